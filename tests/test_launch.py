"""`ray up` for real: on an AWS that runs here, and on hosts that this machine makes of itself."""

import base64
import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
REGION = "us-east-1"
ADDRESS = "203.0.113.7/32"
REHEARSAL = runpy.run_path(str(ROOT / "cluster/rehearse.py"))


@pytest.fixture
def aws(monkeypatch):
    """An AWS on the loopback interface, with what aws/account.yaml makes; and what is asked of it."""
    boto3 = pytest.importorskip("boto3")
    server_of = pytest.importorskip("moto.server")
    from moto.moto_api._internal import moto_api_backend

    server = server_of.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    parameters = {"Bucket": "pdiff-artifacts", "Address": ADDRESS}
    boto3.client("cloudformation", REGION).create_stack(
        StackName="pdiff",
        TemplateBody=(ROOT / "cluster/aws/account.yaml").read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
    )
    yield lambda service: boto3.client(service, REGION)
    server.stop()
    moto_api_backend.reset()  # what it made, which outlives the server


def allowed(*policies):
    """Returns the actions of EC2, IAM and SSM that policies of aws/account.yaml allow."""
    resources = yaml.safe_load((ROOT / "cluster/aws/account.yaml").read_text())["Resources"]
    statements = [s for name in policies for s in resources[name]["Properties"]["PolicyDocument"]["Statement"]]
    return {action.split(":")[1] for statement in statements for action in statement["Action"]}


@pytest.fixture
def launched(aws, tmp_path):
    """Types `ray up` on a cluster file, and returns the first instance that it launches."""
    processes = []

    def launch(file):
        token = tmp_path / ".ray/auth_token"
        token.parent.mkdir(exist_ok=True)
        token.write_text("0" * 64)
        ray = str(Path(sys.executable).parent / "ray")
        environment = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [ray, "up", "-y", "--no-config-cache", str(file)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        processes.append(process)
        for _ in range(600):
            # An instance is there before its profile and its tags are: so Ray's word is waited for.
            if "Launched instance" in (said := (tmp_path / "log").read_text()) or process.poll() is not None:
                break
            time.sleep(0.5)
        found = [i for r in aws("ec2").describe_instances()["Reservations"] for i in r["Instances"]]
        assert found, said
        return found[0]

    yield launch
    for process in processes:  # it waits for ssh, which nobody answers
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100", "gpu"])
def test_ray_up_launches_what_the_file_says(name, aws, launched, tmp_path, monkeypatch):
    from moto.moto_api import recorder

    monkeypatch.setattr(recorder, "_location", str(tmp_path / "recorded"))
    file = ROOT / f"cluster/{name}.yaml"
    stated = yaml.safe_load(file.read_text())["available_node_types"]["head"]["node_config"]
    recorder.start_recording()
    instance = launched(file)
    recorder.stop_recording()
    bodies = [base64.b64decode(json.loads(line)["body"]) for line in (tmp_path / "recorded").read_text().splitlines()]
    asked = set(re.findall(r"\bAction=(\w+)", b"&".join(bodies).decode()))
    assert "RunInstances" in asked
    assert asked <= allowed("Launcher", "Machines"), asked - allowed("Launcher", "Machines")
    assert instance["InstanceType"] == stated["InstanceType"]
    assert instance["ImageId"] == stated["ImageId"], "EC2 looks the name up"
    assert instance["IamInstanceProfile"]["Arn"].endswith("/" + stated["IamInstanceProfile"]["Name"])
    assert instance["Placement"]["AvailabilityZone"] == f"{REGION}a"
    tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    assert tags["ray-cluster-name"] == f"pdiff-{name}"
    assert tags["ray-node-type"] == "head"
    (group,) = instance["SecurityGroups"]
    assert group["GroupName"] == "pdiff"
    (described,) = aws("ec2").describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"]
    strangers = [r for r in described["IpPermissions"] if r["IpRanges"] or r.get("Ipv6Ranges")]
    assert [(r["FromPort"], r["ToPort"], r["IpRanges"][0]["CidrIp"]) for r in strangers] == [(22, 22, ADDRESS)]
    nodes = [r["UserIdGroupPairs"][0]["GroupId"] for r in described["IpPermissions"] if r["UserIdGroupPairs"]]
    assert nodes == [group["GroupId"]]
    # Ray makes no roles of its own, which would be allowed everything.
    assert sorted(role["RoleName"].split("-")[1] for role in aws("iam").list_roles()["Roles"]) == [
        "HeadRole",
        "WorkerRole",
    ]


@pytest.mark.slow
@pytest.mark.skipif(bool(REHEARSAL["missing"]()), reason=REHEARSAL["missing"]())
def test_a_sweep_on_several_hosts():
    workers = REHEARSAL["rehearse"](["sweeps/ablate_layers.yaml", "--preset", "small"])
    assert workers == set(REHEARSAL["NAMES"][1:])
