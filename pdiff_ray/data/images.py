"""Images as arrays: what their headers tell, and how pixels of every mode become grey or coloured ones of 8 bits.

Shapes: C channels, S the edge in pixels.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdiff_ray.common.errors import ConfigError

# What an image may be encoded as. Pillow knows more, some of which it hands to other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 80_000_000  # 240 MB in colour; images beyond are refused before they are decoded
WHITE = 255  # what shows through: pages are white, and drawings on transparent ground mostly dark
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
# What all versions of this package read alike, where nothing is transparent or lies on its side.
PLAIN_FORMATS, PLAIN_MODES = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "PPM"), ("1", "L", "P", "RGB", "CMYK")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS takes its place


def open_image(encoded: bytes | Path, name: str) -> Image.Image:
    """Opens an encoded image or an image file without decoding it.

    Args:
        name: of the image, for messages.

    Raises:
        ConfigError: it is no image, or has more than `MAX_PIXELS`.
    """
    try:
        image = Image.open(encoded if isinstance(encoded, Path) else io.BytesIO(encoded), formats=FORMATS)
        reason = _refusal(image)
    except Image.UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}"
    except Image.DecompressionBombError:
        reason = f"it has more than {MAX_PIXELS:,} pixels"
    except Exception as error:  # of any kind, as readers meet damaged files
        raise ConfigError(unreadable(name, error)) from None
    if reason:
        raise ConfigError(unreadable(name, reason))
    return image


def unreadable(name: str, reason: object) -> str:
    """Returns the message that an image cannot be decoded, for a reason or an error."""
    reason = str(reason) or type(reason).__name__
    return f"data.root: {name} cannot be decoded: {reason}; replace, convert or remove it"


def _refusal(image: Image.Image) -> str:
    """Returns why an image is not decoded, or an empty string."""
    if image.width * image.height > MAX_PIXELS:
        return f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}"
    if image.mode == "F":
        return "its pixels are floating-point numbers, of which no range is known"
    if image.mode == "I" and image.format != "PPM":
        return "its pixels are 32-bit or signed numbers, of which no range is known"
    return ""


def is_plain(image: Image.Image) -> bool:
    """Tells by the header whether this version reads an image, and reads it, as earlier ones did."""
    known = image.format in PLAIN_FORMATS and image.mode in PLAIN_MODES
    return known and not image.has_transparency_data and _orientation(image) == 1


def decode(image: Any, channels: int, size: int) -> np.ndarray:
    """Turns a PIL image into uint8 (C, S, S): upright, shorter edge resized to S, centre cropped.

    Of several frames the first is taken.

    Raises:
        ValueError: it has too many pixels, or such of unknown range. Damaged images may raise anything.
    """
    image = upright(image).convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(edge * scale)) for edge in image.size)
        image = image.resize((width, height), resample=2)  # bilinear
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.array(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def upright(image: Image.Image) -> Image.Image:
    """Returns the image decoded and as it is to be seen: opaque, 8 bits, L if it is grey, else RGB."""
    if reason := _refusal(image):
        raise ValueError(reason)
    image.load()
    orientation = _orientation(image)
    image = _opaque(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    """Returns how EXIF says that an image lies; 1 if it does not."""
    try:
        # The method of the class, as that of PNG decodes the image.
        value = Image.Image.getexif(image).get(0x0112)
    except Exception:  # of any kind: damaged EXIF says nothing
        return 1
    return value if value in tuple(_UPRIGHT) else 1


def _opaque(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I"):
        return _of_sixteen_bits(image)
    if image.has_transparency_data:
        if mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (WHITE,) * 3)
        ground.paste(image.convert("RGB"), mask=image.getchannel("A"))
        image = ground
    return image.convert("L" if mode in GREY else "RGB")


def _of_sixteen_bits(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # TIFF's
    values = np.asarray(image)
    scaled = values / (2 ** tags.get(258, (16,))[0] - 1)  # bits per sample: 12 or 16
    if tags.get(262) == 0:  # white is zero, which Pillow minds with fewer bits only
        scaled = 1 - scaled
    scaled = np.where(values == image.info.get("transparency", -1), WHITE / 255, scaled)
    return Image.fromarray((scaled.clip(0, 1) * 255).round().astype(np.uint8))


class Looks:
    """What images of a data set look like: whether some have one value everywhere, or are equal to an earlier one.

    Args:
        split: that they are of, for messages.
        total: images of the split, of which some may not be looked at.
    """

    def __init__(self, split: str, total: int) -> None:
        self.split, self.total, self.looked = split, total, 0
        self.constant: list[str] = []  # names of images
        self.equal: list[tuple[str, str]] = []
        self.first: dict[bytes, str] = {}  # name of the first image by a hash of its pixels

    def add(self, name: str, image: Image.Image) -> None:
        """Decodes and counts an image; raises ConfigError if it cannot be decoded."""
        self.looked += 1
        try:
            image = upright(image)
        except Exception as error:  # of any kind, as readers meet damaged files
            raise ConfigError(unreadable(name, error)) from None
        name = name.rstrip(",")
        if all(low == high for low, high in np.reshape(image.getextrema(), (-1, 2))):
            self.constant.append(name)
            return
        pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if (first := self.first.setdefault(pixels, name)) != name:
            self.equal.append((first, name))

    def warnings(self) -> list[str]:
        """Returns what may be wrong, with how many images and an example."""
        of = f"of {self.looked:,} {self.split} images" + (" looked at" if self.looked < self.total else "")
        found = []
        if self.constant:
            found.append(f"{len(self.constant):,} {of} have one value everywhere, such as {self.constant[0]}")
        if self.equal:
            found.append(f"{len(self.equal):,} {of} are equal to an earlier one, such as {' and '.join(self.equal[0])}")
        return found
