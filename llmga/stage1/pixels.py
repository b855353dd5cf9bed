"""Pictures as the vision tower reads them: bit-identical to the image processor, without its cost per picture."""

from typing import Any

import numpy as np
from PIL import Image


class PixelEncoder:
    """Turn pictures into `pixel_values` exactly as an image processor with the PIL backend does.

    After resizing and cropping, the processor maps each 8-bit value of a channel to one float. That map is read from
    the processor once, as a table, so its rescaling and normalisation are reproduced bit for bit, whatever they are.
    A picture that has the tower's size already needs the table alone.

    Args:
        image_processor: of CLIP or SigLIP kind, with the PIL backend; the torchvision backend differs by up to two
            grey levels from what the published models were trained with.
    Attributes:
        shape: (3, H, W) of the pixel values of one square picture.
    Raises:
        ValueError: the image processor has another backend.
    """

    def __init__(self, image_processor: Any) -> None:
        backend = getattr(image_processor, "backend", "unknown")
        if backend != "pil":
            raise ValueError(
                f"the image processor runs on the {backend} backend, whose pixel values differ from those that the "
                "published models know; load it with AutoImageProcessor.from_pretrained(path, backend='pil')"
            )
        self._processor = image_processor
        ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2))
        as_floats = image_processor(ramp, do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"]
        self._table = np.ascontiguousarray(as_floats[0, :, :, 0], np.float32)  # (3, 256)
        probe = image_processor(Image.new("RGB", (32, 32)), return_tensors="np")["pixel_values"]
        self.shape: tuple[int, int, int] = tuple(probe.shape[1:])
        # Size 256 with crop 224 changes a 224 px picture too, so whether its own size passes unchanged is tried out.
        noise = np.random.default_rng(0).integers(0, 256, (*self.shape[1:], 3), dtype=np.uint8)
        self._own_size_passes = np.array_equal(
            self._through_processor(Image.fromarray(noise)), noise.transpose(2, 0, 1)
        )

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Encode one RGB picture of any size as (3, H, W) float32, normalised."""
        return np.stack([self._table[channel][values] for channel, values in enumerate(self._cropped(picture))])

    def shown(self, picture: Image.Image) -> Image.Image:
        """Return what the tower sees of a picture: resized and cropped, still in 8 bits."""
        return Image.fromarray(np.ascontiguousarray(self._cropped(picture).transpose(1, 2, 0)))

    def _cropped(self, picture: Image.Image) -> np.ndarray:
        """Resized and cropped, (3, H, W) uint8."""
        if self._own_size_passes and picture.mode == "RGB" and picture.size == self.shape[:0:-1]:
            return np.asarray(picture).transpose(2, 0, 1)
        return self._through_processor(picture)

    def _through_processor(self, picture: Image.Image) -> np.ndarray:
        encoded = self._processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")
        return np.asarray(encoded["pixel_values"][0])


def num_image_tokens(processor: Any, pixel_shape: tuple[int, int, int]) -> int:
    """How many placeholders a `LlavaProcessor` writes for one picture: its patches, plus CLS where that is kept."""
    patches = (pixel_shape[1] // processor.patch_size) * (pixel_shape[2] // processor.patch_size)
    without_cls = processor.vision_feature_select_strategy == "default"
    return patches + processor.num_additional_image_tokens - int(without_cls)
