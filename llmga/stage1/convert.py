"""Released LLMGA and LLaVA checkpoints <-> transformers' LLaVA folders.

    report = convert_checkpoint("llmga-vicuna-7b", "models/llmga-7b", system_prompt="system.txt")
    convert_checkpoint("models/llmga-7b", "back", to="llava")       # the same tensors, bit for bit

Nothing of a checkpoint is executed: weights are safetensors, or .bin files read with `weights_only`; its code is never
imported. Tensors pass one by one, so the memory needed is that of one shard, whatever the model's size.
"""

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmga.checkpoint import is_disk_full, write_folder_atomically
from llmga.provenance import made_with, write_provenance
from llmga.run_folder import hashes
from llmga.runtime import RunFailed
from llmga.stage1.families import FAMILIES, Family
from llmga.stage1.model_checks import ADAPTER_CONFIG, is_adapter
from llmga.stage1.released_config import candidate_families, read_json
from llmga.stage1.released_export import TransformersCheckpoint, write_released
from llmga.stage1.released_import import Facts, ReleasedCheckpoint, Wishes, write_transformers
from llmga.stage1.released_projector import find_projector, read_projector, write_projector
from llmga.stage1.released_weights import SHARD_BYTES, ConvertError

__all__ = ["ConvertError", "Report", "convert_checkpoint"]

FORMATS = {"hf": "transformers", "llava": "LLaVA"}


@dataclass(frozen=True)
class Report:
    """What a conversion found and wrote; `str` of it is what `llmga convert` prints.

    Attributes:
        family: name of the row in `llmga.stage1.families`.
        found: about the source: weights, tensors, dtype, tied head, vision tower, tokenizer, ...
        wrote: about the destination: weights, tensors, parameters, picture token, template, ...
        warnings: what the user should know, one sentence each.
    """

    source: Path
    destination: Path
    to: Literal["hf", "llava"]
    family: str
    found: Mapping[str, Any]
    wrote: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"found {self.source} ({self.family})", *_rows(self.found)]
        lines += [f"wrote {self.destination} ({FORMATS[self.to]})", *_rows(self.wrote)]
        return "\n".join([*lines, *(f"note: {warning}" for warning in self.warnings)])


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    to: Literal["hf", "llava"] = "hf",
    *,
    system_prompt: str | Path | None = None,
    vision_tower: str | Path | None = None,
    family: str | None = None,
    image_token: str | None = None,
    image_token_id: int | None = None,
    needs_tokenizer: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Convert a released checkpoint into a folder that plain transformers loads, or back. The source is only read.

    Args:
        source: a folder with config.json and weights, or a bare projector (`mm_projector.bin`, .safetensors).
        destination: a folder that is not there yet; for a bare projector, a .safetensors file.
        to: "hf" writes transformers' format, "llava" that of LLaVA's code.
        system_prompt: text file with the system text that the weights were trained with. It is checked against length
            and hash; without it the template's slot stays empty.
        vision_tower: folder of the CLIP tower, where config.json names none that is here.
        family: row of `llmga.stage1.families`; needed where the source does not say (a bare projector without config).
        image_token: an existing token to stand for pictures, such as a reserved one; None adds `<image>`, in a spare
            row of the embedding where there is one.
        image_token_id: the row that stands for pictures in a folder without a tokenizer; None takes the last.
        needs_tokenizer: refuse a folder without a tokenizer instead of converting weights and config alone.
        shard_bytes: size of one file of weights, and with it the memory needed.
    Raises:
        ConvertError: anything that does not fit, before the destination appears.
        RunFailed: the disk filled up while writing.
    """
    source, destination = Path(source), Path(destination)
    if to not in FORMATS:
        raise ConvertError(f"to is {to!r}, expected 'hf' (transformers' format) or 'llava' (that of LLaVA's code)")
    if not source.exists():
        raise ConvertError(f"{source} does not exist; SRC is the folder of a checkpoint, or the file of a projector")
    if destination.exists():
        raise ConvertError(f"{destination} exists already; move it away or choose another place")
    row = _named_family(family)
    projector = find_projector(source)
    if projector is not None:
        return _convert_projector(projector, destination, to, row)
    _refuse_adapters(source)
    wishes = Wishes(
        system_prompt=None if system_prompt is None else Path(system_prompt),
        vision_tower=None if vision_tower is None else Path(vision_tower),
        image_token=image_token,
        image_token_id=image_token_id,
        needs_tokenizer=needs_tokenizer,
        shard_bytes=shard_bytes,
    )
    facts = (_to_transformers if to == "hf" else _to_llava)(source, destination, row, wishes)
    return Report(source, destination, to, facts.family, facts.found, facts.wrote, tuple(facts.warnings))


def _to_transformers(source: Path, destination: Path, row: Family | None, wishes: Wishes) -> Facts:
    config = _read_config(source)
    candidates = candidate_families(config, source / "config.json")
    if row is not None and row not in candidates:
        names = " or ".join(candidate.name for candidate in candidates)
        raise ConvertError(f"{source}/config.json says {config['model_type']!r}, which is {names} and not {row.name}")
    with (
        ReleasedCheckpoint(source, config, [row] if row else candidates, wishes) as checkpoint,
        _room_for(checkpoint.weights.num_bytes, destination) as aside,
        ThreadPoolExecutor(1) as hasher,
    ):
        inputs = hasher.submit(hashes, [source])  # reads along, mostly from the page cache
        facts = write_transformers(checkpoint, aside)
        _write_provenance(aside, "hf", facts, inputs.result())
    return facts


def _to_llava(source: Path, destination: Path, row: Family | None, wishes: Wishes) -> Facts:
    _read_config(source)
    with (
        TransformersCheckpoint(source, row, wishes.needs_tokenizer) as checkpoint,
        _room_for(checkpoint.weights.num_bytes, destination) as aside,
        ThreadPoolExecutor(1) as hasher,
    ):
        inputs = hasher.submit(hashes, [source])  # reads along, mostly from the page cache
        facts = write_released(checkpoint, aside, wishes.shard_bytes)
        _write_provenance(aside, "llava", facts, inputs.result())
    return facts


@contextmanager
def _room_for(num_bytes: int, destination: Path) -> Iterator[Path]:
    """`write_folder_atomically` where there is room; a disk that fills up all the same is told in one sentence."""
    home = next(parent for parent in destination.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(home).free
    if free < num_bytes:
        raise ConvertError(
            f"{destination} needs {num_bytes / 1e9:.1f} GB and {home} has {free / 1e9:.1f} GB free; make room or "
            "choose another place"
        )
    try:
        with write_folder_atomically(destination) as aside:
            yield aside
    except Exception as error:
        if is_disk_full(error):
            raise RunFailed(f"{destination} could not be written, the disk is full; make room and try again") from error
        raise


def _convert_projector(path: Path, destination: Path, to: Literal["hf", "llava"], row: Family | None) -> Report:
    config = path.parent / "config.json"
    if row is None and config.is_file():
        row = candidate_families(read_json(config), config)[0]
    if destination.suffix != ".safetensors":
        raise ConvertError(f"{destination}: a projector is written to a file whose name ends with .safetensors")
    weights = read_projector(path, row)
    if row is None:
        raise ConvertError(f"{path} does not say for which LLM it was trained; name it with --family")
    write_projector(weights, destination, to, row)
    first = weights["linear_1.weight"]
    facts = {"tensors": len(weights), "parameters": sum(tensor.numel() for tensor in weights.values())}
    shape = {"vision width": first.shape[1], "language width": first.shape[0]}
    scale = f"sqrt({first.shape[0]}) on the last layer" if row.scales_inputs else "none"
    found = {"projector": path.name, "dtype": str(first.dtype).removeprefix("torch."), **facts, **shape}
    return Report(path, destination, to, row.name, found, {"projector": destination.name, **facts, "factor": scale})


def _named_family(name: str | None) -> Family | None:
    if name is None or name in FAMILIES:
        return FAMILIES.get(name or "")
    raise ConvertError(f"family is {name!r}, expected one of {', '.join(FAMILIES)}")


def _read_config(source: Path) -> Mapping[str, Any]:
    if not source.is_dir() or not (source / "config.json").is_file():
        what = "has no config.json" if source.is_dir() else "is a file"
        raise ConvertError(
            f"{source} {what}; expected the folder of a checkpoint, or a projector (mm_projector.bin, .safetensors)"
        )
    return read_json(source / "config.json")


def _refuse_adapters(source: Path) -> None:
    if is_adapter(source):
        raise ConvertError(
            f"{source} holds a LoRA adapter ({ADAPTER_CONFIG}) and not a whole model; merge it into its base first"
        )


def _write_provenance(folder: Path, to: str, facts: Facts, inputs: list[dict[str, Any]]) -> None:
    provenance = {
        "made_by": f"llmga convert --to {to}",
        "family": facts.family,
        "found": facts.found,
        "wrote": facts.wrote,
        "warnings": facts.warnings,
        "inputs": inputs,
        **made_with(),
    }
    write_provenance(folder, provenance)


def _rows(facts: Mapping[str, Any]) -> Iterator[str]:
    for name, value in facts.items():
        text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        yield f"  {name}: {text:,}" if isinstance(text, int) else f"  {name}: {text}"
