"""Pictures brought to the size that a network wants. For small pictures the rule moves a Frechet distance more than
the choice of pictures does, so its name stands in every protocol, and distances under different rules do not compare.

Pictures are (N, 3, H, W) uint8 RGB.
"""

from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from llmga.metrics.features import MetricError

Resize = Literal["clean", "tf1"]


def resize(images: Tensor, side: int, rule: Resize) -> Tensor:
    """Squash to a square.

    Args:
        rule: "clean": Pillow's bicubic, each channel in floating point, clipped and not rounded, as clean-fid does.
            "tf1": the bilinear of TensorFlow 1, without smoothing and off by half a pixel, as the published figures of
            FID have it.
    Returns:
        (N, 3, side, side) float32 in [0, 255], on the device of the pictures.
    Raises:
        MetricError: not such pictures, or an unknown rule.
    Source: Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation" (2022); torch-fidelity.
    """
    checked_images(images)
    if rule == "tf1":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(side, side), align_corners=False)
    if rule == "clean":
        channels = images.cpu().numpy().astype(np.float32).reshape(-1, *images.shape[2:])
        resized = [
            np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)) for channel in channels
        ]
        stacked = torch.from_numpy(np.stack(resized)).clamp(0, 255)
        return stacked.reshape(len(images), 3, side, side).to(images.device)
    raise MetricError(f"resize rule {rule!r} is unknown; expected one of {', '.join(get_args(Resize))}")


def resize_and_crop(images: Tensor, resize_px: int, crop_px: int) -> Tensor:
    """Pillow's bicubic on the short side, then the centre: the preprocessing that CLIP and DINO were published with.

    Returns:
        (N, 3, crop_px, crop_px) uint8, on the device of the pictures.
    Raises:
        MetricError: not such pictures.
    """
    checked_images(images)
    shaped = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        picture = F.resize(Image.fromarray(pixels), resize_px, InterpolationMode.BICUBIC)
        shaped.append(np.asarray(F.center_crop(picture, crop_px)))
    return torch.from_numpy(np.stack(shaped)).permute(0, 3, 1, 2).to(images.device)


def checked_images(images: Tensor) -> Tensor:
    """The pictures themselves.

    Raises:
        MetricError: they are not (N, 3, H, W) uint8 with N of 1 or more.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise MetricError(
            f"pictures are {tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}; expected (N, 3, H, W) "
            "uint8 with values 0 to 255, one picture or more"
        )
    return images
