"""Where images come from: the table of data sets, Parquet files and folders, and what is wrong with them."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import encoded, images_of, pixels, with_, write_parquet
from PIL import Image

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.config.schema import Data
from pdiff_ray.data import dataset as data
from pdiff_ray.data import sources


def test_table_agrees_with_the_digits(tmp_path):
    from sklearn.datasets import load_digits

    dataset = data.load(Data(), tmp_path)
    info = sources.DATASETS["digits"]
    images, labels = images_of(replace(dataset.train, indices=np.arange(900)))
    scaled = images.double() / 255
    assert images.shape == (900, info.channels, info.image_size, info.image_size)
    assert scaled.mean().item() == pytest.approx(info.mean[0], abs=1e-3)
    assert scaled.std().item() == pytest.approx(info.std[0], abs=1e-3)
    assert len(dataset.test) == 897
    assert labels.unique().tolist() == list(range(info.num_classes))
    assert torch.equal((scaled[:, 0] * 16).round(), torch.from_numpy(load_digits().images[:900]))


def test_table_is_consistent():
    from torchvision import datasets

    for name, info in sources.DATASETS.items():
        assert len(info.mean) == len(info.std) == info.channels, name
        assert all(0 < value < 1 for value in (*info.mean, *info.std)), name
        assert info.torchvision is None or hasattr(datasets, info.torchvision), name


@pytest.mark.parametrize("image", ["img", "image"])
@pytest.mark.parametrize("label", ["label", "fine_label"])
def test_parquet_schemas(tmp_path, image, label):
    images = pixels(12)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", images, range(12), image, label)
    dataset = data.load(Data(name="custom", source="parquet", root=str(tmp_path)), tmp_path / "cache")
    found, labels = images_of(dataset.test)
    assert torch.equal(found, torch.from_numpy(images.transpose(0, 3, 1, 2)))
    assert labels.tolist() == list(range(12))


def test_custom_data_describes_itself(parquet):
    config, _, _ = parquet
    info = sources.describe(config)
    assert (info.channels, info.image_size, info.num_classes) == (3, 8, 3)
    assert info.mean == info.std == (0.5, 0.5, 0.5)
    assert sources.describe(with_(config, channels=1, image_size=4)).image_size == 4


def test_custom_data_is_keyed_by_content(parquet):
    config, train, _ = parquet
    key = sources.keyed(config)
    moved = Path(config.root).rename(Path(config.root).with_name("moved"))
    assert sources.keyed(with_(config, root=str(moved))) == key
    write_parquet(moved / "train-0.parquet", train[:24], np.arange(24) % 3)
    assert sources.keyed(with_(config, root=str(moved))) != key


def test_image_folder(tmp_path):
    arrays = pixels(12, size=6, channels=1)
    for split in ("train", "val"):
        for index, array in enumerate(arrays):
            folder = tmp_path / split / f"class{index % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / f"{index:02}.png")
    config = Data(name="custom", source="folder", root=str(tmp_path), channels=1)
    info = sources.describe(config)
    assert (info.channels, info.image_size, info.num_classes) == (1, 6, 4)
    images, labels = images_of(data.load(config, tmp_path / "cache").test)
    order = sorted(range(12), key=lambda index: (index % 4, index))
    assert labels.tolist() == [index % 4 for index in order]
    assert torch.equal(images[:, 0], torch.from_numpy(arrays[order]))


def test_grey_to_colour_and_resize(tmp_path):
    config = Data(channels=3, image_size=16)
    info, plain = sources.describe(config), sources.DATASETS["digits"]
    assert (info.channels, info.image_size) == (3, 16)
    assert info.mean == pytest.approx(plain.mean * 3)
    images, _ = images_of(data.load(config, tmp_path).test)
    assert images.shape == (897, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 1])
    small, _ = images_of(data.load(Data(), tmp_path).test)
    assert images.double().mean().item() == pytest.approx(small.double().mean().item(), rel=0.01)
    assert torch.equal(images_of(data.load(with_(config, image_size=8), tmp_path).test)[0][:, 2:], small)


def test_oblong_images_are_cropped_in_the_middle(tmp_path):
    array = np.zeros((4, 8, 3), dtype=np.uint8)
    array[:, 2:6] = 255
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [array] * 2, [0, 1])
    images, _ = images_of(data.load(Data(name="custom", source="parquet", root=str(tmp_path)), tmp_path / "c").test)
    assert images.shape == (2, 3, 4, 4)
    assert images.eq(255).all()


# --- errors -----------------------------------------------------------------------------------------------------------


def own_data(root):
    """Ten grey images of two classes, which lie in no file."""
    images = [(Image.fromarray(array), index % 2) for index, array in enumerate(pixels(10, channels=1))]
    return sources.DataInfo(1, 8, 2, (0.5,), (0.25,)), images[:6], images[6:]


def no_data(root):
    return [root]


def test_data_of_the_users_own(tmp_path):
    config = Data(name=f"{__name__}:own_data", root=str(tmp_path))
    sources.check_data(config)
    assert sources.describe(config).std == (0.25,)
    assert sources.count_images(config) == (6, 4)
    images, labels = images_of(data.load(config, tmp_path / "cache").test)
    assert torch.equal(images[:, 0], torch.from_numpy(pixels(10, channels=1)[6:]))
    assert labels.tolist() == [0, 1, 0, 1]


def test_data_of_the_users_own_is_keyed_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "from test_sources import own_data"
    keys = []
    for name, text in (("first_module", source), ("second_module", f"{source}  # changed")):
        (tmp_path / f"{name}.py").write_text(text)
        keys.append(sources.keyed(Data(name=f"{name}:own_data"))["code"]["name"])
    assert keys[0] != keys[1]
    assert sources.keyed(Data(name="first_module:own_data"))["reading"] == sources.READING


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": f"{__name__}:no_data"},
            r"data\.name: test_sources:no_data returned \['data'\], not a DataInfo, train",
        ),
        (
            {"name": f"{__name__}:own_data", "source": "folder"},
            "'folder' says .* which reads its own; remove it",
        ),
    ],
)
def test_data_of_the_users_own_that_does_not_fit(config, message):
    with pytest.raises(ConfigError, match=message):
        sources.describe(Data(**config))


def test_custom_needs_a_source():
    with pytest.raises(ConfigError, match=r"data\.source: 'auto' cannot be read as custom data; choose parquet or"):
        sources.describe(Data(name="custom"))


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (Data(name="mnist"), "set data.download: true"),
        (Data(name="imagenet"), "name another data.source"),
        (Data(name="custom", source="parquet"), "put files there"),
        (Data(name="custom", source="folder"), "no folder train"),
    ],
    ids=lambda value: value.source + value.name if isinstance(value, Data) else "",
)
def test_missing_root(tmp_path, config, remedy):
    with pytest.raises(ConfigError) as caught:
        sources.check_data(with_(config, root=str(tmp_path / "nowhere")))
    assert str(caught.value).startswith("data.root: ")
    assert "nowhere" in str(caught.value)
    assert remedy in str(caught.value)


def test_empty_image_folder(tmp_path):
    config = Data(name="custom", source="folder", root=str(tmp_path))
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(ConfigError, match=r"data\.root: .*train has to hold a folder of images per class"):
        sources.check_data(config)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ConfigError, match=r"data\.root: the class folder .*train/cat holds no image \(\.png, .*; add"):
        sources.check_data(config)


def test_parquet_names_and_labels_that_are_no_text(parquet):
    config, _, _ = parquet
    file = next(Path(config.root).glob("train-0*"))
    content, images = file.read_bytes(), pq.read_table(file)
    labels = pa.array([b"\xe9"] * len(images), pa.binary()).view(pa.string())
    pq.write_table(images.set_column(1, "label", labels), file)
    with pytest.raises(ConfigError, match=rf"{file} cannot be read as Parquet images: .*UTF8"):
        sources.check_data(config)
    assert content.count(b"label") > 0
    file.write_bytes(content.replace(b"label", b"\xe9abel"))
    with pytest.raises(ConfigError, match=rf"{file} cannot be read as Parquet images: .*utf-8"):
        sources.check_data(config)


def test_truncated_parquet_file_is_named(parquet):
    config, _, _ = parquet
    path = Path(config.root) / "train-1.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"data\.root: .*train-1\.parquet cannot be read as Parquet images"):
        sources.check_data(config)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (pa.table({"picture": [b"x"], "label": [0]}), "has columns picture, label; wanted are img or image"),
        (pa.table({"img": [{"bytes": b"x"}]}), "has columns img; wanted"),
        (pa.table({"img": [b"x"], "label": [0]}), "cannot be read as Parquet images"),
        (pa.table({"img": [{"bytes": b"x"}], "label": [[0]]}), "labels of type list.* wanted is one number or one"),
        (pa.table({"img": pa.array([{"bytes": b"x"}])[:0], "label": pa.array([0])[:0]}), "holds no images"),
    ],
    ids=["no image", "no label", "no struct", "labels in lists", "no rows"],
)
def test_wrong_parquet_columns(tmp_path, table, expected):
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(ConfigError, match=expected) as caught:
        data.load(Data(name="custom", source="parquet", root=str(tmp_path)), tmp_path / "cache")
    assert "train.parquet" in str(caught.value)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_of_another_data_set(tmp_path, label):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", pixels(4, size=32), [0, 1, 2, label])
    with pytest.raises(ConfigError, match=rf"train\.parquet, row 3 \(counted from 0\), has the label {label}"):
        sources.check_data(Data(name="cifar10", source="parquet", root=str(tmp_path)))


@pytest.mark.parametrize("max_cache_gib", [1.0, 0.0])
def test_damaged_image_is_named(tmp_path, parquet, max_cache_gib):
    config, train, _ = parquet
    column = [{"bytes": encoded(array)} for array in train[:20]]
    column[13] = {"bytes": column[13]["bytes"][:60]}
    table = pa.table({"img": pa.array(column), "label": pa.array([0, 1] * 10)})
    pq.write_table(table, Path(config.root) / "test.parquet")
    with pytest.raises(PdiffError, match=r"data\.root: .*test\.parquet, row 13 \(counted from 0\), cannot be"):
        images_of(data.load(with_(config, max_cache_gib=max_cache_gib), tmp_path / "cache").test)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_damaged_files_of_torchvisions_are_named(tmp_path):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "MNIST/raw").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"MNIST/raw/{name}-ubyte").write_bytes(b"\0\0\x08\3" + bytes(12))
    with pytest.raises(ConfigError, match=rf"data.root: mnist is not under '{tmp_path}'"):
        sources.open_samples(Data(name="mnist", source="torchvision", root=str(tmp_path)), "train")


def test_damaged_image_file_is_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(pixels(1)[0]).save(tmp_path / split / "cat" / "a.png")
    (tmp_path / "test/cat/b.png").write_bytes(b"not an image")
    with pytest.raises(PdiffError, match=r"test/cat/b\.png cannot be decoded"):
        data.load(Data(name="custom", source="folder", root=str(tmp_path)), tmp_path / "cache")


def test_one_process_at_a_time_fetches(tmp_path, monkeypatch):
    running, most = 0, 0

    class Slow:
        def __init__(self, root, train, download):
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.05)
            running -= 1

    monkeypatch.setattr("torchvision.datasets.MNIST", Slow)
    config = Data(name="mnist", root=str(tmp_path / "root"), download=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda split: sources.open_samples(config, split), ["train", "test"] * 2))
    assert most == 1
