"""Files of someone else, mutated at random: each is read, or refused in one message that names it.

Whatever they hold, nothing of it is run, nothing is written outside, no more memory is taken than files of their size
need, and none takes long. PDIFF_FUZZ=N makes N inputs of each format, other ones in each run; `-m long` makes 100,000
in all, those of each format in a process of their own.
"""

import argparse
import copy
import io
import json
import os
import pickle
import pickletools
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from helpers import encoded, write_parquet
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from test_damage import OLD, OLD_KEY, SUMMARY, sweep
from test_reading import SHIPPED, mutated
from test_store import SUBSET, make_records

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config import sweep as space
from pdiff_ray.config.schema import Data
from pdiff_ray.data import files as data_files
from pdiff_ray.data import sources
from pdiff_ray.data.images import decode, open_image
from pdiff_ray.stages import checkpoints
from pdiff_ray.stages.report import load_summary
from pdiff_ray.stages.stored import Networks
from pdiff_ray.storage import artifacts, checks, weights
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.matching import match
from pdiff_ray.storage.parameters import encode as encode_part
from pdiff_ray.storage.sealed import digest, read_listed, seal
from pdiff_ray.storage.trees import load_tree
from pdiff_ray.storage.vectors import read_vectors
from pdiff_ray.sweeps.ledger import Ledger

SWEEP = sweep("elsewhere")
INPUTS = int(os.environ.get("PDIFF_FUZZ", 0))  # of each format
SHORT, LONG = 20, 100_000  # of each format; of all
DEADLINE = timedelta(seconds=10)  # for one input
MEMORY = 2**30  # bytes of addresses beyond those that are in use before
# What a loader of data has no need of, by the names of Python's audit events, and what changes files.
RUN = re.compile(
    r"os\.(system|exec|fork|forkpty|spawn|posix_spawn|startfile)|subprocess\.Popen|pickle\.find_class|marshal\.loads?|"
    r"socket\.(connect|bind|getaddrinfo|gethostbyname)"
)
CHANGE = re.compile(r"os\.(mkdir|rename|link|symlink|remove|rmdir|truncate|chmod|chown|utime)|shutil\..*")

# --- mutations --------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = ["", "x", "../../outside/x", "/etc/hostname", "a/../b", "C:x", "a\\b", "\0", "\x1b[2J", "\ud800", "x" * 5000]
ODD = [None, True, -1, *NUMBERS, 10**40, 0.5, 1e308, float("nan"), float("inf"), *TEXTS, [], {}, [[]], [0] * 999]


def mutated_bytes(draw, content, start=0):
    """Bytes from `start` on flipped, cut out, repeated, or made an odd number."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(min(start, len(content)), len(content)))
        kind = draw(st.sampled_from(["flip", "number", "cut", "end", "repeat"]))
        if kind == "flip" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * size)
            content[at : at + size] = number.to_bytes(size, draw(st.sampled_from(["little", "big"])))
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, 9))]
        elif kind == "end":
            del content[at:]
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 99))]
    return bytes(content)


def spots(tree):
    """Every place in a tree of dicts and lists, as its container and key."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from spots(value)


def mutated_tree(draw, tree):
    """A tree with values, keys or whole branches changed, left out, moved or put deeper."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(spots(tree))
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["odd", "odd", "other", "remove", "rename", "deep"]))
        if kind == "odd":
            container[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif kind == "other":
            place, other = places[draw(st.integers(0, len(places) - 1))]
            container[key] = copy.deepcopy(place[other])
        elif kind == "deep":
            for _ in range(draw(st.sampled_from([1, 60, 250]))):
                container[key] = [container[key]]
        elif kind == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.sampled_from([*TEXTS, *map(str, container)]))] = container.pop(key)
    return tree


def mutated_program(draw, program):
    """A pickle with numbers, texts or names in its instructions changed, or instructions left out or repeated."""
    steps = [(opcode.name, argument, at) for opcode, argument, at in pickletools.genops(program)]
    ends = [at for _, _, at in steps[1:]] + [len(program)]
    pieces = [program[at:end] for (_, _, at), end in zip(steps, ends, strict=True)]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(1, len(steps) - 1))
        name, argument, _ = steps[at]
        kind = draw(st.sampled_from(["odd", "odd", "other", "remove", "repeat"]))
        if kind == "remove":
            pieces[at] = b""
        elif kind == "repeat":
            pieces[at] *= draw(st.sampled_from([2, 3, 500]))
        elif kind == "other":
            pieces[at] = pieces[draw(st.integers(1, len(steps) - 1))]
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            pieces[at] = draw(st.sampled_from([b"cos\nsystem\n", b"ccanary\nrun\n", b"ctorch\nLongStorage\n"]))
        elif isinstance(argument, str):
            text = draw(st.sampled_from(TEXTS)).encode("utf-8", "surrogatepass")
            pieces[at] = b"X" + len(text).to_bytes(4, "little") + text
        elif isinstance(argument, int):
            pieces[at] = pickle.dumps(draw(st.sampled_from([-1, *NUMBERS, 10**40])), 2)[2:-1]
    return b"".join(pieces)


# --- formats ----------------------------------------------------------------------------------------------------------
# Each writes a file into an empty folder, and returns its path and the function that reads all of it.

shapes = st.lists(st.integers(0, 3), max_size=3)
dtypes = st.sampled_from([*weights.SAFETENSORS_DTYPES.values()])
names = st.sampled_from(["weight", "bias", "layers.0.weight", "module.bias", "ema.weight", "num_batches_tracked"])


def tensors(draw):
    return {name: torch.ones(draw(shapes)).to(draw(dtypes)).contiguous() for name in draw(st.sets(names, min_size=1))}


def tensors_of(file):
    """Loads the tensors that a checkpoint describes, as an import does."""
    try:
        found = match(weights.read(file), ["weight"])
    except PdiffError as error:
        raise PdiffError(f"{file}: {error}") from None
    weights.load(found.named())


def archive(draw, folder):
    """What torch.save writes."""
    saved = tensors(draw)
    if draw(st.booleans()):
        whole = torch.arange(24.0)
        saved |= {"weight": whole[4:16].view(3, 4).t(), "bias": whole[:3], "tied": torch.nn.Parameter(whole)}
    content = draw(
        st.sampled_from([saved, {"state_dict": saved, "epoch": 3, "args": argparse.Namespace(a=1)}, [saved, saved]])
    )
    stream = io.BytesIO()
    torch.save(content, stream, pickle_protocol=draw(st.sampled_from([2, 4])))
    file, kind = folder / "e1.pt", draw(st.sampled_from(["whole", "bytes", "end", "program", "names"]))
    if kind in ("program", "names"):
        with zipfile.ZipFile(stream) as opened:
            entries = {name: opened.read(name) for name in opened.namelist()}
        program = next(name for name in entries if name.endswith("data.pkl"))
        if kind == "program":
            entries[program] = mutated_program(draw, entries[program])
        else:
            renamed = draw(st.sampled_from([*entries]))
            entries[draw(st.sampled_from([*TEXTS[1:7], *entries]))] = entries.pop(renamed)
        stream = io.BytesIO()
        with zipfile.ZipFile(
            stream, "w", draw(st.sampled_from([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]))
        ) as z:
            for name, value in entries.items():
                z.writestr(name, value)
    elif kind != "whole":
        start = 0 if kind == "bytes" else max(0, len(stream.getvalue()) - 900)
        stream = io.BytesIO(mutated_bytes(draw, stream.getvalue(), start))
    file.write_bytes(stream.getvalue())
    return file, lambda: tensors_of(file)


def safetensors_content(draw):
    content = safetensors.torch.save(tensors(draw), metadata={"scalars": '{"step": 3, "kept|x": [1, 2]}'})
    kind = draw(st.sampled_from(["whole", "bytes", "header", "length"]))
    if kind == "bytes":
        return mutated_bytes(draw, content)
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    if kind == "header":
        header = mutated_tree(draw, header)
    text = json.dumps(header).encode()
    length = draw(st.sampled_from(NUMBERS)) if kind == "length" else len(text)
    return length.to_bytes(8, "little") + text + rest


def safetensors_file(draw, folder):
    """What safetensors writes."""
    file = folder / "e1.safetensors"
    file.write_bytes(safetensors_content(draw))
    return file, lambda: tensors_of(file)


def tree(draw, folder):
    """The state of a network or of work, and what digests do not keep anyone from writing."""
    content = safetensors_content(draw)
    return folder / "state", lambda: load_tree(content, str(folder / "state"))


def index(draw, folder):
    """The index of a network in several files."""
    file, content = folder / "model.safetensors.index.json", {"weight": torch.ones(2)}
    safetensors.torch.save_file(content, folder / "model-00001-of-00002.safetensors")
    places = {"metadata": {"total_size": 8}, "weight_map": {"weight": "model-00001-of-00002.safetensors"}}
    file.write_text(json.dumps(mutated_tree(draw, places)))
    return file, lambda: weights.load(weights.read_parts(file))


def vectors(draw, folder):
    """Samples of another tool, as NumPy writes them."""
    stream = io.BytesIO()
    shape = draw(st.sampled_from([(3, SUBSET.size), (SUBSET.size,), (0, SUBSET.size), (2, 3, 4)]))
    np.save(stream, np.ones(shape, draw(st.sampled_from(["<f4", ">f8", "<f2", "<i8", "<c8", "<U3", "O"]))))
    content = stream.getvalue()
    kind = draw(st.sampled_from(["whole", "bytes", "header"]))
    if kind == "bytes":
        content = mutated_bytes(draw, content)
    elif kind == "header":
        old = draw(st.sampled_from([b"<f4", b"False", b"descr", b"(3,", str(SUBSET.size).encode()]))
        content = content.replace(
            old, draw(st.sampled_from([b"|O", b"-1", b"99999999999999", b"'", b"__import__", b""]))
        )
    file = folder / "samples.npy"
    file.write_bytes(content)
    return file, lambda: read_vectors(file, SUBSET)


def part_content(draw):
    """Networks in Parquet, of which the metadata, a column, or bytes are changed."""
    rows = [replace(r, wrong=b"\x05", asked=0.5) for r in make_records(range(3))]
    content = encode_part(rows, SUBSET, {"sharing": {"shared": 0.5}})
    kind = draw(st.sampled_from(["whole", "bytes", "footer", "metadata", "column"]))
    if kind == "bytes":
        return mutated_bytes(draw, content)
    if kind == "footer":
        return mutated_bytes(draw, content, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    table = pq.read_table(io.BytesIO(content))
    if kind == "metadata":
        about = mutated_tree(draw, {"": json.loads(table.schema.metadata[b"pdiff_ray"])})
        table = table.replace_schema_metadata({"pdiff_ray": json.dumps(about.get(""))})
    elif kind == "column":
        table = mutated_column(draw, table)
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=draw(st.sampled_from([1, 2, 9])), use_dictionary=draw(st.booleans()))
    return sink.getvalue()


def mutated_column(draw, table):
    """A table of which a column has other values or types, is left out, or is there under another name."""
    at, count = draw(st.integers(0, table.num_columns - 1)), len(table)
    columns = [
        pa.array([draw(st.sampled_from([-1, 0, 2, 2**63 - 1]))] * count, pa.int64()),
        pa.array([draw(st.sampled_from(["", "original", "../../x", "x" * 999]))] * count),
        pa.array([b"\0" * draw(st.sampled_from([0, 1, 999]))] * count),
        pa.array([[float("nan")] * draw(st.integers(0, 9))] * count, pa.list_(pa.float32())),
        pa.array([{"a": 1}] * count),
        pa.array([1.5] * count, pa.float16()),
        pa.nulls(count, table.schema.field(at).type),
        pa.nulls(count, pa.list_(pa.float32(), draw(st.sampled_from([0, 1, 100_000])))),
        pa.array(["a"] * count).dictionary_encode(),
    ]
    name = draw(st.sampled_from([table.column_names[at]] * 5 + ["id", "x", ""]))
    if draw(st.integers(0, 9)) == 0:
        return table.remove_column(at)
    return table.set_column(at, name, draw(st.sampled_from(columns)))


def part(draw, folder):
    """A part file of an artifact whose digests are right."""
    content = part_content(draw)
    artifact = Artifact(Storage(str(folder)), "zoo", {"of": "someone"}, {})
    sha = digest(content)
    name = f"networks/part-{sha}.parquet"
    file = folder / artifact.folder / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    artifact.commit({}, {}, 1.0, {name: {"path": name, "sha256": sha, "ids": [0, 1, 2]}})

    def read():
        networks = Networks(artifact)
        _ = networks.subset, networks.table().to_pandas(), networks.vectors()
        _ = [networks.vectors([i]) for i in networks.ids]

    return file, read


def lone_part(draw, folder):
    """A part file by itself, as samples of another tool."""
    file = folder / "samples.parquet"
    file.write_bytes(part_content(draw))
    return file, lambda: read_vectors(file, SUBSET)


def manifest(draw, folder):
    """The manifest of an artifact, its digest right or missing."""
    fields = mutated_tree(draw, json.loads(OLD))
    file = folder / "base" / OLD_KEY / "manifest.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(seal(fields) if draw(st.booleans()) else json.dumps(fields).encode())
    (file.parent / "table-5be08c9684a1.csv").write_bytes(b"a,b\n")

    def read():
        storage = Storage(str(folder))
        (found,) = artifacts.finished(storage)
        for name in artifacts.read_manifest(storage, found).files:
            artifacts.opened(storage, artifacts.read_manifest(storage, found)).read(name)

    return file.parent, read


def summary(draw, folder):
    """The summary of an evaluation, its digest right."""
    content = mutated_tree(draw, SUMMARY)
    artifact = Artifact(Storage(str(folder)), "evaluation", {}, {})
    artifact.commit({"summary.json": json.dumps(content).encode()}, {}, 1.0)
    return folder, lambda: load_summary({"evaluation": artifact})


def trial(draw, folder):
    """The record of a sweep's trial, and the list of the files that the sweep wrote."""
    ledger = Ledger(SWEEP, Storage(str(folder)))
    ledger.record(replace(ledger.ask(), state="finished", objective=0.5, curve=((1, 0.25),)))
    file = folder / ledger.folder / "trials" / "00000.json"
    fields = json.loads(file.read_text())
    del fields["sha256"]
    listing = {"files": {"summary.md": digest(b"| a |")}}
    if draw(st.booleans()):
        file.write_bytes(seal(mutated_tree(draw, fields)))
    else:
        listing = mutated_tree(draw, listing)
    (folder / ledger.folder / "files.json").write_bytes(seal(listing))
    (folder / ledger.folder / "summary.md").write_bytes(b"| a |")

    def read():
        storage = Storage(str(folder))
        for name in read_listed(storage, ledger.folder):
            assert name == "summary.md"
        for known in Ledger(SWEEP, storage).done():
            _ = known.text

    return folder, read


def experiment(draw, folder):
    """An experiment file."""
    origin = draw(st.sampled_from([*SHIPPED]))
    text = SHIPPED[origin].replace("base: ", f"base: {origin.parent}/")
    file = folder / "mine.yaml"
    if draw(st.booleans()):
        text = mutated(text, draw(st.randoms(use_true_random=False)))
    else:
        tree = mutated_tree(draw, yaml.safe_load(text))
        try:
            text = yaml.safe_dump(tree, allow_unicode=draw(st.booleans()))
        except RecursionError:  # PyYAML writes no more than some 300 levels
            reject()
    file.write_bytes(text.encode("utf-8", "surrogateescape") if "\ud800" not in text else text.encode("utf-16"))

    def read():
        loaded = space.load(file)
        (loaded if hasattr(loaded, "zoo") else loaded.experiment).model_dump_json()

    return file, read


IMAGES = [
    encoded(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), format)
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
] + [encoded(np.arange(64, dtype=np.uint8).reshape(8, 8)), encoded(np.arange(64, dtype=np.uint16).reshape(8, 8))]


def image(draw, folder):
    """An image in a folder of images."""
    file = folder / "x.png"
    content = draw(st.sampled_from(IMAGES))
    file.write_bytes(mutated_bytes(draw, content, draw(st.sampled_from([0, 0, len(content) // 2]))))

    def read():
        opened = open_image(file, str(file))
        try:
            decode(opened, 3, 8)
        except Exception as error:  # of any kind, as callers expect
            raise PdiffError(f"{file}: {error}") from None

    return file, read


def dataset(draw, folder):
    """Images and labels in Parquet files, of which one is changed."""
    pictures = [encoded(np.full((8, 8, 3), i, np.uint8)) for i in range(6)]
    for split in ("train", "test"):
        write_parquet(
            folder / f"{split}.parquet", pictures, [0, 1, 2] * 2, names=draw(st.sampled_from([None, ["a", "b", "c"]]))
        )
    file = folder / f"{draw(st.sampled_from(['train', 'test']))}.parquet"
    content = file.read_bytes()
    kind = draw(st.sampled_from(["whole", "bytes", "footer", "column"]))
    if kind == "column":
        pq.write_table(mutated_column(draw, pq.read_table(file)), file)
    elif kind != "whole":
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        file.write_bytes(mutated_bytes(draw, content, footer if kind == "footer" else 0))

    def read():
        found = data_files.find("parquet", folder)
        found.fingerprint()
        for split in data_files.SPLITS:
            for opened in found.open(split).opened():
                _ = opened.size

    return folder, read


def idx(draw, folder):
    """Images and labels as torchvision keeps those of MNIST."""
    place = folder / "MNIST" / "raw"
    place.mkdir(parents=True)
    kinds = {"images-idx3": b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (2, 4, 4)) + bytes(range(32))}
    kinds["labels-idx1"] = b"\0\0\x08\1" + (2).to_bytes(4, "big") + b"\1\2"
    odd = draw(st.sampled_from(["none", *kinds]))
    for kind, content in kinds.items():
        content = mutated_bytes(draw, content) if kind == odd else content
        for split in ("train", "t10k"):
            (place / f"{split}-{kind}-ubyte").write_bytes(content)
    config = Data(name="mnist", source="torchvision", root=str(folder))

    def read():
        samples = sources.open_samples(config, "train")
        _ = [sources.decoded(samples, i, sources.DATASETS["mnist"]) for i in range(len(samples))]

    return Path("data.root"), read


def places(draw, folder):
    """Names, links and pipes in a folder of checkpoints, of images and of artifacts."""
    outside = folder.parent / "outside"
    kept = [
        "a/e1.pt",
        "a/e2.pt",
        "train/a/x.png",
        "test/a/x.png",
        "base/0123456789abcdef/manifest.json",
        "a/model.index.json",
    ]
    for name in draw(st.lists(st.sampled_from(kept), min_size=1, unique=True)):
        place = folder / name
        for _ in range(draw(st.integers(0, 2))):
            place = place.parent if place.parent != folder else place
        above = [parent for parent in place.parents if parent.is_relative_to(folder) and os.path.lexists(parent)]
        if os.path.lexists(place) or any(parent.is_symlink() or not parent.is_dir() for parent in above):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        kind = draw(st.sampled_from(["file", "folder", "pipe", "link", "loop", "odd"]))
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "folder":
            place.mkdir()
        elif kind in ("link", "loop"):
            place.symlink_to(outside if kind == "link" else draw(st.sampled_from([folder, place, "/proc/self/root/x"])))
        else:
            place = place if kind == "file" else place.with_name("e1\n\x1b.pt")
            place.write_bytes(draw(st.sampled_from([b"", b"PK", b"{}", IMAGES[0]])))

    def images(source):
        found = data_files.find(source, folder)
        _ = [opened.size for split in data_files.SPLITS for opened in found.open(split).opened()]

    def checkpoint_files(pattern):
        for name, file in checkpoints.find(folder, pattern, checkpoints.Report()).items():
            _ = weights.read_parts(file) if name.endswith(checkpoints.INDEX) else weights.read(file)

    def storage():
        there = Storage(str(folder))
        there.check_writable()
        for known in checks.folders(there):
            checks.verify(there, known)
        Artifact(there, "base", {}, {}).commit({"a": b"a"}, {}, 1.0)

    readers = [lambda: images("folder"), lambda: images("parquet"), lambda: checkpoint_files(None), storage]
    return folder, draw(st.sampled_from([*readers, lambda: checkpoint_files("*")]))


FORMATS = {
    form.__name__: form
    for form in (
        *(archive, safetensors_file, tree, index, vectors, part, lone_part, manifest, summary, trial, experiment),
        *(image, dataset, idx, places),
    )
}

# --- oracle -----------------------------------------------------------------------------------------------------------


class Watch:
    """Notes what Python code does to the system while the context lasts, but for changes below a folder."""

    def __init__(self):
        self.folder, self.noted = None, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = arguments
            if (mode or "r")[0] == "r" and "+" not in (mode or "") and not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            changed = [path]
        elif CHANGE.fullmatch(event):
            changed = [argument for argument in arguments[:2] if isinstance(argument, str | bytes | Path)]
        elif RUN.fullmatch(event) or (event == "import" and arguments[0] == "canary"):
            changed = ["/"]
        else:
            return
        if not self._importing() and any(
            not os.path.abspath(os.fsdecode(path)).startswith(f"{self.folder}/") for path in changed
        ):
            self.noted.append((event, arguments))

    @staticmethod
    def _importing():
        """Tells whether this is of a package that is imported when it is first needed."""
        frame = sys._getframe(2)
        while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        return frame is not None


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture
def little_memory():
    """Lets this process have so much more than it has, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.filterwarnings("ignore")  # Pillow's of what it makes do with
@pytest.mark.parametrize("name", FORMATS)
def test_what_others_give(name, tmp_path, watch, little_memory):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("mine")
    outcomes, number = Counter(), iter(range(10**9))

    @settings(
        max_examples=INPUTS or SHORT,
        derandomize=not INPUTS,
        database=None,
        deadline=DEADLINE,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def check(data):
        folder = tmp_path / str(next(number))
        folder.mkdir()
        file, read = FORMATS[name](data.draw, folder)
        watch.folder, watch.noted = str(folder), []
        try:
            read()
        except PdiffError as error:
            message = str(error)
            assert str(file) in message or f"(base of {file.name})" in message
            assert len(message) < 10_000
            assert "frame #" not in message
            assert message.isprintable() or "\n" in message
            # What is too large is to be found before it is asked for.
            assert not re.search(r"alloc|[Mm]emory(?!-mapped)", message.replace(str(tmp_path), "")), message
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
        finally:
            watch.folder = None
        assert [f"{event} {arguments}"[:200] for event, arguments in watch.noted] == []
        shutil.rmtree(folder)

    little_memory()
    check()
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.isdigit()) == ["outside"]
    assert [path.read_text() for path in (tmp_path / "outside").iterdir()] == ["mine"]
    print(f"{name}: {dict(outcomes)}")
    assert min(outcomes["read"], outcomes["refused"]) > 0


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_many(name):
    """In a process of its own, which a library may end."""
    inputs, chosen = str(-(-LONG // len(FORMATS))), f"{__file__}::test_what_others_give[{name}]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-n", "0", chosen],
        env={**os.environ, "PDIFF_FUZZ": inputs},
        capture_output=True,
        text=True,
        timeout=3 * 3600,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
