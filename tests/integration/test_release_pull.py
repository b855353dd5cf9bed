"""Pulls over real HTTP: what is safe and whole arrives, anything else leaves nothing at its place.

Run: pytest tests/integration/test_release_pull.py
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http as hub_http
import pytest

from llmga.release.hub import Hub, HubError
from llmga.release.kinds import ReleaseError
from llmga.release.listing import write_listing
from llmga.release.pull import Pulled, pull
from tests.hub_server import Blob, Fault, HubServer, hub_server

TOKEN = "hf_secretSecretSECRET0123456789abcd"
REPO = "me/model"
FILES = {
    "README.md": b"# A model\n",
    "config.json": b'{"scale": 1}\n',
    "model.safetensors": bytes(range(256)) * 3000,
    "unet/config.json": b'{"in_channels": 4}\n',
}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Online, without waiting for real."""
    waited: list[float] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    source = tmp_path / "source"
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    write_listing(source, "restorer")
    with hub_server({TOKEN: "me"}) as started:
        started.make(REPO, files={**FILES, "release.json": (source / "release.json").read_bytes()})
        yield started


def pulled(server: HubServer, folder: Path, token: str | None = TOKEN, revision: str | None = None) -> Pulled:
    return pull(Hub(REPO, token, server.url, pause=lambda seconds: None), folder, revision)


def refused(server: HubServer, folder: Path, kind: type[Exception], token: str | None = TOKEN) -> str:
    with pytest.raises(kind) as caught:
        pulled(server, folder, token)
    assert not folder.exists() and TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_release_arrives_byte_for_byte(server: HubServer, tmp_path: Path) -> None:
    result = pulled(server, tmp_path / "there")
    found = {path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*")}
    assert found == {*FILES, "release.json", ".gitattributes", "unet"}
    assert all((tmp_path / "there" / name).read_bytes() == content for name, content in FILES.items())
    assert (result.files, result.listed) == (len(FILES) + 2, len(FILES)) and result.commit in str(result)
    assert server.tokens_elsewhere == [] and not list(tmp_path.glob(".*"))


def test_a_revision_is_what_it_was_then(server: HubServer, tmp_path: Path) -> None:
    repo = server.repos[REPO]
    first = repo.commits[-1][0]
    repo.commit({"config.json": Blob(b'{"scale": 4}\n', False)})
    pulled(server, tmp_path / "then", revision=first)
    pulled(server, tmp_path / "now")
    assert (tmp_path / "then/config.json").read_bytes() == FILES["config.json"]
    assert {path.name for path in (tmp_path / "now").iterdir()} == {"config.json"}
    with pytest.raises(HubError, match="no such revision"):
        pulled(server, tmp_path / "never", revision="v7")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pytorch_model.bin", b"x", "pytorch_model.bin is a pickle or may hold one"),
        ("vae/weights.ckpt", b"x", "vae/weights.ckpt is a pickle"),
        ("modeling.py", b"print()", "modeling.py is code"),
        ("../outside.json", b"{}", "leads out of the folder"),
        ("weights.dat", b"\x80\x04\x95", "weights.dat is a pickle or an archive under another name"),
        ("notes.txt", b"PK\x03\x04...", "notes.txt is a pickle or an archive"),
        ("generation_config.json", b'{"auto_map": {"AutoModel": "m.M"}}', "auto_map asks for code"),
        ("model_index.json", b'{"unet": ["my_unet", "UNet"]}', "unet is .*my_unet.*, code from outside"),
        ("model_index.json", b'{"_class_name": ["pipeline", "P"]}', "code from outside"),
    ],
)
def test_what_could_run_code_is_refused(
    server: HubServer, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    repo = server.repos[REPO]
    repo.commit({**repo.commits[-1][1], name: Blob(content, False)})
    sentence = refused(server, tmp_path / "there", ReleaseError)
    assert re.search(said, sentence), sentence
    assert server.asked("GET", ".*/resolve/.*safetensors") == 0 or name in ("weights.dat", "notes.txt")


def test_an_interrupted_pull_fetches_only_what_is_missing(server: HubServer, tmp_path: Path) -> None:
    large = server.repos[REPO].commits[-1][1]["model.safetensors"].sha256
    server.faults = [Fault("GET", f"/large/{large}", 403, times=9)]
    refused(server, tmp_path / "there", HubError)
    server.faults, server.requests = [], []
    pulled(server, tmp_path / "there")
    assert server.asked("GET", ".*config.json") == 0 and server.asked("GET", "/large/") == 1
    assert (tmp_path / "there/model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "/api/models/me/model/revision", 500),
        Fault("GET", "/api/models/me/model", 503),
        Fault("GET", ".*/tree/", 429, headers={"Retry-After": "2"}),
        Fault("HEAD", ".*/resolve/.*/config.json", 500),
        Fault("GET", "/large/", 500),
        Fault("GET", "/large/", None),
    ],
    ids=lambda fault: f"{fault.method} {fault.path} {fault.status}",
)
def test_what_passes_is_tried_again(server: HubServer, tmp_path: Path, fault: Fault) -> None:
    server.faults = [fault]
    pulled(server, tmp_path / "there")
    assert (tmp_path / "there/model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_another_content_than_listed_is_not_taken(server: HubServer, tmp_path: Path) -> None:
    repo = server.repos[REPO]
    files = dict(repo.commits[-1][1])
    listing = json.loads(files["release.json"].content)
    listing["files"]["config.json"]["sha256"] = "0" * 64
    repo.commit({**files, "release.json": Blob(json.dumps(listing).encode(), False)})
    assert "config.json is not what release.json says" in refused(server, tmp_path / "there", ReleaseError)


def test_large_content_that_was_changed_on_the_way_is_not_taken(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = server.RequestHandlerClass
    honest = handler.large  # type: ignore[attr-defined]

    def flipped(self: object, body: bytes, oid: str) -> tuple[int, bytes, dict[str, str]]:
        status, content, headers = honest(self, body, oid)
        return status, content[:-1] + b"?", headers

    monkeypatch.setattr(handler, "large", flipped)
    assert "model.safetensors arrived with another hash" in refused(server, tmp_path / "there", HubError)


def test_what_nobody_may_see_and_places_that_are_taken(server: HubServer, tmp_path: Path) -> None:
    assert "no repository me/model that can be seen without HF_TOKEN" in refused(
        server, tmp_path / "there", HubError, token=None
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(ReleaseError, match="exists already and is not empty"):
        pulled(server, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]
