"""Painted holes, measured: raw output and composite against the true picture, and what they show of hidden shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmga.evaluation.bench import Columns, Meter, Score
from llmga.evaluation.holes import Holes
from llmga.evaluation.meters import RATE, features_of, unit_range
from llmga.images import MASK_THRESHOLD
from llmga.metrics.extractors import Extractor, protocol_of
from llmga.metrics.holes import colour_fit, hole_psnr, preserved_psnr, seam_excess
from llmga.metrics.lpips import Lpips
from llmga.metrics.picture_files import read_pictures
from llmga.metrics.pictures import ssim_luma
from llmga.toyworld.parse import ParsedScene, parse_batch
from llmga.toyworld.scene import Scene
from llmga.toyworld.visibility import is_visible

MAX_PSNR = 100.0  # dB, of pictures that agree bit for bit
_LESS = Score("of [0, 1]", False)
PIXEL_SCORES = {
    "hole_psnr": Score("dB"),
    "preserved_psnr": Score("dB"),
    "seam": _LESS,
    "gain_error": Score("", False),
    "bias_error": _LESS,
    "ssim": Score(),
}


def hole_meter(
    holes: Holes, lpips: Lpips | None, extractor: Extractor | None, pixels: bool, device: torch.device
) -> Meter:
    """Features and LPIPS of raw output and composite; PSNR in the hole and, raw, outside; seam, gain, bias, SSIM.

    Seam, gain and bias are how far they are from the truth's 0, 1 and 0; gain and bias compare the hole's pixels.

    Args:
        device: where LPIPS is.
    """

    def measure(files: Mapping[str, Path]) -> Columns:
        raw, truth, hole = _read(files, holes)
        composite = torch.where(hole, raw, truth)
        columns: Columns = {}
        for before, behind, pictures in (("", "", composite), ("raw_", "_raw", raw)):
            if extractor is not None:
                columns[f"{before}features"] = features_of(extractor, pictures, files)
            if lpips is not None:
                pair = (unit_range(each).to(device) for each in (pictures, truth))
                columns[f"lpips{behind}"] = lpips(*pair).double().cpu().numpy()
        return columns | (_pixels(raw, composite, truth, hole) if pixels else {})

    made_by: dict[str, Any] = {"composite": "kept pixels pasted back, bit for bit", "range": "[0, 1]"}
    scores = {name: Score("", False) for name in ("lpips", "lpips_raw")} if lpips is not None else {}
    made_by |= {"lpips": "vgg"} if lpips is not None else {}
    made_by |= protocol_of(extractor) if extractor is not None else {}
    return Meter("holes", made_by, measure, scores | (PIXEL_SCORES if pixels else {}))


def world_hole_meter(holes: Holes, scenes: Mapping[str, Scene], preset: str) -> Meter:
    """What composites show of shapes that the hole hides for the most part, by the toy world's parser.

    `hidden` are their attributes; a hidden shape that is not drawn is wrong in all of them.
    """

    def measure(files: Mapping[str, Path]) -> Columns:
        raw, truth, hole = _read(files, holes)
        shown = parse_batch(torch.where(hole, raw, truth).permute(0, 2, 3, 1).numpy(), preset)
        pairs = [_hidden(scene, scenes[id], one[0]) for scene, id, one in zip(shown, files, hole, strict=True)]
        cells = [(len(scene.residual) - len(scene.unparseable), len(scene.residual)) for scene in shown]
        return {name: np.array(of, np.int64).reshape(-1, 2) for name, of in (("hidden", pairs), ("parseable", cells))}

    return Meter("world", {"preset": preset}, measure, {"hidden": RATE, "parseable": RATE})


def _read(files: Mapping[str, Path], holes: Holes) -> tuple[Tensor, Tensor, Tensor]:
    """Raw output at the size of the truth, the truth, both (N, 3, H, W) uint8, and the hole, (N, 1, H, W) bool."""
    truth = read_pictures({id: holes.truths[id] for id in files})
    raw = read_pictures(files, side=truth.shape[2])
    mask = read_pictures({id: holes.masks[id] for id in files})
    return raw, truth, mask[:, :1] >= MASK_THRESHOLD


def _pixels(raw: Tensor, composite: Tensor, truth: Tensor, hole: Tensor) -> Columns:
    raw, composite, truth = (unit_range(pictures) for pictures in (raw, composite, truth))
    fit = colour_fit(composite, truth, hole)
    found = {
        "hole_psnr": hole_psnr(composite, truth, hole).clamp(max=MAX_PSNR),
        "preserved_psnr": preserved_psnr(raw, truth, hole).clamp(max=MAX_PSNR),
        "seam": seam_excess(composite, truth, hole).abs(),
        "gain_error": (fit.gain - 1).abs(),
        "bias_error": fit.bias.abs(),
        "ssim": ssim_luma(composite, truth),
    }
    return {name: values.double().numpy() for name, values in found.items()}


def _hidden(shown: ParsedScene, scene: Scene, hole: Tensor) -> tuple[int, int]:
    """Right and all attributes of the shapes that are mostly hidden."""
    read, covered = shown.facts(), hole.numpy().astype(np.uint8)
    wanted = {
        (kind, obj.cell): value
        for obj in scene.objects
        if not is_visible(scene, obj.cell, covered)
        for kind, value in obj.attributes().items()
    }
    return sum(read.get(fact) == value for fact, value in wanted.items()), len(wanted)
