"""Held-out figures and picture strips while a restorer trains."""

import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from llmga.diffrir.data import collate
from llmga.diffrir.network import DiffRIR
from llmga.diffrir.phases import network_inputs, target_of
from llmga.diffrir.reference import compose, hole_of
from llmga.diffrir.restore import to_uint8
from llmga.files import atomic_write, written_aside
from llmga.metrics.holes import colour_fit, hole_psnr, seam_excess
from llmga.metrics.pictures import psnr_luma, ssim_luma
from llmga.runtime import Ranks, sum_over_ranks

Pair = dict[str, Any]
_NOISE_SEED = 0
_MAX_PSNR = 100.0  # of pictures that agree bit for bit
_GAP_PX = 2


def restore_pairs(model: DiffRIR, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[Pair, Tensor]]:
    """Batches of held-out pairs with the raw restored pictures, (B, 3, H, W) in [0, 1].

    Phase prior may look at the truth, as its teacher does; the noise of other phases is the same at every step.
    """
    device = next(model.parameters()).device
    for first in range(0, len(pairs), batch_size):
        batch = collate(list(pairs[first : first + batch_size]))
        batch = {name: v.to(device) if torch.is_tensor(v) else v for name, v in batch.items()}
        inputs = network_inputs(batch, model.reference)
        if model.phase == "prior":
            image = model(inputs, target_of(batch)).image
        else:
            numbers = range(first, first + len(inputs))
            rows = [torch.randn(model.prior_width, generator=_generator(index)) for index in numbers]
            image = model(inputs, noise=torch.stack(rows).to(device)).image
        yield batch, image.float().clamp(0, 1)


def measure(batch: Pair, images: Tensor, border: int = 0) -> dict[str, Tensor]:
    """Figures of each restored picture, kept pixels pasted back; (B,) float64 each, nan where one has no meaning.

    psnr, ssim: luma of the whole picture. hole_psnr: RGB inside the hole. seam, gain_error, bias_error: see
    `llmga.metrics.holes`; how far they are from the truth's 0, 1 and 0, without sign.
    """
    truth, mask = batch["ground_truth"], hole_of(batch["edit_mask"])
    whole = to_uint8(compose(images, truth, mask)).float() / 255
    fit = colour_fit(whole, truth, mask)
    figures = {
        "psnr": psnr_luma(whole, truth, border).clamp(max=_MAX_PSNR),
        "ssim": ssim_luma(whole, truth, border),
        "hole_psnr": hole_psnr(whole, truth, mask).clamp(max=_MAX_PSNR),
        "seam": seam_excess(whole, truth, mask),
        "gain_error": (fit.gain - 1).abs(),
        "bias_error": fit.bias.abs(),
    }
    return {name: values.double().cpu() for name, values in figures.items()}


def validate(
    model: DiffRIR,
    pairs: Sequence[Pair],
    batch_size: int,
    ranks: Ranks,
    border: int = 0,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Means over all held-out pictures under names that begin with `eval_`; every rank measures its share."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    mine = pairs[ranks.rank :: ranks.world_size]
    for batch, images in restore_pairs(model, mine, batch_size):
        figures = measure(batch, images, border)
        if lpips is not None:
            whole = compose(images, batch["ground_truth"], batch["edit_mask"])
            figures["lpips"] = lpips(whole, batch["ground_truth"]).double().cpu()
        for name, values in figures.items():
            known = values.isfinite()
            sums[name] = sums.get(name, 0.0) + float(values[known].sum())
            counts[name] = counts.get(name, 0.0) + float(known.sum())
    names = ["psnr", "ssim", "hole_psnr", "seam", "gain_error", "bias_error", *(["lpips"] if lpips else [])]
    totals = sum_over_ranks([sums.get(name, 0.0) for name in names] + [counts.get(name, 0.0) for name in names])
    return {
        f"eval_{name}": total / count
        for name, total, count in zip(names, totals[: len(names)], totals[len(names) :], strict=True)
        if count
    }


class Strips:
    """Writes `samples/step-<n>.png`, one row per picture, and `samples/index.html` with those of all steps.

    Args:
        folder: made when missing.
        pairs: the same at every step.
    """

    def __init__(self, folder: Path, pairs: Sequence[Pair], reference: bool) -> None:
        self.folder, self.pairs, self.reference = folder, list(pairs), reference
        self.titles = ["degraded", *(["reference"] if reference else []), "restored", "pasted", "truth"]

    def cut_after(self, step: int) -> None:
        """Forget the strips past `step`, which the resumed run will write again."""
        for number, path in self._steps():
            if number > step:
                path.unlink()

    def write(self, model: DiffRIR, step: int, batch_size: int) -> list[np.ndarray]:
        """Restore the pictures and write the strip of a step; returns its rows, (H, W, 3) uint8 each."""
        rows = [
            row for batch, images in restore_pairs(model, self.pairs, batch_size) for row in self._rows(batch, images)
        ]
        height = sum(len(row) + _GAP_PX for row in rows) - _GAP_PX
        sheet = np.full((height, rows[0].shape[1], 3), 255, np.uint8)
        top = 0
        for row in rows:
            sheet[top : top + len(row)] = row
            top += len(row) + _GAP_PX
        path = self.folder / f"step-{step}.png"
        with written_aside(path) as aside:
            Image.fromarray(sheet).save(aside, format="PNG")
        atomic_write(self.folder / "index.html", self._page())
        return rows

    def _rows(self, batch: Pair, images: Tensor) -> Iterator[np.ndarray]:
        truth, mask = batch["ground_truth"], batch["edit_mask"]
        shown = [F.interpolate(batch["low_quality"], truth.shape[-2:], mode="nearest")]
        if self.reference:
            shown.append(target_of(batch).masked_fill(hole_of(mask), 0))
        shown += [images, compose(images, truth, mask), truth]
        gap = torch.ones_like(truth[..., :_GAP_PX])
        parts = [part for picture in shown for part in (picture, gap)][:-1]
        yield from to_uint8(torch.cat(parts, dim=3)).permute(0, 2, 3, 1).cpu().numpy()

    def _steps(self) -> list[tuple[int, Path]]:
        """Step and file of every strip, the newest first."""
        found = [(path.stem.removeprefix("step-"), path) for path in self.folder.glob("step-*.png")]
        return sorted(((int(number), path) for number, path in found if number.isdecimal()), reverse=True)

    def _page(self) -> str:
        shots = "\n".join(
            f'<h2>after step {number}</h2>\n<img src="{html.escape(path.name)}" alt="{", ".join(self.titles)}">'
            for number, path in self._steps()
        )
        return _PAGE.format(columns=" | ".join(self.titles), shots=shots)


def _generator(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(_NOISE_SEED + index)


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Restored while learning</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
  img {{ width: 100%; image-rendering: pixelated; border-radius: 4px; }}
  h2 {{ font-size: 14px; margin: 1.5rem 0 .4rem; }}
</style>
<h1>Restored while learning</h1>
<p>From left to right: {columns}.</p>
{shots}
</html>
"""
