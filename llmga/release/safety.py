"""What never goes into a release nor comes out of one: pickles, which run code when they are read, and code itself."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from llmga.release.kinds import ReleaseError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".distcp")
_CODE = (".py", ".pyc", ".so", ".dll", ".exe", ".sh", ".ipynb")
_PICKLE_HEADS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_ZIP_HEAD = b"PK\x03\x04"  # torch.save writes a zip around its pickle
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # that a pipeline's parts may come from


def refuse_names(names: Iterable[str], where: str) -> None:
    """Raise for a file that runs code when it is read, or that would land outside its folder, by name alone.

    Args:
        where: the folder or repository, for the message.
    Raises:
        ReleaseError: with the file's name.
    """
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ReleaseError(f"{where}: the file name {name!r} leads out of the folder; refused")
        if path.suffix.lower() in _PICKLES:
            raise ReleaseError(
                f"{where}: {name} is a pickle or may hold one, and reading it can run code; only safetensors are "
                f"released and pulled. {_way_out(path)}"
            )
        if path.suffix.lower() in _CODE:
            raise ReleaseError(f"{where}: {name} is code; releases hold none and pulls take none")


def refuse_contents(folder: Path) -> None:
    """Raise for files of a folder that are pickles under another name, or settings that ask for remote code.

    Raises:
        ReleaseError: with the file's name.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(4)
        if head[:2] in _PICKLE_HEADS or head == _ZIP_HEAD:
            raise ReleaseError(f"{path} is a pickle or an archive under another name, and reading it can run code")
        if path.suffix == ".json" and path.name not in ("tokenizer.json", "vocab.json"):
            refuse_remote_code(path)


def refuse_remote_code(path: Path) -> None:
    """Raise when a JSON file of settings would have a library run code from a repository.

    Raises:
        ReleaseError: it does, or it is damaged.
    """
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ReleaseError(f"{path} is no JSON ({error}); save or download it again") from None
    if not isinstance(settings, dict):
        return
    if "auto_map" in settings:
        raise ReleaseError(f"{path}: auto_map asks for code from a repository ({settings['auto_map']}); refused")
    if path.name == "model_index.json":
        foreign = [name for name, part in settings.items() if _is_foreign(name, part)]
        if foreign:
            raise ReleaseError(
                f"{path}: {foreign[0]} is {settings[foreign[0]]}, code from outside diffusers and transformers; refused"
            )


def _is_foreign(name: str, part: Any) -> bool:
    if name == "_class_name":
        return not isinstance(part, str)
    return not name.startswith("_") and isinstance(part, list) and bool(part) and part[0] not in _LIBRARIES


def _way_out(path: PurePosixPath) -> str:
    if path.stem in ("optimizer", "scheduler", "training_args", "random_states_0") or path.stem.startswith("rng_state"):
        return "That is state of a training run: release its final/ instead of a checkpoint"
    return (
        "Save the weights with save_pretrained, or turn a published checkpoint with `llmga convert`; move the file away"
    )
