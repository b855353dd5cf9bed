"""Table 3: in- and outpainting, narrow and wide, each kind of hole an evaluation of its own.

Measured are the raw output and the composite, in which kept pixels are pasted back. Distances of composites flatter
every system, since most of their pixels are the truth's own; what a system does to pixels that it should keep shows in
the raw output alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmga.evaluation.bench import Bench, Cell, Work
from llmga.evaluation.config import SystemConfig
from llmga.evaluation.hole_meters import hole_meter, world_hole_meter
from llmga.evaluation.holes import Holes, make_holes, prompts_for
from llmga.evaluation.meters import build_features, feature_meter, file_meter, texts_hash
from llmga.evaluation.numbers import Distance, Sides, require_enough
from llmga.evaluation.paint import Studio, generation_facts, paint_settings, reconstruct, seeds_of, system_facts
from llmga.evaluation.protocol import UNKNOWN_GENERATION, Entry, Protocol, run_protocol
from llmga.evaluation.rows import Rows, scene_of
from llmga.evaluation.table_configs import HoleKind, PaintingConfig
from llmga.metrics.extractors import Extractor
from llmga.metrics.lpips import Lpips
from llmga.metrics.picture_files import pictures_of
from llmga.runtime import Ranks
from llmga.stage2.sample import Painted, Sampler

HEADERS = {
    "frechet": "Frechet distance",
    "frechet_raw": "raw",
    "kernel": "kernel distance",
    "kernel_raw": "raw",
    "lpips": "LPIPS",
    "lpips_raw": "raw",
    "hole_psnr": "PSNR in the hole, dB",
    "preserved_psnr": "PSNR outside, raw, dB",
    "seam": "seam",
    "gain_error": "gain error",
    "bias_error": "bias error",
    "ssim": "SSIM",
    "hidden": "hidden shapes, %",
    "parseable": "parseable, %",
}
COMPARED = ("frechet", "frechet_raw", "kernel", "kernel_raw", "lpips", "lpips_raw", "hole_psnr", "seam", "hidden")
VARIED = ("prompts", "prompts_sha256")


def evaluate_painting(config: PaintingConfig, ranks: Ranks) -> str | None:
    """Paint, measure and compare, one kind of hole after another."""
    with Work(ranks) as work:
        evaluation = _Table3(config, work)
        tables = {kind: evaluation.run(kind) for kind in config.kinds}
    if any(table is None for table in tables.values()):
        return None
    return "\n\n".join(f"## {kind}\n\n{table}" for kind, table in tables.items())


class _Table3:
    """Rows, their holes, and the networks that pictures are measured with, shared by all kinds."""

    def __init__(self, config: PaintingConfig, work: Work) -> None:
        self.config, self.work = config, work
        self.studio = Studio(work, config.paint)
        self.rows = Rows(config.rows)
        self.extractor: Extractor | None = None
        self.warnings: list[str] = []
        if kinds := [name for name in ("frechet", "kernel") if name in config.metrics]:
            self.extractor = build_features(config.measure.features, self.studio.device)
            counts = {"the set": len(self.rows.ids)}
            self.warnings = require_enough(kinds, counts, self.extractor, config.measure.splits)
        self.lpips = Lpips(self.studio.device) if "lpips" in config.metrics else None
        self.holes = make_holes(config, self.rows, work)
        self.prompts = {  # what is missing is told before anything is painted
            (kind, condition): prompts_for(config, self.rows, kind, condition)
            for kind in config.kinds
            for condition in config.conditions
        }

    def run(self, kind: HoleKind) -> str | None:
        """One kind of hole."""
        bench = Bench(self.config.out / "measured" / kind, self.work, self.config.measure.batch_size)
        entries = [*self._entries(kind), *self._sanity(kind)]
        return run_protocol(self.config.out / kind, self._protocol(kind), entries, list(self._sides()), bench)

    def _folder(self, name: str) -> Path:
        return self.config.out / "pictures" / name

    def _entries(self, kind: HoleKind) -> Iterator[Entry]:
        holes, paint = self.holes[kind], self.config.paint
        for system in self.config.systems:
            for condition in self.config.conditions:
                name, prompts = f"{system.name}-{condition}", self.prompts[kind, condition]
                beside = {"truth": holes.truths, "mask": holes.masks}
                if system.pictures is not None:
                    folder = system.pictures / f"{kind}-{condition}"
                    files = pictures_of(folder, self.rows.ids, f"{kind}, {name}", self.rows.all_ids)
                    yield Entry(Cell(name, files, beside), system_facts(system), {}, warnings=[UNKNOWN_GENERATION])
                    continue
                made = generation_facts(paint, prompts=condition, prompts_sha256=texts_hash(prompts), hole=kind)
                files = self._paint(system, f"{kind}-{name}", holes, prompts, made)
                yield Entry(Cell(name, files, beside), system_facts(system), made)

    def _paint(
        self, system: SystemConfig, folder: str, holes: Holes, prompts: Mapping[str, str], made: Mapping[str, object]
    ) -> dict[str, Path]:
        def painter(sampler: Sampler, ids: Sequence[str]) -> Sequence[Painted]:
            truths, masks = ([files[id] for id in ids] for files in (holes.truths, holes.masks))
            texts, seeds = [prompts[id] for id in ids], seeds_of(self.config.paint.seed, ids)
            return sampler.inpaint(texts, truths, masks, None, seeds, paint_settings(self.config.paint))

        facts = {**made, "hole_seed": self.config.hole_seed, "picture_side": self.config.side}
        return self.studio.paint_share(system, self._folder(folder), self.rows.ids, facts, painter)

    def _sanity(self, kind: HoleKind) -> Iterator[Entry]:
        holes = self.holes[kind]
        beside = {"truth": holes.truths, "mask": holes.masks}
        if "oracle" in self.config.sanity:
            yield Entry(Cell("oracle", holes.truths, beside), {"name": "true pictures"}, {}, compared=False)
        painters = [system for system in self.config.systems if system.pipeline is not None]
        if "autoencoder" in self.config.sanity and painters:
            files = reconstruct(self.studio, painters[0], self._folder("autoencoder"), holes.truths)
            facts = {**system_facts(painters[0]), "name": "autoencoder of the first system, on true pictures"}
            yield Entry(Cell("autoencoder", files, beside), facts, {}, compared=False)

    def _sides(self) -> Iterator[Sides]:
        """Each prompt against none, and each system against the first."""
        first, *others = [system.name for system in self.config.systems]
        conditions = self.config.conditions
        for name in (first, *others):
            if "empty" in conditions:
                for condition in conditions:
                    if condition != "empty":
                        yield Sides.of(f"{name}-{condition}", f"{name}-empty", f"{condition} prompt, {name}")
        for other in others:
            for condition in conditions:
                yield Sides.of(f"{other}-{condition}", f"{first}-{condition}", f"tuning, {condition}")

    def _protocol(self, kind: HoleKind) -> Protocol:
        config, holes = self.config, self.holes[kind]
        meters = [hole_meter(holes, self.lpips, self.extractor, "pixels" in config.metrics, self.studio.device)]
        if "world" in config.metrics:
            scenes = {id: scene_of(record) for id, record in self.rows.records.items()}
            meters.append(world_hole_meter(holes, scenes, config.measure.preset))
        distances = {
            f"{name}{ending}": Distance(name, f"{column}features")
            for name in ("frechet", "kernel")
            if name in config.metrics
            for ending, column in (("", ""), ("_raw", "raw_"))
        }
        return Protocol(
            task="painting",
            data={**self.rows.facts(), "hole": kind, "hole_seed": config.hole_seed, "side": config.side},
            measure=config.measure,
            preset=config.preset,
            meters=meters,
            headers=HEADERS,
            compared=COMPARED,
            varied=VARIED,
            distances=distances,
            extractor=self.extractor,
            reference=Cell("reference", holes.truths),
            reference_meters=[file_meter(), *([feature_meter(self.extractor)] if self.extractor is not None else [])],
            warnings=self.warnings,
        )
