"""Guards what a training run sees of the pictures people really have: odd modes, broken files, paths that wander off.

Run: pytest tests/unit/test_images.py
"""

import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from llmga.images import PictureError, blank_holes, fit_picture, open_mask, open_picture, picture_path
from llmga.masks import Mask
from llmga.stage1.pixels import PixelEncoder

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
ROWS, COLUMNS = np.mgrid[:160:4, :240:4]
SMOOTH = Image.fromarray(np.stack([COLUMNS, ROWS, np.full_like(ROWS, 90)], axis=2).astype(np.uint8))


def pixel(picture: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = picture.getpixel((x, y))
    assert isinstance(value, tuple)
    return tuple(map(int, value))


# ---------------------------------------------------------------- odd, but readable


def test_an_ordinary_picture_is_read_exactly(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "a.png")
    picture = open_picture(tmp_path / "a.png")
    assert picture.mode == "RGB" and picture.tobytes() == PHOTO.tobytes()


def test_type_comes_from_content_and_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (10, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "really_a_gif.jpg", format="GIF", save_all=True, append_images=frames[1:])
    picture = open_picture(tmp_path / "really_a_gif.jpg")
    assert picture.size == (10, 8) and pixel(picture) == (255, 0, 0)


@pytest.mark.parametrize("name", ["rgba.png", "grey_alpha.png", "palette.png", "palette.gif", "colour_key.png"])
def test_transparent_parts_lie_on_white(name: str, tmp_path: Path) -> None:
    """Left half transparent (with dark pixels below), right half solid blue or dark grey."""
    colours = np.zeros((4, 8, 4), np.uint8)
    colours[:, 4:] = (0, 0, 200, 255)
    picture = Image.fromarray(colours)
    path = tmp_path / name
    if name == "rgba.png":
        picture.save(path)
    elif name == "grey_alpha.png":
        picture.convert("LA").save(path)
    elif name.startswith("palette"):
        indices = Image.fromarray((colours[:, :, 3] // 255).astype(np.uint8), mode="P")
        indices.putpalette([0, 0, 0, 0, 0, 200])
        indices.save(path, transparency=0)
    else:
        picture.convert("RGB").save(path, transparency=(0, 0, 0))
    opened = open_picture(path)
    solid = (23, 23, 23) if name == "grey_alpha.png" else (0, 0, 200)
    assert pixel(opened) == (255, 255, 255) and pixel(opened, 7, 3) == solid


def test_half_transparent_pixels_are_blended(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert pixel(open_picture(tmp_path / "a.png")) == (204, 204, 204)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 257, 40000, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    opened = open_picture(path)
    assert [pixel(opened, x) for x in range(4)] == [(grey,) * 3 for grey in (0, 1, 156, 255)]


def test_sixteen_bit_colour_is_scaled(tmp_path: Path) -> None:
    """Pillow cannot write such a file, so its three chunks are written here."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + struct.pack(">3H", 65535, 40000, 0)
    header = struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert pixel(open_picture(tmp_path / "deep.png")) == (255, 156, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    opened = open_picture(path)
    assert opened.mode == "RGB" and min(pixel(opened)) >= 253


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    SMOOTH.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    difference = np.asarray(open_picture(tmp_path / "a.jpg")).astype(int) - np.asarray(SMOOTH)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation: int, tmp_path: Path) -> None:
    upright = Image.new("RGB", (6, 4), "white")
    upright.putpixel((1, 0), (255, 0, 0))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left: a viewer turns it right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert open_picture(tmp_path / "a.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"]
)
def test_damaged_exif_does_not_cost_the_picture(exif: bytes, tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (40, 24)


@pytest.mark.parametrize("mode", ["squash", "crop", "pad", "laion", "clip"])
@pytest.mark.parametrize("shape", [(3, 2000), (5000, 1), (1, 1)])
def test_extreme_ratios_are_read_and_fitted(shape: tuple[int, int], mode, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A centre crop by way of the whole scaled picture would need 512 x 2,560,000 pixels for the second shape."""
    Image.new("RGB", shape, "red").save(tmp_path / "line.png")
    fitted = fit_picture(open_picture(tmp_path / "line.png"), 512, mode, "laion/line.png")
    middle = [pixel(fitted, x, y) for x, y in ((255, 255), (255, 256), (256, 255), (256, 256))]
    assert fitted.size == (512, 512) and (255, 0, 0) in middle


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "file is empty"),
        ("text.jpg", b"<html>404 Not Found</html>", r"not a picture .* first bytes are b'<html>404 Not Fo'"),
        ("drawing.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),  # would start a program
    ],
)
def test_what_is_no_picture_is_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PictureError, match=f"{name}: .*{reason}"):
        open_picture(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_picture_is_refused(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    PHOTO.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(PictureError, match=r"damaged or cut short|not a picture"):
        open_picture(path)


def test_junk_in_every_byte_never_raises_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a"
    for suffix in ("jpeg", "png", "gif", "webp", "tiff"):
        PHOTO.save(path, format=suffix)
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            damaged = content.copy()
            damaged[rng.integers(0, len(content), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
            try:
                assert open_picture(path).mode == "RGB"
            except PictureError as error:
                assert error.path == path


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"missing\.jpg: the file does not exist"):
        open_picture(tmp_path / "missing.jpg")
    with pytest.raises(PictureError, match="this is a folder"):
        open_picture(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(PictureError, match=r"pipe\.jpg: this is a pipe or a device") as caught:
        open_picture(tmp_path / "pipe.jpg")
    assert caught.value.code == "picture_unreadable"


def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)  # 50 kB on disk, 1.1 GiB as RGB
    with pytest.raises(PictureError, match="too many pixels for Pillow's own limit"):
        open_picture(path)
    Image.new("1", (10000, 9000)).save(path)
    with pytest.raises(PictureError, match="10000 x 9000 is more than 89,478,485 pixels"):
        open_picture(path)
    PHOTO.save(path)
    with pytest.raises(PictureError, match="40 x 24 is more than 959 pixels; shrink it or raise the limit"):
        open_picture(path, max_pixels=959)
    assert open_picture(path, max_pixels=960).size == (40, 24)


def test_values_without_a_known_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(PictureError, match="floating-point pixels"):
        open_picture(tmp_path / "float.tif")
    Image.fromarray(np.array([[-5, 70000]], np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(PictureError, match="run from -5 to 70000; expected 0 to 65535"):
        open_picture(tmp_path / "deep.tif")


def test_the_error_reaches_another_process_whole() -> None:
    error = pickle.loads(pickle.dumps(PictureError("a/b.jpg", "the file is empty")))
    assert (error.path, error.reason, str(error)) == (
        Path("a/b.jpg"),
        "the file is empty",
        "a/b.jpg: the file is empty",
    )


# ---------------------------------------------------------------- paths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "coco").mkdir(parents=True)
    PHOTO.save(folder / "coco" / "a.png")
    PHOTO.save(tmp_path / "outside.png")
    return folder


def test_names_below_the_root_are_found(root: Path) -> None:
    for name in ("coco/a.png", "./coco/../coco/a.png", str(root / "coco" / "a.png")):
        assert open_picture(picture_path(root, name)).size == (40, 24)
    assert picture_path(root, "not/there.png") == root.resolve() / "not" / "there.png"


@pytest.mark.parametrize("name", ["../outside.png", "../../outside.jpg", "coco/../../outside.png", "/etc/passwd", ".."])
def test_names_that_leave_the_root_are_refused(name: str, root: Path) -> None:
    with pytest.raises(PictureError, match=r"outside .*pictures; move it below, or set image_root"):
        picture_path(root, name)


def test_links_may_not_leave_the_root_but_the_root_may_be_one(root: Path, tmp_path: Path) -> None:
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "inner.png").symlink_to(root / "coco" / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (tmp_path / "alias").symlink_to(root)
    with pytest.raises(PictureError, match=r"outside\.png, outside"):
        picture_path(root, "link.png")
    assert open_picture(picture_path(root, "inner.png")).size == (40, 24)
    assert open_picture(picture_path(tmp_path / "alias", "coco/a.png")).size == (40, 24)
    with pytest.raises(PictureError):
        open_picture(picture_path(root, "loop.png"))


def test_a_folder_beside_the_root_with_the_same_beginning_is_outside(root: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures2").mkdir()
    with pytest.raises(PictureError, match="outside"):
        picture_path(root, "../pictures2/a.png")


@pytest.mark.parametrize("name", ["", "a\0.png"])
def test_names_that_are_no_names_are_refused(name: str, root: Path) -> None:
    with pytest.raises(PictureError, match="expected a path below this folder"):
        picture_path(root, name)


def test_a_name_too_long_for_the_file_system_is_a_picture_error(root: Path) -> None:
    with pytest.raises(PictureError):
        open_picture(picture_path(root, "x" * 5000 + ".png"))


# ---------------------------------------------------------------- shaping


def test_squash_ignores_the_ratio_and_leaves_a_fitting_square_alone() -> None:
    assert fit_picture(SMOOTH, 32, "squash").tobytes() == SMOOTH.resize((32, 32), Image.Resampling.LANCZOS).tobytes()
    square = PHOTO.crop((0, 0, 24, 24))
    for mode in ("squash", "crop", "pad"):
        assert fit_picture(square, 24, mode).tobytes() == square.tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(451, 300), (427, 640), (200, 64)])
def test_crop_equals_scaling_the_whole_and_cutting_the_centre(shape: tuple[int, int]) -> None:
    picture = PHOTO.resize(shape, Image.Resampling.BICUBIC)
    width, height = (int(side * 128 / min(shape)) for side in shape)
    left, top = (width - 128) // 2, (height - 128) // 2
    expected = picture.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + 128, top + 128))
    difference = np.asarray(fit_picture(picture, 128, "crop")).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1  # one grey level, from single-precision box corners inside Pillow


@pytest.mark.parametrize("size", [32, 33, 224])
@pytest.mark.parametrize("shape", [(451, 300), (427, 640), (200, 64), (31, 32), (33, 500), (336, 336), (7, 5)])
def test_clip_mode_is_what_clips_image_processor_does(shape: tuple[int, int], size: int) -> None:
    crop = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=crop, do_normalize=False, do_rescale=False
    )
    noise = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    fitted = fit_picture(picture, size, "clip")
    assert np.array_equal(np.asarray(fitted), expected)
    encoder = PixelEncoder(CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop))
    assert np.array_equal(encoder(fitted), encoder(picture))  # and so the second time nothing happens


def test_pad_keeps_everything_on_clips_mean_colour() -> None:
    fitted = fit_picture(Image.new("RGB", (40, 20), "red"), 32, "pad")
    rows = [pixel(fitted, 5, y) for y in range(32)]
    assert rows == [(122, 116, 104)] * 8 + [(255, 0, 0)] * 16 + [(122, 116, 104)] * 8


def test_the_laion_rule_reads_the_path_in_any_case() -> None:
    for source, mode in (("imgs/LAION/1.jpg", "crop"), (Path("laion_3.jpg"), "crop"), ("COCO/1.jpg", "squash")):
        assert fit_picture(SMOOTH, 16, "laion", source).tobytes() == fit_picture(SMOOTH, 16, mode).tobytes()  # type: ignore[arg-type]


def test_an_unknown_mode_or_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match="picture mode 'stretch' is unknown; expected one of squash, crop, pad, laion, clip"
    ):
        fit_picture(PHOTO, 8, "stretch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="picture size is 0"):
        fit_picture(PHOTO, 0, "squash")


def test_holes_are_black_and_kept_pixels_untouched() -> None:
    hole = np.zeros((24, 40), np.uint8)
    hole[:, :10] = 1
    blanked = np.asarray(blank_holes(PHOTO, Mask(hole, "box")))
    assert not blanked[:, :10].any() and np.array_equal(blanked[:, 10:], np.asarray(PHOTO)[:, 10:])
    with pytest.raises(ValueError, match="picture is 40 x 24, its mask 24 x 40"):
        blank_holes(PHOTO, Mask(hole.T, "box"))


# ---------------------------------------------------------------- mask files


@pytest.mark.parametrize("kind", ["0/1", "0/255", "bool", "rgb", "grey"])
def test_mask_files_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    hole = np.zeros((20, 30), np.uint8)
    hole[5:15, 10:20] = 1
    picture = {
        "0/1": lambda: Image.fromarray(hole),
        "0/255": lambda: Image.fromarray(hole * 255),
        "bool": lambda: Image.fromarray(hole.astype(bool)),
        "rgb": lambda: Image.fromarray(hole * 255).convert("RGB"),
        "grey": lambda: Image.fromarray(np.where(hole, 125, 124).astype(np.uint8)),
    }[kind]()
    picture.save(tmp_path / "mask.png")
    mask = open_mask(tmp_path / "mask.png", 20, "crop")
    assert mask.hole.shape == (20, 20) and mask.hole.dtype == np.uint8
    assert np.array_equal(mask.hole, hole[:, 5:25]) and mask.kind == "irregular"


def test_a_mask_file_that_keeps_one_rectangle_is_outpainting(tmp_path: Path) -> None:
    for name, box in (("left", (0, 0, 4, 16)), ("frame", None), ("none", (0, 0, 0, 0)), ("all", (0, 0, 16, 16))):
        hole = np.zeros((16, 16), np.uint8)
        if box is None:
            hole[:] = 255
            hole[4:12, 3:13] = 0
        else:
            hole[box[1] : box[3], box[0] : box[2]] = 255
        Image.fromarray(hole).save(tmp_path / "mask.png")
        mask = open_mask(tmp_path / "mask.png", 16)
        assert mask.kind == {"left": "outpainting", "frame": "outpainting", "none": "irregular", "all": "full"}[name]


def test_a_padded_mask_keeps_the_padding(tmp_path: Path) -> None:
    Image.new("L", (20, 10), 255).save(tmp_path / "mask.png")
    assert (
        open_mask(tmp_path / "mask.png", 20, "pad").hole.any(axis=1).tolist() == [False] * 5 + [True] * 10 + [False] * 5
    )
