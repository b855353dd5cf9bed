"""Pushes over real HTTP, with what goes wrong on the way: one commit or none, nothing twice, the token nowhere.

Run: pytest tests/integration/test_release_push.py
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http as hub_http
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from llmga.release.hub import Hub, HubError, discreet, is_transient, read_token, redacted
from llmga.release.kinds import ReleaseError
from llmga.release.listing import write_listing
from llmga.release.push import Pushed, push
from tests.hub_server import Blob, Fault, HubServer, hub_server

TOKEN = "hf_secretSecretSECRET0123456789abcd"
REPO = "me/model"
FILES = {
    "README.md": b"# A model\n",
    "config.json": b'{"scale": 1}\n',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 300,
    "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 400,
}
LARGE = [name for name in FILES if name.endswith(".safetensors")]
COMMIT = "/api/models/me/model/commit/main"


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the server speaks plain HTTP
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the library wanted to wait; nobody does."""
    waited: list[float] = []
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub_server({TOKEN: "me"}) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_release(tmp_path / "release", FILES)


def make_release(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_listing(folder, "restorer")
    return folder


def hub(server: HubServer, waits: list[float], token: str = TOKEN) -> Hub:
    return Hub(REPO, token, server.url, pause=waits.append)


def pushed(server: HubServer, waits: list[float], folder: Path, **options: bool) -> Pushed:
    with discreet(TOKEN):
        return push(hub(server, waits), folder, **options)


def refused(server: HubServer, waits: list[float], folder: Path, kind: type[Exception] = HubError) -> str:
    """The one sentence that a push ends with; it never holds the token."""
    with pytest.raises(kind) as caught:
        pushed(server, waits, folder)
    sentence = str(caught.value)
    assert TOKEN not in sentence and "\n" not in sentence and "signature" not in sentence
    return sentence


def content(server: HubServer) -> dict[str, bytes]:
    files = server.repos[REPO].files()
    assert files is not None
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


def test_a_new_repository_is_private_and_whole_after_one_commit(
    server: HubServer, folder: Path, waits: list[float]
) -> None:
    result = pushed(server, waits, folder)
    repo = server.repos[REPO]
    assert repo.private and result.made and len(repo.commits) == 2  # the Hub's own first, then ours
    assert content(server) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert result.commit == repo.commits[-1][0] and sorted(result.changed) == sorted(content(server))
    assert server.asked("PUT", "/large/") == 2 and server.tokens_elsewhere == [] and waits == []


def test_the_same_release_again_changes_nothing(server: HubServer, folder: Path, waits: list[float]) -> None:
    first = pushed(server, waits, folder)
    again = pushed(server, waits, folder)
    assert (again.commit, again.changed, again.made) == (first.commit, [], False)
    assert "already" in str(again) and server.asked("PUT", "/large/") == 2 and len(server.repos[REPO].commits) == 2


def test_an_update_sends_what_changed_and_removes_what_its_predecessor_had(
    server: HubServer, tmp_path: Path, folder: Path, waits: list[float]
) -> None:
    pushed(server, waits, folder)
    repo = server.repos[REPO]
    repo.commit({**repo.commits[-1][1], "NOTES.md": repo.commits[-1][1]["README.md"]})  # a person's, on the web page
    files = {name: data for name, data in FILES.items() if name != LARGE[1]} | {"config.json": b'{"scale": 2}\n'}
    result = pushed(server, waits, make_release(tmp_path / "next", files))
    assert sorted(result.changed) == ["config.json", "release.json"] and result.removed == [LARGE[1]]
    assert content(server).keys() == files.keys() | {"NOTES.md", "release.json"}
    assert server.asked("PUT", "/large/") == 2


def test_uploads_in_parts(server: HubServer, folder: Path, waits: list[float]) -> None:
    server.part_bytes = 30_000
    pushed(server, waits, folder)
    assert server.asked("PUT", "/large/.*/part/") == 3 + 4
    assert content(server)[LARGE[0]] == FILES[LARGE[0]] and content(server)[LARGE[1]] == FILES[LARGE[1]]


@pytest.mark.parametrize(
    ("fault", "expected_wait"),
    [
        (Fault("GET", "/api/whoami", 429, headers={"Retry-After": "7"}), 7),
        (Fault("GET", "/api/models/me/model", 503), 1),
        (Fault("POST", "/api/repos/create", 500), 1),
        (Fault("POST", "/api/validate-yaml", 502), 1),
        (Fault("POST", ".*/preupload/", 429, headers={"Retry-After": "3"}), 4),  # the library adds one
        (Fault("POST", ".*/objects/batch", 500), 1),
        (Fault("PUT", "/large/", 500), 1),
        (Fault("PUT", "/large/", None), 1),
        (Fault("POST", COMMIT, 500), 1),
        (Fault("POST", COMMIT, 429, headers={"Retry-After": "9"}), 9),
        (Fault("POST", COMMIT, None), 1),
        (Fault("POST", COMMIT, None, served=True), 1),  # made, and the answer lost
    ],
    ids=lambda value: f"{value.method} {value.path} {value.status}" if isinstance(value, Fault) else "",
)
def test_what_passes_is_tried_again(
    server: HubServer, folder: Path, waits: list[float], fault: Fault, expected_wait: float
) -> None:
    server.faults = [fault]
    result = pushed(server, waits, folder)
    assert fault.times == 0 and waits == [expected_wait]
    assert content(server).keys() == {*FILES, "release.json"} and len(server.repos[REPO].commits) == 2
    assert result.commit == server.repos[REPO].commits[-1][0]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("GET", "/api/whoami", 401, 9), "does not accept the token in HF_TOKEN (401)"),
        (Fault("POST", "/api/repos/create", 403, 9), "the token may not do that (403"),
        (Fault("POST", ".*/preupload/", 403, 9), "write access to me's repositories"),
        (Fault("PUT", "/large/", 403, 9), "the token may not do that (403"),
        (Fault("POST", COMMIT, 409, 9), "was changed by someone else meanwhile (409"),
        (Fault("POST", COMMIT, 403, 9), "the token may not do that (403"),
        (Fault("POST", COMMIT, 429, 99), "too many requests"),
        (Fault("POST", COMMIT, 500, 99), "the Hub has a fault of its own (500"),
        (Fault("PUT", "/large/", None, 99), "the connection to"),
        (Fault("GET", "/api/whoami", 429, 9, {"Retry-After": "4000"}), "run this again in 4000 s"),
    ],
    ids=lambda value: f"{value.method} {value.path} {value.status}" if isinstance(value, Fault) else "",
)
def test_what_does_not_pass_is_one_sentence_and_nothing_is_published(
    server: HubServer, folder: Path, waits: list[float], fault: Fault, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.make(REPO) if "create" not in fault.path else None
    server.faults = [fault]
    assert said in refused(server, waits, folder)
    assert all(len(repo.commits) == 1 for repo in server.repos.values())  # what the Hub itself made
    assert TOKEN not in caplog.text


def test_an_interrupted_push_goes_on_with_what_is_missing(server: HubServer, folder: Path, waits: list[float]) -> None:
    second = json.loads((folder / "release.json").read_text())["files"][LARGE[1]]["sha256"]
    server.faults = [Fault("PUT", f"/large/{second}", None, times=99)]
    refused(server, waits, folder)
    assert len(server.stored) == 1 and content(server) == {}
    server.faults, server.requests = [], []
    pushed(server, waits, folder)
    assert server.asked("PUT", "/large/") == server.asked("PUT", f"/large/{second}") == 1
    assert content(server)[LARGE[1]] == FILES[LARGE[1]]


def test_an_upload_over_xet_that_fails_is_a_sentence_too(
    server: HubServer, folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")  # huggingface_hub takes it where it is installed; this server does not speak it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    assert "cannot upload" in refused(server, waits, folder)
    assert server.asked("GET", ".*/xet-write-token/") > 0 and content(server) == {}


def test_someone_elses_commit_in_between_is_not_overwritten(
    server: HubServer, folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.make(REPO)
    theirs = {**repo.commits[-1][1], "README.md": Blob(b"theirs", False)}
    server.faults = [Fault("POST", ".*/objects/batch", 500)]
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=lambda seconds: repo.commit(theirs)))  # meanwhile
    assert "changed by someone else" in refused(server, waits, folder)
    assert content(server) == {"README.md": b"theirs"}


def test_a_public_repository_takes_no_private_release(server: HubServer, folder: Path, waits: list[float]) -> None:
    server.make(REPO, private=False)
    assert "everybody can see it" in refused(server, waits, folder, ReleaseError)
    assert content(server) == {}
    pushed(server, waits, folder, private=False)
    assert content(server).keys() == {*FILES, "release.json"}


def test_files_of_others_stay_unless_told_otherwise(server: HubServer, folder: Path, waits: list[float]) -> None:
    server.make(REPO, files={"pytorch_model.bin": b"old", "README.md": b"old"})
    assert "holds 1 files that no release has put there, first pytorch_model.bin" in refused(
        server, waits, folder, ReleaseError
    )
    assert pushed(server, waits, folder, replace=True).removed == ["pytorch_model.bin"]
    assert content(server).keys() == {*FILES, "release.json"}


def test_a_folder_that_changed_after_the_export_is_refused(server: HubServer, folder: Path, waits: list[float]) -> None:
    (folder / "config.json").write_bytes(b'{"scale": 4}\n')
    assert "config.json is not what release.json says" in refused(server, waits, folder, ReleaseError)
    assert server.requests == []


def test_nobody_at_the_address(folder: Path, waits: list[float]) -> None:
    with hub_server({}) as gone:
        address = gone.url
    with pytest.raises(HubError, match=r"the connection to http://127.0.0.1:\d+ was lost or never made"):
        push(Hub(REPO, TOKEN, address, pause=waits.append), folder)
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize("value", ["", "  ", "hf_with space", "hf_ü", "x\ny"])
def test_a_token_that_is_none_is_refused_and_not_repeated(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", value)
    with pytest.raises(ReleaseError, match="HF_TOKEN") as caught:
        read_token(needed=True)
    assert not value.strip() or value not in str(caught.value)


def test_logs_of_the_libraries_lose_token_and_signatures(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("huggingface_hub")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    library.addHandler(handler)
    try:
        with discreet(TOKEN):
            library.warning("PUT %s with %s", "https://lies.here/large/ab?signature=secret", TOKEN)
    finally:
        library.removeHandler(handler)
    assert lines == ["PUT https://lies.here/large/ab with (token)"]


def test_only_what_can_pass_is_transient() -> None:
    assert is_transient(ConnectionResetError()) and is_transient(json.JSONDecodeError("", "", 0))
    assert not is_transient(ValueError("no")) and not is_transient(OfflineModeIsEnabled("HF_HUB_OFFLINE"))
    assert redacted("see https://a.b/c?d=e and hf_x", "hf_x") == "see https://a.b/c and (token)"
