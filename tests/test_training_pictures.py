import io
import struct
import zlib

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_localdit.training.pictures import PictureError, decode, picture_size, resize_and_crop

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (6, 10, 3), dtype=np.uint8)

# What is stored for each value of EXIF's Orientation, by its definition: which sides row 0 and column 0 are.
STORED = {
    1: lambda seen: seen,  # top, left
    2: lambda seen: seen[:, ::-1],  # top, right
    3: lambda seen: seen[::-1, ::-1],  # bottom, right
    4: lambda seen: seen[::-1],  # bottom, left
    5: lambda seen: seen.swapaxes(0, 1),  # left, top
    6: lambda seen: seen.swapaxes(0, 1)[::-1],  # right, top
    7: lambda seen: seen.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda seen: seen.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(image, kind="png", **options):
    return np.asarray(decode(encoded(image, kind, **options)))


def png_of_16_bits(values):
    """Pillow writes no PNG with 16 bits and several channels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind, options", [("png", {}), ("webp", {"lossless": True}), ("tiff", {})])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(kind, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PIXELS)))
    content = encoded(stored, kind, exif=exif, **options)
    np.testing.assert_array_equal(np.asarray(decode(content)), PIXELS)
    assert picture_size(io.BytesIO(content)) == PIXELS.shape[:2]


old_pillow = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 does not read the YCbCr TIFF that it writes"
)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", pytest.param("YCbCr", marks=old_pillow)])
def test_colours_and_size_of_other_modes(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    content = encoded(image, "tiff")
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(image.convert("RGB")))
    assert picture_size(io.BytesIO(content)) == PIXELS.shape[:2]


def test_cmyk_jpeg_is_not_inverted():
    image = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    assert abs(decoded(image, "jpeg", quality=95).astype(int) - [200, 30, 30]).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_over_white(mode):
    alpha = RANDOM.integers(0, 256, PIXELS.shape[:2], dtype=np.uint8)
    image = Image.fromarray(PIXELS).convert(mode[:-1])
    colours = np.asarray(image.convert("RGB")).astype(float)
    image.putalpha(Image.fromarray(alpha))
    opacity = alpha[..., None] / 255
    assert abs(decoded(image) - (colours * opacity + 255 * (1 - opacity))).max() <= 1


def test_transparent_colours_are_white():
    grey = Image.fromarray(np.array([[10, 200]], dtype=np.uint8))
    np.testing.assert_array_equal(decoded(grey, transparency=10)[0], [[255] * 3, [200] * 3])
    np.testing.assert_array_equal(decoded(grey.convert("RGB"), transparency=(10, 10, 10))[0], [[255] * 3, [200] * 3])
    palette = grey.convert("RGB").quantize(2)
    expected = [[255] * 3 if index == 1 else [value] * 3 for index, value in zip(palette.getdata(), (10, 200))]
    np.testing.assert_array_equal(decoded(palette, transparency=1)[0], expected)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled(kind):
    values = np.array([[0, 128, 129, 257, 257 * 128, 65535 - 128, 65535 - 129, 65535]], dtype=np.uint16)
    found = decoded(Image.fromarray(values), kind)
    np.testing.assert_array_equal(found[0, :, 0], [0, 0, 1, 1, 128, 255, 254, 255])
    assert (found == found[..., :1]).all()


def test_16_bit_colours_are_scaled():
    values = RANDOM.integers(0, 65536, (4, 5, 3), dtype=np.uint16)
    assert abs(np.asarray(decode(png_of_16_bits(values))) - values / 257).max() <= 1
    opaque = np.concatenate([values, np.full((4, 5, 1), 65535, dtype=np.uint16)], axis=2)
    assert abs(np.asarray(decode(png_of_16_bits(opaque))) - values / 257).max() <= 1


@pytest.mark.parametrize("values", [np.array([[0.5]], dtype=np.float32), np.array([[70000]], dtype=np.int32)])
def test_pixels_without_a_known_range_are_refused(values):
    with pytest.raises(PictureError, match="have no known range; expected 8 or 16 bits"):
        decoded(Image.fromarray(values), "tiff")


@pytest.mark.parametrize("limit, reason", [(40, r"10 x 6 pixels are more than .* = 40"), (20, "exceeds limit of 40")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_unopened(monkeypatch, limit, reason):
    content = encoded(Image.fromarray(PIXELS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for read in (decode, lambda content: picture_size(io.BytesIO(content))):
        with pytest.raises(PictureError, match=reason):
            read(content)


def test_first_picture_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert (decoded(frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True) == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "tiff"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_pictures_are_refused(kind):
    image = Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(image, kind)
    for kept in (0, 1, 20, len(content) // 2):
        with pytest.raises(PictureError):
            decode(content[:kept])


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200)
@given(st.sampled_from(["jpeg", "png", "webp", "tiff", "bmp"]), st.integers(0), st.binary(min_size=1, max_size=8))
def test_damage_raises_nothing_else(kind, place, damage):
    content = bytearray(encoded(Image.fromarray(PIXELS), kind))
    place %= len(content)
    content[place : place + len(damage)] = damage
    for read in (decode, lambda content: picture_size(io.BytesIO(content))):
        try:
            read(bytes(content))
        except PictureError as error:
            assert "\n" not in str(error) and str(error)


def test_size_of_a_large_png_is_read_without_its_pixels():
    content = encoded(Image.fromarray(RANDOM.integers(0, 256, (300, 200, 3), dtype=np.uint8)))
    assert picture_size(io.BytesIO(content[:1000])) == (300, 200)


def to_pixels(tensor):
    return ((tensor.permute(1, 2, 0).double() + 1) * 127.5).round().numpy()


def test_crops_without_resizing_are_exact():
    image = Image.fromarray(RANDOM.integers(0, 256, (20, 11, 3), dtype=np.uint8))
    whole = np.asarray(image)
    np.testing.assert_array_equal(to_pixels(resize_and_crop(image, 20, 11)), whole)
    np.testing.assert_array_equal(to_pixels(resize_and_crop(image, 10, 11)), whole[5:15])
    found = set()
    for seed in range(100):
        part = to_pixels(resize_and_crop(image, 10, 11, "random", torch.Generator().manual_seed(seed)))
        again = resize_and_crop(image, 10, 11, "random", torch.Generator().manual_seed(seed))
        np.testing.assert_array_equal(part, to_pixels(again))
        (place,) = [top for top in range(11) if (whole[top : top + 10] == part).all()]
        found.add(place)
    assert found == set(range(11))


def test_resizing_keeps_the_aspect_ratio_and_the_middle():
    """A disc stays one, of the size that it has when the picture just covers the result."""
    y, x = np.mgrid[-100:100, -150:150] + 0.5
    disc = Image.fromarray(np.where(x**2 + y**2 < 80**2, 255, 0).astype(np.uint8)).convert("RGB")
    bright = to_pixels(resize_and_crop(disc, 100, 50))[..., 0] > 127
    y, x = np.mgrid[-50:50, -25:25] + 0.5
    assert (bright == (x**2 + y**2 < 40**2)).mean() > 0.99


def test_shrinking_is_antialiased():
    checks = np.indices((256, 256)).sum(axis=0) % 2 * 255
    small = resize_and_crop(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), 32, 32)
    assert small[:, 4:-4, 4:-4].abs().max() < 0.02


@settings(max_examples=100)
@given(*[st.integers(1, 70)] * 4, st.sampled_from(["center", "random"]), st.integers(0, 255))
def test_any_size_to_any_size(height, width, new_height, new_width, crop, value):
    image = Image.new("RGB", (width, height), (value, value, value))
    found = resize_and_crop(image, new_height, new_width, crop, torch.Generator().manual_seed(value))
    assert found.shape == (3, new_height, new_width) and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full_like(found, value / 127.5 - 1))
