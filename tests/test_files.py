"""Which files are a split's, and what their labels stand for: what is not plain is refused, and nothing is left out
without a word."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import TINY, encoded, images_of, pixels, with_, write_parquet
from test_cli import pdiff

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.schema import Data
from pdiff_ray.data import dataset as data
from pdiff_ray.data import files, sources, survey

NAMES = ["ant", "bee", "cat", "dog"]


def parquet_of(root, **counts):
    """Parquet files by their paths without the suffix, each with so many images of four classes in turn."""
    for index, (path, count) in enumerate(counts.items()):
        write_parquet(root / f"{path}.parquet", pixels(count, seed=index), np.arange(count) % 4)
    return Data(name="custom", source="parquet", root=str(root), loader_workers=0)


def folders_of(root, *files):
    """Images at the given paths."""
    for index, path in enumerate(files):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(pixels(1, seed=index)[0]))
    return Data(name="custom", source="folder", root=str(root), loader_workers=0)


TWO_CLASSES = [f"{split}/{name}/{index}.png" for split in ("train", "test") for name in NAMES[:2] for index in range(2)]


# --- shards, configurations, splits -----------------------------------------------------------------------------------


def shards(split, total, left_out=(), count=8, suffix="", first=0):
    numbers = [number for number in range(first, first + total) if number not in left_out]
    return {f"data/{split}-{number:05d}-of-{total:05d}{suffix}": count for number in numbers}


@pytest.mark.parametrize(
    "train",
    [
        shards("train", 3),
        shards("train", 3, first=1),
        shards("train", 3, suffix="-a09b74b3ef9c3b56"),
        {"data/train-0": 8, "data/train-1": 8, "data/train-7": 8},
        {"data/train": 24},
        {"data/train/train": 24},
    ],
    ids=["of 3", "from 1", "with hashes", "numbered", "one", "in a folder"],
)
def test_whole_sets_are_taken(tmp_path, train):
    assert sources.count_images(parquet_of(tmp_path, **train, **{"data/test": 4})) == (24, 4)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (shards("train", 5, (1, 3)), "are 3 of 5; put those .* there: train-00001-of-00005, train-00003-of-00005$"),
        ({"data/train-00001-of-999999999": 8}, "are 1 of 999999999; .*-of-999999999 and 999999992 more$"),
        (shards("train", 5, (0,)), "are 4 of 5; .* there: train-00000-of-00005$"),
        (shards("train", 2) | shards("train", 3), "do not belong together: train-00000-of-00002.parquet, "),
        (shards("train", 1) | {"data/train": 8}, "do not belong together"),
        (shards("train", 1) | shards("train", 1, suffix="-a09b74b3ef9c3b56"), "do not belong together"),
        (shards("train", 2, (1,)) | {"data/train-00007-of-00002": 8}, "do not belong together"),
        ({"other/train": 8, "data/train": 8}, "several configurations .*/data, .*/other; set data.root to one of"),
        ({"other/train": 8}, "several configurations .*/data, .*/other; set data.root to one of"),
        ({"data/train_unlabelled": 8}, r"no train\*\.parquet under .*, only data/test.parquet, data/train_unl"),
    ],
    ids=[
        "two missing",
        "most missing",
        "first missing",
        "two totals",
        "one beside",
        "twice",
        "beyond",
        "two sets",
        "apart",
        "other",
    ],
)
def test_what_is_missing_or_ambiguous_is_refused(tmp_path, train, message):
    with pytest.raises(ConfigError, match=message):
        sources.describe(parquet_of(tmp_path, **train, **{"data/test": 4}))


def test_only_exact_names_are_splits(tmp_path):
    others = [
        "train_unlabelled",
        "train_unlabelled-00000-of-00002",
        "test_hard-00000-of-00001",
        "validation",
        "more/test",
    ]
    config = parquet_of(tmp_path, train=8, test=4, **dict.fromkeys([*others, ".hidden/train", "__MACOSX/train"], 4))
    found = sources.inventory(config)
    assert found.images == {"train": 8, "test": 4}
    assert sorted(found.unused) == sorted(f"{name}.parquet" for name in others)


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_validation_data_serves_as_test_data(tmp_path, name):
    assert sources.count_images(parquet_of(tmp_path / "parquet", train=8, **{name: 4})) == (8, 4)
    files = [path.replace("test/", f"{name}/") for path in TWO_CLASSES]
    assert sources.count_images(folders_of(tmp_path / "folder", *files)) == (4, 4)


def test_hidden_and_other_files_never_count(tmp_path):
    config = folders_of(tmp_path, *TWO_CLASSES)
    key, before = sources.keyed(config), sources.inventory(config)
    hidden = ["train/.ipynb_checkpoints/0.png", "train/ant/.ipynb_checkpoints/0.png", "train/ant/._0.png",
              "test/__MACOSX/0.png", "test/bee/.DS_Store", ".git/x.png"]  # fmt: skip
    folders_of(tmp_path, *hidden)
    assert (sources.keyed(config), sources.inventory(config)) == (key, before)
    others = ["train_unlabelled/ant/0.png", "train/ant/notes.txt", "test/Thumbs.db", "train/loose.png"]
    folders_of(tmp_path, *others)
    assert sources.keyed(config) == key
    found = sources.inventory(config)
    assert found.images == before.images
    assert sorted(found.unused) == ["test/Thumbs.db", "train/ant/notes.txt", "train/loose.png", "train_unlabelled"]


@pytest.mark.parametrize(("source", "name"), [("folder", "train/a/x.png"), ("parquet", "train.parquet")])
def test_a_named_pipe_is_no_image(tmp_path, source, name):
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    (tmp_path / "test.parquet").touch()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{tmp_path / name} cannot be decoded: it is no regular file"):
        files.find(source, tmp_path)


def test_links_that_lead_back_are_followed_once(tmp_path):
    config = folders_of(tmp_path, *TWO_CLASSES)
    (tmp_path / "train/ant/again").symlink_to(tmp_path / "train/ant")
    assert sources.count_images(config) == (4, 4)


def test_changed_files_of_the_same_size_are_decoded_anew(tmp_path):
    config = folders_of(tmp_path, *TWO_CLASSES)
    for file in tmp_path.rglob("*.png"):
        file.with_suffix(".bmp").write_bytes(encoded(pixels(1)[0], "BMP"))
        file.unlink()
    data.load(config, tmp_path / "cache")
    changed = pixels(1, seed=9)[0]
    (tmp_path / "test/ant/0.bmp").write_bytes(encoded(changed, "BMP"))
    np.testing.assert_array_equal(
        images_of(data.load(config, tmp_path / "cache").test)[0][0], changed.transpose(2, 0, 1)
    )


# --- classes ----------------------------------------------------------------------------------------------------------


def labelled(root, train, test, type=None, names=None):
    for split, labels in (("train", train), ("test", test)):
        write_parquet(root / f"{split}.parquet", pixels(len(labels)), labels, type=type, names=names)
    return Data(name="custom", source="parquet", root=str(root))


@pytest.mark.parametrize(
    ("type", "values"),
    [
        (pa.uint8(), [0, 1, 2, 3]),
        (pa.float64(), [0.0, 1.0, 2.0, 3.0]),
        (pa.dictionary(pa.int8(), pa.int64()), [0, 1, 2, 3]),
        (pa.string(), NAMES),
        (pa.large_string(), NAMES),
        (pa.dictionary(pa.int32(), pa.string()), NAMES),
    ],
    ids=str,
)
def test_labels_may_be_numbers_or_names(tmp_path, type, values):
    """Names are numbered by the training data, also where the test data has but some of them."""
    config = labelled(tmp_path, [values[i] for i in (3, 0, 1, 2)], [values[2], values[1]], type)
    sources.check_data(config)
    assert sources.describe(config).num_classes == 4
    dataset = data.load(config, tmp_path / "cache")
    assert images_of(dataset.test)[1].tolist() == [2, 1]
    assert dataset.train.source.labels.tolist() == [3, 0, 1, 2]
    assert sources.inventory(config).classes == {"train": 4, "test": 2}


@pytest.mark.parametrize("text", [False, True])
def test_declared_classes_win(tmp_path, text):
    """Neither a class without training images nor the order of the alphabet counts."""
    names = ["dog", "ant", "cat", "bee"]
    train, test = [0, 1, 1], [2, 0]
    if text:
        train, test = ([names[i] for i in labels] for labels in (train, test))
    config = labelled(tmp_path, train, test, names=names)
    sources.check_data(config)
    assert sources.describe(config).num_classes == 4
    assert images_of(data.load(config, tmp_path / "cache").test)[1].tolist() == [2, 0]
    assert "reading" in sources.keyed(config)


def test_test_data_may_lack_a_class_folder(tmp_path):
    config = folders_of(tmp_path, "train/ant/0.png", "train/bee/0.png", "train/cat/0.png", "test/cat/0.png")
    sources.check_data(config)
    assert images_of(data.load(config, tmp_path / "cache").test)[1].tolist() == [2]


ROW = r"{}\.parquet, row {} \(counted from 0\), has "


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ([0, None, 1], [0], {}, ROW.format("train", 1) + "no label; correct"),
        (
            [0, 1],
            [-1, -1],
            {},
            ROW.format("test", 0) + "the label -1, which .* 1 more .* validation are taken",
        ),
        ([0, 1], [0, 2], {}, "the training data has the labels 0 to 1, but .*" + ROW.format("test", 1) + "the label 2"),
        ([0, 4], [0], {"names": NAMES}, "the classes have the labels 0 to 3, but .*" + ROW.format("train", 1)),
        (["ant", "bee"], ["ant", "cow"], {}, ROW.format("test", 1) + "the label 'cow', which is none of the classes"),
        (["ant", "cow"], ["ant"], {"names": NAMES}, ROW.format("train", 1) + "the label 'cow', which is none"),
        (["ant", "bee"], [0, 1], {}, "labels are text in one of .*train.parquet and .*test.parquet, and numbers"),
        ([0, 1], ["ant", "bee"], {}, "labels are text in one of .*train.parquet and .*test.parquet, and numbers"),
        ([None, None], [0], {}, ROW.format("train", 0) + "no label, and 1 more like it"),
        ([0.0, 0.5], [0.0], {}, r"train\.parquet cannot be read as Parquet images: .*0\.5"),
        ([2, 10**9], [2], {}, ROW.format("train", 1) + "the label 1000000000, which would make"),
    ],
    ids=[
        "null",
        "minus",
        "beyond",
        "beyond declared",
        "unknown",
        "undeclared",
        "text",
        "numbers",
        "nulls",
        "half",
        "huge",
    ],
)
def test_labels_that_are_no_class_are_named(tmp_path, train, test, options, message):
    with pytest.raises(ConfigError, match=message):
        sources.check_data(labelled(tmp_path, train, test, **options))


def test_empty_shards_and_declared_classes_of_text_and_numbers(tmp_path):
    config = labelled(tmp_path, ["bee", "ant"], [0, 1], names=["bee", "ant"])
    (tmp_path / "train.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [], [])
    dataset = data.load(config, tmp_path / "cache")
    assert dataset.train.source.labels.tolist() == images_of(dataset.test)[1].tolist() == [0, 1]


def test_files_that_declare_different_classes(tmp_path):
    config = labelled(tmp_path, [0, 1], [0, 1], names=NAMES)
    write_parquet(tmp_path / "test.parquet", pixels(2), [0, 1], names=NAMES[::-1])
    with pytest.raises(ConfigError, match=r"train\.parquet and .*test\.parquet declare different classes \(ant, bee"):
        sources.describe(config)


def test_known_data_with_other_classes(tmp_path):
    config = with_(labelled(tmp_path, [0, 1], [0, 1], names=NAMES), name="cifar10")
    with pytest.raises(ConfigError, match=r"cifar10 has 10 classes, but under .* are 4 \(ant, bee"):
        sources.check_data(config)


def test_missing_bytes_are_named(tmp_path):
    config = labelled(tmp_path, [0, 1], [0, 1])
    write_parquet(tmp_path / "test.parquet", [encoded(pixels(1)[0])] * 2, [0, 1])
    table = pa.table({"img": [{"bytes": encoded(pixels(1)[0])}, {"bytes": None}], "label": [0, 1]})
    pa.parquet.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"test\.parquet, row 1 .* has no bytes of an image; embed it or remove"):
        sources.describe(config)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["test/cow/0.png"], "class folder .*test/cow is none of the training data's; add training images"),
        (["train/cow/notes.txt"], "class folder .*train/cow holds no image .*; add some or remove it"),
        (["test/ant/.hidden.png", "test/cat/"], "class folder .*test/cat holds no image"),
    ],
)
def test_class_folders_that_do_not_fit(tmp_path, files, message):
    config = folders_of(tmp_path, *TWO_CLASSES)
    for file in files:
        (tmp_path / file).mkdir() if file.endswith("/") else folders_of(tmp_path, file)
    with pytest.raises(ConfigError, match=message):
        sources.describe(config)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_tells_what_is_there(tmp_path):
    constant = [encoded(np.zeros((8, 8), np.uint8))] * 8
    write_parquet(tmp_path / "data/default/train-00000-of-00001.parquet", constant, np.arange(8) % 3, names=NAMES)
    write_parquet(tmp_path / "data/default/test-00000-of-00001.parquet", constant[:2], [3, 3], names=NAMES)
    write_parquet(tmp_path / "data/default/test_hard.parquet", constant, [0] * 8)
    override = f"data={{name: custom, source: parquet, root: {tmp_path / 'data'}}}"
    text = pdiff("sweep", TINY, "--storage", tmp_path / "s", "--set", override, "--dry-run").replace("\n", " ")
    assert f"Parquet files in {tmp_path / 'data/default'}" in text
    assert "train 8 images of 3 classes, test 2 images of 1 classes; 1 x 8 x 8 pixels, 4 classes" in text
    assert "default/test_hard.parquet" in text
    assert "warning: 8 of 8 train images have one value everywhere" in text
    options = ("--storage", tmp_path / "s", "--set", override, "--dry-run", "--json")
    assert '"test": 2' in pdiff("sweep", TINY, *options, errors=io.StringIO())


def test_the_plan_of_known_data_tells_what_the_table_has(tmp_path):
    assert "train 900 images, test 897 images; 1 x 8 x 8 pixels" in pdiff(
        "sweep", TINY, "--storage", tmp_path, "--dry-run"
    )


def test_a_survey_is_remembered_and_made_anew_if_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("PDIFF_CACHE", str(tmp_path / "cache"))
    config = folders_of(tmp_path / "data", *TWO_CLASSES)
    opened, real = [], files.open_image
    monkeypatch.setattr(files, "open_image", lambda *args: (opened.append(args), real(*args))[1])
    info = sources.describe(config)
    assert len(opened) == 8
    survey._SURVEYS.clear()
    assert sources.describe(config) == info
    assert len(opened) == 8
    kept = next(Path(tmp_path / "cache").glob("survey-*/survey.json"))
    kept.write_bytes(kept.read_bytes().replace(b"8", b"9"))
    survey._SURVEYS.clear()
    assert sources.describe(config) == info
    assert len(opened) == 12
