"""Says in one message whether what is pinned can run on this machine, before anything long is installed.

    python cluster/check_node.py uv.lock

The lock file tells what is needed: the wheels' tags the glibc, torch's CUDA the driver of NVIDIA.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

# The oldest driver for every minor version of a CUDA: its release notes, on minor version compatibility.
DRIVERS = {12: (525, 60, 13), 13: (580, 65, 6)}
NVIDIA = "0x10de"  # as PCI devices call it
DISK_GIB = 15  # environment and cache, which share their files, take 7

Version = tuple[int, ...]


def needed_glibc(lock: dict, machine: str, python: Version) -> dict[Version, str]:
    """Returns the glibc that packages need, each with the name of one that needs it.

    Args:
        machine: such as x86_64.
        python: such as (3, 11).
    """
    interpreter = f"cp{python[0]}{python[1]}"
    needed: dict[Version, str] = {}
    for package in lock["package"]:
        files = [wheel["url"].rsplit("/", 1)[-1] for wheel in package.get("wheels", ())]
        versions = [
            tuple(map(int, found))
            for file in files
            if interpreter in file or "-abi3-" in file or "-none-" in file
            for found in re.findall(rf"manylinux_(\d+)_(\d+)_{machine}", file)
        ]
        if versions:
            needed.setdefault(min(versions), f"{package['name']} {package['version']}")
    return needed


def needed_driver(lock: dict) -> tuple[str, Version]:
    """Returns the CUDA that the locked torch runs on, and the oldest driver for it.

    Raises:
        SystemExit: DRIVERS does not know it.
    """
    cuda = next(package["version"] for package in lock["package"] if package["name"] == "cuda-toolkit")
    major = int(cuda.split(".")[0])
    if major not in DRIVERS:
        raise SystemExit(
            f"cluster/check_node.py: CUDA {cuda} is newer than its table; add the oldest driver for {major}"
        )
    return cuda, DRIVERS[major]


def version(text: str) -> Version:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def dotted(numbers: Iterable[int]) -> str:
    return ".".join(str(number) for number in numbers)


def driver_here(devices: Path = Path("/sys/bus/pci/devices")) -> str | None:
    """Returns the version of the NVIDIA driver, "" where a GPU lacks a working one, None on a machine without a GPU.

    A head without a GPU may boot an image that has NVIDIA's tools; a container may see the GPU but no PCI devices.
    """
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True)
        if asked.returncode == 0 and (found := asked.stdout.split("\n")[0].strip()):
            return found
    vendors = [path.read_text().strip() for path in devices.glob("*/vendor")]
    return "" if NVIDIA in vendors else None


def problems(lock: dict, glibc: str, driver: str | None, free_gib: float, python: Version = (3, 11)) -> list[str]:
    """Returns what keeps the locked packages from running on a machine with this glibc, driver and disk."""
    found = []
    glibcs = needed_glibc(lock, platform.machine(), python)
    newest = max(glibcs, default=(0,))
    if version(glibc) < newest:
        found.append(f"glibc {glibc}, but {glibcs[newest]} needs {dotted(newest)}: use an image of a newer system")
    if driver is not None:
        cuda, oldest = needed_driver(lock)
        asks = f"but torch's CUDA {cuda} needs {dotted(oldest)}: use an image with a newer one, or update it"
        if not driver:
            found.append(f"a GPU without a working NVIDIA driver (nvidia-smi), {asks}")
        elif version(driver) < oldest:
            found.append(f"NVIDIA driver {driver}, {asks}")
    if free_gib < DISK_GIB:
        found.append(f"{free_gib:.0f} GiB free, but the environment needs {DISK_GIB}: use a larger disk")
    return found


def main(file: str) -> None:
    lock = tomllib.loads(Path(file).read_text())
    glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "glibc 0").split()[-1]
    installed = Path(file).with_name(".venv").exists()
    free_gib = math.inf if installed else shutil.disk_usage(Path.home()).free / 2**30
    found = problems(lock, glibc, driver_here(), free_gib, sys.version_info[:2])
    if found:
        raise SystemExit("\n".join(f"{platform.node()} cannot run pdiff_ray: {problem}" for problem in found))


if __name__ == "__main__":
    main(sys.argv[1])
