"""What of a model's folder is released, and how its text files lose what belongs to this machine."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from llmga.provenance import FILE as PROVENANCE
from llmga.release.kinds import Kind, ReleaseError, read_json
from llmga.release.safety import refuse_contents, refuse_names
from llmga.release.weights import weight_files

_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PROCESSOR = ("processor_config.json", "preprocessor_config.json", *_TOKENIZER)
_SETTINGS: dict[Kind, tuple[str, ...]] = {
    "mllm": ("config.json", "generation_config.json", *_PROCESSOR),
    "adapter": ("adapter_config.json", *_PROCESSOR),
    "pipeline": ("model_index.json", "prompt_layout.json"),
    "restorer": ("config.json",),
}
_PART = ("config.json", "generation_config.json", "scheduler_config.json", "preprocessor_config.json", *_TOKENIZER)
_STEMS: dict[Kind, str] = {"mllm": "model", "adapter": "adapter_model", "restorer": "model"}
_AS_THEY_ARE = ("tokenizer.json", "vocab.json")  # words of a vocabulary, no settings
_LOCAL_NAMES = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")
_ABSOLUTE = re.compile(r"(?<![\w.:/\\<])(?:~?/(?:[\w.@+-]+/)+[\w.@+-]*|[A-Za-z]:\\[\w.@+\\ -]+)")

Weights = list[tuple[str, str, list[Path]]]
"""Folder in the release ("" for the top), stem of the file names, files that hold the tensors."""


def refuse_unsafe(folder: Path) -> None:
    """Raise for a pickle or code anywhere in a folder that is to be released.

    Raises:
        ReleaseError: with the file's name.
    """
    refuse_names((path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))), str(folder))
    refuse_contents(folder)


def settings_files(folder: Path, kind: Kind) -> list[Path]:
    """Text files that are released, as paths in the folder; the card is not among them, because it is written anew."""
    names = [Path(name) for name in (*_SETTINGS[kind], PROVENANCE) if (folder / name).is_file()]
    for part in parts(folder) if kind == "pipeline" else []:
        names += [Path(part) / name for name in _PART if (folder / part / name).is_file()]
    return names


def weights(folder: Path, kind: Kind) -> Weights:
    """The files of tensors that are released.

    Raises:
        ReleaseError: some are missing.
    """
    if kind != "pipeline":
        return [("", _STEMS[kind], weight_files(folder, _STEMS[kind]))]
    found: Weights = []
    for part in parts(folder):
        if not (folder / part / "config.json").is_file():
            continue  # a tokenizer or a scheduler
        stem = "model" if list((folder / part).glob("model*.safetensors")) else "diffusion_pytorch_model"
        found.append((part, stem, weight_files(folder / part, stem)))
    return found


def parts(folder: Path) -> list[str]:
    """The folders that a pipeline's index names.

    Raises:
        ReleaseError: one of them is missing.
    """
    index = read_json(folder / "model_index.json")
    named = [name for name, part in index.items() if isinstance(part, list) and part and part[0] is not None]
    missing = [name for name in named if not (folder / name).is_dir()]
    if missing:
        raise ReleaseError(f"{folder}/model_index.json names {missing[0]}, and there is no such folder")
    return named


def left_out(folder: Path, kind: Kind, taken: Weights) -> list[str]:
    """What stays here: copies in other formats, state of a training run, anything that no library asks for."""
    released = {folder / name for name in settings_files(folder, kind)}
    released |= {path for _, _, files in taken for path in files}
    released |= {folder / at / f"{stem}.safetensors.index.json" for at, stem, _ in taken}
    rest = (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in released)
    return [path.relative_to(folder).as_posix() for path in rest if path != folder / "README.md"]


def copy_settings(folder: Path, kind: Kind, out: Path, adapter_base: str | None) -> None:
    """Copy the text files, without paths of this machine.

    Args:
        adapter_base: the Hub's name of an adapter's base, which its config then names.
    """
    for name in settings_files(folder, kind):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name.suffix != ".json" or name.name in _AS_THEY_ARE:
            shutil.copyfile(folder / name, out / name)
            continue
        content = portable(read_json(folder / name))
        if name.name == "adapter_config.json":
            content["base_model_name_or_path"] = adapter_base
            content.pop("revision", None)
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def portable(value: Any) -> Any:
    """The same settings without names of where they were loaded from, absolute paths made relative or cut to a name."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items() if key not in _LOCAL_NAMES}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    return portable_text(value) if isinstance(value, str) else value


def portable_text(text: str) -> str:
    """A text in which absolute paths count from the working folder, or are cut to their last part."""
    return _ABSOLUTE.sub(lambda match: _relative(match[0]), text)


def _relative(path: str) -> str:
    trimmed = path.rstrip("/\\")
    here = f"{Path.cwd()}/"
    if trimmed.startswith(here):
        return trimmed.removeprefix(here)
    return re.split(r"[/\\]", trimmed)[-1]


def refuse_local_paths(folder: Path) -> None:
    """Raise when a text file of a finished release still names this machine's folders.

    Raises:
        ReleaseError: with file and path.
    """
    local = {str(Path.home()), str(Path.cwd()), str(folder.resolve()), os.environ.get("HOME", "")}
    told = sorted(path for path in local if path.count("/") > 1)  # "/" and "/root" are parts of other words
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".md", ".jinja", ".txt") or path.name in _AS_THEY_ARE:
            continue
        text = path.read_text(encoding="utf-8")
        found = next((name for name in told if name in text), None)
        if found:
            raise ReleaseError(f"{path} names {found}, a folder of this machine; take it out of the model's files")
