"""Who answers: an MLLM in this process, or a server (`llmga.stage1.record.endpoint`)."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch

from llmga.runtime import Ranks
from llmga.stage1.model import load_mllm
from llmga.stage1.record.config import RecordConfig
from llmga.stage1.reply import Prompt, generate_replies

_WINDOW_BYTES = 1 << 16
_WINDOWS = 8


class Engine(Protocol):
    """Answers questions; a reply depends on its prompt and its seed and not on its neighbours."""

    provenance: dict[str, Any]
    """Which model answered."""

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float) -> list[str | Exception]:
        """One reply for each prompt, or the error that this prompt alone causes."""
        ...


class LocalEngine:
    """A LLaVA folder, answering in batches with a key-value cache."""

    def __init__(self, cfg: RecordConfig, ranks: Ranks) -> None:
        """Load the model onto the device of this process."""
        assert cfg.model is not None
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        self.mllm, self.cfg = load_mllm(cfg.model, dtype=dtype), cfg
        if torch.cuda.is_available():
            self.mllm.model.to(torch.device("cuda", ranks.local_rank % torch.cuda.device_count()))
        self.provenance = {"engine": "transformers", "model": cfg.model.name, "model_hash": folder_hash(cfg.model)}

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float) -> list[str | Exception]:
        """See `Engine`."""
        return list(
            generate_replies(
                self.mllm,
                prompts,
                max_new_tokens=self.cfg.sampling.max_new_tokens,
                batch_size=self.cfg.batch_size,
                temperature=temperature,
                top_p=self.cfg.sampling.top_p,
                seeds=seeds,
                picture_size=self.cfg.picture_size,
                picture_mode=self.cfg.picture_mode,
            )
        )


def folder_hash(folder: Path) -> str:
    """16 digits that tell one model folder from another: names and sizes of its files, and samples of their content.

    Weights of tens of gigabytes would take minutes to read whole in each of a hundred processes; training changes
    every part of them, so eight windows of 64 KiB, spread evenly, show it.
    """
    digest = sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            for window in range(_WINDOWS):
                file.seek(max(0, size - _WINDOW_BYTES) * window // (_WINDOWS - 1))
                digest.update(file.read(_WINDOW_BYTES))
    return digest.hexdigest()[:16]
