"""Build toy data: pictures, and manifests with records of every task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from llmga.checkpoint import write_folder_atomically
from llmga.files import one_builder
from llmga.records import Record, open_manifest, write_manifest
from llmga.toyworld.corpus import CORPORA, PARTS, draw_record
from llmga.toyworld.png import encode_png
from llmga.toyworld.render import render
from llmga.toyworld.scene import PRESETS, SPLITS, Scene, sample_scene
from llmga.toyworld.sheet import write_sheet

SETTINGS_FILE = "world.json"
FINGERPRINT_RECORDS = 128

_Drawn = tuple[Record, Scene]


class WorldError(ValueError):
    """Toy data that cannot be built as asked."""


@dataclass(frozen=True)
class Report:
    """What a folder of toy data holds: split -> task -> number of records, and split -> number of pictures.

    `built` is False when the folder held exactly this data already.
    """

    folder: Path
    tasks: dict[str, dict[str, int]]
    pictures: dict[str, int]
    built: bool = True

    def in_words(self, seconds: float) -> str:
        """A line for each split, and one for the folder, which took so long."""
        lines = []
        for split, tasks in self.tasks.items():
            named = ", ".join(f"{count:,} {task}" for task, count in tasks.items())
            lines.append(f"{split:<12}{sum(tasks.values()):>8,} records, {self.pictures[split]:,} pictures: {named}")
        records = sum(map(sum, (tasks.values() for tasks in self.tasks.values())))
        done = f"built in {seconds:.1f} s ({records / seconds:,.0f} records/s)" if self.built else "was there already"
        return "\n".join([*lines, f"{self.folder} {done}"])


def build_world(
    out: Path,
    rows: int = 20_000,
    seed: int = 0,
    preset: str = "learnable",
    kind: str = "stage1",
    weights: Mapping[str, float] | None = None,
    splits: Mapping[str, int] | None = None,
    sheet: bool = True,
) -> Report:
    """Write `<split>.jsonl`, `pictures/<split>/<scene seed>.png`, `world.json` and the contact sheet `index.html`.

    The folder appears when it is complete. When it is there already and holds exactly this data, nothing is done; a
    second builder of a folder waits for the first.

    Args:
        out: folder to make.
        rows: records of the training split; validation holds a twentieth of it and test a fifth, at least 64 each.
        seed: picks the scenes and all that is said about them. Splits share no scene's seed, whatever this one is; a
            scene of few objects may still equal one of another split in all but the jitter of its objects.
        preset: `learnable` or `dense`.
        kind: `base` or `stage1`: a key of `CORPORA`.
        weights: weight of each part, a key of `PARTS`, instead of the kind's.
        splits: records of each split instead of `rows`; `composition` may be among them.
        sheet: write the contact sheet, too.
    Raises:
        WorldError: an argument is wrong, or the folder cannot be written, or is there and holds something else.
    """
    settings = _settings(rows, seed, preset, kind, weights, splits)
    out = Path(out)
    if (present := _present(out, settings)) is not None:
        return present
    try:
        with one_builder(out.parent):
            return _present(out, settings) or _build(out, settings, sheet)
    except OSError as error:
        raise WorldError(f"{out} cannot be written: {error.strerror or error}; choose another folder") from error


def splits_from(texts: Iterable[str]) -> dict[str, int]:
    """Splits as a command line names them: `test=1000`.

    Raises:
        WorldError: a text is not NAME=RECORDS.
    """
    splits = {}
    for text in texts:
        name, _, count = text.partition("=")
        if not count.isdecimal():
            raise WorldError(f"--split {text!r} is not NAME=RECORDS, such as test=1000")
        splits[name] = int(count)
    return splits


def _build(out: Path, settings: Mapping[str, Any], sheet: bool) -> Report:
    with write_folder_atomically(out, durable=False) as folder:  # twenty thousand pictures are quickly drawn again
        tasks, pictures = {}, {}
        for split, count in settings["splits"].items():
            (folder / "pictures" / split).mkdir(parents=True)
            counts: Counter[str] = Counter(pictures=0)
            drawn = _draw_records(split, count, settings["seed"], settings["preset"], settings["weights"])
            write_manifest(folder / f"{split}.jsonl", _with_pictures(folder, drawn, counts))
            pictures[split] = counts.pop("pictures")
            tasks[split] = dict(sorted(counts.items()))
        if sheet:
            _write_sheet(folder)
        content = {"settings": settings, "tasks": tasks, "pictures": pictures}
        (folder / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Report(out, tasks, pictures)


# ---------------------------------------------------------------- records


def _draw_records(split: str, count: int, seed: int, preset: str, weights: Mapping[str, float]) -> Iterator[_Drawn]:
    """Records and their scenes; record n is a pure function of the arguments but `count`."""
    seeds, number = SPLITS[split], list(SPLITS).index(split)
    parts, bounds = list(weights), np.cumsum(list(weights.values())) / sum(weights.values())
    first = int(np.random.default_rng([seed, number]).integers(len(seeds)))
    for index in range(count):
        rng = np.random.default_rng([seed, number, index])
        part = parts[int(np.searchsorted(bounds, rng.random(), side="right"))]
        scene_seed = seeds[(first + index) % len(seeds)]
        scene = sample_scene(scene_seed, preset)
        image = f"pictures/{split}/{scene_seed}.png"
        yield draw_record(part, f"{split}-{index:07d}", split, image, scene, rng), scene


def _with_pictures(folder: Path, drawn: Iterable[_Drawn], counts: Counter[str]) -> Iterator[Record]:
    """The records, counted by task; their pictures are written on the way."""
    for record, scene in drawn:
        if record.image:
            (folder / record.image).write_bytes(encode_png(render(scene)))
            counts["pictures"] += 1
        counts[record.task] += 1
        yield record


def _fingerprint() -> str:
    """Tells this code from one that writes or draws otherwise for the same settings, as after a change of wording."""
    digest = sha256()
    for record, scene in _draw_records("train", FINGERPRINT_RECORDS, 0, "learnable", dict.fromkeys(PARTS, 1.0)):
        digest.update(f"{record!r}\n".encode())
        digest.update(render(scene).tobytes())
    return digest.hexdigest()[:16]


def _write_sheet(folder: Path) -> None:
    """The contact sheet of a split: held-out scenes where there are some."""
    manifests = [folder / f"{split}.jsonl" for split in ("test", "validation", *SPLITS)]
    write_sheet(folder / "index.html", open_manifest(next(path for path in manifests if path.exists())))


# ---------------------------------------------------------------- arguments and folders


def _settings(
    rows: int,
    seed: int,
    preset: str,
    kind: str,
    weights: Mapping[str, float] | None,
    splits: Mapping[str, int] | None,
) -> dict[str, Any]:
    """What decides every byte, checked."""
    if kind not in CORPORA:
        raise WorldError(f"toy data of kind {kind!r} is unknown; expected one of {', '.join(CORPORA)}")
    if preset not in PRESETS:
        raise WorldError(f"toy world preset {preset!r} is unknown; expected one of {', '.join(PRESETS)}")
    if rows < 1 or seed < 0:
        raise WorldError(f"rows is {rows} and seed is {seed}; expected at least 1 row and a seed that is not negative")
    weights = dict(CORPORA[kind] if weights is None else weights)
    for part, weight in weights.items():
        if part not in PARTS:
            raise WorldError(f"weights name the unknown part {part!r}; expected some of {', '.join(PARTS)}")
        if not (np.isfinite(weight) and weight >= 0):
            raise WorldError(f"the weight of {part!r} is {weight}; expected a number that is not negative")
    if not sum(weights.values()):
        raise WorldError("all weights are 0; expected at least one above")
    default = {"train": rows, "validation": max(64, rows // 20), "test": max(64, rows // 5)}
    splits = dict(default if splits is None else splits)
    if not splits:
        raise WorldError(f"splits is empty; expected some of {', '.join(SPLITS)} with their number of records")
    for split, count in splits.items():
        if split not in SPLITS:
            raise WorldError(f"split {split!r} is unknown; expected some of {', '.join(SPLITS)}")
        if not 1 <= count <= len(SPLITS[split]):
            raise WorldError(f"split {split!r} shall hold {count} records; expected 1 to {len(SPLITS[split])}")
    settings = {"kind": kind, "preset": preset, "seed": seed, "weights": weights, "splits": splits}
    return {**settings, "generator": _fingerprint()}


def _present(out: Path, settings: dict[str, Any]) -> Report | None:
    """A report of the folder when it holds exactly this data; None when there is no folder.

    Raises:
        WorldError: it holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    what = "is not a folder of toy data"
    try:
        content = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
        if content["settings"] == settings:
            return Report(out, content["tasks"], content["pictures"], built=False)
        found = content["settings"]
        what = "differs in " + ", ".join(
            f"{name} ({found.get(name)} there, {value} asked)"
            for name, value in settings.items()
            if found.get(name) != value
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise WorldError(f"{out} exists and {what}; choose another folder, or delete it first")
