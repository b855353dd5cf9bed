"""From a picture of any shape to the rectangle that the UNet is trained on, and the numbers SDXL is told about it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, slots=True)
class Crop:
    """Which part of a picture becomes an example.

    Attributes:
        size: (height, width) of the result.
        position: where the cut lies along the side that is too long, 0 to 1 for (vertical, horizontal).
        flipped: mirrored left to right, before it is cut.
    """

    size: Size
    position: tuple[float, float] = (0.5, 0.5)
    flipped: bool = False


def crop_picture(picture: Image.Image, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """Scale a picture so that it just covers the rectangle, and cut; a smaller picture is enlarged.

    Args:
        picture: 8-bit RGB, or grey for masks.
    Returns:
        uint8 of shape size or (*size, 3); and SDXL's time ids as float32: height and width of the picture, top and
        left of the cut in the scaled (and mirrored) picture, height and width of the rectangle.
    Source: as published, bilinear and around the centre; there, mirrored pictures were told a wrong left.
    """
    height, width = crop.size
    scale = max(height / picture.height, width / picture.width)
    scaled_height, scaled_width = max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
    top = round(crop.position[0] * (scaled_height - height))
    left = round(crop.position[1] * (scaled_width - width))
    left_here = scaled_width - width - left if crop.flipped else left  # of the picture as it lies
    x_scale, y_scale = picture.width / scaled_width, picture.height / scaled_height
    box = (left_here * x_scale, top * y_scale, (left_here + width) * x_scale, (top + height) * y_scale)
    cut = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))
    time_ids = np.array([picture.height, picture.width, top, left, height, width], np.float32)
    return (cut[:, ::-1] if crop.flipped else cut), time_ids


def to_unit_range(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to (3, H, W) float32 in [-1, 1]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32) / 127.5 - 1


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """Rectangles of about resolution x resolution pixels whose sides are multiples of `step`, the square among them.

    For each width within the aspect limits, the height that comes closest to the area; square first.
    """
    square = max(step, round(resolution / step) * step)
    found = {(square, square)}
    for width in range(step, math.ceil(resolution * max_aspect / step) * step + 1, step):
        height = max(step, round(resolution**2 / width / step) * step)
        if max(height, width) / min(height, width) <= max_aspect:
            found |= {(height, width), (width, height)}
    return [(square, square), *sorted(found - {(square, square)})]


def nearest_bucket(height: int, width: int, sizes: list[Size]) -> int:
    """Index of the rectangle whose aspect ratio is closest to a picture's."""
    aspect = math.log(width / height)
    return min(range(len(sizes)), key=lambda k: abs(math.log(sizes[k][1] / sizes[k][0]) - aspect))


def group_by_bucket(buckets: Iterator[int], per_step: int, total_steps: int) -> Iterator[list[int]]:
    """Positions of an endless order of examples, regrouped so that the examples of a step share a bucket.

    Each bucket fills up as its examples come and is given out when it holds a step's worth, so that nothing is drawn
    twice and the order depends on nothing but the examples.

    Args:
        buckets: bucket of each example in the order.
        per_step: examples of a step, over all processes.
    Yields:
        `per_step` positions for each of the `total_steps` steps.
    """
    waiting: dict[int, list[int]] = {}
    given = 0
    for position, bucket in enumerate(buckets):
        if given == total_steps:
            return
        queue = waiting.setdefault(bucket, [])
        queue.append(position)
        if len(queue) == per_step:
            yield waiting.pop(bucket)
            given += 1
