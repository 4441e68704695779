"""`ray up` and a sweep on hosts that this machine makes of itself: what hosts.yaml does, without other machines.

    uv run --group cluster python cluster/rehearse.py sweeps/ablate_layers.yaml --preset small

Every host is a network namespace of Linux with processes, home folder, /tmp/ray and an sshd of its own; a bridge is
their network, /mnt/pdiff the folder they share. Needs root, sshd, rsync and iproute2, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parent.parent
NETWORK = "10.213.77"
CLUSTER = "pdiff-rehearsal"
BRIDGE = "pdiff-bridge"
NAMES = ("pdiff-head", "pdiff-one", "pdiff-two")
TOOLS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "rsync", "uv")
NAMESPACES = ("unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc")
LEFT_S = 180.0  # after `ray down`, until workers have noticed that their head is gone
SUBMIT = "ray job submit --address http://127.0.0.1:8265 -- ~/pdiff_ray/cluster/node.sh sweep"
MLFLOW = (
    "import mlflow, collections; c = mlflow.MlflowClient('http://127.0.0.1:5000'); "
    "runs = c.search_runs([e.experiment_id for e in c.search_experiments()]); "
    "print('MLflow:', dict(collections.Counter(r.data.tags['kind'] + ' ' + r.info.status for r in runs)))"
)


def missing() -> str:
    """Returns why this machine cannot do it, or nothing."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make network namespaces"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(absent)} (packages openssh-server, rsync, iproute2, util-linux, uv)"
    if subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True
    ).returncode:
        return "needs the right to make namespaces"
    try:
        import aiohttp_cors  # noqa: F401  (of ray[default])
    except ImportError:
        return "needs ray[default] (uv sync --group cluster)"
    return ""


@dataclass
class Host:
    name: str
    address: str
    process: subprocess.Popen[bytes]

    def processes(self) -> list[str]:
        """Returns the commands of the processes on it, but for those that make it a host."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
            return [command for process in found if (command := command_of(process))]
        return []


def left_on(made: list[Host]) -> dict[str, list[str]]:
    return {host.name: found for host in made if (found := host.processes())}


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE and process.name() not in ("unshare", "sshd"):
            return " ".join(process.cmdline())[:300]
    return ""


def run(*command: str, **options) -> None:
    subprocess.run(command, check=True, **options)


def kept() -> list[Path]:
    """Returns folders of this machine's that hosts see, lest each download Python and packages of its own."""
    cache = subprocess.run(["uv", "cache", "dir"], check=True, capture_output=True, text=True).stdout.strip()
    return [Path(cache), Path(sys.base_prefix)]


def boot(name: str, address: str, scratch: Path) -> Host:
    """Starts a host."""
    home = scratch / name
    home.mkdir()
    run("ip", "netns", "add", name)
    run("ip", "link", "add", f"{name}-v", "type", "veth", "peer", "name", "eth0", "netns", name)
    run("ip", "link", "set", f"{name}-v", "master", BRIDGE, "up")
    inside = ("ip", "-n", name)
    run(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
    run(*inside, "link", "set", "eth0", "up")
    run(*inside, "link", "set", "lo", "up")
    run(*inside, "route", "add", "default", "via", f"{NETWORK}.1")  # by which Ray finds the host's own address
    cache, python = kept()
    tools = (str(os.environ.get("UV") or shutil.which("uv")), f"{python}/bin/python3.11")
    environment = f"UV_CACHE_DIR={cache} UV_LINK_MODE=symlink UV_OFFLINE=1"
    (scratch / f"{name}.sshd").write_text(
        f"ListenAddress {address}\nHostKey {scratch}/key\nAuthorizedKeysFile {scratch}/key.pub\nStrictModes no\n"
        f"UsePAM no\nPidFile none\nPasswordAuthentication no\nSetEnv {environment}\n"
    )
    below_home = [folder.relative_to(Path.home()) for folder in (cache, python) if folder.is_relative_to(Path.home())]
    script = [
        "set -e",
        f"hostname {name}",
        f"mount -t tmpfs -o size=64g none {home}",  # where the many links of an environment come and go quickly
        *(f"mkdir -p {home}/{path} && mount --bind {Path.home()}/{path} {home}/{path}" for path in below_home),
        f"mkdir -p {home}/.local/bin && ln -s {' '.join(tools)} {home}/.local/bin",
        f"mount --rbind {home} {Path.home()}",
        "mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray",
        "mount -t tmpfs none /dev/shm",
        "mount -t tmpfs none /mnt && mkdir /mnt/pdiff",
        f"mount --bind {scratch}/shared /mnt/pdiff",
        "mount -t tmpfs none /run && mkdir /run/sshd",
        f"exec {shutil.which('sshd')} -D -e -f {scratch}/{name}.sshd",
    ]
    command = ["ip", "netns", "exec", name, *NAMESPACES, "bash", "-c", "\n".join(script)]
    with (scratch / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    for _ in range(100):
        with contextlib.suppress(OSError):
            socket.create_connection((address, 22), timeout=1).close()
            return Host(name, address, process)
        time.sleep(0.1)
    raise SystemExit((scratch / f"{name}.log").read_text())


@contextlib.contextmanager
def hosts(scratch: Path) -> Iterator[list[Host]]:
    """Makes the hosts, and takes them away."""
    made: list[Host] = []
    (scratch / "shared").mkdir()
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(scratch / "key"))
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        run("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for number, name in enumerate(NAMES, start=2):
            made.append(boot(name, f"{NETWORK}.{number}", scratch))
        yield made
    finally:
        for host in made:
            host.process.kill()
            host.process.wait()
        for name in NAMES:
            subprocess.run(["ip", "link", "del", f"{name}-v"], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        run("ip", "link", "del", BRIDGE)


def cluster_file(scratch: Path, made: list[Host]) -> Path:
    """Writes hosts.yaml with the hosts' addresses; one core each, so that work must go to both."""
    content = yaml.safe_load((ROOT / "cluster/hosts.yaml").read_text())
    content["cluster_name"] = CLUSTER  # a cluster of the user's keeps its own state
    content["provider"] |= {"head_ip": made[0].address, "worker_ips": [host.address for host in made[1:]]}
    content["auth"] = {"ssh_user": "root", "ssh_private_key": str(scratch / "key")}
    content["file_mounts"] = {"~/pdiff_ray": str(ROOT), "~/.ray/auth_token": str(scratch / "token")}
    for key, cores in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
        start = f"{content[key][1]} --num-cpus={cores} --object-store-memory=200000000"
        # Ray gives a node half a minute to start, which is little for three of them on a busy machine.
        content[key][1] = f"for _ in 1 2 3 4; do ({start}) && break; ray stop; done"
    file = scratch / "hosts.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def workers_of(storage: Path) -> set[str]:
    """Returns the hosts that have written networks to storage, by their names in its rows."""
    import pyarrow.parquet as pq

    files = [file for file in storage.rglob("*.parquet") if "worker" in pq.read_schema(file).names]
    return {
        row.split(":")[0] for file in files for row in pq.read_table(file, columns=["worker"])["worker"].to_pylist()
    }


def rehearse(job: list[str]) -> set[str]:
    """Runs a sweep, given as arguments of `pdiff sweep`, on a cluster of hosts.

    Returns:
        The hosts that did its work.

    Raises:
        SystemExit: a command failed, or something is left running.
    """
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    scratch = Path(tempfile.mkdtemp(prefix="pdiff-", dir="/tmp"))
    try:
        with hosts(scratch) as made:
            say(f"hosts: {', '.join(f'{host.name} {host.address}' for host in made)}")
            (scratch / "launcher").mkdir()
            environment = {
                **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PDIFF_"))},
                "HOME": str(scratch / "launcher"),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(scratch / "token"),
                "RAY_USAGE_STATS_ENABLED": "0",
            }
            (scratch / "token").write_text(os.urandom(32).hex())
            run("uv", "lock", "--quiet", cwd=ROOT)
            file = str(cluster_file(scratch, made))

            def ray(*arguments: str) -> None:
                say(f"ray {' '.join(arguments).replace(str(scratch), '...')}")
                command = [str(Path(sys.executable).parent / "ray"), *arguments]
                ended = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
                if ended.returncode:
                    for log in sorted(scratch.glob("*.log")):
                        print(f"--- {log.name}", log.read_text()[-2000:], sep="\n")
                    raise SystemExit(f"ray {arguments[0]} ended with {ended.returncode}")

            ray("up", "-y", "--no-config-cache", file)
            alive = "$(ray list nodes --format json | grep -o ALIVE | wc -l)"
            ray("exec", file, f"timeout 600 bash -c 'until [ {alive} = {len(made)} ]; do sleep 5; done'; ray status")
            ray("exec", file, f"{SUBMIT} {' '.join(job)}")
            workers = workers_of(scratch / "shared")
            say(f"networks were made on {', '.join(sorted(workers))}")
            ray("exec", file, f'python -c "{MLFLOW}"')
            ray("down", "-y", file)
            deadline = time.monotonic() + LEFT_S
            while (left := left_on(made)) and time.monotonic() < deadline:
                time.sleep(1)
            if left:
                raise SystemExit(f"left running: {json.dumps(left)}")
            say("nothing is left running")
            return workers
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for left in Path("/tmp/ray").glob(f"cluster-{CLUSTER}.*"):  # which hosts are taken, of Ray's launcher
            left.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", nargs=argparse.REMAINDER, help="arguments of `pdiff sweep`; default: the quickstart")
    if why := missing():
        raise SystemExit(why)
    rehearse(parser.parse_args().job or ["sweeps/quickstart.yaml"])
