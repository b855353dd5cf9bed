"""Table 1: every system with short captions and with refined prompts, so that what tuning does and what prompts do can
be told apart, and whether the two together do more than their sum.

Every picture is scored against both texts, whichever it was painted from: the short caption tells whether the request
was kept, the refined prompt whether it was followed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmga.evaluation.bench import Bench, Cell, Work
from llmga.evaluation.config import PaintConfig, SystemConfig
from llmga.evaluation.meters import (
    build_clip,
    build_features,
    clip_meter,
    feature_meter,
    file_meter,
    texts_hash,
    world_meter,
)
from llmga.evaluation.numbers import Sides, distances_of, require_enough
from llmga.evaluation.paint import Studio, generation_facts, paint_settings, reconstruct, seeds_of, system_facts
from llmga.evaluation.protocol import UNKNOWN_GENERATION, Entry, Protocol, run_protocol
from llmga.evaluation.rows import Rows, reference_files, training_overlap
from llmga.evaluation.table_configs import TextToImageConfig
from llmga.metrics.picture_files import pictures_of
from llmga.runtime import Ranks
from llmga.stage2.sample import Painted, Sampler

HEADERS = {
    "frechet": "Frechet distance",
    "kernel": "kernel distance",
    "inception_score": "Inception score",
    "clip_short": "CLIP, short caption",
    "clip_refined": "CLIP, refined prompt",
    "clip_refined_long": "prompts over a window, %",
    "attributes": "attributes, %",
    "above_chance": "above chance, %",
    "early": "early, %",
    "late": "late, %",
    "constraints": "request kept, %",
    "exact": "whole scene, %",
    "theme": "theme, %",
    "parseable": "parseable, %",
}
COMPARED = ("frechet", "kernel", "clip_short", "clip_refined", "attributes", "early", "late", "constraints", "theme")
VARIED = ("prompts", "prompts_sha256")


def evaluate_text_to_image(config: TextToImageConfig, ranks: Ranks) -> str | None:
    """Paint, measure and compare; see `llmga.evaluation.protocol.run_protocol`."""
    with Work(ranks) as work:
        return _Table1(config, work).run()


class _Table1:
    """One evaluation: what is asked, who paints it, and how it is measured."""

    def __init__(self, config: TextToImageConfig, work: Work) -> None:
        self.config = config
        self.studio = Studio(work, config.paint)
        self.bench = Bench(config.out / "measured", work, config.measure.batch_size)
        self.rows = Rows(config.rows)
        self.texts = {"short": self.rows.texts(config.short), "refined": self.rows.texts(config.refined)}
        measured_from = {"frechet", "kernel"} & set(config.metrics)
        needs_own = config.sanity or (measured_from and config.reference.folder is None)
        self.own = self.rows.own_pictures(self._folder("own"), work) if needs_own else {}
        self.reference = reference_files(config.reference, self.own) if measured_from else {}
        self.protocol = self._protocol()  # what is missing or too small is told before anything is painted

    def run(self) -> str | None:
        """Everything, as far as it is this process's."""
        entries = [*self._entries(), *self._sanity()]
        return run_protocol(self.config.out, self.protocol, entries, list(self._sides()), self.bench)

    def _folder(self, name: str) -> Path:
        return self.config.out / "pictures" / name

    # ------------------------------------------------------------ how it is measured

    def _protocol(self) -> Protocol:
        config, device = self.config, self.studio.device
        meters, warnings = [file_meter()], []
        distances = distances_of(config.metrics)
        extractor = build_features(config.measure.features, device) if distances else None
        if extractor is not None:
            counts = {"the set": len(self.rows.ids)}
            counts |= {"the reference": len(self.reference)} if self.reference else {}
            warnings = require_enough(list(distances), counts, extractor, config.measure.splits)
            meters.append(feature_meter(extractor))
        if "clip" in config.metrics:
            meters.append(clip_meter(build_clip(config.measure.clip, device), self.texts))
        if "world" in config.metrics:
            meters.append(world_meter(config.measure.preset, self.texts["refined"], self.texts["short"]))
        side = config.reference.side
        return Protocol(
            task="text_to_image",
            data=self.rows.facts(config.short, config.refined),
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

    # ------------------------------------------------------------ whose pictures

    def _entries(self) -> Iterator[Entry]:
        """Every system under every condition, painted as far as this process has to."""
        config = self.config
        for system in config.systems:
            overlap = training_overlap(system, self.reference, self.rows, config.reference.allow_overlap)
            facts = {**system_facts(system), "training_overlap": overlap}
            for condition in config.conditions:
                yield self._entry(system, facts, condition, config.paint)
            if "another_seed" in config.sanity and system is config.systems[-1] and system.pipeline is not None:
                another = replace(config.paint, seed=config.paint.seed + 1)
                yield replace(self._entry(system, facts, config.conditions[-1], another, "-again"), compared=False)

    def _entry(
        self, system: SystemConfig, facts: Mapping[str, Any], condition: str, paint: PaintConfig, ending: str = ""
    ) -> Entry:
        name = f"{system.name}-{condition}{ending}"
        if system.pictures is not None:
            files = pictures_of(system.pictures / condition, self.rows.ids, name, self.rows.all_ids)
            return Entry(Cell(name, files), facts, {}, warnings=[UNKNOWN_GENERATION])
        texts = self.texts[condition]
        made = generation_facts(paint, prompts=condition, prompts_sha256=texts_hash(texts))

        def painter(sampler: Sampler, ids: Sequence[str]) -> Sequence[Painted]:
            prompts = [texts[id] for id in ids]
            return sampler.text_to_image(prompts, None, seeds_of(paint.seed, ids), paint_settings(paint))

        files = self.studio.paint_share(system, self._folder(name), self.rows.ids, made, painter)
        return Entry(Cell(name, files), facts, made)

    def _sanity(self) -> Iterator[Entry]:
        """Rows that stand beside: real pictures, and what the first pipeline's autoencoder leaves of them."""
        if "oracle" in self.config.sanity:
            yield Entry(Cell("oracle", self.own), {"name": "real pictures"}, {}, compared=False)
        painters = [system for system in self.config.systems if system.pipeline is not None]
        if "autoencoder" in self.config.sanity and painters:
            files = reconstruct(self.studio, painters[0], self._folder("autoencoder"), self.own)
            facts = {**system_facts(painters[0]), "name": "autoencoder of the first system, on real pictures"}
            yield Entry(Cell("autoencoder", files), facts, {}, compared=False)

    def _sides(self) -> Iterator[Sides]:
        """Tuning under each condition, prompts with each system, both together, and their interaction."""
        first, *others = [system.name for system in self.config.systems]
        conditions = self.config.conditions
        for other in others:
            for condition in conditions:
                yield Sides.of(f"{other}-{condition}", f"{first}-{condition}", f"tuning, {condition}")
        if {"short", "refined"} <= set(conditions):
            for name in (first, *others):
                yield Sides.of(f"{name}-refined", f"{name}-short", f"refined prompts, {name}")
            for other in others:
                yield Sides.of(f"{other}-refined", f"{first}-short", "tuning and refined prompts")
                gains = {
                    f"{other}-refined": 1.0,
                    f"{other}-short": -1.0,
                    f"{first}-refined": -1.0,
                    f"{first}-short": 1.0,
                }
                yield Sides(f"gain of {other} by prompts", f"gain of {first}", gains, "interaction")
