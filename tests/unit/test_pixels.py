"""Guards the pictures the vision tower reads: one grey level off would go unnoticed by every other test."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llmga.stage1.pixels import PixelEncoder


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def clip(resize: int, crop: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": resize}, crop_size={"height": crop, "width": crop})


@pytest.mark.parametrize(
    "processor",
    [
        clip(64, 64),
        clip(336, 336),
        clip(72, 64),  # even a 64 px picture is resized, to 72, and cropped
        SiglipImageProcessorPil(size={"height": 64, "width": 64}),
    ],
    ids=["clip 64", "clip 336", "clip 72 to 64", "siglip 64"],
)
@pytest.mark.parametrize("size", [(64, 64), (336, 336), (512, 512), (90, 64), (50, 120)])
def test_pixel_values_are_those_of_the_image_processor_bit_for_bit(processor, size):
    picture = noise(*size)
    expected = processor(picture, return_tensors="np")["pixel_values"][0]
    encoder = PixelEncoder(processor)
    found = encoder(picture)
    assert found.dtype == np.float32 and found.shape == encoder.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


def test_grey_pictures_are_read_as_rgb():
    encoder = PixelEncoder(clip(64, 64))
    np.testing.assert_array_equal(encoder(noise(64, 64, "L")), encoder(noise(64, 64, "L").convert("RGB")))


def test_shown_is_what_the_tower_sees():
    picture = noise(96, 64)
    assert np.array_equal(np.asarray(PixelEncoder(clip(64, 64)).shown(picture)), np.asarray(picture)[:, 16:80])


def test_another_backend_is_refused():
    class TorchvisionProcessor:
        backend = "torchvision"

    with pytest.raises(ValueError, match=r"runs on the torchvision backend.*backend='pil'"):
        PixelEncoder(TorchvisionProcessor())
