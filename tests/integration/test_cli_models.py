"""Commands that load a model or start worker processes: what they print, and their exit codes.

Run: pytest tests/integration/test_cli_models.py
"""

import json
from pathlib import Path

from PIL import Image

from llmga.config import EXIT_BAD_INPUT, EXIT_OK
from llmga.stage1.conversation import Turn
from llmga.stage1.model import load_mllm
from llmga.stage1.reply import Prompt, generate_replies
from tests.toy import toy_mllm_folder
from tests.unit.test_cli import TOY, run


def test_ask_prints_the_reply_and_nothing_else(tmp_path: Path) -> None:
    folder = toy_mllm_folder(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "picture_size": 40, "picture_mode": "crop"}))
    picture = Image.new("RGB", (48, 32), "red")
    picture.save(tmp_path / "red.png")
    options = ["--model", str(folder), "--max-new-tokens", "6"]
    for name, prompt in [
        (str(tmp_path / "red.png"), Prompt([Turn("user", "What is this?", has_picture=True)], picture)),
        ("-", Prompt([Turn("user", "What is this?")])),
    ]:
        shape = {"picture_size": 40, "picture_mode": "crop"}  # what `ask` must find in the folder
        [reply] = generate_replies(load_mllm(folder), [prompt], max_new_tokens=6, **shape)
        assert run("ask", name, "What is this?", *options)[:2] == (EXIT_OK, reply + "\n")


def test_an_error_in_a_loading_worker_is_one_sentence_too(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "task": "vqa", "image": 7}\n', encoding="utf-8")
    code, _, err = run(
        "stage1",
        TOY,
        f"data.sources=[{{path: {rows}}}]",
        "data.validation=[]",
        "run.eval_every_steps=0",
        "run.sample_every_steps=0",
        f"run.output_dir={tmp_path / 'run'}",
        "run.num_workers=1",
    )
    assert code == EXIT_BAD_INPUT
    assert "Traceback" not in err and "rows.jsonl" in err
