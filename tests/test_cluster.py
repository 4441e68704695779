"""The cluster files, as far as Ray can check them without a cloud."""

from pathlib import Path

import pytest
import yaml

from pdiff_ray.config import loading

FOLDER = Path(__file__).parent.parent / "cluster"
SITES = sorted(FOLDER.glob("*.site.yaml"))
CLUSTERS = sorted(set(FOLDER.glob("*.yaml")) - set(SITES))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.name)
def test_ray_accepts_the_cluster_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    # What Ray's own check lets pass.
    assert all(node.get("max_workers", 0) <= config["max_workers"] for node in types.values())
    assert all(node["node_config"].get("InstanceType") for node in types.values())


@pytest.mark.parametrize("path", SITES, ids=lambda p: p.name)
def test_site_files_fit_every_experiment(path, monkeypatch):
    monkeypatch.setenv("PDIFF_SITE", str(path))
    for file in (FOLDER.parent / "sweeps").glob("*.yaml"):
        experiment = loading.load(file)
        assert experiment.resources.gpus_per_worker == 1
        assert experiment.storage_uri.startswith("s3://")
        assert loading.load(file, ["resources.workers=4"]).resources.workers == 4
