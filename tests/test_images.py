"""What becomes of every kind of picture file, and which files are never decoded."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, PngImagePlugin

from lsgm.data import images
from lsgm.data.images import is_grey, load_image, read_image
from lsgm.errors import UserError

SIZE = 8
GREY = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) * 4
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def saved(folder: Path, array: np.ndarray, name: str = "x.png", **options: object) -> Path:
    Image.fromarray(array).save(folder / name, **options)
    return folder / name


def pixels(path: Path, channels: int = 1) -> np.ndarray:
    """(H, W), or (H, W, 3)."""
    return read_image(path, SIZE, channels).permute(1, 2, 0).numpy().squeeze()


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_image(path, SIZE, 3)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (GREY, "x.png"),
        (GREY.astype(np.uint16) * 257, "x.png"),
        (GREY.astype(np.uint16) * 257, "x.tif"),
        (GREY.astype(np.float32) / 255, "x.tif"),
    ],
    ids=["8 bits", "16 bits", "16-bit TIFF", "float TIFF"],
)
def test_grey_values_of_every_depth_are_scaled(tmp_path, array, name):
    path = saved(tmp_path, array, name)
    assert is_grey(path)
    np.testing.assert_array_equal(pixels(path), GREY)
    np.testing.assert_array_equal(pixels(path, 3), np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("array", [GREY.astype(np.uint16) * 257, GREY.astype(np.float32) / 255])
def test_a_tiff_whose_white_is_zero_is_inverted(tmp_path, array):
    path = saved(tmp_path, array, "x.tif")
    whole = bytearray(path.read_bytes())
    tag = whole.index(b"\x06\x01\x03\x00\x01\x00\x00\x00\x01\x00")  # PhotometricInterpretation 1
    whole[tag + 8] = 0
    path.write_bytes(whole)
    np.testing.assert_array_equal(pixels(path), 255 - GREY)


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (GREY.astype(np.float32), "numbers in [0, 1], and these are 0 to 252"),
        (np.full((SIZE, SIZE), np.nan, np.float32), "numbers in [0, 1], and these are nan to nan"),
        (GREY.astype(np.int32) * 257, "32-bit integer pixels do not say which value is white"),
    ],
    ids=["float up to 252", "NaN", "32-bit integers"],
)
def test_pixels_of_unknown_scale_are_refused(tmp_path, array, part):
    assert part in message(saved(tmp_path, array, "x.tif"))


@pytest.mark.parametrize("hidden", [0, 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_colours_do_not_show(tmp_path, hidden, channels):
    alpha = np.zeros((SIZE, SIZE), np.uint8)
    alpha[:, : SIZE // 2] = 255
    rgba = np.dstack([COLOUR, alpha])
    rgba[:, SIZE // 2 :, :3] = hidden
    seen = pixels(saved(tmp_path, rgba), channels)
    plain = pixels(saved(tmp_path, COLOUR, "plain.png"), channels)
    np.testing.assert_array_equal(seen[:, : SIZE // 2], plain[:, : SIZE // 2])
    assert (seen[:, SIZE // 2 :] == images.BACKGROUND).all()


def test_half_transparent_grey_is_mixed_with_the_background(tmp_path):
    la = np.dstack([GREY, np.full_like(GREY, 51)])  # alpha 1/5
    path = saved(tmp_path, la)
    assert is_grey(path)
    np.testing.assert_allclose(pixels(path), GREY * 0.2 + 255 * 0.8, atol=1)


@pytest.mark.parametrize("depth", ["palette", "8", "16"])
def test_a_transparent_colour_is_replaced(tmp_path, depth):
    step = 257 if depth == "16" else 1
    image = Image.fromarray(GREY.astype(np.uint16) * step if depth == "16" else GREY)
    if depth == "palette":
        image = image.convert("P")
    image.save(tmp_path / "x.png", transparency=100 * step)
    np.testing.assert_array_equal(
        pixels(tmp_path / "x.png"), np.where(GREY == 100, images.BACKGROUND, GREY)
    )


def test_colour_models_and_palettes(tmp_path):
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    cmyk.save(tmp_path / "x.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "x.tif", 3), COLOUR)
    palette = Image.fromarray(COLOUR).quantize(64, dither=Image.Dither.NONE)
    palette.save(tmp_path / "x.png")
    assert palette.mode == "P" and not is_grey(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels(tmp_path / "x.png", 3), np.array(palette.convert("RGB")))


def test_an_upright_first_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    path = saved(tmp_path, COLOUR, "x.png", exif=exif)
    np.testing.assert_array_equal(pixels(path, 3), np.rot90(COLOUR, -1))
    assert load_image(path).size == (SIZE, SIZE)
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    for name in ("x.gif", "x.tif", "x.webp"):
        first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
        np.testing.assert_array_equal(pixels(tmp_path / name), GREY)


def test_jpeg_2000_and_webp(tmp_path):
    for name, options in (("x.jp2", {"irreversible": False}), ("x.webp", {"lossless": True})):
        np.testing.assert_array_equal(pixels(saved(tmp_path, COLOUR, name, **options), 3), COLOUR)


def test_a_loaded_image_keeps_its_alpha(tmp_path):
    rgba = np.dstack([COLOUR, GREY])
    np.testing.assert_array_equal(np.asarray(load_image(saved(tmp_path, rgba))), rgba)


# What is never decoded


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    Image.fromarray(COLOUR).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    for read in (message, lambda path: pytest.raises(UserError, is_grey, path)):
        read(tmp_path / "x.png")
    assert "none of BMP, GIF, JPEG, JPEG2000, PNG, TIFF, WEBP" in message(tmp_path / "x.png")


@pytest.mark.parametrize("side", [9000, 20000])  # Pillow warns at the first, refuses the second
def test_a_small_file_of_many_pixels_is_not_decoded(tmp_path, monkeypatch, recwarn, side):
    path = tmp_path / "x.png"
    Image.new("1", (16, 16)).save(path)
    whole = bytearray(path.read_bytes())
    whole[16:24] = side.to_bytes(4, "big") * 2  # width and height of the header
    whole[29:33] = PngImagePlugin._crc32(bytes(whole[12:29])).to_bytes(4, "big")
    path.write_bytes(whole)

    def decoded(*args: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    assert f"at most {images.MAX_PIXELS}" in message(path)
    assert not recwarn.list


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    path = saved(tmp_path, COLOUR)
    busy, most, lock = 0, 0, threading.Lock()

    def slow(image: Image.Image) -> Image.Image:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)
        with lock:
            busy -= 1
        return image

    monkeypatch.setattr(images, "_decoded", slow)
    for limit, expected in ((images.LARGE_PIXELS, 4), (SIZE * SIZE - 1, 1)):
        monkeypatch.setattr(images, "LARGE_PIXELS", limit)
        most = 0
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: read_image(path, SIZE, 3), range(4)))
        assert most == expected


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
def test_every_damage_is_one_line(tmp_path):
    """Files of every format, cut and flipped in many places, give a picture or one line."""
    rng = np.random.default_rng(0)
    for name in ("x.png", "x.gif", "x.tif", "x.bmp", "x.jpg", "x.webp", "x.jp2"):
        whole = saved(tmp_path, COLOUR, name).read_bytes()
        for _ in range(30):
            cut = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for place in rng.integers(0, len(cut), 3):
                cut[place] ^= 1 << rng.integers(8)
            (tmp_path / name).write_bytes(cut)
            try:
                read_image(tmp_path / name, SIZE, 3)
            except UserError as error:
                assert str(error).startswith(f"{tmp_path / name}: ") and "\n" not in str(error)
    assert "No such file" in message(tmp_path / "missing.png")
