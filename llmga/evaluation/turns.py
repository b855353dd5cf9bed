"""Figure 5: does it stay as good when the same is asked again and again in one conversation?

Every turn of a system is an entry. A slope is a weighted sum of all its turns, so that its interval is paired by row.
A picture's noise is the same in every turn: what changes is what the system asks for.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmga.evaluation.bench import Bench, Cell, Columns, Meter, Work
from llmga.evaluation.config import SystemConfig
from llmga.evaluation.conversations import answer_share, conversations_of, prompt_of
from llmga.evaluation.meters import RATE, build_clip, build_features, clip_meter, feature_meter, file_meter, world_meter
from llmga.evaluation.numbers import Sides, distances_of, require_enough
from llmga.evaluation.paint import Studio, generation_facts, paint_settings, seeds_of, system_facts
from llmga.evaluation.protocol import UNKNOWN_GENERATION, Entry, Protocol, run_protocol
from llmga.evaluation.rows import Rows, reference_files
from llmga.evaluation.table_configs import TalkerConfig, TurnsConfig
from llmga.metrics.item_store import ItemStore
from llmga.metrics.picture_files import pictures_of
from llmga.runtime import Ranks
from llmga.stage2.recipe import RecipeError, read_recipe
from llmga.stage2.sample import Painted, Sampler

HEADERS = {
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "clip_short": "CLIP, request",
    "asked": "asked for a picture, %",
    "constraints": "request kept, %",
    "kept": "all of it, %",
    "theme": "theme, %",
    "parseable": "parseable, %",
}
COMPARED = ("frechet", "kernel", "clip_short", "asked", "constraints", "kept")
VARIED = ("turn", "replies")


def evaluate_turns(config: TurnsConfig, ranks: Ranks) -> str | None:
    """Talk, paint, measure and compare; see `llmga.evaluation.protocol.run_protocol`."""
    with Work(ranks) as work:
        return _Figure5(config, work).run()


class _Figure5:
    """One evaluation: what is asked, who answers and paints, and how it is measured."""

    def __init__(self, config: TurnsConfig, work: Work) -> None:
        self.config, self.work = config, work
        self.studio = Studio(work, config.paint)
        self.rows = Rows(config.rows)
        self.requests = self.rows.texts("short_caption")
        self.conversations = conversations_of(config, self.rows, Rows(config.talk))
        distances = {"frechet", "kernel"} & set(config.metrics)
        needs_own = distances and config.reference.folder is None
        own = self.rows.own_pictures(config.out / "pictures/own", work) if needs_own else {}
        self.reference = reference_files(config.reference, own) if distances else {}
        self.protocol = self._protocol()

    def run(self) -> str | None:
        """Everything, as far as it is this process's."""
        bench = Bench(self.config.out / "measured", self.work, self.config.measure.batch_size)
        return run_protocol(self.config.out, self.protocol, list(self._entries()), list(self._sides()), bench)

    def _entries(self) -> Iterator[Entry]:
        for system in self.config.systems:
            if system.pictures is not None:
                for turn in self._turns():
                    name = f"{system.name}-turn{turn}"
                    files = pictures_of(system.pictures / f"turn{turn}", self.rows.ids, name, self.rows.all_ids)
                    facts = {"name": system.name, "pictures": str(system.pictures)}
                    yield Entry(Cell(name, files), facts, {}, warnings=[UNKNOWN_GENERATION])
                continue
            stores = answer_share(self.config, system, self.conversations, self.work)
            for turn, store in zip(self._turns(), stores, strict=True):
                yield self._painted(system, turn, store)

    def _painted(self, system: TalkerConfig, turn: int, replies: ItemStore) -> Entry:
        name, paint = f"{system.name}-turn{turn}", self.config.paint
        painter_config = SystemConfig(system.name, system.pipeline)
        made = generation_facts(paint, turn=turn, replies=replies.folder.name)

        def painter(sampler: Sampler, ids: Sequence[str]) -> Sequence[Painted]:
            texts = [prompt_of(str(reply)) for reply in replies.read(dict.fromkeys(ids, ""))["reply"]]
            return sampler.text_to_image(texts, None, seeds_of(paint.seed, ids), paint_settings(paint))

        folder = self.config.out / "pictures" / name
        files = self.studio.paint_share(painter_config, folder, self.rows.ids, made, painter)
        return Entry(Cell(name, files), {**system_facts(painter_config), "mllm": str(system.mllm)}, made)

    def _turns(self) -> range:
        return range(1, self.config.turns + 1)

    def _sides(self) -> Iterator[Sides]:
        """The slope over the turns of each system, and how it differs from the first's."""
        turns = np.array(self._turns(), np.float64)
        per_turn = (turns - turns.mean()) / np.square(turns - turns.mean()).sum()
        slopes = {
            system.name: {
                f"{system.name}-turn{turn}": float(w) for turn, w in zip(self._turns(), per_turn, strict=True)
            }
            for system in self.config.systems
        }
        first, *others = slopes
        for name, weights in slopes.items():
            yield Sides(f"{name}, each turn later", "the turn before", weights, f"slope of {name}")
        for other in others:
            both = {**slopes[first], **{cell: -weight for cell, weight in slopes[other].items()}}
            yield Sides(f"slope of {first}", f"slope of {other}", both, f"{first} decays less than {other}")

    def _protocol(self) -> Protocol:
        config, device = self.config, self.studio.device
        meters, warnings = [file_meter(), reply_meter()], []
        distances = distances_of(config.metrics)
        extractor = build_features(config.measure.features, device) if distances else None
        if extractor is not None:
            counts = {"the set": len(self.rows.ids), "the reference": len(self.reference)}
            warnings = require_enough(list(distances), counts, extractor, config.measure.splits)
            meters.append(feature_meter(extractor))
        if "clip" in config.metrics:
            meters.append(clip_meter(build_clip(config.measure.clip, device), {"short": self.requests}))
        if "world" in config.metrics:
            meters.append(world_meter(config.measure.preset, requests=self.requests))
        side = config.reference.side
        return Protocol(
            task="turns",
            data={**self.rows.facts("short_caption"), "turns": config.turns, "talk": config.talk.path.stem},
            measure=config.measure,
            preset=config.preset,
            meters=meters,
            headers=HEADERS,
            compared=COMPARED,
            varied=VARIED,
            distances=distances,
            extractor=extractor,
            reference=Cell("reference", self.reference) if self.reference else None,
            reference_meters=[file_meter(side), feature_meter(extractor, side)] if extractor is not None else [],
            warnings=warnings,
        )


def reply_meter() -> Meter:
    """Whether a picture was asked for, told by its recipe: `asked`; of pictures without one it is not known."""

    def measure(files: Mapping[str, Path]) -> Columns:
        pairs = []
        for path in files.values():
            try:
                pairs.append((int(bool(read_recipe(path).prompt)), 1))
            except RecipeError:
                pairs.append((0, 0))
        return {"asked": np.array(pairs, np.int64)}

    return Meter("replies", {}, measure, {"asked": RATE})
