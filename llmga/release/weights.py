"""Weights as safetensors files of a chosen size: tensors pass one shard at a time, bit for bit as they were."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmga.release.kinds import ReleaseError, read_json


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold a model's weights: those its index names, else the one file.

    Args:
        stem: "model" or "diffusion_pytorch_model".
    Raises:
        ReleaseError: there are none, or some of them are missing.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else [single.name]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ReleaseError(
            f"{folder} lacks {', '.join(missing) or 'weights'}; expected safetensors, as they were saved"
        )
    return [folder / name for name in names]


def reshard(sources: list[Path], folder: Path, stem: str, shard_bytes: int) -> list[Path]:
    """Write the tensors of some files to others of at most `shard_bytes`, with an index where there are several.

    Returns:
        The files with weights; one shard is in memory at a time.
    Raises:
        ReleaseError: a file is damaged, or two hold a tensor of one name.
    """
    homes: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    for path in sources:
        for name, size in _sizes(path).items():
            if name in homes:
                raise ReleaseError(f"{path} and {homes[name].name} both hold {name}; save the model again")
            homes[name], sizes[name] = path, size
    split = split_state_dict_into_shards_factory(
        sizes,  # any values will do: only `get_storage_size` looks at them
        get_storage_size=lambda size: size,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for filename, names in split.filename_to_tensors.items():
        save_file(_read(names, homes), folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / filename for filename in split.filename_to_tensors]


def count_same(given: list[Path], found: list[Path]) -> int:
    """Compare the tensors of two sets of files bit for bit.

    Returns:
        How many there are.
    Raises:
        ReleaseError: with the first name that is missing, unknown or another tensor.
    """
    homes = {name: path for path in found for name in _sizes(path)}
    count = 0
    for name, tensor in _each(given):
        if name not in homes:
            raise ReleaseError(f"{found[0].parent}: {name} is missing; nothing was pushed")
        other = _read([name], {name: homes.pop(name)})[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape or not torch.equal(_bits(tensor), _bits(other)):
            raise ReleaseError(
                f"{found[0].parent}: {name} read back differs from {given[0].parent}; nothing was pushed"
            )
        count += 1
    if homes:
        raise ReleaseError(f"{found[0].parent}: {min(homes)} is in no file of {given[0].parent}; nothing was pushed")
    return count


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, so that a NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _each(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a dict)
                yield name, file.get_tensor(name)


def _read(names: list[str], homes: dict[str, Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted({homes[name] for name in names}):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in names if homes[name] == path}
    return tensors


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor, from the file's header alone."""
    try:
        with safe_open(path, framework="pt"):
            pass  # checks the header against the file's length
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise ReleaseError(f"{path} is no whole safetensors file ({error}); save or download it again") from None
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - start for name, (start, end) in spans.items()}
