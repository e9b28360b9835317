"""The one place where image files become RGB.

`decode` turns a file, or its bytes, into an 8-bit RGB image the way a person would see it, or raises `BadImage` with
one line that says why not.

What "the way a person would see it" means, where plain `Image.open(file).convert("RGB")` does otherwise:

- 16-bit grey is scaled to 8 bits (Pillow clips it to white), 12-bit and white-is-zero TIFFs included.
- Transparency of every kind is composited on white (Pillow shows whatever colour lies under the transparent pixels).
- The EXIF orientation is applied. Broken EXIF counts as none, except in AVIF, whose decoder refuses it; an orientation
  that only XMP states is not applied.
- Of an animation, a multi-page TIFF or a multi-image JPEG, the first image is taken.
- ICC profiles are ignored, as by torchvision and timm: numbers go through unchanged, whatever their colour space.

Only the formats in `FORMATS` are read, and a file's content tells its format, never its extension. Pillow knows more
than thirty others, one of which starts another program (EPS runs Ghostscript): too much to offer to a stranger's file.

Two things are Pillow's and process-wide, and are left as they are: `PIL.Image.MAX_IMAGE_PIXELS`, whose warning is not
wanted here as `decode` has a limit of its own, and `PIL.ImageFile.LOAD_TRUNCATED_IMAGES`: a program that sets that one
gets truncated images with their missing part in grey, here as well. Of damaged TIFFs Pillow and libtiff may write a
line to stderr, which says nothing that the `BadImage` does not.
"""

import errno
import importlib.util
import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from conv2former_runtime.errors import UserError, printable

# The most pixels, width times height, that `decode` takes unless told otherwise: half a gigabyte as Pillow holds RGB.
# While an image of that size is decoded and converted the process takes 1 GiB, for floating point 1.6 and for animated
# WebP nearly 3, which a file of some kilobytes can demand. The 108-megapixel cameras of phones stay below the limit.
MAX_PIXELS = 1 << 27
# The largest file that `decode` opens, but for TIFF, whose later pages are never read. Some decoders read the whole
# file before anything is known of it, and a sparse file of a terabyte costs its author nothing.
MAX_FILE_BYTES = 1 << 30
MAX_ASPECT = 20  # of an image before it is resized for evaluation
HEIC = importlib.util.find_spec("pillow_heif") is not None  # the extra is installed; it is imported for the first file


class BadImage(UserError):
    """A file that cannot be turned into an image."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"cannot read {printable(file)}: {printable(reason)}")
        self.file = file  # as the user knows it: a path, or the name given to `decode`
        self.reason = reason  # one line

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is rebuilt from its `args`, here the message alone: two arguments would be missing.
        return type(self), (self.file, self.reason)


class _JpegFile(JpegImageFile):
    """JPEG, of which a multi-image file (MPO) is read as the plain JPEG it starts with."""

    def _read_dpi_from_exif(self) -> None:
        """Does nothing: Pillow parses the EXIF for a resolution that nobody wants, and warns where it is broken."""


_PLUGINS: dict[str, type[ImageFile]] = {
    "JPEG": _JpegFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "PPM": PpmImageFile,
    "JPEG2000": Jpeg2KImageFile,
}
try:
    from PIL.AvifImagePlugin import AvifImageFile

    _PLUGINS["AVIF"] = AvifImageFile
except ImportError:  # it came with Pillow 11.3
    pass

FORMATS = tuple(_PLUGINS)  # by Pillow's names

_TEXTS = (
    (re.compile("version https://git-lfs"), ", a pointer of Git LFS: fetch the file itself with git lfs pull"),
    (re.compile(r"\s*<(!doctype html|html)", re.IGNORECASE), ", a web page"),
    (re.compile(r"\s*<(\?xml|svg)", re.IGNORECASE), ", SVG or other XML"),
)
_SIGNATURES = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0")),
    ("PPM", re.compile(rb"P[1-6f]\s")),
    ("JPEG2000", re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n")),
    ("AVIF", re.compile(rb"....ftyp.{0,48}avi[fs]", re.DOTALL)),
    # Formats that people try, so that the message can name them.
    ("HEIC", re.compile(rb"....ftyp.{0,48}(hei[cxms]|hev[cxms])", re.DOTALL)),
    ("JPEG XL", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n")),
    ("PDF", re.compile(rb"%PDF")),
    ("PostScript", re.compile(rb"%!PS|\xc5\xd0\xd3\xc6")),
    ("Photoshop", re.compile(rb"8BPS")),
    # Last, since two letters can be the start of anything.
    ("BMP", re.compile(rb"BM")),
)
_HEAD = 64

_PATH = str | os.PathLike

_TRANSPOSE = {  # by the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that exchange the sides
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_EXIF_INTEGERS = {1: "B", 3: "H", 4: "I"}


def decode(
    source: str | Path | bytes | BinaryIO,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    turn: bool = True,
) -> Image.Image:
    """Reads an image as 8-bit RGB; the module's text says what that means.

    Args:
        source: A path, the content of a file, or an open binary file, which is read from its position to its end and
            left open.
        name: What to call the image in a `BadImage`; the path unless given.
        max_pixels: Larger images are refused before any of their pixels are decoded. For some formats Pillow has its
            own limit, 178,956,970 pixels.
        turn: Whether the EXIF orientation is applied.

    Returns:
        An image of mode RGB without metadata, independent of the file.

    Raises:
        BadImage: The file cannot be read, for whatever reason.
        TypeError: `source` is none of the above, which is the caller's bug.
        OSError: The process may open no more files, which is not the image's fault.
    """
    if isinstance(source, io.TextIOBase) or not (isinstance(source, _PATH | bytes) or hasattr(source, "read")):
        raise TypeError(f"decode needs a path, bytes or a binary file, not {type(source).__name__}")
    try:
        with _binary(source) as stream:
            return _decode(stream, max_pixels, turn)
    except _Refused as error:
        raise BadImage(_name(source) if name is None else name, str(error)) from error.__cause__


def shown(image: Image.Image) -> Image.Image:
    """An image from `Image.open` as `decode` gives the same file: 8-bit RGB, on white; raises BadImage.

    It is turned by the EXIF that it carries, which Pillow leaves in an image that `rotate` has turned: turn with
    `ImageOps.exif_transpose`. A copy has lost what TIFF and PNG say of deep and transparent values.
    """
    if image.mode == "RGB" and not image.info and not isinstance(image, ImageFile):
        return image
    try:
        if not (image.width and image.height):
            raise _Refused("it has no pixels")
        return _shown(image, turn=True)
    except _Refused as error:
        raise BadImage(str(getattr(image, "filename", "") or "<image>"), str(error)) from error.__cause__
    except Exception as error:  # see `_decode`
        raise BadImage(str(getattr(image, "filename", "") or "<image>"), str(_refusal(error, image.format))) from error


def limit_aspect(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than ``MAX_ASPECT`` times as long as wide.

    Evaluation resizes the short side, which would make gigabytes of a line of pixels, and then takes the middle anyway.
    """
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(width - limit, 0) // 2, max(height - limit, 0) // 2
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


class _Refused(Exception):
    """An image that cannot be read; its text is the reason."""


def _binary(source: str | Path | bytes | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """The source, open for random access."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        if not isinstance(source, _PATH):
            # Into memory, since not every stream can seek, and some decoders use its file descriptor directly.
            content = source.read(MAX_FILE_BYTES + 1)
            if len(content) > MAX_FILE_BYTES:
                raise _Refused(f"it is larger than {MAX_FILE_BYTES:,} bytes")
            return io.BytesIO(content)
        # Asked before opening, since opening a pipe waits for its other end.
        mode = os.stat(source).st_mode
        if stat.S_ISDIR(mode):
            listable = os.access(source, os.R_OK | os.X_OK)
            raise _Refused("it is a folder" if listable else "it is a folder that may not be listed")
        if not stat.S_ISREG(mode):
            raise _Refused("it is a pipe or a device, not a file")
        # As a stream and not by its path: by that Pillow would map some files into memory, and a mapped file that
        # shrinks meanwhile takes the process down.
        return open(source, "rb")
    except _Refused:
        raise
    except Exception as error:  # a path may hold a NUL, and a stream may come from a damaged archive of any kind
        raise _refusal(error) from error


def _decode(stream: BinaryIO, max_pixels: int, turn: bool) -> Image.Image:
    file_format = None
    try:
        file_format = _sniff(stream.read(_HEAD))
        plugin = _plugin(file_format)
        if file_format != "TIFF" and stream.seek(0, io.SEEK_END) > MAX_FILE_BYTES:
            raise _Refused(f"it is larger than {MAX_FILE_BYTES:,} bytes")
        # Not through Image.open: that warns of large images, and silencing a warning is a change to the whole
        # process, which other threads would feel. The plugins warn by themselves in two rare cases only: a GIF whose
        # first frame exceeds its screen, and a TIFF too large for Pillow's own limit, though not for ours.
        stream.seek(0)
        with _no_size_warning() if file_format == "GIF" else nullcontext():
            image = plugin(stream, "")
        width, height = image.size
        if width * height > max_pixels:
            raise _Refused(f"its {width} x {height} pixels are more than the limit of {max_pixels:,}")
        large = Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS
        with _no_size_warning() if large else nullcontext():
            return _shown(image, turn)
    except _Refused:
        raise
    except Exception as error:
        # Pillow's plugins raise nearly anything on a damaged file: OSError, SyntaxError, ValueError, struct.error,
        # zlib.error, AssertionError, OverflowError, MemoryError. A bug of ours would look the same: tests look for it.
        raise _refusal(error, file_format) from error


def _shown(image: Image.Image, turn: bool) -> Image.Image:
    _scale_transparent_colour(image)
    image.load()
    rgb = _rgb(image)
    if turn and (way := _TRANSPOSE.get(_orientation(image))) is not None:
        rgb = rgb.transpose(way)
    elif rgb is image:
        rgb = rgb.copy()  # into a plain Image, which holds on to nothing of the file
    rgb.info = {}  # the EXIF in there would have the next reader turn the image once more
    return rgb


def _plugin(file_format: str) -> type[ImageFile]:
    """Pillow's class for a format; raises ``_Refused`` where it is not read."""
    if file_format == "HEIC" and HEIC and file_format not in _PLUGINS:
        from pillow_heif.as_plugin import HeifImageFile

        _PLUGINS[file_format] = HeifImageFile
    if file_format not in _PLUGINS:
        way = "install its reader with pip install pillow-heif, or " * (file_format in ("HEIC", "AVIF"))
        raise _Refused(f"{file_format} is not read here; {way}convert it to PNG or JPEG first")
    return _PLUGINS[file_format]


def turned(file: Path) -> bool:
    """Whether the EXIF of an image file turns or mirrors it; not of one that cannot be read."""
    try:
        return _header(file)[1] in _TRANSPOSE
    except (_Refused, OSError):  # whoever decodes it says so
        return False


def shown_size(file: Path, *, turn: bool) -> tuple[int, int]:
    """(width, height) as ``decode`` gives it, without reading the pixels; raises BadImage."""
    try:
        (width, height), orientation = _header(file)
    except _Refused as error:
        raise BadImage(str(file), str(error)) from None
    return (height, width) if turn and orientation in _ON_ITS_SIDE else (width, height)


def _header(file: Path) -> tuple[tuple[int, int], int]:
    """Size and EXIF orientation; raises ``_Refused``."""
    try:
        with open(file, "rb") as stream:
            image = _plugin(_sniff(stream.read(_HEAD)))
            stream.seek(0)
            opened = image(stream, "")
            return opened.size, _orientation(opened)
    except _Refused:
        raise
    except Exception as error:  # Pillow raises nearly anything
        raise _refusal(error) from error


def _refusal(error: Exception, file_format: str | None = None) -> _Refused:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error
    if isinstance(error, OSError) and error.strerror:
        return _Refused(error.strerror)
    if isinstance(error, MemoryError):
        return _Refused("there is not enough memory for it")
    # Pillow's reasons quote the header of a PPM, which is text
    reason = "" if file_format == "PPM" else str(error)[:200]
    reason = reason or type(error).__name__
    return _Refused(f"it is a damaged or unusual {file_format} file ({reason})" if file_format else reason)


def _sniff(head: bytes) -> str:
    for file_format, signature in _SIGNATURES:
        if signature.match(head):
            return file_format
    if not head:
        raise _Refused("it is empty")
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) > len(head) - 4 and all(c.isprintable() or c in "\t\r\n\ufeff" for c in text):
        # which kind, and nothing that it says: it may be anybody's file
        kind = next((words for start, words in _TEXTS if start.match(text)), "")
        raise _Refused(f"it is no image but text{kind}")
    raise _Refused(f"it is in none of the formats {', '.join(FORMATS)}")


@contextmanager
def _no_size_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _scale_transparent_colour(image: Image.Image) -> None:
    """Brings a PNG's transparent colour (tRNS) to the depth to which its pixels are decoded; Pillow leaves it."""
    colour = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or colour is None or not image.tile:
        return
    raw_mode: Any = image.tile[0][3]
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _rgb(image: Image.Image) -> Image.Image:
    """Converts a loaded image of any mode; returns it as it is where nothing is to be done."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        rgba: Image.Image = image.convert("LA") if image.mode == "La" else image  # Pillow converts La to nothing else
        rgba = rgba if rgba.mode == "RGBA" else rgba.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scales grey of 12, 16 or 32 bits, or floating point, to 8 bits."""
    values = np.asarray(image)
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise _Refused("its floating-point values are not all finite numbers")
        if low < 0 or high > 1:
            raise _Refused(f"its floating-point values range from {low:g} to {high:g}; only 0 to 1 has a known meaning")
        levels = values * np.float32(255)
        grey = np.rint(levels, out=levels).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise _Refused(f"its values range from {low} to {high}; only 0 to 65535 has a known meaning")
        top = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
        scaled = values.astype(np.uint32)
        scaled *= 510  # in place, and not by a table, whose index numpy would widen to 8 bytes per pixel
        scaled += top
        scaled //= 2 * top
        grey = scaled.astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for up to 8 bits
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, or some other number where there is none or the EXIF is broken.

    Pillow's own reader parses everything that is in the EXIF, raises on some broken ones and warns on others. A TIFF
    has been turned already, while it was loaded.
    """
    exif = image.info.get("exif")
    if exif is None and isinstance(text := image.info.get("Raw profile type exif"), str):  # ImageMagick's PNG
        try:
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return 1
    if not isinstance(exif, bytes):
        return 1
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == _ORIENTATION and kind in _EXIF_INTEGERS:
                return struct.unpack_from(order + _EXIF_INTEGERS[kind], exif, entry + 8)[0]
    except struct.error:  # cut off
        pass
    return 1


def _name(source: str | Path | bytes | BinaryIO) -> str:
    if isinstance(source, _PATH):
        return os.fsdecode(source)
    if isinstance(source, bytes):
        return "<bytes>"
    name = getattr(source, "name", None)  # a number for a file opened by its descriptor
    return name if isinstance(name, str) else "<stream>"
