"""Tensors of released checkpoints, one at a time: where they lie, what transformers calls them, how they are written.

A checkpoint is never in memory as a whole. Reading goes through memory maps, writing keeps one shard.

Names, by beginning (the rest of a name is the same everywhere):

    in LLaVA's folders                                 in memory                      in transformers' folders
    model.embed_tokens, model.layers, model.norm       model.language_model.          language_model.model.
    lm_head                                            lm_head                        language_model.lm_head
    model.mm_projector.0, .2                           model.multi_modal_projector.linear_1, linear_2   (no model.)
    model.vision_tower.vision_tower.vision_model       model.vision_tower             vision_tower
"""

import json
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmga.files import HEAD_BYTES, what_it_is
from llmga.stage1.model import standard_name
from llmga.strict_json import read_object

SHARD_BYTES = 2_000_000_000
_SAFETENSORS = "model.safetensors"
_INDEXED = (  # in the order of preference
    ("model.safetensors.index.json", _SAFETENSORS),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


class _Spelling(NamedTuple):
    """One beginning of names in the three places."""

    released: str
    in_memory: str
    on_disk: str


_SPELLINGS = (
    *(
        _Spelling(f"model.{part}.", f"model.language_model.{part}.", f"language_model.model.{part}.")
        for part in ("embed_tokens", "layers", "norm")
    ),
    _Spelling("lm_head.", "lm_head.", "language_model.lm_head."),
    *(
        _Spelling(
            f"model.mm_projector.{layer}.",
            f"model.multi_modal_projector.linear_{number}.",
            f"multi_modal_projector.linear_{number}.",
        )
        for layer, number in ((0, 1), (2, 2))
    ),
    _Spelling("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.", "vision_tower."),
)
# Buffers that older libraries stored and nobody reads: they follow from the config.
_BUFFERS = (".position_ids", ".inv_freq")


class ConvertError(ValueError):
    """A checkpoint that cannot be converted; the sentence says what was found, what was expected and what to do."""


def is_buffer(name: str) -> bool:
    """Whether a stored tensor follows from the config, so that it is dropped."""
    return name.endswith(_BUFFERS)


def transformers_name(name: str) -> str | None:
    """LLaVA's name of a tensor -> its name in a folder by transformers; None for a name that LLaVA does not have."""
    return next(
        (row.on_disk + name.removeprefix(row.released) for row in _SPELLINGS if name.startswith(row.released)), None
    )


def released_name(name: str) -> str | None:
    """Any spelling of transformers' name of a tensor -> LLaVA's; None for a name that LLaVA does not have."""
    name = standard_name(name)
    return next(
        (row.released + name.removeprefix(row.in_memory) for row in _SPELLINGS if name.startswith(row.in_memory)), None
    )


class StoredWeights:
    """The tensors of a file or of a folder's shards; `with` closes the files.

    Args:
        place: a .safetensors or .bin file, or a folder with model.safetensors, pytorch_model.bin or an index of shards.
    Attributes:
        files: what is read, in order.
        names: every tensor, in the order of the files.
    Raises:
        ConvertError: no weights there, an index and its shards that disagree, a file that holds anything but tensors.
    """

    def __init__(self, place: Path) -> None:
        self._stack = ExitStack()
        self._homes: dict[str, Any] = {}  # name -> open safetensors file, or the tensors of a .bin file
        listed: dict[str, str] | None = None
        if place.is_dir():
            self.files, listed = _weight_files(place)
        else:
            self.files = [place]
        try:
            for file in self.files:
                home = self._open(file)
                for name in home.keys():  # noqa: SIM118 (a handle, not a dict)
                    if name in self._homes:
                        raise ConvertError(f"{file}: {name} is also in an earlier shard; download the folder again")
                    self._homes[name] = home
                self._check_listed(file, listed, home)
        except BaseException:
            self._stack.close()
            raise
        self.names = list(self._homes)

    def __enter__(self) -> "StoredWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        self._homes.clear()
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""
        home = self._homes[name]
        return home[name].clone() if isinstance(home, dict) else home.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        home = self._homes[name]
        return tuple(home[name].shape if isinstance(home, dict) else home.get_slice(name).get_shape())

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self.files)

    def dtypes(self) -> list[torch.dtype]:
        """Every dtype that occurs, the most frequent one first."""
        counts: dict[torch.dtype, int] = {}
        for name, home in self._homes.items():
            if is_buffer(name):
                continue
            if isinstance(home, dict):
                dtype = home[name].dtype
            else:
                dtype = _SAFETENSORS_DTYPES.get(home.get_slice(name).get_dtype()) or home.get_tensor(name).dtype
            counts[dtype] = counts.get(dtype, 0) + 1
        return sorted(counts, key=lambda dtype: -counts[dtype])

    def _open(self, file: Path) -> Any:
        if file.suffix == ".safetensors":
            try:
                return self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConvertError(f"{file} is {_what(file) or f'no safetensors file ({error})'}") from None
        return _load_pickled(file)

    @staticmethod
    def _check_listed(file: Path, listed: dict[str, str] | None, home: Any) -> None:
        if listed is None:
            return
        held = set(home.keys())
        lost = sorted(name for name, shard in listed.items() if shard == file.name and name not in held)
        if lost:
            raise ConvertError(
                f"{file} lacks {len(lost)} tensors that the index puts there, first {lost[0]}; download the shard again"
            )


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold a folder's weights, and what its index says is where."""
    for index_name, single in _INDEXED:
        index = folder / index_name
        if index.is_file():
            listed = read_object(index, ConvertError, "download it again").get("weight_map")
            if not isinstance(listed, dict):
                raise ConvertError(f"{index} is no index of shards, for it has no weight_map; download it again")
            files = [folder / name for name in sorted(set(listed.values()))]
            outside = next((file for file in files if file.parent != folder), None)
            if outside is not None:
                raise ConvertError(f"{index} names {outside}, which lies elsewhere; shards stand beside their index")
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise ConvertError(
                    f"{index} names {len(files)} shards, of which {len(absent)} are missing, first {absent[0]}; "
                    "download the rest"
                )
            return files, listed
        if (folder / single).is_file():
            return [folder / single], None
    raise ConvertError(
        f"{folder} holds no weights; expected model.safetensors, pytorch_model.bin or an index of shards "
        "(model.safetensors.index.json, pytorch_model.bin.index.json)"
    )


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """Tensors of a .bin file, mapped where the file's age allows it. Nothing that the file says is executed."""
    try:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: such a file cannot be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        what = _what(file)
        if what is None and isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            what = "a pickle that asks for more than tensors, which may be an attack; nothing of it was executed"
        raise ConvertError(f"{file} is {what or f'no file of tensors ({_first_line(error)})'}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConvertError(f"{file} holds {type(tensors).__name__}, expected names with a tensor each")
    return tensors


def _what(file: Path) -> str | None:
    """What a file is that holds no tensors, if its start tells."""
    if not file.is_file():
        return "missing"
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    return None if head.startswith(b"PK") else what_it_is(head)  # torch's own files are zip archives


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ShardWriter:
    """Write tensors to `model.safetensors`, or to numbered shards with an index when they need more than one.

    Args:
        folder: there already.
        shard_bytes: what is kept in memory before it is written.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []
        self.num_tensors = self.num_parameters = self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it may be written now or later."""
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._shard_bytes:
            self._write()
        self._waiting[name] = tensor.contiguous()
        self._waiting_bytes += tensor.nbytes
        self.num_tensors += 1
        self.num_parameters += tensor.numel()
        self.num_bytes += tensor.nbytes

    def close(self) -> list[str]:
        """Write what waits, give the shards their names and return them."""
        self._write()
        total = len(self._shards)
        if total == 1:
            self._part(0).rename(self._folder / _SAFETENSORS)
            return [_SAFETENSORS]
        names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        weight_map: dict[str, str] = {}
        for number, name in enumerate(names):
            self._part(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(self._shards[number], name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / f"{_SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return names

    def _write(self) -> None:
        if self._waiting:
            save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(self._waiting))
            self._waiting, self._waiting_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f".part-{number}.safetensors"


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
