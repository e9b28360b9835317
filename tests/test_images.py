"""`conv2former.data.images`: every kind of image file comes out as the right RGB, or as a `BadImage`."""

import errno
import gzip
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import sklearn
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin

from conv2former.data.images import FORMATS, IMAGE_EXTENSIONS, BadImage, decode, find_images
from conv2former.errors import UserError
from conv2former_runtime import images

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (21, 32, 3), dtype=np.uint8))
DEEP = np.arange(65536, dtype=np.uint16).reshape(256, 256)  # every 16-bit value once
DEEP_RGB = np.repeat(np.round(DEEP / 257).astype(np.uint8)[..., None], 3, axis=2)

needs_avif = pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")
EVERY_FORMAT = [
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
    pytest.param("AVIF", marks=needs_avif),
]
LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}


def saved(picture, file_format, **options):
    stream = io.BytesIO()
    picture.save(stream, file_format, **options)
    return stream.getvalue()


def pixels(source, **options):
    picture = decode(source, **options)
    assert type(picture) is Image.Image and picture.mode == "RGB" and picture.info == {}
    return np.asarray(picture)


def rejection(source, **options):
    with pytest.raises(BadImage) as caught:
        decode(source, **options)
    return caught.value.reason


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour_type, rows, *before):
    """A PNG byte by byte, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *before, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")))


def tiff(row, bits, *, order="<", photometric=1, sample_format=1, samples=1, extra=None):
    """A TIFF of one row, byte by byte, for what Pillow does not write."""
    width = len(row) * 8 // bits // samples
    shorts = {258: bits, 259: 1, 262: photometric, 277: samples, 339: sample_format}
    if extra is not None:
        shorts[338] = extra
    longs = {256: width, 257: 1, 278: 1, 279: len(row)}
    entries = len(shorts) + len(longs) + 1
    longs[273] = 8 + 2 + 12 * entries + 4
    fields = [(tag, struct.pack(order + "HIHH", 3, 1, value, 0)) for tag, value in shorts.items()]
    fields += [(tag, struct.pack(order + "HII", 4, 1, value)) for tag, value in longs.items()]
    directory = b"".join(struct.pack(order + "H", tag) + field for tag, field in sorted(fields))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, entries)
    return start + directory + bytes(4) + row


def exif(orientation, order="<", kind=3):
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *((orientation, 0) if kind == 3 else (orientation,)))
    entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    return b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


# ---- What a image looks like


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_photographs_come_out_as_from_pillow(name):
    path = Path(sklearn.__file__).parent / "datasets" / "images" / name
    with Image.open(path) as picture:
        expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("file_format", EVERY_FORMAT)
def test_rgb_of_every_format_by_path_bytes_and_stream(file_format, tmp_path):
    path = tmp_path / "misnamed.txt"
    content = saved(NOISE, file_format)
    path.write_bytes(content)
    with Image.open(path) as picture:
        expected = np.asarray(picture.convert("RGB"))
    for source in (path, str(path), content, io.BytesIO(content)):
        assert np.array_equal(pixels(source), expected)
    path.unlink()


def test_png_named_jpg(tmp_path):
    NOISE.save(tmp_path / "a.jpg", "PNG")
    assert np.array_equal(pixels(tmp_path / "a.jpg"), np.asarray(NOISE))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_shallow_grey(mode):
    grey = NOISE.convert(mode)
    assert np.array_equal(pixels(saved(grey, "PNG")), np.asarray(grey.convert("L").convert("RGB")))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("JPEG2000", {})],
)
def test_16_bit_grey_is_scaled_and_not_clipped(file_format, options):
    result = pixels(saved(Image.fromarray(DEEP), file_format, **options))
    assert np.array_equal(result, DEEP_RGB)
    ramp = result[..., 0].ravel().astype(int)
    assert (np.diff(ramp) >= 0).all() and np.unique(ramp).size == 256
    assert (ramp == 255).sum() == 129, "only the top half step is white"


@pytest.mark.parametrize(("order", "sample_format"), [("<", 1), (">", 1), ("<", 2)])
def test_16_bit_tiff_of_either_byte_order_and_signed(order, sample_format):
    row = np.array([0, 128, 129, 1000, 32767], order + "u2").tobytes()
    result = pixels(tiff(row, 16, order=order, sample_format=sample_format))
    assert result[0, :, 0].tolist() == [0, 0, 1, 4, 127]


def test_32_bit_integers():
    values = np.array([[0, 257, 40000, 65535]], np.int32)
    assert pixels(saved(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 1, 156, 255]
    assert "-1 to 65535" in rejection(saved(Image.fromarray(np.array([[-1, 65535]], np.int32)), "TIFF"))
    assert "0 to 65536" in rejection(saved(Image.fromarray(np.array([[0, 65536]], np.int32)), "TIFF"))


def test_12_bit_tiff():
    assert pixels(tiff(bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x10]), 12))[0, :, 0].tolist() == [0, 255, 128, 1]


def test_tiff_in_which_white_is_zero():
    row = np.array([0, 65535, 257], "<u2")
    assert pixels(tiff(row.tobytes(), 16, photometric=0))[0, :, 0].tolist() == [255, 0, 254]
    assert pixels(tiff(bytes([0, 255, 1]), 8, photometric=0))[0, :, 0].tolist() == [255, 0, 254]


def test_16_bit_grey_with_a_transparent_value():
    content = png(2, 1, 16, 0, b"\0\x05\x05\x06\x00", chunk(b"tRNS", b"\x05\x05"))
    assert pixels(content)[0].tolist() == [[255] * 3, [6] * 3]


def test_floating_point():
    values = np.array([[0, 0.25, 0.5, 1]], np.float32)
    for content in (saved(Image.fromarray(values), "TIFF"), saved(Image.fromarray(values), "PPM")):
        assert pixels(content)[0, :, 0].tolist() == [0, 64, 128, 255]
    assert "0 to 255" in rejection(saved(Image.fromarray(values * 255), "TIFF"))
    assert "-0.5 to 0.5" in rejection(saved(Image.fromarray(values - 0.5), "TIFF"))
    for odd in (np.nan, np.inf, -np.inf):
        assert "finite" in rejection(saved(Image.fromarray(np.array([[0, odd]], np.float32)), "TIFF"))


def test_16_bit_colour_keeps_its_high_byte():
    row = np.array([0, 0x8000, 0xFFFF], ">u2")
    assert pixels(png(1, 1, 16, 2, b"\0" + row.tobytes())).tolist() == [[[0, 128, 255]]]


def on_white(colour, alpha):
    colour, alpha = np.asarray(colour, float), np.asarray(alpha, float)[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [(mode, file_format) for mode in ("RGBA", "LA") for file_format in ("PNG", "TIFF", "JPEG2000")]
    + [("RGBA", "WEBP")],
)
def test_alpha_is_composited_on_white(mode, file_format):
    alpha = np.linspace(0, 255, 21 * 32).astype(np.uint8).reshape(21, 32)
    picture = NOISE.convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    result = pixels(saved(picture, file_format, **LOSSLESS.get(file_format, {})))
    expected = on_white(NOISE.convert("L").convert("RGB") if mode == "LA" else NOISE, alpha)
    assert np.abs(result - expected).max() <= 1
    assert (result[alpha == 0] == 255).all() and np.array_equal(result[alpha == 255], expected[alpha == 255])


@needs_avif
def test_alpha_of_avif():
    content = saved(Image.new("RGBA", (16, 16), (200, 0, 0, 128)), "AVIF", quality=100)
    assert np.abs(pixels(content) - on_white((200, 0, 0), 128)).max() <= 3


def test_16_bit_alpha():
    colour = np.array([0x8000, 0x1000, 0x2000, 0x8000], ">u2").tobytes()
    assert np.abs(pixels(png(1, 1, 16, 6, b"\0" + colour)) - on_white((128, 16, 32), 128)).max() <= 1
    grey = np.array([0x8000, 0x8000, 0x1234, 0x0000], ">u2").tobytes()
    assert np.abs(pixels(png(2, 1, 16, 4, b"\0" + grey))[0, :, 0] - [191, 255]).max() <= 1


def test_premultiplied_alpha():
    content = tiff(bytes([64, 32, 0, 128, 0, 0, 0, 0]), 8, photometric=2, samples=4, extra=1)
    assert np.abs(pixels(content)[0] - [[191, 159, 127], [255, 255, 255]]).max() <= 1


def test_premultiplied_modes_that_pillow_may_hold():
    for mode, colour, expected in (("RGBa", (64, 32, 0, 128), [191, 159, 127]), ("La", (64, 128), [191] * 3)):
        picture = Image.new(mode, (1, 1), colour)
        assert np.abs(np.asarray(images._rgb(picture))[0, 0] - np.array(expected)).max() <= 1


@pytest.mark.parametrize(
    ("depth", "rows", "key", "expected"),
    [(1, 0x40, 1, [0, 255]), (2, 0x90, 2, [255, 85]), (4, 0xA5, 10, [255, 85]), (8, None, 5, [255, 6])],
)
def test_transparent_grey_of_every_depth(depth, rows, key, expected):
    row = bytes([5, 6]) if rows is None else bytes([rows])
    content = png(2, 1, depth, 0, b"\0" + row, chunk(b"tRNS", struct.pack(">H", key)))
    assert pixels(content)[0, :, 0].tolist() == expected


def test_transparent_colour_of_8_and_16_bits():
    content = png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 4, 5, 6]), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert pixels(content)[0].tolist() == [[255] * 3, [4, 5, 6]]
    row = struct.pack(">6H", 1000, 2000, 3000, 40000, 50000, 60000)
    content = png(2, 1, 16, 2, b"\0" + row, chunk(b"tRNS", row[:6]))
    assert pixels(content)[0].tolist() == [[255] * 3, [156, 195, 234]]


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(file_format):
    picture = NOISE.quantize(17)
    assert np.array_equal(pixels(saved(picture, file_format)), np.asarray(picture.convert("RGB")))


def test_palette_with_transparency():
    picture = Image.new("P", (4, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 0, 0, 0])
    picture.putdata([0, 1, 2, 3])
    one = [[10, 20, 30], [255, 255, 255], [70, 80, 90], [0, 0, 0]]
    assert pixels(saved(picture, "PNG", transparency=1))[0].tolist() == one
    assert pixels(saved(picture, "GIF", transparency=1))[0].tolist() == one
    many = pixels(saved(picture, "PNG", transparency=bytes([255, 128, 0])))[0]
    assert np.abs(many - [[10, 20, 30], [147, 152, 157], [255, 255, 255], [0, 0, 0]]).max() <= 1


def test_palette_with_an_alpha_channel():
    picture = Image.new("PA", (1, 1))
    picture.putpalette([200, 100, 50])
    picture.putpixel((0, 0), (0, 128))
    assert np.abs(np.asarray(images._rgb(picture))[0, 0] - on_white((200, 100, 50), 128)).max() <= 1


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk(file_format):
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (60, 120, 200, 30)]
    for ink in inks:
        options = {"quality": 95} if file_format == "JPEG" else {}
        result = pixels(saved(Image.new("CMYK", (16, 16), ink), file_format, **options))
        expected = [(255 - part) * (255 - ink[3]) / 255 for part in ink[:3]]
        assert np.abs(result - np.array(expected)).max() <= 4, ink


def test_ycck_jpeg():
    ink = (60, 120, 200, 30)
    # Pillow writes only CMYK, inverted as Adobe does. In YCCK the three inks are stored as if they were RGB in YCbCr.
    planes = Image.new("RGB", (16, 16), ink[:3]).convert("YCbCr").split()
    picture = Image.merge("CMYK", [*(plane.point(lambda v: 255 - v) for plane in planes), Image.new("L", (16, 16), 30)])
    content = bytearray(saved(picture, "JPEG", quality=95))
    content[content.index(b"Adobe") + 11] = 2
    expected = [(255 - part) * (255 - ink[3]) / 255 for part in ink[:3]]
    assert np.abs(pixels(bytes(content)) - np.array(expected)).max() <= 4


def test_lab():
    for lightness, expected in ((255, 255), (0, 0)):
        picture = Image.merge("LAB", [Image.new("L", (1, 1), value) for value in (lightness, 128, 128)])
        assert np.abs(pixels(saved(picture, "TIFF")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "RGBX"])
def test_modes_that_come_from_no_file_but_from_pillow(mode):
    picture = NOISE.convert(mode)
    assert np.array_equal(np.asarray(images._rgb(picture)), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_first_picture_of_many(file_format):
    first, second = Image.new("RGB", (16, 16), (250, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 250))
    content = saved(first, file_format, save_all=True, append_images=[second])
    assert np.abs(pixels(content).astype(int) - [250, 0, 0]).max() <= 4


# ---- Orientation

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", pytest.param("AVIF", marks=needs_avif)])
def test_orientation(file_format, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    stored = pixels(saved(NOISE, file_format))
    result = decode(saved(NOISE, file_format, exif=tag))
    assert np.array_equal(np.asarray(result), UPRIGHT[orientation](stored))
    assert result.getexif().get(0x0112) is None, "the next reader would turn it again"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_of_either_byte_order_and_integer(order, kind):
    stored = pixels(saved(NOISE, "JPEG"))
    for block in (exif(6, order, kind), b"Exif\0\0" + exif(6, order, kind)):
        assert np.array_equal(pixels(saved(NOISE, "JPEG", exif=block)), UPRIGHT[6](stored))


GREY = NOISE.convert("L")
OPENED = dict(
    turned=saved(NOISE, "JPEG", exif=exif(6)),
    grey=saved(GREY, "PNG"),
    deep=saved(Image.fromarray(DEEP), "PNG"),
    deep_and_turned=saved(Image.fromarray(DEEP), "PNG", exif=exif(6)),
    transparent=saved(NOISE.convert("RGBA").rotate(30), "PNG"),
    transparent_grey=saved(Image.merge("LA", (GREY, GREY)), "PNG"),
    a_transparent_colour=saved(NOISE, "PNG", transparency=NOISE.getpixel((3, 4))),
    a_transparent_number=saved(NOISE.quantize(8), "PNG", transparency=3),
    cmyk=saved(NOISE.convert("CMYK"), "JPEG"),
    floats=saved(Image.fromarray(np.asarray(GREY) / np.float32(255)), "TIFF"),
)


@pytest.mark.parametrize("name", OPENED)
def test_what_pillow_opens_is_what_decode_gives(name):
    opened = Image.open(io.BytesIO(OPENED[name]))
    before = opened.mode, opened.size, dict(opened.info)
    assert np.array_equal(np.asarray(images.shown(opened)), pixels(OPENED[name]))
    assert (opened.mode, opened.size, dict(opened.info)) == before, "it is the user's"


def test_pillow_images_without_a_file():
    plain = Image.new("RGB", (3, 2))
    assert images.shown(plain) is plain  # for nothing: every image of a training comes this way
    assert np.asarray(images.shown(Image.new("LA", (3, 2), (0, 0)))).min() == 255
    for wrong, reason in (
        (Image.fromarray(np.full((4, 5), 7.0, np.float32)), "values range from 7 to 7; only 0 to 1"),
        (Image.new("L", (0, 5)), "it has no pixels"),
    ):
        with pytest.raises(BadImage, match=reason):
            images.shown(wrong)
    with pytest.raises(BadImage, match="damaged or unusual PNG file"):
        images.shown(Image.open(io.BytesIO(OPENED["grey"][:-400])))


def test_orientation_of_16_bit_grey_and_alpha():
    assert np.array_equal(pixels(saved(Image.fromarray(DEEP), "PNG", exif=exif(6))), UPRIGHT[6](DEEP_RGB))
    assert np.array_equal(pixels(saved(NOISE.convert("RGBA"), "PNG", exif=exif(8))), UPRIGHT[8](np.asarray(NOISE)))


def test_orientation_as_imagemagick_writes_it():
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif(3)):8}\n{exif(3).hex()}\n")
    assert np.array_equal(pixels(saved(NOISE, "PNG", pnginfo=info)), UPRIGHT[3](np.asarray(NOISE)))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 3\nno hex\n")
    assert np.array_equal(pixels(saved(NOISE, "PNG", pnginfo=info)), np.asarray(NOISE))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage and no TIFF",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
        exif(6)[:20],
        exif(0),
        exif(9),
        exif(6, kind=2),
    ],
    ids=["empty", "garbage", "offset", "cut", "cut tag", "zero", "nine", "a string"],
)
def test_broken_exif_is_ignored_in_silence(file_format, block):
    content, expected = saved(NOISE, file_format, exif=block), pixels(saved(NOISE, file_format))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(content), expected)


# ---- What is no image


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not a image at all", "it is no image but text"),
        ("text with an é".encode(), "text"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(1000), "none of the formats JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"BM of a text", "BMP"),
        (b"P5 is what it starts with", "PPM"),
    ],
)
def test_no_picture(content, reason, tmp_path):
    assert reason in rejection(content)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImage) as caught:
        decode(tmp_path / "a.jpg")
    error = caught.value
    assert reason in error.reason and error.file == str(tmp_path / "a.jpg") and isinstance(error, UserError)
    assert str(error) == f"cannot read {error.file}: {error.reason}" and "\n" not in str(error)


@pytest.mark.parametrize("file_format", ["TGA", "ICO", "PCX", "SGI", "DDS", "EPS"])
def test_formats_that_only_pillow_reads(file_format):
    content = saved(NOISE, file_format)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == file_format, "or else this test shows nothing"
    assert rejection(content)


@pytest.mark.parametrize("file_format", [*EVERY_FORMAT, "TIFF LZW", "JPEG progressive"])
def test_truncated(file_format):
    options = {"TIFF LZW": {"compression": "tiff_lzw"}, "JPEG progressive": {"progressive": True}}.get(file_format, {})
    content = saved(NOISE, file_format.split()[0], **options)
    assert pixels(content).shape == (21, 32, 3)
    for length in (1, 2, 3, 4, 8, 12, 16, 20, 30, 50, len(content) // 4, len(content) // 2, len(content) * 3 // 4):
        assert rejection(content[:length]), length


def test_missing_folder_pipe_and_odd_paths(tmp_path):
    assert rejection(tmp_path / "nothing.jpg") == "No such file or directory"
    assert rejection(tmp_path) == "it is a folder"
    assert rejection("a\0b.jpg")
    assert rejection("x" * 5000)
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert rejection(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "pipe" in rejection(tmp_path / "pipe.jpg")
    assert "device" in rejection("/dev/zero")


def test_failures_of_the_system(tmp_path, monkeypatch):
    NOISE.save(tmp_path / "a.png")

    def failing(code):
        def fail(*_):
            raise OSError(code, os.strerror(code))

        return fail

    monkeypatch.setattr(images, "open", failing(errno.EACCES), raising=False)
    assert rejection(tmp_path / "a.png") == "Permission denied"
    monkeypatch.setattr(images, "open", failing(errno.EMFILE), raising=False)
    with pytest.raises(OSError, match="open files"):  # would be the fault of every following image, too
        decode(tmp_path / "a.png")


def test_the_callers_mistakes():
    for source in (None, 3, NOISE, io.StringIO("text")):
        with pytest.raises(TypeError, match="decode needs"):
            decode(source)


def test_streams(tmp_path):
    content = saved(NOISE, "PNG")
    stream = io.BytesIO(b"before" + content)
    stream.seek(6)
    assert np.array_equal(pixels(stream), np.asarray(NOISE))
    assert not stream.closed
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", content)
        archive.writestr("b.png", content[:100])
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        with archive.open("a.png") as member:
            assert np.array_equal(pixels(member), np.asarray(NOISE))
        with archive.open("b.png") as member, pytest.raises(BadImage, match=r"^cannot read b\.png: "):
            decode(member)
    with gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(content)[:-20])) as member:
        assert "end-of-stream" in rejection(member)


def test_stream_that_fails_at_length():
    class Failing(io.BytesIO):
        def read(self, *_):
            raise KeyError("x" * 1000)

    assert 0 < len(rejection(Failing())) <= 200


def test_names_in_messages():
    for source, options, file in (
        (b"x", {}, "<bytes>"),
        (io.BytesIO(b"x"), {}, "<stream>"),
        (b"x", {"name": "a.zip/b.png"}, "a.zip/b.png"),
        ("missing.png", {"name": "other"}, "other"),
    ):
        with pytest.raises(BadImage) as caught:
            decode(source, **options)
        assert caught.value.file == file and str(caught.value).startswith(f"cannot read {file}: ")


def test_message_is_one_printable_line():
    error = BadImage("a\nb\x1b[31m\udcff.jpg", "two\r\nlines")
    assert str(error) == r"cannot read a\nb\x1b[31m\udcff.jpg: two\r\nlines"
    assert error.file == "a\nb\x1b[31m\udcff.jpg"


def test_bad_image_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "it is empty")))
    assert type(error) is BadImage
    assert (error.file, error.reason, str(error)) == ("a.jpg", "it is empty", "cannot read a.jpg: it is empty")


# ---- Size, memory, files


def test_bomb_is_refused_before_its_pixels(monkeypatch):
    def load(_):
        pytest.fail("pixels were asked for")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    content = png(60000, 60000, 8, 2, bytes(1000))
    assert len(content) < 200
    assert rejection(content) == "its 60000 x 60000 pixels are more than the limit of 134,217,728"


@pytest.mark.parametrize("file_format", EVERY_FORMAT)
def test_limit_of_pixels_is_exact(file_format):
    content = saved(NOISE, file_format)
    assert pixels(content, max_pixels=21 * 32).shape == (21, 32, 3)
    assert "limit of 671" in rejection(content, max_pixels=21 * 32 - 1)


@pytest.mark.parametrize("file_format", EVERY_FORMAT)
def test_pillows_own_limit_neither_warns_nor_changes(file_format, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow warns above, refuses from twice as many on
    content = saved(NOISE, file_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(content))
        before = list(warnings.filters)
        assert pixels(content).shape == (21, 32, 3)
        assert warnings.filters == before
    assert Image.MAX_IMAGE_PIXELS == 500


def test_gif_whose_first_frame_exceeds_its_screen(monkeypatch):
    content = bytearray(saved(NOISE, "GIF"))
    content[6:10] = struct.pack("<HH", 1, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Image.DecompressionBombWarning):
            GifImagePlugin.GifImageFile(io.BytesIO(content))
        assert "limit of 600" in rejection(bytes(content), max_pixels=600)


def test_large_file(tmp_path, monkeypatch):
    NOISE.save(tmp_path / "a.png")
    NOISE.save(tmp_path / "a.tif")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    assert "larger than 1,000 bytes" in rejection(tmp_path / "a.png")
    assert "larger than 1,000 bytes" in rejection(io.BytesIO(saved(NOISE, "TIFF")))
    assert pixels(tmp_path / "a.tif").shape == (21, 32, 3), "of a TIFF only the first page is read"


def test_large_texts_in_a_png():
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 3_000_000)
    assert np.array_equal(pixels(saved(NOISE, "PNG", pnginfo=info)), np.asarray(NOISE))
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 30_000_000, zip=True)
    content = saved(NOISE, "PNG", pnginfo=info)
    assert len(content) < 100_000
    assert "too large" in rejection(content)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux does")
def test_files_are_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for file_format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        many = {"save_all": True, "append_images": [NOISE.rotate(180)]} if file_format in ("GIF", "TIFF") else {}
        content = saved(NOISE, file_format, **many, **({"compression": "tiff_lzw"} if file_format == "TIFF" else {}))
        for part in (content, content[: len(content) // 3]):
            (tmp_path / "a").write_bytes(part)
            try:
                kept.append(decode(tmp_path / "a"))
            except BadImage as error:
                kept.append(error)
    assert {type(result) for result in kept} == {Image.Image, BadImage}
    assert len(os.listdir("/proc/self/fd")) == before


def test_random_damage():
    """Whatever happens to a file, what comes out is a image or a `BadImage`."""
    rng = random.Random(0)
    deep = Image.fromarray(DEEP[:24, :16])
    palette = NOISE.quantize(16)
    contents = {
        "JPEG": saved(NOISE, "JPEG", exif=exif(6)),
        "CMYK": saved(NOISE.convert("CMYK"), "JPEG", progressive=True),
        "MPO": saved(NOISE, "MPO", save_all=True, append_images=[NOISE]),
        "PNG": saved(palette, "PNG", transparency=bytes(range(16)), exif=exif(6)),
        "WEBP": saved(NOISE, "WEBP", exif=exif(6)),
        "WEBP animated": saved(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(180)]),
        "GIF": saved(palette, "GIF", transparency=3, disposal=2),
        "BMP": saved(palette, "BMP"),
        "TIFF": saved(deep, "TIFF"),
        "TIFF LZW": saved(NOISE, "TIFF", compression="tiff_lzw"),
        "float": saved(deep.convert("F"), "TIFF"),
        "PPM": saved(deep, "PPM"),
        "JPEG2000": saved(NOISE, "JPEG2000"),
    }
    if "AVIF" in FORMATS:
        contents["AVIF"] = saved(NOISE, "AVIF", exif=exif(6))
    outcomes = {}
    for name, content in contents.items():
        outcomes[name] = set()
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 5))):
                # Mostly in the header, where it hurts.
                damaged[rng.randrange(rng.choice((100, len(damaged))))] = rng.choice(
                    (0, 1, 127, 255, rng.randrange(256))
                )
            if rng.random() < 0.1:
                del damaged[rng.randrange(len(damaged)) :]
            try:
                picture = decode(bytes(damaged), max_pixels=1_000_000)
            except BadImage as error:
                assert "\n" not in str(error)
                outcomes[name].add("refused")
            else:
                assert picture.mode == "RGB"
                outcomes[name].add("read")
    assert all("refused" in outcome for outcome in outcomes.values()), outcomes
    assert sum("read" in outcome for outcome in outcomes.values()) > len(outcomes) / 2, outcomes


# ---- Finding files


@pytest.fixture
def tree(tmp_path):
    pictures = ["img10.png", "img2.PNG", "Img1.jpg", "b/2/x.webp", "b/10/x.webp", "b/y.tif"]
    for name in [*pictures, "notes.txt", ".hidden.png", ".git/a.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(root, found):
    assert all(isinstance(path, Path) for path in found)
    return [path.relative_to(root).as_posix() for path in found]


def test_find_in_a_folder(tree):
    expected = ["b/2/x.webp", "b/10/x.webp", "b/y.tif", "Img1.jpg", "img2.PNG", "img10.png"]
    assert names(tree, find_images([tree])) == expected


def test_what_is_named_is_taken_as_it_is(tree):
    given = [tree / "notes.txt", str(tree / "missing.jpg"), tree / ".git", tree / ".hidden.png", tree / "b" / "y.tif"]
    assert names(tree, find_images(given)) == ["notes.txt", "missing.jpg", ".git/a.png", ".hidden.png", "b/y.tif"]
    assert find_images([]) == []
    assert find_images(str(tree / "notes.txt")) == [tree / "notes.txt"], "a string is not a sequence of paths"


def test_links_are_followed_and_loops_end(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.png").touch()
    (tree / "b" / "far").symlink_to(elsewhere)
    (tree / "b" / "up").symlink_to(tree)
    (tree / "b" / "2" / "self.png").symlink_to(tree / "b" / "2" / "self.png")
    (tree / "b" / "10" / "gone.png").symlink_to(tree / "nowhere.png")
    (tree / "b" / "10" / "link.png").symlink_to(tree / "img10.png")
    found = names(tree, find_images([tree]))
    assert found[:5] == ["b/2/self.png", "b/2/x.webp", "b/10/gone.png", "b/10/link.png", "b/10/x.webp"]
    assert found[5:] == ["b/far/far.png", "b/y.tif", "Img1.jpg", "img2.PNG", "img10.png"]
    for broken in found[0], found[2]:
        assert rejection(tree / broken)


def test_folder_that_may_not_be_listed_is_reported_like_a_file(tree, monkeypatch):
    scandir = os.scandir

    def guarded(path):
        if os.path.basename(path) == "b":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = find_images([tree])
    assert names(tree, found) == ["b", "Img1.jpg", "img2.PNG", "img10.png"]
    assert rejection(found[0]) == "it is a folder that may not be listed"


def test_every_extension_is_of_a_format_that_is_read(tmp_path):
    for extension in IMAGE_EXTENSIONS:
        (tmp_path / f"a{extension}").touch()
    assert len(find_images([tmp_path])) == len(IMAGE_EXTENSIONS)
    known = {ext for ext, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    known |= {".avif", ".heic", ".heif", ".hif"}
    assert set(IMAGE_EXTENSIONS) <= known
