"""Guards recording: rows to prompts through a real server or a model, nothing lost, nothing done twice.

Run: pytest tests/integration/test_record.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmga.config import ConfigError, load_config
from llmga.quarantine import read_quarantine
from llmga.records import Record, open_manifest, write_manifest
from llmga.runtime import Ranks
from llmga.stage1.record.config import RecordConfig
from llmga.stage1.record.endpoint import EndpointError
from llmga.stage1.record.merge import merge_parts
from llmga.stage1.record.parts import PartsError, PartWriter, parts_folder, read_lines
from llmga.stage1.record.questions import read_reply
from llmga.stage1.record.run import RecordingError, record_prompts, reply_seed
from llmga.stage1.sources import Source
from tests.chat_server import ChatServer, asked_text, chat_server, shown_picture

REPOSITORY = Path(__file__).parents[2]
KEY = "sk-never-shown"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Nine rows: descriptions, refinements, holes, an edit, and a chat that asks for no picture."""
    colours = [(10 * number, 200, 30) for number in range(4)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (24, 16), colour).save(tmp_path / f"{number}.png")
    rows = [Record(f"see-{n}", "similar_image", image=f"{n}.png", caption="old") for n in range(4)]
    rows += [Record(f"refine-{n}", "prompt_refinement", short_caption=f"a boat {n}") for n in range(2)]
    rows.append(Record("hole", "outpainting", image="1.png"))
    rows.append(Record("edit", "editing", image="2.png", instruction="make it blue", meta={"kept": 1}))
    rows.append(
        Record("chat", "qa", messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}))
    )
    write_manifest(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def settings(manifest: Path, server: ChatServer | None = None, **changes: Any) -> RecordConfig:
    """Recording settings with small pictures and short waits."""
    values = {
        "source.path": manifest, "out": manifest.with_name("out.jsonl"), "picture_size": 32, "batch_size": 4,
        "endpoint.url": server.url if server else "http://127.0.0.1:9/v1", "endpoint.model": "llmga",
        "endpoint.backoff_s": 0.01, "endpoint.retries": 2, "endpoint.key_env": "LLMGA_TEST_KEY", **changes,
    }  # fmt: skip
    return load_config(RecordConfig, None, [f"{key}={value}" for key, value in values.items()])


def tagged(body: dict[str, Any], number: int = 0) -> str:
    """A proper reply that repeats the question."""
    return f"Sure.\n<gen_img> {asked_text(body)} {body['seed']} </gen_img>"


def test_every_row_that_asks_for_a_picture_gets_its_prompt_with_provenance(manifest: Path) -> None:
    with chat_server(tagged, delay_s=0.2) as server:
        merged = record_prompts(settings(manifest, server), Ranks())
    assert merged is not None and (merged.num_prompts, merged.rejected) == (8, {})
    records = list(open_manifest(merged.out))
    assert [record.id for record in records] == [
        *(f"see-{n}" for n in range(4)),
        "refine-0",
        "refine-1",
        "hole",
        "edit",
    ]
    assert 2 <= server.most_at_once <= 4 and len(server.requests) == 8
    for record in records:
        told = record.meta["recorded"]
        assert record.prompt == f"{told['instruction']} {told['seed']}" and told["tokens"] > 3
        assert told["seed"] == reply_seed(0, record.id, 0)
        assert {
            "engine": "endpoint",
            "model": "llmga",
            "temperature": 0.2,
            "top_p": 1.0,
            "attempt": 0,
        }.items() <= told.items()
        assert ("picture" in told) == (record.image is not None)
    assert records[7].meta["kept"] == 1 and records[0].caption == "old" and "a boat 1" in records[5].prompt
    assert records[6].meta["recorded"]["mask"]["kind"] == "outpainting"
    assert json.loads((manifest.with_name("out.report.json")).read_text())["chunks"] == {"1": 8}


def test_the_model_is_shown_the_picture_with_its_hole_black(manifest: Path) -> None:
    with chat_server(tagged) as server:
        record_prompts(settings(manifest, server), Ranks())
    by_text = {asked_text(body): shown_picture(body) for body in server.requests}
    assert sum(picture is None for picture in by_text.values()) == 2  # the refinements
    black = [np.asarray(p).reshape(-1, 3).sum(1).min() == 0 for p in by_text.values() if p is not None]
    assert sum(black) == 1 and all(p.size == (32, 32) for p in by_text.values() if p is not None)


def test_malformed_replies_are_drawn_again_hotter_then_quarantined_with_their_reason(manifest: Path) -> None:
    bad = {"a boat 0": "no tags at all", "a boat 1": "<gen_img> never closed"}

    def answer(body: dict[str, Any], number: int) -> str:
        text = asked_text(body)
        if "make it blue" in text and body["temperature"] < 0.5:
            return "<gen_img> one </gen_img> and <gen_img> two </gen_img>"
        return next((reply for caption, reply in bad.items() if caption in text), tagged(body))

    with chat_server(answer) as server:
        cfg = settings(manifest, server)
        merged = record_prompts(cfg, Ranks())
    assert merged is not None and merged.rejected == {"no_prompt": 1, "unbalanced_tags": 1}
    [edit] = [record for record in open_manifest(merged.out) if record.id == "edit"]
    assert (edit.meta["recorded"]["attempt"], edit.meta["recorded"]["temperature"]) == (1, 0.7)
    assert merged.quarantine is not None and read_quarantine(merged.quarantine, manifest) == [4, 5]
    lost = {line["id"]: line for line in read_lines(parts_folder(cfg.out)) if "rejected" in line}
    assert lost["refine-1"]["replies"] == ["<gen_img> never closed"] * 3
    seeds = [body["seed"] for body in server.requests if "a boat 0" in asked_text(body)]
    assert len(set(seeds)) == 3 and "2 rows without a prompt" in str(merged)


def test_pictures_that_cannot_be_read_are_quarantined_and_the_rest_is_recorded(manifest: Path) -> None:
    (manifest.parent / "2.png").write_bytes(b"no picture")
    with chat_server(tagged) as server:
        merged = record_prompts(settings(manifest, server), Ranks())
    assert merged is not None and merged.rejected == {"not_a_picture": 2} and merged.num_prompts == 6


def test_a_busy_server_is_waited_for_and_its_nonsense_asked_again(manifest: Path) -> None:
    faults: dict[int, Any] = {0: 503, 1: 429, 2: b"<html>", 3: 500}
    with chat_server(lambda body, number: faults.get(number, tagged(body))) as server:
        merged = record_prompts(settings(manifest, server, **{"endpoint.retries": 5}), Ranks())
    assert merged is not None and merged.num_prompts == 8 and len(server.requests) == 12


def test_a_prompt_that_the_server_refuses_costs_only_its_row(manifest: Path) -> None:
    with chat_server(lambda body, number: 400 if "a boat 1" in asked_text(body) else tagged(body)) as server:
        merged = record_prompts(settings(manifest, server), Ranks())
    assert merged is not None and merged.rejected == {"refused": 1} and merged.num_prompts == 7


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (401, r"refuses access \(401\); \$LLMGA_TEST_KEY holds a key that it does not accept"),
        (404, r"answers status 404: .*check endpoint\.url and endpoint\.model"),
        (400, "refuses all of 4 prompts; the first: status 400"),
        (503, r"cannot be used, tried 3 times \(endpoint\.retries\): status 503"),
        (b"{}", "is no chat completion: {}"),
    ],
)
def test_a_server_that_cannot_be_used_stops_with_one_sentence_without_the_key(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: Any, message: str
) -> None:
    monkeypatch.setenv("LLMGA_TEST_KEY", KEY)
    with chat_server(lambda body, number: answer) as server, pytest.raises(EndpointError, match=message) as raised:
        record_prompts(settings(manifest, server), Ranks())
    assert set(server.authorizations) == {f"Bearer {KEY}"}
    everything = (
        str(raised.value)
        + caplog.text
        + "".join(p.read_text() for p in parts_folder(manifest.with_name("out.jsonl")).iterdir())
    )
    assert KEY not in everything


def test_a_server_that_is_not_there_is_named(manifest: Path) -> None:
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:9/v1/chat/completions cannot be used.*refused"):
        record_prompts(settings(manifest), Ranks())


def test_any_processes_may_share_the_work_and_a_rerun_asks_nothing_twice(manifest: Path) -> None:
    with chat_server(tagged) as server:
        cfg = settings(manifest, server, batch_size=1)
        assert record_prompts(cfg, Ranks(rank=1, world_size=3)) is None
        assert len(server.requests) == 3
        with pytest.raises(PartsError, match=r"5 of 8 rows are not recorded yet, the first is .*rows\.jsonl:1"):
            merge_parts(cfg, Source(cfg.source))
        assert record_prompts(cfg, Ranks(rank=0, world_size=2)) is None  # another number of processes
        merged = record_prompts(cfg, Ranks(rank=1, world_size=2))
        assert merged is not None and len(server.requests) == 8
        alone = record_prompts(settings(manifest, server, out=manifest.with_name("alone.jsonl")), Ranks())
    assert alone is not None
    assert [r.prompt for r in open_manifest(merged.out)] == [r.prompt for r in open_manifest(alone.out)]


def test_a_torn_line_is_recorded_again(manifest: Path) -> None:
    with chat_server(tagged) as server:
        cfg = settings(manifest, server)
        record_prompts(cfg, Ranks())
        [part] = parts_folder(cfg.out).glob("part-*.jsonl")
        whole = part.read_bytes()
        part.write_bytes(whole[:-20])
        merged = record_prompts(cfg, Ranks())
        assert merged is not None and part.read_bytes() == whole and len(server.requests) == 9
        part.write_bytes(b"{]\n" + whole)
        with pytest.raises(PartsError, match=r"part-00000-of-00001\.jsonl:1 is damaged"):
            record_prompts(cfg, Ranks())


def test_other_settings_do_not_mix(manifest: Path) -> None:
    with chat_server(tagged) as server:
        record_prompts(settings(manifest, server), Ranks())
        with pytest.raises(PartsError, match=r"recorded with other settings: temperature \(0\.2 there, 0\.9 now\)"):
            record_prompts(settings(manifest, server, **{"sampling.temperature": 0.9}), Ranks())


def test_one_part_has_one_writer(tmp_path: Path) -> None:
    with PartWriter(tmp_path, 0, 1), pytest.raises(PartsError, match="is being written by another process"):
        PartWriter(tmp_path, 0, 1)


def test_rows_that_ask_for_nothing_and_rows_that_lack_something(manifest: Path) -> None:
    write_manifest(manifest, [Record("b", "similar_image")])
    with chat_server(tagged) as server, pytest.raises(PartsError, match=r"not one row of .* has a prompt"):
        record_prompts(settings(manifest, server), Ranks())
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    write_manifest(manifest, [Record("c", "qa", messages=chat)])
    with pytest.raises(RecordingError, match=r"no row of .*rows\.jsonl asks for a picture; set task"):
        record_prompts(settings(manifest, out=manifest.with_name("b.jsonl")), Ranks())


def test_every_picture_can_be_described_whatever_the_rows_task(manifest: Path) -> None:
    with chat_server(tagged) as server:
        merged = record_prompts(
            settings(manifest, server, task="similar_image", **{"source.tasks": "[editing]"}), Ranks()
        )
    assert merged is not None and [record.task for record in open_manifest(merged.out)] == ["editing"]
    assert "make it blue" not in asked_text(server.requests[0])


@pytest.mark.parametrize(
    ("reply", "prompt", "reason"),
    [
        ("<gen_image> a cat </gen_image>", "a cat", ""),
        ("", None, "empty_reply"),
        ("a cat", None, "no_prompt"),
        ("<gen_img> a cat </gen_image>", None, "unbalanced_tags"),
        ("<gen_img> </gen_img>", None, "unbalanced_tags"),
        ("<gen_img> a </gen_img> <gen_img> b </gen_img>", None, "several_prompts"),
    ],
)
def test_replies(manifest: Path, reply: str, prompt: str | None, reason: str) -> None:
    assert read_reply(reply, settings(manifest)) == (prompt, reason)


def test_a_model_of_ours_answers_the_same_whatever_the_batch(manifest: Path, tmp_path: Path) -> None:
    from tests.toy import toy_mllm_folder

    folder = toy_mllm_folder(tmp_path / "mllm")
    told = {}
    for batch_size in (1, 5):
        values = {
            "source.path": manifest, "model": folder, "out": tmp_path / f"{batch_size}.jsonl", "reply": "plain",
            "picture_size": 32, "batch_size": batch_size, "precision": "fp32", "sampling.temperature": 1.0,
            "sampling.max_new_tokens": 12, "sampling.attempts": 9,
        }  # fmt: skip
        cfg = load_config(RecordConfig, None, [f"{key}={value}" for key, value in values.items()])
        merged = record_prompts(cfg, Ranks())
        assert merged is not None
        told[batch_size] = {record.id: (record.prompt, record.meta["recorded"]) for record in open_manifest(merged.out)}
    assert told[1] == told[5] and len({prompt for prompt, _ in told[1].values()}) > 5
    assert all(len(recorded["model_hash"]) == 16 for _, recorded in told[1].values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=a.jsonl", "source.path=absent.jsonl", "model=m"], r"absent\.jsonl does not exist"),
        (["out=a.txt"], r"found a\.txt, expected a name that ends in \.jsonl or \.parquet"),
        ([], "found neither, expected one of the two: the folder of an MLLM, or a server"),
        (["endpoint.url=localhost", "endpoint.model=m"], "found localhost, expected the address of a server"),
        (["sampling.temprature=1"], "temperature"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RecordConfig, None, ["source.path=README.md", *overrides])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/record").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    cfg = load_config(RecordConfig, path, check_machine=False)
    assert cfg.out.suffix == ".jsonl" and path.name.split("_")[0].removesuffix(".yaml") in ("toy", "photos")
