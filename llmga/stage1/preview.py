"""A page that shows what a run trains on, before it runs: pictures, masks, and every token, coloured by its label.

Nothing is approximated for the page: the examples are the first ones of the run, made by the code that feeds it.
"""

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from llmga.bad_samples import BadSampleBudget
from llmga.files import atomic_write, no_file_to_write
from llmga.images import data_url
from llmga.mixture import Mixture, SourceShare
from llmga.records import TASKS
from llmga.stage1.config import Stage1Config
from llmga.stage1.data import Sample, Stage1Dataset, build_datasets
from llmga.stage1.start import load_start_processor
from llmga.tokens import IGNORE_INDEX

NUM_MEASURED = 300  # examples that the figures at the top are about
KINDS = ("generation", "description", "chat")
MASK_TINT = (224, 49, 140)
_MAX_BARS = 32


class PreviewError(ValueError):
    """A page that cannot be written where it was asked for."""


@dataclass(frozen=True)
class Chip:
    """One token, a few that make up one character, or the whole block of a picture.

    Attributes:
        label: "trained", "given" (in the input, not trained) or "picture".
        control: a special token or a generation tag rather than text.
        ends_line: the text holds a line break, shown as an arrow.
    """

    text: str
    label: str
    control: bool
    title: str
    ends_line: bool = False


@dataclass(frozen=True)
class _Measured:
    """The figures of one example."""

    index: int
    source: int
    task: str
    kind: str
    mask: str | None
    tokens: int
    trained: int
    picture: int


def write_preview(
    cfg: Stage1Config,
    out_path: Path,
    num_examples: int = 24,
    num_measured: int = NUM_MEASURED,
    processor: Any = None,
) -> Path:
    """Write the page: mixture, lengths, and examples of every task and kind among the first of the run.

    Args:
        cfg: of the run; neither its model's weights nor its run folder are touched.
        out_path: one HTML file with everything in it.
        num_examples: shown with their tokens.
        num_measured: first examples of the run that lengths and shares are taken from.
        processor: a `LlavaProcessor`; None loads the one that `cfg.model` starts with.
    Returns:
        `out_path`.
    Raises:
        ValueError: data that training would stop at, or nothing can be written to `out_path`.
    """
    if problem := no_file_to_write(Path(out_path)):
        raise PreviewError(f"the page cannot be written: {problem}")
    if processor is None:
        processor = load_start_processor(cfg.model)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "replaced.jsonl"
        data = build_datasets(cfg, processor, _examples_on_one_device(cfg), log)[0]
        assert isinstance(data.order, Mixture)
        measured = [_measure(data, index) for index in range(min(max(num_measured, num_examples), len(data)))]
        chosen = [data.sample(index) for index in _choose(measured, num_examples)]
        replaced = BadSampleBudget(log, max_share=1.0, total=len(data)).replaced(len(measured))
    page = _environment().get_template("preview.html.j2")
    atomic_write(
        Path(out_path),
        page.render(
            cfg=cfg,
            title=lambda task: task.upper() if task in ("vqa", "qa") else task.replace("_", " ").capitalize(),
            tiles=_tiles(data, measured, cfg.data.max_length),
            sources=_source_rows(data.order.summary(), measured),
            histogram=_histogram(measured, cfg.data.max_length),
            replaced=replaced,
            num_measured=len(measured),
            tasks={
                task: [_show(data, sample) for sample in chosen if sample.record.task == task]
                for task in TASKS
                if any(sample.record.task == task for sample in chosen)
            },
        ),
    )
    return Path(out_path)


def token_chips(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int], image_token_id: int) -> list[Chip]:
    """Token ids as readable pieces, in order; joined, with "\\n" for "↵", they are the conversation.

    Args:
        labels: as long as `input_ids`, IGNORE_INDEX where nothing is trained.
        image_token_id: its runs become one chip with their count.
    """
    control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    chips = []
    for start, end, text in _pieces(tokenizer, input_ids, image_token_id):
        token = input_ids[start]
        if token == image_token_id:
            chips.append(Chip(f"picture x{end - start}", "picture", True, f"id {token}, {end - start} times"))
            continue
        label = "given" if labels[start] == IGNORE_INDEX else "trained"
        ids = " ".join(map(str, input_ids[start:end]))
        shown, title = text.replace("\n", "↵"), f"id {ids}, {label}"
        chips.append(Chip(shown, label, token in control, title, ends_line="\n" in text))
    return chips


def _pieces(tokenizer: Any, input_ids: Sequence[int], image_token_id: int) -> Iterator[tuple[int, int, str]]:
    """(start, end, text): each token with the text it adds, read with the token before it for the sake of spaces."""
    start, before = 0, 0
    while start < len(input_ids):
        end = start + 1
        if input_ids[start] == image_token_id:
            while end < len(input_ids) and input_ids[end] == image_token_id:
                end += 1
            yield start, end, ""
            start = before = end
            continue
        known = tokenizer.decode(input_ids[before:start])
        text = tokenizer.decode(input_ids[before:end])
        while text.endswith("\ufffd") and end < min(start + 4, len(input_ids)):  # part of a character
            end += 1
            text = tokenizer.decode(input_ids[before:end])
        yield start, end, text[len(known) :]
        start, before = end, start


# ---------------------------------------------------------------- figures of the run


def _examples_on_one_device(cfg: Stage1Config) -> int | None:
    """None where epochs decide."""
    if cfg.run.max_steps is None:
        return None
    return cfg.run.max_steps * cfg.run.batch_size * cfg.run.accumulation_steps


def _measure(data: Stage1Dataset, index: int) -> _Measured:
    sample = data.sample(index)
    labels = sample.encoded.labels
    return _Measured(
        index=index,
        source=data.sources.index(sample.source),
        task=sample.record.task,
        kind=sample.example.kind,
        mask=None if sample.example.mask is None else sample.example.mask.kind,
        tokens=len(labels),
        trained=len(labels) - labels.count(IGNORE_INDEX),
        picture=0 if sample.pixel_values is None else data.num_image_tokens,
    )


def _choose(measured: Sequence[_Measured], count: int) -> list[int]:
    """The first example of each task, kind and mask, then the second of each, until there are enough; in order."""
    seen: Counter[tuple[str, str, str | None]] = Counter()
    ranked = []
    for one in measured:
        sort = (one.task, one.kind, one.mask)
        ranked.append((seen[sort], one.index))
        seen[sort] += 1
    return sorted(index for _, index in sorted(ranked)[:count])


def _tiles(data: Stage1Dataset, measured: Sequence[_Measured], max_length: int) -> list[tuple[str, str]]:
    """(figure, what it says) for the head of the page."""
    lengths = np.array([one.tokens for one in measured])
    tokens, trained = int(lengths.sum()), sum(one.trained for one in measured)
    picture = sum(one.picture for one in measured)
    return [
        (f"{len(data):,}", "examples, on one device"),
        (f"{sum(map(len, data.sources)):,}", f"rows in {len(data.sources)} source{'s'[: len(data.sources) > 1]}"),
        (f"{trained / tokens:.1%}", "of the tokens are trained"),
        (f"{picture / tokens:.1%}", "stand for pictures"),
        (f"{np.median(lengths):,.0f}", "tokens in the median example"),
        (f"{lengths.max():,}", f"in the longest, {max_length:,} allowed"),
    ]


def _source_rows(shares: Sequence[SourceShare], measured: Sequence[_Measured]) -> list[dict[str, Any]]:
    """The mixture, with what was measured of each source."""
    by_source = defaultdict(list)
    for one in measured:
        by_source[one.source].append(one)
    all_trained = sum(one.trained for one in measured)
    rows = []
    for number, share in enumerate(shares):
        own = by_source[number]
        rows.append(
            {
                "share": share,
                "tokens": sum(one.tokens for one in own) / len(own) if own else None,
                "trained": sum(one.trained for one in own) / all_trained,
            }
        )
    return rows


def _histogram(measured: Sequence[_Measured], max_length: int) -> dict[str, Any]:
    """Bars of example lengths, stacked by kind, as fractions of a plot of 1 x 1."""
    longest = max(one.tokens for one in measured)
    with_limit = max_length <= 1.6 * longest
    width = _round_width((max_length if with_limit else longest) / _MAX_BARS)
    num_bars = math.ceil((max(longest, max_length if with_limit else 0) + 1) / width)
    counts = {kind: [0] * num_bars for kind in KINDS}
    for one in measured:
        counts[one.kind][one.tokens // width] += 1
    tallest = max(map(sum, zip(*counts.values(), strict=True)))
    bars = []
    for bar in range(num_bars):
        below = 0
        for kind in KINDS:
            if count := counts[kind][bar]:
                title = f"{bar * width} to {(bar + 1) * width - 1} tokens: {count} {kind}"
                bars.append((kind, bar / num_bars, below / tallest, 1 / num_bars, count / tallest, title))
                below += count
    every = math.ceil(num_bars / 8)
    return {
        "bars": bars,
        "ticks": [(bar / num_bars, f"{bar * width:,}") for bar in range(0, num_bars + 1, every)],
        "limit": max_length / (num_bars * width) if with_limit else None,
        "max_length": max_length,
        "tallest": tallest,
        "totals": [(kind, sum(counts[kind])) for kind in KINDS if any(counts[kind])],
    }


def _round_width(least: float) -> int:
    """The smallest 1, 2 or 5 times a power of ten that is no less."""
    power = 10 ** math.floor(math.log10(max(least, 1)))
    return int(next(step * power for step in (1, 2, 5, 10) if step * power >= least))


# ---------------------------------------------------------------- one example


def _show(data: Stage1Dataset, sample: Sample) -> dict[str, Any]:
    """What the template prints of an example."""
    encoded, example = sample.encoded, sample.example
    picture = None if example.picture is None else data.pixels.shown(example.picture)
    image_token_id = data.tokenizer.convert_tokens_to_ids(data.image_token)
    trained = sum(label != IGNORE_INDEX for label in encoded.labels)
    in_picture = 0 if picture is None else data.num_image_tokens
    overlay = None
    if picture is not None and example.mask is not None:
        hole = data.pixels.shown(Image.fromarray(example.mask.hole * np.uint8(255)).convert("RGB"))
        overlay = data_url(_tint(picture, np.asarray(hole)[..., 0] >= 128))
    return {
        "index": sample.index,
        "id": sample.record.id,
        "source": sample.source.name,
        "place": sample.source.place(sample.row),
        "epoch": sample.epoch,
        "replaces": data.order[sample.index][1] != sample.row,
        "kind": example.kind,
        "chips": token_chips(data.tokenizer, encoded.input_ids, encoded.labels, image_token_id),
        "picture": picture and data_url(picture),
        "size": picture and picture.size,
        "mask": example.mask,
        "overlay": overlay,
        "counts": (
            ("trained", trained),
            ("given", len(encoded.labels) - trained - in_picture),
            ("picture", in_picture),
        ),
        "tokens": len(encoded.labels),
    }


def _tint(picture: Image.Image, hole: np.ndarray) -> Image.Image:
    """The picture with what is to be generated in diagonal stripes of a colour that photographs rarely have."""
    tinted = np.asarray(picture).copy()
    y, x = np.indices(hole.shape)
    period = max(4, hole.shape[0] // 16)
    light = ((x + y) % period) * 2 < period
    tinted[hole & light] = MASK_TINT
    tinted[hole & ~light] = np.array(MASK_TINT) * 3 // 5
    return Image.fromarray(tinted)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
