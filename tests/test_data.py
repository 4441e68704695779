"""Data sets, splits, the cache, streaming and training batches, on tiny images."""

import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pdiff_ray import data, sources
from pdiff_ray.config import Data
from pdiff_ray.errors import ConfigError, PdiffError

CPU = torch.device("cpu")


def pixels(count, size=8, channels=3, seed=0):
    shape = (count, size, size, channels) if channels == 3 else (count, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path, images, labels, image="img", label="label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array([{"bytes": png(array), "path": None} for array in images])
    pq.write_table(pa.table({image: column, label: pa.array(labels, pa.int64())}), path, row_group_size=10)


@pytest.fixture
def parquet(tmp_path):
    """Configuration, training pixels (40, in two files) and test pixels (10) of a custom set of 3 classes."""
    train, test = pixels(40), pixels(10, seed=1)
    labels = np.arange(40) % 3
    write_parquet(tmp_path / "root/train-0.parquet", train[:25], labels[:25])
    write_parquet(tmp_path / "root/train-1.parquet", train[25:], labels[25:])
    write_parquet(tmp_path / "root/test.parquet", test, np.arange(10) % 3)
    config = Data(name="custom", source="parquet", root=str(tmp_path / "root"), loader_workers=0)
    return config, train, test


def images_of(split, batch_size=7):
    batches = list(split.in_order(batch_size))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def with_(config, **changes):
    return config.model_copy(update=changes)


# --- the table --------------------------------------------------------------------------------------------------------


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


def test_prepared_images_are_standardized(tmp_path):
    dataset = data.load(Data(), tmp_path)
    prepared = dataset.prepare(images_of(dataset.train)[0], CPU)
    assert prepared.dtype == torch.float32
    assert prepared.mean().item() == pytest.approx(0, abs=0.02)
    assert prepared.std().item() == pytest.approx(1, abs=0.02)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_stable(tmp_path):
    config = Data(validation_fraction=0.2, selection_images=100)
    first, second = data.load(config, tmp_path / "a"), data.load(config, tmp_path / "b")
    train, validation, selection = (set(s.indices.tolist()) for s in (first.train, first.validation, first.selection))
    assert len(validation) == 180
    assert not train & validation
    assert train | validation == set(range(900))
    assert selection < train
    assert len(selection) == 100
    for name in ("train", "validation", "selection", "test"):
        np.testing.assert_array_equal(getattr(first, name).indices, getattr(second, name).indices)
    other = data.load(with_(config, seed=1), tmp_path / "a")
    assert set(other.validation.indices.tolist()) != validation


def test_splits_hold_the_images_at_their_indices(tmp_path):
    dataset = data.load(Data(), tmp_path)
    images, labels = images_of(replace(dataset.train, indices=np.arange(900)))
    for split in (dataset.train, dataset.validation, dataset.selection):
        found, found_labels = images_of(split)
        assert torch.equal(found, images[split.indices])
        assert torch.equal(found_labels, labels[split.indices])


def test_selection_is_no_larger_than_the_training_data(tmp_path):
    dataset = data.load(Data(selection_images=5000), tmp_path)
    assert len(dataset.selection) == len(dataset.train) == 810


# --- cache ------------------------------------------------------------------------------------------------------------


def test_cache_is_built_once(tmp_path, parquet):
    config, train, _ = parquet
    decoded = []
    first = data.load(config, tmp_path / "cache", lambda done, total: decoded.append(done))
    assert decoded
    decoded.clear()
    second = data.load(config, tmp_path / "cache", lambda done, total: decoded.append(done))
    assert not decoded
    images, labels = images_of(replace(second.train, indices=np.arange(40)))
    assert torch.equal(images, torch.from_numpy(train.transpose(0, 3, 1, 2)))
    assert labels.tolist() == [i % 3 for i in range(40)]
    assert torch.equal(images_of(first.test)[0], images_of(second.test)[0])
    left = {path.name for path in (tmp_path / "cache").glob("*/*")}
    assert left == {"images.npy", "labels.npy"}


@pytest.mark.parametrize("name", ["custom", "cifar10"])
def test_replaced_file_is_decoded_anew(tmp_path, parquet, name):
    config = with_(parquet[0], name=name, image_size=8)
    data.load(config, tmp_path / "cache")
    other = pixels(10, seed=7)
    write_parquet(Path(config.root) / "test.parquet", other, np.arange(10) % 3)
    images, _ = images_of(data.load(config, tmp_path / "cache").test)
    assert torch.equal(images, torch.from_numpy(other.transpose(0, 3, 1, 2)))


def test_two_at_once_build_one_whole_cache(tmp_path):
    """Locks are per open file, so threads contend for them as processes do."""
    config, together, decoded = Data(pixel_noise=0.5), threading.Barrier(2), []

    def load(_):
        together.wait()
        return data.load(config, tmp_path, lambda done, total: decoded.append(done))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, range(2))
    for split in ("train", "test"):
        assert torch.equal(images_of(getattr(first, split))[0], images_of(getattr(second, split))[0])
    assert decoded.count(900) == decoded.count(897) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", "", ".lock", ".lock"]


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PdiffError, match=r"cache .*file.*; free space or set PDIFF_CACHE"):
        data.load(Data(), tmp_path / "file" / "cache")


def test_pixel_noise_is_fixed(tmp_path):
    config = Data(pixel_noise=0.5)
    first, second = data.load(config, tmp_path / "a"), data.load(config, tmp_path / "b")
    noisy, clean = images_of(first.test)[0], data.load(Data(), tmp_path / "a")
    assert torch.equal(noisy, images_of(second.test)[0])
    noise = noisy - clean.prepare(images_of(clean.test)[0], CPU)
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert torch.equal(first.prepare(noisy, CPU), noisy)
    assert not torch.equal(images_of(data.load(with_(config, seed=1), tmp_path / "a").test)[0], noisy)


# --- sources ----------------------------------------------------------------------------------------------------------


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


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_images_are_the_cached_ones(tmp_path, parquet, workers):
    config, _, _ = parquet
    cached = data.load(config, tmp_path / "cache")
    streaming = with_(config, max_cache_gib=0.0, loader_workers=workers)
    streamed = data.load(streaming, tmp_path / "streaming")
    assert not list((tmp_path / "streaming").rglob("*.npy"))
    for name in ("validation", "test")[: 2 - workers]:
        images, labels = images_of(getattr(cached, name))
        found, found_labels = images_of(getattr(streamed, name))
        assert torch.equal(found, images)
        assert torch.equal(found_labels, labels)
    pairs = zip(cached.training_batches(16, 1, 4, CPU, 0), streamed.training_batches(16, 1, 4, CPU, 0), strict=True)
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in pairs)


def test_streaming_maps_one_arrow_file_and_travels_light(tmp_path, parquet):
    config, _, _ = parquet
    streaming, cache = with_(config, max_cache_gib=0.0), tmp_path / "cache"
    samples = data.load(streaming, cache).train.source.samples
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert len(written) == 2
    samples[0]
    assert samples._encoded.nbytes > 40 * 150
    assert len(pickle.dumps(samples)) < 2000
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(samples))[33][0]), np.asarray(samples[33][0]))
    data.load(with_(streaming, image_size=4), cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")} == written


def test_streaming_refuses_fixed_noise(tmp_path):
    with pytest.raises(ConfigError, match=r"pixel_noise needs decoded images.*max_cache_gib is 0"):
        data.load(Data(pixel_noise=0.1, max_cache_gib=0), tmp_path)


# --- training batches -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def augmented(tmp_path_factory):
    return data.load(Data(augment="crop_flip", train_noise=0.1, channels=3), tmp_path_factory.mktemp("augmented"))


def test_batches_depend_on_seed_and_step_alone(augmented):
    whole = list(augmented.training_batches(100, 0, 20, CPU, "x", 1))  # 8 steps per epoch
    middle = list(augmented.training_batches(100, 13, 20, CPU, "x", 1))
    other = list(augmented.training_batches(100, 13, 20, CPU, "x", 2))
    assert len(whole) == 20
    for (images, labels), (again, labels_again) in zip(whole[13:], middle, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labels_again)
    assert not torch.equal(middle[0][1], other[0][1])
    assert not torch.equal(whole[0][1], whole[8][1])  # another epoch is another permutation


def test_an_epoch_repeats_no_image(tmp_path):
    dataset = data.load(Data(), tmp_path)
    seen = torch.cat([images for images, _ in dataset.training_batches(90, 0, 9, CPU, 0)])
    expected = dataset.prepare(images_of(dataset.train)[0], CPU)
    assert len(seen) == len(expected) == 810
    assert sorted(map(bytes, seen.flatten(1).numpy())) == sorted(map(bytes, expected.flatten(1).numpy()))


def test_ranks_partition_the_batch(tmp_path):
    dataset = data.load(Data(), tmp_path)
    ((images, labels),) = dataset.training_batches(50, 3, 4, CPU, 0)
    parts = [next(dataset.training_batches(50, 3, 4, CPU, 0, rank=rank, world=3)) for rank in range(3)]
    assert [len(part[1]) for part in parts] == [17, 17, 16]
    for rank, (part, part_labels) in enumerate(parts):
        assert torch.equal(part, images[rank::3])
        assert torch.equal(part_labels, labels[rank::3])


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
@pytest.mark.parametrize("train_noise", [0.0, 0.5])
def test_augmentation_keeps_shape_and_memory_format(tmp_path, augment, train_noise):
    dataset = data.load(Data(augment=augment, train_noise=train_noise, channels=3), tmp_path)
    ((images, labels),) = dataset.training_batches(32, 0, 1, CPU, 0)
    assert images.shape == (32, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert len(labels) == 32
    plain, _ = next(data.load(Data(channels=3), tmp_path).training_batches(32, 0, 1, CPU, 0))
    assert torch.equal(images, plain) == (augment == "none" and not train_noise)


def test_crops_and_flips_are_those_of_a_loop(tmp_path):
    """Every augmented image is one of the 2 flips x 3 x 3 crops of the reflected original."""
    dataset = data.load(Data(augment="crop_flip", channels=3), tmp_path)
    plain = data.load(Data(channels=3), tmp_path)
    ((images, _),) = dataset.training_batches(64, 0, 1, CPU, 0)
    ((originals, _),) = plain.training_batches(64, 0, 1, CPU, 0)
    used = set()
    for image, original in zip(images, originals, strict=True):
        padded = torch.nn.functional.pad(original[None], [1] * 4, mode="reflect")[0]
        mirrored = torch.nn.functional.pad(original.flip(-1)[None], [1] * 4, mode="reflect")[0]
        crops = {
            (flip, top, left): source[:, top : top + 8, left : left + 8]
            for flip, source in enumerate((padded, mirrored))
            for top in range(3)
            for left in range(3)
        }
        matching = [which for which, crop in crops.items() if torch.equal(crop, image)]
        assert matching
        used.add(matching[0])
    assert {flip for flip, _, _ in used} == {0, 1}
    assert len(used) > 10


def test_augmentation_is_seeded(augmented):
    dataset = augmented
    (first,), (again,), (other,) = (
        [images for images, _ in dataset.training_batches(32, 0, 1, CPU, seed)] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"data\.name: unknown data set 'cifar-10'; did you mean 'cifar10'"):
        sources.describe(Data(name="cifar-10"))
    with pytest.raises(ConfigError, match=r"'zzzz'; known: digits, mnist, .*custom"):
        sources.describe(Data(name="zzzz"))


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
        sources.check(with_(config, root=str(tmp_path / "nowhere")))
    assert str(caught.value).startswith("data.root: ")
    assert "nowhere" in str(caught.value)
    assert remedy in str(caught.value)


def test_empty_image_folder(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"data\.root: .*train has to hold a folder of images per class"):
        sources.check(Data(name="custom", source="folder", root=str(tmp_path)))


def test_truncated_parquet_file_is_named(parquet):
    config, _, _ = parquet
    path = Path(config.root) / "train-1.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"data\.root: .*train-1\.parquet cannot be read as Parquet images"):
        sources.check(config)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (pa.table({"picture": [b"x"], "label": [0]}), "has columns picture, label; wanted are img or image"),
        (pa.table({"img": [{"bytes": b"x"}]}), "has columns img; wanted"),
        (pa.table({"img": [b"x"], "label": [0]}), "cannot be read as Parquet images"),
        (pa.table({"img": [{"bytes": b"x"}], "label": ["cat"]}), "cannot be read as Parquet images"),
        (pa.table({"img": pa.array([{"bytes": b"x"}])[:0], "label": pa.array([0])[:0]}), "holds no images"),
    ],
    ids=["no image", "no label", "no struct", "label as text", "no rows"],
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
    with pytest.raises(ConfigError, match=rf"cifar10 has the labels 0 to 9, but the train data .* has .*{label}"):
        sources.check(Data(name="cifar10", source="parquet", root=str(tmp_path)))


@pytest.mark.parametrize("max_cache_gib", [1.0, 0.0])
def test_damaged_image_is_named(tmp_path, parquet, max_cache_gib):
    config, train, _ = parquet
    column = [{"bytes": png(array)} for array in train[:20]]
    column[13] = {"bytes": column[13]["bytes"][:60]}
    table = pa.table({"img": pa.array(column), "label": pa.array([0, 1] * 10)})
    pq.write_table(table, Path(config.root) / "test.parquet")
    with pytest.raises(PdiffError, match=r"data\.root: image 13, counted from 0, cannot be decoded"):
        images_of(data.load(with_(config, max_cache_gib=max_cache_gib), tmp_path / "cache").test)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_damaged_image_file_is_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(pixels(1)[0]).save(tmp_path / split / "cat" / "a.png")
    (tmp_path / "test/cat/b.png").write_bytes(b"not an image")
    with pytest.raises(PdiffError, match=r"test/cat/b\.png cannot be decoded"):
        data.load(Data(name="custom", source="folder", root=str(tmp_path)), tmp_path / "cache")


def test_batch_larger_than_the_data(tmp_path):
    dataset = data.load(Data(), tmp_path)
    with pytest.raises(ConfigError, match="batch_size is 811, but there are only 810 training images; lower it"):
        next(dataset.training_batches(811, 0, 1, CPU, 0))
