"""Pixels of every mode, from folders and from Parquet files: the same, and those that a viewer shows."""

import io
from dataclasses import replace

import numpy as np
import pytest
from helpers import encoded, images_of, pixels, with_, write_parquet
from PIL import Image

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.config.schema import Data
from pdiff_ray.data import dataset as data
from pdiff_ray.data import images, sources

GREY = pixels(1, channels=1)[0]
COLOUR = pixels(1, seed=1)[0]
ALPHA = pixels(1, channels=1, seed=2)[0]
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "TIFF": "tif", "GIF": "gif", "WEBP": "webp", "PPM": "pgm"}


def decoded(content, channels=None):
    image = images.open_image(content, "it")
    return images.decode(image, channels or (1 if image.mode in images.GREY else 3), 8).transpose(1, 2, 0).squeeze()


def on_white(array, alpha):
    alpha = (alpha if array.ndim == 2 else alpha[..., None]) / 255
    return array * alpha + 255 * (1 - alpha)


def dyed(**options):
    """A palette of 256 shades of red; its first shade is transparent if `options` say so."""
    image = Image.fromarray(GREY)
    image.putpalette([value for shade in range(256) for value in (shade, 0, 0)])
    return encoded(image, **options)


RED = np.stack([GREY, 0 * GREY, 0 * GREY], -1)
FIRST = GREY[0, 0]
SIXTEEN = GREY.astype(np.uint16) * 257
CASES = {
    "1": (encoded(Image.fromarray(GREY > 99)), (GREY > 99) * 255),
    "L": (encoded(GREY), GREY),
    "L with a transparent shade": (encoded(GREY, transparency=int(FIRST)), np.where(GREY == FIRST, 255, GREY)),
    "LA": (encoded(Image.fromarray(np.dstack([GREY, ALPHA]))), on_white(GREY, ALPHA)),
    "P": (dyed(), RED),
    "P with a transparent shade": (
        dyed(transparency=int(FIRST)),
        np.where((GREY == FIRST)[..., None], 255, RED),
    ),
    "P with alpha": (dyed(transparency=bytes(range(256))), on_white(RED, GREY)),
    "RGB": (encoded(COLOUR), COLOUR),
    "RGBA": (encoded(np.dstack([COLOUR, ALPHA])), on_white(COLOUR, ALPHA)),
    "all in alpha": (encoded(np.dstack([COLOUR * 0, ALPHA])), np.dstack([255 - ALPHA] * 3)),
    "16 bits": (encoded(SIXTEEN), GREY),
    "16 bits with a transparent shade": (
        encoded(Image.fromarray(SIXTEEN), transparency=int(SIXTEEN[0, 0])),
        np.where(GREY == FIRST, 255, GREY),
    ),
    "16 bits as TIFF": (encoded(SIXTEEN, "TIFF"), GREY),
    "16 bits as big-endian TIFF": (encoded(Image.fromarray(SIXTEEN.astype(">u2")), "TIFF"), GREY),
    "16 bits as TIFF with white as zero": (encoded(SIXTEEN, "TIFF", tiffinfo={262: 0}), 255 - GREY),
    "16 bits as PGM": (encoded(SIXTEEN, "PPM"), GREY),
    "CMYK": (encoded(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR),
    "YCbCr": (encoded(Image.fromarray(COLOUR).convert("YCbCr"), "TIFF"), COLOUR),
    "LAB": (
        encoded(Image.fromarray(np.full((8, 8, 3), (128, 0, 0), np.uint8), "LAB"), "TIFF"),
        np.full((8, 8, 3), 119),
    ),
    "frames": (
        encoded(Image.fromarray(GREY), "WEBP", save_all=True, append_images=[Image.fromarray(ALPHA)], lossless=True),
        np.dstack([GREY] * 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_that_a_viewer_shows(case):
    content, expected = CASES[case]
    tolerance = {"YCbCr": 3, "LAB": 3}.get(case, 1 if "alpha" in case.lower() or "A" in case else 0)
    np.testing.assert_allclose(decoded(content).astype(int), expected, atol=tolerance)


def write_both(root, contents, split="train"):
    """The same encoded images as files in folders of two classes and in a Parquet file, in the same order."""
    order = sorted(range(len(contents)), key=lambda index: (index % 2, index))
    write_parquet(root / f"parquet/{split}.parquet", [contents[i] for i in order], [i % 2 for i in order])
    for index in order:
        suffix = SUFFIXES[Image.open(io.BytesIO(contents[index])).format]
        file = root / f"folder/{split}/class{index % 2}/{index:03}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[index])
    return [Data(name="custom", source=s, root=str(root / s), loader_workers=0) for s in ("folder", "parquet")]


@pytest.mark.parametrize("max_cache_gib", [1.0, 0.0])
def test_folders_and_parquet_files_give_the_same(tmp_path, max_cache_gib):
    contents = [content for content, _ in CASES.values()]
    write_both(tmp_path, contents)
    configs = write_both(tmp_path, contents[::-1], "test")
    folder, parquet = (data.load(with_(c, max_cache_gib=max_cache_gib), tmp_path / "cache") for c in configs)
    assert folder.info == parquet.info
    for split in ("train", "test"):
        (found, labels), (other, other_labels) = (images_of(getattr(d, split)) for d in (folder, parquet))
        np.testing.assert_array_equal(found, other)
        np.testing.assert_array_equal(labels, other_labels)


@pytest.mark.parametrize(("odd", "channels"), [(None, 1), (3, 3)])
def test_one_coloured_image_makes_a_set_coloured(tmp_path, odd, channels):
    contents = [CASES["L"][0], CASES["16 bits"][0], CASES["LA"][0], CASES["1"][0]]
    if odd:
        contents[odd] = CASES["RGB"][0]
    write_both(tmp_path, contents)
    for config in write_both(tmp_path, contents[:2], "test"):
        assert sources.describe(config).channels == channels


def test_size_is_the_median_of_all_images(tmp_path):
    contents = [encoded(np.zeros((size, 40, 3), np.uint8)) for size in (8, 20, 20, 20, 30)]
    write_both(tmp_path, contents)
    for config in write_both(tmp_path, contents[:2], "test"):
        assert sources.describe(config).image_size == 20


# --- orientation ------------------------------------------------------------------------------------------------------


def turned(orientation, format, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(np.kron(CORNER, np.ones((8, 8, 1), np.uint8))), format, exif=exif, **options)


CORNER = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 250]]], np.uint8)
UPRIGHT = {
    1: CORNER,
    2: CORNER[:, ::-1],
    3: CORNER[::-1, ::-1],
    4: CORNER[::-1],
    5: CORNER.transpose(1, 0, 2),
    6: np.rot90(CORNER, -1),
    7: np.rot90(CORNER, 2).transpose(1, 0, 2),
    8: np.rot90(CORNER),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"quality": 100, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_stand_upright(orientation, format, options):
    image = images.open_image(turned(orientation, format, **options), "it")
    found = images.decode(image, 3, 16).transpose(1, 2, 0)[4::8, 4::8]
    np.testing.assert_allclose(found.astype(int), UPRIGHT[orientation], atol=8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_says_nothing():
    content = turned(6, "JPEG", quality=100, subsampling=0)
    at = content.index(b"Exif") + 6
    broken = content[:at] + b"II*\0\xff\xff\xff\xff" + content[at + 8 :]  # a directory beyond the end
    found = images.decode(images.open_image(broken, "it"), 3, 16).transpose(1, 2, 0)[4::8, 4::8]
    np.testing.assert_allclose(found.astype(int), CORNER, atol=8)


# --- refused by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(GREY.astype(np.float32), "TIFF"), "floating-point numbers"),
        (encoded(GREY.astype(np.int32), "TIFF"), "32-bit or signed numbers"),
        (encoded(np.zeros((8, 33, 3), np.uint8)), "it has 33 x 8 pixels, more than 256"),
        (b"no image", "it is none of PNG, JPEG"),
        (CASES["RGB"][0][:60], "truncated|cannot be decoded"),
    ],
    ids=["float", "int32", "large", "text", "truncated"],
)
def test_refused_images_are_named(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(images, "MAX_PIXELS", 256)
    write_both(tmp_path, [CASES["RGB"][0]] * 4)
    for config in write_both(tmp_path, [CASES["RGB"][0]] * 3, "test"):
        if config.source == "folder":
            bad = tmp_path / "folder/test/class1/bad.png"
            bad.write_bytes(content)
            name = str(bad)
        else:
            write_parquet(tmp_path / "parquet/test.parquet", [CASES["RGB"][0], content], [0, 1])
            name = r"test\.parquet, row 1 \(counted from 0\),"
        with pytest.raises(ConfigError, match=f"{name} cannot be decoded: .*({reason})"):
            sources.describe(config)


def large_data(root):
    image = [(Image.fromarray(np.zeros((9, 9), np.uint8)), 0)] * 3
    return sources.DataInfo(1, 8, 2, (0.5,), (0.25,)), image, [(Image.fromarray(GREY), 5)] * 3


def test_refused_images_and_labels_of_the_users_own(tmp_path, monkeypatch):
    config = Data(name=f"{__name__}:large_data")
    with pytest.raises(ConfigError, match="image 0, counted from 0, has the label 5"):
        data.load(config, tmp_path)
    monkeypatch.setattr(images, "MAX_PIXELS", 80)
    with pytest.raises(PdiffError, match="image 0, counted from 0, cannot be decoded: it has 9 x 9 pixels"):
        data.load(config, tmp_path / "other")


# --- warnings, keys ---------------------------------------------------------------------------------------------------


def test_constant_and_equal_images_are_warned_of(tmp_path):
    constant, other = encoded(np.full((8, 8, 3), 7, np.uint8)), [encoded(array) for array in pixels(6)]
    write_both(tmp_path, [constant, *other, other[2], constant])
    for config in write_both(tmp_path, other[:2], "test"):
        first, second = sources.inventory(config).warnings
        assert first.startswith("2 of 9 train images have one value everywhere, such as ")
        assert second.startswith("1 of 9 train images are equal to an earlier one, such as ")
        assert ("000.png" if config.source == "folder" else "train.parquet, row 0") in first


def test_constant_and_equal_images_of_the_users_own_are_warned_of():
    first, second = sources.inventory(Data(name=f"{__name__}:large_data")).warnings
    assert first == "3 of 3 train images have one value everywhere, such as image 0, counted from 0"
    assert second.startswith(
        "2 of 3 test images are equal to an earlier one, such as image 0, counted from 0 and image"
    )


@pytest.mark.parametrize(
    ("contents", "as_before"),
    [
        ([CASES["RGB"][0], CASES["P"][0]], True),
        ([CASES["L"][0]] * 2, True),
        ([CASES["RGB"][0], CASES["RGBA"][0]], False),
        ([CASES["RGB"][0], CASES["P with a transparent shade"][0]], False),
        ([CASES["RGB"][0], turned(6, "JPEG")], False),
        ([CASES["16 bits"][0]] * 2, False),
    ],
    ids=["plain", "grey", "RGBA", "palette", "turned", "16 bits"],
)
def test_only_images_that_are_read_otherwise_have_other_keys(tmp_path, contents, as_before):
    """Results of earlier versions are found where the images are the same."""
    write_both(tmp_path, contents)
    for config in write_both(tmp_path, contents, "test"):
        assert ("reading" not in sources.keyed(with_(config, image_size=8))) == as_before


# --- damaged images ---------------------------------------------------------------------------------------------------


class One:
    """A data set of one encoded image."""

    def __init__(self, content):
        self.content = content

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return images.open_image(self.content, "it"), 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF"])
def test_whatever_byte_changes_an_image_is_read_or_refused(format):
    random, content = np.random.default_rng(0), turned(6, format)
    refusals = []
    for _ in range(40):
        damaged = bytearray(content)
        damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        try:
            sources.decoded(One(bytes(damaged)), 0, sources.DataInfo(3, 8, 1, (0.5,) * 3, (0.5,) * 3))
        except PdiffError as error:
            refusals.append(str(error))
    assert refusals
    assert all(" cannot be decoded: " in refusal for refusal in refusals)


def test_what_torchvision_reads_lies_as_in_the_file(tmp_path):
    """Its loaders drop what EXIF says, on which networks with published weights were trained."""
    from torchvision.datasets import ImageFolder

    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "a").mkdir()
    Image.fromarray(COLOUR).save(tmp_path / "a" / "0.png", exif=exif)
    samples = ImageFolder(str(tmp_path))
    for name, expected in {"imagenet": COLOUR, "own": np.rot90(COLOUR, 2)}.items():
        info = replace(
            sources.DATASETS["imagenet"], image_size=8, torchvision="ImageNet" if name == "imagenet" else None
        )
        image, _ = sources.decoded(samples, 0, info)
        np.testing.assert_array_equal(image.transpose(1, 2, 0), expected)
