"""From a trained folder to somebody else's machine: the commands that people type, over real HTTP.

Run: pytest tests/e2e/test_release.py
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import warm_python
from tests.hub_server import Fault, HubServer, hub_server

REPOSITORY = Path(__file__).parents[2]
TOKEN = "hf_secretSecretSECRET0123456789abcd"
TOY = "configs/release/toy.yaml"
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with hub_server({TOKEN: "me"}) as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))  # the libraries' caches
        yield started


def run(server: HubServer, *arguments: str, token: str | None = TOKEN, cold: bool = False) -> tuple[int, str]:
    """Exit code and all that was printed; the token is in none of it.

    Args:
        cold: in the true interpreter, as the card's own lines always are.
    """
    switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": server.url}
    if "llmga" in arguments:
        switches["HF_DEBUG"] = "1"  # the library then logs every request
    python = warm_python(**switches) if "llmga" in arguments and not cold else sys.executable
    environment = {**os.environ, **switches, "HF_TOKEN": token or "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [python, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert TOKEN not in done.stdout and "signature=" not in done.stdout
    return done.returncode, done.stdout


def loading_code(card: Path) -> str:
    """The lines of the card that load the model."""
    found = re.search(r"## Load it\n\n```python\n(.*?)\n```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None and len(found[1].splitlines()) == 3
    return found[1]


def check_loading(server: HubServer, cfg: str, overrides: list[str], out: Path, test: str, cold: bool = False) -> None:
    """Release, pull, and run the card's own three lines against the repository."""
    code, said = run(server, "-m", "llmga", "release", cfg, *overrides, cold=cold)
    assert code == 0 and "equal bit for bit" in said and "in one commit" in said, said
    repo = next(word.removeprefix("repo=") for word in overrides if word.startswith("repo="))
    code, said = run(server, "-m", "llmga", "pull", repo, "--out", str(out))
    assert code == 0 and "checked by their hashes" in said, said
    code, said = run(server, "-c", loading_code(out / "README.md") + "\n" + test)
    assert code == 0 and "it works" in said, said


def test_a_dry_run_needs_no_token_and_asks_nobody(server: HubServer, tmp_path: Path) -> None:
    overrides = ["repo=me/dry", f"export_dir={tmp_path / 'out'}", "--dry-run"]
    code, said = run(server, "-m", "llmga", "release", TOY, *overrides, token=None)
    assert code == 0 and server.requests == []
    assert re.search(r"[0-9a-f]{64} +7,265,112  model.safetensors\n", said)
    assert "nothing was pushed to me/dry (private if it is made)" in said
    code, said = run(server, "-m", "llmga", "release", TOY, *overrides[:2], token=None)
    assert code == 2 and said.startswith("HF_TOKEN is not set") and server.requests == []


def test_the_toy_mllm_goes_out_and_comes_back(server: HubServer, tmp_path: Path) -> None:
    server.faults = [Fault("PUT", "/large/", None), Fault("POST", ".*/commit/main", 500)]
    test = "assert model.num_parameters() > 3e6 and '<gen_img>' in processor.tokenizer.get_vocab(); print('it works')"
    overrides = ["repo=me/llmga-toy", f"export_dir={tmp_path / 'out'}"]
    check_loading(server, TOY, overrides, tmp_path / "there", test, cold=True)
    assert server.repos["me/llmga-toy"].private and len(server.repos["me/llmga-toy"].commits) == 2
    assert not any(fault.times for fault in server.faults)


def test_a_pipeline_and_a_restorer_go_out_and_come_back(server: HubServer, tmp_path: Path) -> None:
    from tests.toy import toy_restorer
    from tests.toy_diffusion import toy_sd_pipeline

    toy_sd_pipeline().save_pretrained(tmp_path / "pipeline")
    toy_restorer(phase="diffusion").save_pretrained(tmp_path / "restorer")
    base = "{id: stable-diffusion-v1-5/stable-diffusion-v1-5}"
    (tmp_path / "p.yaml").write_text(
        f"folder: {tmp_path}/pipeline\nlicence: creativeml-openrail-m\nbase_model: {base}\ndata: []\nshard_gb: 0.0001\n"
    )
    (tmp_path / "r.yaml").write_text(
        f"folder: {tmp_path}/restorer\nlicence: apache-2.0\nfrom_scratch: true\ndata: []\n"
    )
    check_loading(
        server,
        str(tmp_path / "p.yaml"),
        ["repo=me/painter", f"export_dir={tmp_path / 'p'}"],
        tmp_path / "painter",
        "assert picture.size == (16, 16); print('it works')",
    )
    check_loading(
        server,
        str(tmp_path / "r.yaml"),
        ["repo=me/restorer", f"export_dir={tmp_path / 'r'}"],
        tmp_path / "there",
        "assert model.phase == 'diffusion'; print('it works')",
    )


def test_a_refused_token_is_one_sentence_and_exit_code_1(server: HubServer, tmp_path: Path) -> None:
    server.faults = [Fault("GET", "/api/whoami", 401, 1)]
    overrides = ["repo=me/late", f"export_dir={tmp_path / 'out'}"]
    code, said = run(server, "-m", "llmga", "release", TOY, *overrides)
    assert code == 1 and said.splitlines()[-1].startswith(
        "cannot ask who the token belongs to: the Hub does not accept"
    )
    assert "me/late" not in server.repos
    assert "llmga/cli.py" not in said  # the Hub's library, told to be wordy, shows a trace of its own
