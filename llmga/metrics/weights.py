"""Weights of the networks that metrics look through: found where their libraries keep them, never fetched, and hashed.

Nothing is downloaded behind anybody's back, and no network stays random: what is missing is one error that says what to
fetch and where it goes.
"""

import os
import re
from collections.abc import Sequence
from hashlib import file_digest
from pathlib import Path

from llmga.metrics.features import MetricError

_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})$")  # how torch.hub's files say what they hold


class MissingWeights(MetricError):
    """The weights of an extractor are not on this machine; the message says what to do."""


def find_weights(name: str, given: Path | None, places: Sequence[Path], fetch: str) -> Path:
    """The file with an extractor's weights.

    Args:
        name: of the extractor.
        given: a file of the user's own, which is then the only place.
        places: where its library keeps it, the first that exists counts.
        fetch: a command that puts it there.
    Raises:
        MissingWeights: there is no such file.
    """
    if given is not None:
        if not given.is_file():
            raise MissingWeights(f"weights of {name}: {given} is not a file; expected the path of its weights")
        return given
    for place in places:
        if place.is_file():
            return place
    shown = " or ".join(map(str, places))
    raise MissingWeights(
        f"the weights of {name} are missing; expected them at {shown}. Where there is a network, run: {fetch} ; to a "
        "machine without one, copy the file and give its path as the weights"
    )


def weight_hash(path: Path) -> str:
    """SHA-256 of a file of weights, 64 hexadecimal digits.

    Raises:
        MetricError: the file's name carries another hash, as torch.hub writes them; the download broke off.
    """
    with path.open("rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    named = _NAMED_HASH.search(path.stem)
    if named and not found.startswith(named[1]):
        raise MetricError(
            f"{path} should begin its SHA-256 with {named[1]}, as its name says, but has {found[:8]}; the download is "
            "damaged or cut short: delete the file and fetch it again"
        )
    return found


def torch_cache() -> Path:
    """Where torch keeps downloaded weights: $TORCH_HOME, or torch in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("TORCH_HOME")
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(home) if home else shared / "torch") / "hub" / "checkpoints"


def hub_file(repository: str, names: Sequence[str]) -> Path:
    """The first of `names` in the Hugging Face cache, of the newest snapshot; where none is, where one would be."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots" / "*" / names[0]
