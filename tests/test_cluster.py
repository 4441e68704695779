"""The cluster files, as far as Ray can check them without a cloud."""

from pathlib import Path

import pytest
import yaml

CLUSTERS = sorted((Path(__file__).parent.parent / "cluster").glob("*.yaml"))


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
