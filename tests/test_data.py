"""Splits, the cache, streaming and training batches, on tiny images."""

import pickle
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import images_of, pixels, with_, write_parquet

from pdiff_ray.common.errors import ConfigError, PdiffError, UnavailableError
from pdiff_ray.common.seeds import rng
from pdiff_ray.config.schema import Data
from pdiff_ray.data import dataset as data

CPU = torch.device("cpu")


# --- images -----------------------------------------------------------------------------------------------------------


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
    first = data.load(config, tmp_path / "cache", lambda done, *_: decoded.append(done))
    assert decoded
    decoded.clear()
    second = data.load(config, tmp_path / "cache", lambda done, *_: decoded.append(done))
    assert not decoded
    images, labels = images_of(replace(second.train, indices=np.arange(40)))
    assert torch.equal(images, torch.from_numpy(train.transpose(0, 3, 1, 2)))
    assert labels.tolist() == [i % 3 for i in range(40)]
    assert torch.equal(images_of(first.test)[0], images_of(second.test)[0])
    left = {path.name for path in (tmp_path / "cache").glob("*/*")}
    assert left == {"images.npy", "labels.npy", "checksums.txt"}


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
        return data.load(config, tmp_path, lambda done, *_: decoded.append(done))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, range(2))
    for split in ("train", "test"):
        assert torch.equal(images_of(getattr(first, split))[0], images_of(getattr(second, split))[0])
    assert decoded.count(900) == decoded.count(897) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", "", ".lock", ".lock"]


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "checksums.txt"])
def test_damaged_cache_is_made_anew(tmp_path, parquet, capfd, name):
    """Whatever byte changes, images and labels are those of the files."""
    config, cache = parquet[0], tmp_path / "cache"
    expected = [images_of(getattr(data.load(config, cache), split)) for split in ("train", "test")]
    capfd.readouterr()
    random = np.random.default_rng(0)
    for round in range(8):
        for file in cache.glob(f"custom-t*/{name}"):
            content = bytearray(file.read_bytes())
            if round:
                content[random.integers(len(content))] ^= 1 << random.integers(8)
            else:
                content = content[: len(content) // 2]
            file.write_bytes(content)
        notes = []
        dataset = data.load(config, cache, lambda *told, notes=notes: notes.append(told[2]))
        assert notes == ["anew, as the cache was damaged"] * 2
        for split, (images, labels) in zip((dataset.train, dataset.test), expected, strict=True):
            found, found_labels = images_of(split)
            assert torch.equal(found, images)
            assert torch.equal(found_labels, labels)
        assert capfd.readouterr().err.count("is damaged and is made anew") == 2
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("name", ["images.records", "ends.npy", "checksums.npy", "checksums.txt"])
def test_damaged_records_are_made_anew(tmp_path, parquet, name):
    config, cache = with_(parquet[0], max_cache_gib=0.0), tmp_path / "cache"
    expected = images_of(data.load(config, cache).test)[0]
    random = np.random.default_rng(0)
    for _ in range(6):
        (file,) = cache.glob(f"custom-test-encoded-*/{name}")
        intact = file.read_bytes()
        content = bytearray(intact)
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        file.write_bytes(content)
        assert torch.equal(images_of(data.load(config, cache).test)[0], expected)
        assert torch.equal(images_of(data.load(config, cache).test)[0], expected)
        assert file.read_bytes() == intact
    file.unlink()
    assert torch.equal(images_of(data.load(config, cache).test)[0], expected)


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PdiffError, match=r"cache .*file.*; free space or set PDIFF_CACHE"):
        data.load(Data(), tmp_path / "file" / "cache")


def test_a_full_cache_is_an_error_and_no_signal(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(UnavailableError, match="No space left on device; free space or set PDIFF_CACHE"):
            data.load(Data(name="digits"), tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


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


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_images_are_the_cached_ones(tmp_path, parquet, workers):
    config, _, _ = parquet
    cached = data.load(config, tmp_path / "cache")
    streaming = with_(config, max_cache_gib=0.0, loader_workers=workers)
    streamed = data.load(streaming, tmp_path / "streaming")
    assert not list((tmp_path / "streaming").rglob("images.npy"))
    for name in ("validation", "test")[: 2 - workers]:
        images, labels = images_of(getattr(cached, name))
        found, found_labels = images_of(getattr(streamed, name))
        assert torch.equal(found, images)
        assert torch.equal(found_labels, labels)
    pairs = zip(cached.training_batches(16, 1, 4, CPU, 0), streamed.training_batches(16, 1, 4, CPU, 0), strict=True)
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in pairs)


def test_streaming_maps_one_file_and_travels_light(tmp_path, parquet):
    config, _, _ = parquet
    streaming, cache = with_(config, max_cache_gib=0.0), tmp_path / "cache"
    samples = data.load(streaming, cache).train.source.samples
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.records")}
    assert len(written) == 2
    samples[0]
    assert samples._records[0].nbytes > 40 * 150
    assert len(pickle.dumps(samples)) < 2000
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(samples))[33][0]), np.asarray(samples[33][0]))
    data.load(with_(streaming, image_size=4), cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.records")} == written


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


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip", "resized_crop_flip"])
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


def test_resized_crops_are_parts_of_any_size_within_the_image():
    """Of an image whose values are coordinates, a part has the coordinates of a rectangle, at even distances."""
    size = 16
    steps = (torch.arange(size) + 0.5) / size
    ramps = torch.stack([steps.expand(size, size), steps.view(-1, 1).expand(size, size)])
    parts = data._resized_crops(ramps.expand(500, 2, size, size), rng(CPU, 0))
    assert not parts.isnan().any()
    edges = steps[0], steps[-1]
    assert edges[0] <= parts.min() < edges[0] + 0.01
    assert edges[1] - 0.01 < parts.max() <= edges[1]
    across, down = parts[:, 0, 0].diff(), parts[:, 1, :, 0].diff()  # but at the image's border, where they stay
    width, height = across[:, 3:-3].mean(1) * size, down[:, 3:-3].mean(1) * size
    torch.testing.assert_close(across[:, 3:-3] * size, width[:, None].expand(-1, size - 7), atol=1e-4, rtol=0)
    torch.testing.assert_close(parts[:, 0, 0], parts[:, 0, -1])
    area, ratio = width * height, width / height
    assert 0.08 - 1e-3 < area.min() < 0.1
    assert 0.45 < area.mean() < 0.56
    assert 3 / 4 - 1e-3 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 4 / 3 + 1e-3


def test_augmentation_is_seeded(augmented):
    dataset = augmented
    (first,), (again,), (other,) = (
        [images for images, _ in dataset.training_batches(32, 0, 1, CPU, seed)] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batch_larger_than_the_data(tmp_path):
    dataset = data.load(Data(), tmp_path)
    with pytest.raises(ConfigError, match="batch_size is 811, but there are only 810 training images; lower it"):
        next(dataset.training_batches(811, 0, 1, CPU, 0))
