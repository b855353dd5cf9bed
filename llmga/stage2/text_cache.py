"""What the text encoders say of prompts, made once: windows of 77 positions, as shards beside the latents.

    cache/text.json                        what all were made with; another text encoder or layout is another cache
    cache/source-0/text-00000.safetensors  for text encoder t: t.states (n, 77, D), for SDXL's last t.projected (n, P)
    cache/source-0/text-00000.json         for each row its texts by hash, and for each encoder [first window, how many]

Window 0 of a shard is that of the empty text: it stands for "no prompt", and fills up prompts in layouts where the
batch's longest decides. Prompts are joined from windows as without a cache, so nothing depends on who encoded them.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from llmga.records import Record
from llmga.stage2.chunks import EncodedRows
from llmga.stage2.config import Stage2Config
from llmga.stage2.parts import chosen_layout
from llmga.stage2.prompt_batch import UNCONDITIONAL, ChunkRows, OwnWindows, Prompt, PromptBatch
from llmga.stage2.prompt_encoder import LongPromptEncoder
from llmga.stage2.shards import CacheError, ShardReader, Shards, check_facts_of, hash_of
from llmga.stage2.sources import Source

FORMAT = 1
_AT_ONCE = 64  # texts that are tokenized and encoded together
_DTYPES = {"fp16": np.float16, "fp32": np.float32}


def text_facts(cfg: Stage2Config) -> dict[str, Any]:
    """What every entry depends on beside its text."""
    layout = chosen_layout(cfg)
    return {
        "format": FORMAT,
        "text_encoders": text_hash(cfg.model.path),
        "layout": layout.name,
        "max_chunks": layout.max_chunks,
        "short_captions": cfg.data.short_caption_share > 0,
        "precision": cfg.cache.precision,
        "computed_in": cfg.run.precision,
        "rows_per_shard": cfg.cache.rows_per_shard,
    }


def text_hash(pipeline: Path) -> str:
    """Of the weights, settings and vocabularies of a pipeline's text encoders: 16 hexadecimal digits."""
    suffixes = (".safetensors", ".bin", ".json", ".txt")
    files = [
        path
        for part in ("text_encoder", "tokenizer")
        for folder in pipeline.glob(f"{part}*")
        for path in folder.glob("*")
        if path.suffix in suffixes
    ]
    if not files:
        raise CacheError(f"{pipeline} has no text encoder in text_encoder/; expected a pipeline saved by diffusers")
    return hash_of(files)


class TextShards(Shards):
    """The encoded prompts of one source."""

    kind, what = "text", "prompts"

    def texts(self, row: int) -> list[str]:
        """What a row may be trained on: its text, and the short caption where that may take its place."""
        record: Record = self.source[row]
        texts = [self.source.check(row, record)]
        if self.cfg.data.short_caption_share > 0 and record.short_caption:
            texts.append(record.short_caption)
        return texts

    def stale(self, row: int, entry: dict[str, Any]) -> str | None:
        """Whether a row has other texts now."""
        if set(entry["texts"]) == {text_key(text) for text in self.texts(row)}:
            return None
        return f"the prompt of row {row} (id {self.source[row].id!r}) has changed since"


def text_key(text: str) -> str:
    """What a text is found by."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


# ---------------------------------------------------------------- making


def write_text_shard(cfg: Stage2Config, encoder: LongPromptEncoder, shards: TextShards, number: int) -> None:
    """Encode the texts of a shard's rows, equal ones once, and write it.

    Raises:
        CacheError: the text encoders gave values that are not finite.
    """
    by_row = [shards.texts(row) for row in shards.rows(number)]
    texts = list(dict.fromkeys(["", *(text for row in by_row for text in row)]))
    dtype = _DTYPES[cfg.cache.precision]
    kept: dict[str, list[np.ndarray]] = {}
    places: dict[str, list[list[int]]] = {text_key(text): [] for text in texts}
    counts = [0] * len(encoder.towers)
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        batch = _own_windows(encoder.tokenize(part))
        for tower, encoded in enumerate(encoder.encode_windows(batch)):
            for name, values in zip(EncodedRows._fields, encoded, strict=True):
                if values is not None:
                    kept.setdefault(f"{tower}.{name}", []).append(values.float().cpu().numpy().astype(dtype))
            for text, length in zip(part, batch.towers[tower].num_chunks.tolist(), strict=True):
                places[text_key(text)].append([counts[tower], length])
                counts[tower] += length
    tensors = {name: np.concatenate(values) for name, values in kept.items()}
    if not all(np.isfinite(values).all() for values in tensors.values()):
        raise CacheError(
            "a text encoder gave values that are not finite; set run.precision=fp32 or cache.precision=fp32"
        )
    ids = [shards.source[row].id for row in shards.rows(number)]
    entries = [
        {"id": record_id, "texts": {text_key(text): places[text_key(text)] for text in row}}
        for record_id, row in zip(ids, by_row, strict=True)
    ]
    shards.write(number, tensors, entries)


def _own_windows(batch: PromptBatch) -> PromptBatch:
    """The windows of each prompt that hold its text, without those that its neighbours made necessary."""
    towers = []
    for windows in batch.towers:
        first = windows.num_chunks.cumsum(0) - windows.num_chunks
        pairs = zip(first.tolist(), windows.num_text_chunks.tolist(), strict=True)
        own = [place + number for place, count in pairs for number in range(count)]
        towers.append(ChunkRows(windows.rows[own], None, windows.num_text_chunks, windows.num_text_chunks))
    return PromptBatch(tuple(towers), batch.unconditional, batch.prompts)


# ---------------------------------------------------------------- reading


class TextCache(ShardReader):
    """The encoded prompts of one source, read by position."""

    def read(self, row: int, prompt: Prompt) -> OwnWindows:
        """The windows of one of a row's texts, or of no prompt, behind that of the empty text.

        Returns:
            for each text encoder (1 + K, 77, D) states, and (1 + K, P) projected vectors or None, float32.
        """
        file, entry = self.entry(row)
        present = set(file.keys())
        towers = sorted(int(name.split(".")[0]) for name in present if name.endswith(".states"))
        places = [[0, 1]] * len(towers) if prompt is UNCONDITIONAL else entry["texts"][text_key(prompt)]

        def windows(name: str, start: int, count: int) -> np.ndarray | None:
            if name not in present:
                return None
            values = file.get_slice(name)
            return np.concatenate([values[:1], values[start : start + count]]).astype(np.float32)

        found: OwnWindows = []
        for tower, (start, count) in zip(towers, places, strict=True):
            states = windows(f"{tower}.states", start, count)
            assert states is not None
            found.append((states, windows(f"{tower}.projected", start, count)))
        return found


def open_texts(cfg: Stage2Config, sources: Sequence[Source], *, checked: bool = False) -> list[TextCache]:
    """The encoded prompts of a run's sources, once it is known that they are what the run expects.

    Args:
        checked: another process has looked already.
    Raises:
        CacheError: made with other text encoders or another layout, or with missing, damaged or stale entries.
    """
    check_text_facts(cfg)
    opened = []
    for number, source in enumerate(sources):
        shards = TextShards(cfg, source, number)
        if not checked:
            shards.refuse_bad()
        opened.append(TextCache(shards))
    return opened


def check_text_facts(cfg: Stage2Config) -> None:
    """Raise a CacheError when the prompts were encoded with other settings than the run's."""
    assert cfg.cache.path is not None
    check_facts_of(cfg.cache.path / "text.json", text_facts(cfg))
