"""Results of shipped experiments are found again by later versions: their keys stay what they are.

A change that means other results raises `FORMAT` in storage/artifacts.py, and renews `keys.json`.
"""

import json
from pathlib import Path

import pytest
from helpers import tiny

from pdiff_ray.config import sweep
from pdiff_ray.stages.table import artifacts_of
from pdiff_ray.storage.files import Storage
from pdiff_ray.sweeps.ledger import Ledger

ROOT = Path(__file__).parents[1]
KEYS = json.loads((ROOT / "tests/keys.json").read_text())


@pytest.mark.parametrize("name", KEYS)
def test_keys_stay(name, tmp_path):
    file, _, preset = name.partition(":")
    loaded = sweep.load(ROOT / file, [f"storage={tmp_path}"], preset or None)
    swept = isinstance(loaded, sweep.SweepFile)
    experiment = loaded.experiment if swept else loaded
    keys = {"report": artifacts_of(experiment, Storage(str(tmp_path)))["report"].key}
    assert keys | ({"sweep": Ledger(loaded).key} if swept else {}) == KEYS[name]


def test_every_shipped_file_is_among_them():
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "sweeps").glob("*.yaml")} <= {
        name.partition(":")[0] for name in KEYS
    }


@pytest.mark.parametrize("override", ["zoo.members=2", "zoo.imported=mine"])
def test_code_of_an_own_network_is_part_of_the_bases_key(override, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = set()
    for factor in (1, 2):
        (tmp_path / "own_network.py").write_text(f"def build(in_channels, image_size, num_classes): return {factor}")
        _, artifacts = tiny(tmp_path / "s", "network.name=own_network:build", "network.args={}", override)
        keys.add(artifacts["base"].key)
    assert len(keys) == 2
