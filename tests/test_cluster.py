"""The cluster files: what Ray checks of them, and what it does not."""

import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from pdiff_ray.config import loading

FOLDER = Path(__file__).parent.parent / "cluster"
SITES = sorted(FOLDER.rglob("*.site.yaml"))
CLUSTERS = sorted(path for path in FOLDER.glob("*.yaml") if path not in SITES)
AWS = [path for path in CLUSTERS if yaml.safe_load(path.read_text())["provider"]["type"] == "aws"]
ACCOUNT = yaml.safe_load((FOLDER / "aws/account.yaml").read_text())
CHECK = runpy.run_path(str(FOLDER / "check_node.py"))


def named(path):
    return str(path.relative_to(FOLDER))


def settings(path):
    return yaml.safe_load(path.read_text())


def resources_of(kind):
    return {name: r["Properties"] for name, r in ACCOUNT["Resources"].items() if r["Type"] == f"AWS::{kind}"}


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_ray_accepts_the_cluster_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(settings(path))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_maxima_are_consistent(path):
    config = settings(path)
    types = config.get("available_node_types", {})
    workers = [node.get("max_workers", 0) for name, node in types.items() if name != config["head_node_type"]]
    assert all(count <= config["max_workers"] for count in workers)
    assert all(node.get("min_workers", 0) <= node.get("max_workers", 0) for node in types.values())
    assert config.get("max_workers", 0) <= sum(workers) or not types, "more nodes than their types allow"


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_nothing_listens_for_strangers(path):
    config, text = settings(path), path.read_text()
    heads = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert len(heads) == 1
    assert "--dashboard-host=127.0.0.1" in heads[0]
    assert "0.0.0.0" not in text
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("cluster/node.sh install" in command for command in config["setup_commands"])
    script = (FOLDER / "node.sh").read_text()
    assert "RAY_AUTH_MODE=token" in script
    assert "--host 127.0.0.1" in script


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_nodes_get_the_whole_package(path, tmp_path):
    """What is left out is named from the root: a bare `data` would leave the package's own folder out, too."""
    config = settings(path)
    assert config["file_mounts"]["~/pdiff_ray"] == "."
    assert "rsync_filter" not in config, "uv's cache and environments ignore themselves"
    assert all(name.startswith("/") or name == "__pycache__" for name in config["rsync_exclude"])


@pytest.mark.parametrize("path", AWS, ids=named)
def test_machines_of_aws_are_real(path):
    """By the offerings that moto keeps of EC2's own answers."""
    moto = Path(pytest.importorskip("moto").__file__).parent / "ec2/resources"
    config = settings(path)
    region = config["provider"]["region"]
    types = json.loads(gzip.decompress((moto / "instance_types.json.gz").read_bytes()))
    zones = moto / f"instance_type_offerings/availability-zone/{region}.json.gz"
    offered = {(o["InstanceType"], o["Location"]) for o in json.loads(gzip.decompress(zones.read_bytes()))}
    for node in config["available_node_types"].values():
        kind = node["node_config"]["InstanceType"]
        assert all((kind, zone) in offered for zone in config["provider"]["availability_zone"].split(","))
        gpus = types[kind].get("GpuInfo", {}).get("Gpus", [])
        cores = types[kind]["VCpuInfo"]["DefaultVCpus"]
        assert node["resources"] == {"CPU": cores} | ({"GPU": gpus[0]["Count"]} if gpus else {})
        architecture = "arm64" if "arm64" in types[kind]["ProcessorInfo"]["SupportedArchitectures"] else "x86_64"
        assert f"/{architecture}/" in node["node_config"]["ImageId"]


@pytest.mark.parametrize("path", AWS, ids=named)
def test_images_of_aws_are_found_at_launch(path):
    config = settings(path)
    for node in config["available_node_types"].values():
        parts = node["node_config"]
        assert re.fullmatch(r"resolve:ssm:/aws/service/deeplearning/ami/x86_64/[\w.-]+/latest/ami-id", parts["ImageId"])
        assert parts["IamInstanceProfile"]["Name"] in {
            profile["InstanceProfileName"] for profile in resources_of("IAM::InstanceProfile").values()
        }
    groups = {group["GroupName"] for group in resources_of("EC2::SecurityGroup").values()}
    assert config["provider"]["security_group"]["GroupName"] in groups


def test_images_of_google_are_found_at_launch():
    config = settings(FOLDER / "google.yaml")
    for name, node in config["available_node_types"].items():
        (disk,) = node["node_config"]["disks"]
        image = disk["initializeParams"]["sourceImage"]
        driver = re.fullmatch(r"projects/[\w-]+/global/images/family/[\w-]+-amd64-with-nvidia-(\d+)", image)
        assert driver is not None
        assert CHECK["DRIVERS"][13][0] <= int(driver[1])
        assert ("GPU" in node["resources"]) == (name != config["head_node_type"])
    assert config["provider"]["availability_zone"].startswith(config["provider"]["region"] + "-")


def test_permissions_name_what_they_allow():
    for policy in resources_of("IAM::ManagedPolicy").values():
        for statement in policy["PolicyDocument"]["Statement"]:
            assert not any("*" in action for action in statement["Action"])
            if statement["Resource"] == "*":
                assert all(action.startswith("ec2:Describe") for action in statement["Action"])
    for role in resources_of("IAM::Role").values():
        assert all(set(policy) == {"Ref"} for policy in role["ManagedPolicyArns"]), "a policy of AWS's own is broad"


def test_the_security_group_lets_in_ssh_alone():
    (group,) = resources_of("EC2::SecurityGroup").values()
    (rule,) = group["SecurityGroupIngress"]
    assert (rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == (22, 22, {"Ref": "Address"})
    assert re.fullmatch(ACCOUNT["Parameters"]["Address"]["AllowedPattern"], "203.0.113.7/32")
    assert not re.fullmatch(ACCOUNT["Parameters"]["Address"]["AllowedPattern"], "0.0.0.0/0")
    for rule in resources_of("EC2::SecurityGroupIngress").values():
        assert rule["SourceSecurityGroupId"] == rule["GroupId"]


@pytest.mark.parametrize("path", SITES, ids=named)
def test_site_files_fit_every_experiment(path, monkeypatch):
    monkeypatch.setenv("PDIFF_SITE", str(path))
    stated = settings(path)["resources"]
    for file in (FOLDER.parent / "sweeps").glob("*.yaml"):
        experiment = loading.load(file)
        assert experiment.resources.model_dump().items() >= stated.items()
        assert experiment.storage_uri == settings(path)["storage"]
        assert loading.load(file, ["resources.workers=4"]).resources.workers == 4


@pytest.mark.parametrize("path", CLUSTERS, ids=named)
def test_the_site_file_of_a_cluster_is_there(path):
    (named_file,) = re.findall(r"node\.sh install (\S+)", path.read_text().replace("]", " "))
    assert (FOLDER.parent / named_file) in SITES


# What the check before an installation says of a lock file like uv's.
LOCK = {
    "package": [
        {"name": "pdiff-ray", "version": "0.1.0"},
        {
            "name": "cuda-toolkit",
            "version": "13.2.2",
            "wheels": [{"url": "x/cuda_toolkit-13.2.2-py2.py3-none-any.whl"}],
        },
        {
            "name": "torch",
            "version": "2.15.0",
            "wheels": [
                {"url": "x/torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl"},
                {"url": "x/torch-2.15.0-cp311-cp311-manylinux_2_28_aarch64.whl"},
                {"url": "x/torch-2.15.0-cp312-cp312-manylinux_2_34_x86_64.whl"},
            ],
        },
        {"name": "old", "version": "1.0", "wheels": [{"url": "x/old-1.0-cp39-abi3-manylinux_2_17_x86_64.whl"}]},
    ]
}


@pytest.mark.parametrize(
    ("glibc", "driver", "free_gib", "said"),
    [
        ("2.28", None, 20, []),
        ("2.39", "580.65.06", 20, []),
        ("2.39", "595.91.07", 20, []),
        ("2.27", None, 20, ["glibc 2.27, but torch 2.15.0 needs 2.28"]),
        ("2.39", "575.57.08", 20, ["NVIDIA driver 575.57.08, but torch's CUDA 13.2.2 needs 580.65.6"]),
        ("2.39", "", 20, ["a GPU without a working NVIDIA driver"]),
        ("2.27", "460.73.01", 3, ["glibc 2.27", "NVIDIA driver 460.73.01", "3 GiB free"]),
    ],
)
def test_a_machine_is_checked_before_installing(glibc, driver, free_gib, said, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = CHECK["problems"](LOCK, glibc, driver, free_gib)
    assert [expected in problem for problem, expected in zip(found, said, strict=True)] == [True] * len(said)


def test_a_cuda_that_the_table_lacks_is_told():
    lock = {"package": [{"name": "cuda-toolkit", "version": "99.0.1", "wheels": []}]}
    with pytest.raises(SystemExit, match=r"CUDA 99\.0\.1 is newer than its table"):
        CHECK["needed_driver"](lock)


@pytest.mark.parametrize("path", SITES, ids=named)
def test_shares_of_gpus_are_stated_for_all_work_or_none(path):
    """What is "auto" asks for no GPU while none has joined, as where an interrupted sweep goes on."""
    stated = {name for name in settings(path)["resources"] if name.startswith("gpus_per_")}
    assert stated in (set(), {"gpus_per_worker", "gpus_per_actor", "gpus_per_trial"})


class Metadata(BaseHTTPRequestHandler):
    """What a cloud tells a machine of itself: that it is to go."""

    def do_PUT(self):
        self.answer(b"token" if "X-aws-ec2-metadata-token-ttl-seconds" in self.headers else None)

    def do_GET(self):
        aws = (
            self.path == "/latest/meta-data/spot/instance-action"
            and self.headers["X-aws-ec2-metadata-token"] == "token"
        )
        google = self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google"
        noticed = {"aws": aws, "google": google}.get(self.server.cloud)
        self.answer(b"TRUE" if noticed else b"FALSE" if google else None)

    def answer(self, body):
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", "110"), ("google", "25"), ("neither", None)])
def test_ray_is_told_of_the_notice_that_a_machine_has(cloud, seconds, tmp_path):
    """The script as it is; `ray` and `pgrep` write down what they are asked, and tell of a node for ten looks."""
    for folder in ("cluster", "bin", "home"):
        (tmp_path / folder).mkdir()
    shutil.copy(FOLDER / "node.sh", tmp_path / "cluster")
    looks, asked = tmp_path / "looks", tmp_path / "asked"
    raylet = "7 raylet --node_id=0abc --gcs-address=10.0.0.1:6379 --session=x --gcs-address=none"
    stubs = {
        "ray": f'echo "$*" >>{asked}',
        "pgrep": f"echo >>{looks}; [ $(wc -l <{looks}) -le 10 ] && echo '{raylet}'",
    }
    for name, body in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.cloud = cloud
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}",
        "GCE_METADATA_HOST": address,
        "PDIFF_NOTICE_EVERY_S": "0.05",
    }
    try:
        subprocess.run(["bash", tmp_path / "cluster/node.sh", "notice"], env=environment, check=True)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (asked.exists() and asked.read_text().endswith("\n")):
            if looks.exists() and len(looks.read_text().splitlines()) > 10:
                break
            time.sleep(0.05)
    finally:
        server.shutdown()
    if seconds is None:
        assert not asked.exists()
        return
    (command,) = asked.read_text().splitlines()
    assert command.startswith("drain-node --address 10.0.0.1:6379 --node-id 0abc ")
    assert "--reason DRAIN_NODE_REASON_PREEMPTION" in command
    assert command.endswith(f"--deadline-remaining-seconds {seconds}")


@pytest.mark.parametrize("name", ["a100", "google"])
def test_machines_that_may_be_spot_listen_for_notice(name):
    commands = settings(FOLDER / f"{name}.yaml")["worker_start_ray_commands"]
    assert commands[-1] == "~/pdiff_ray/cluster/node.sh notice"


@pytest.mark.parametrize(
    ("answer", "without_gpu", "with_gpu"),
    [(None, None, ""), ("exit 9", None, ""), ("echo 580.65.06", "580.65.06", "580.65.06")],
    ids=["no tool", "the tool alone", "a driver"],
)
def test_a_gpu_is_seen_without_its_driver(answer, without_gpu, with_gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if answer:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    devices = tmp_path / "devices"
    for number, vendor, expected in (("0", "0x8086", without_gpu), ("1", "0x10de", with_gpu)):
        (devices / number).mkdir(parents=True)
        (devices / number / "vendor").write_text(vendor + "\n")
        assert CHECK["driver_here"](devices) == expected


def test_the_check_is_derived_from_what_is_installed(tmp_path):
    """The lock says of torch what torch says of itself."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA")
    from importlib import metadata

    (cuda,) = re.findall(r"cuda-toolkit\S*==(\S+?);", "\n".join(metadata.requires("torch")).replace(" ", ""))
    assert cuda.startswith(torch.version.cuda)
    tags = re.findall(r"manylinux_(\d+_\d+)", metadata.distribution("torch").read_text("WHEEL"))
    lock = {
        "package": [
            {"name": "cuda-toolkit", "version": cuda},
            {"name": "torch", "version": "2", "wheels": [{"url": f"x/torch-cp311-manylinux_{tags[0]}_x86_64.whl"}]},
        ]
    }
    assert CHECK["needed_driver"](lock)[0] == cuda
    assert CHECK["needed_glibc"](lock, "x86_64", (3, 11)) == {tuple(map(int, tags[0].split("_"))): "torch 2"}


KUBERNETES = [settings(FOLDER / f"kuberay/{name}.yaml")["spec"] for name in ("raycluster", "rayjob")]


@pytest.mark.parametrize("cluster", [KUBERNETES[0], KUBERNETES[1].get("rayClusterSpec")], ids=["raycluster", "rayjob"])
def test_pods_ask_for_the_token_and_are_checked(cluster):
    assert cluster == KUBERNETES[0], "the job's cluster is another one"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    image = f"rayproject/ray:{cluster['rayVersion']}-py311"
    assert f"FROM {image}\n" in (FOLDER / "kuberay/Dockerfile").read_text()
    assert f"ray[default]=={cluster['rayVersion']}" in (FOLDER.parent / "pyproject.toml").read_text()
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        pod = group["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["initContainers"][0]["command"] == ["python", "cluster/check_node.py", "uv.lock"]
        assert pod["initContainers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
        containers = [
            *pod["containers"],
            *pod["initContainers"],
            *cluster["headGroupSpec"]["template"]["spec"]["containers"],
        ]
        assert len({container["image"] for container in containers}) == 1


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.sh")), ids=named)
def test_scripts_are_of_bash(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
