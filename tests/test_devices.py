"""Devices: how much of a GPU is free, float32 on it, and the end of its memory. No GPU is needed."""

import pytest
import torch
from threadpoolctl import threadpool_info

from pdiff_ray.cli import doctor
from pdiff_ray.common import devices
from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Experiment


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize(("fraction", "free"), [(0.25, 15), (1.0, 62)])
def test_free_memory_is_that_of_ones_share(monkeypatch, device, fraction, free):
    """What the allocator keeps for later is free as well."""
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", lambda device: fraction, raising=False)
    assert devices.free_bytes(torch.device(device)) == free


def test_numpy_keeps_to_the_threads_of_torch():
    try:
        for threads in (2, 1):
            devices.limit_threads(threads)
            assert torch.get_num_threads() == threads
            assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {threads}
    finally:
        devices.limit_threads(1)


def test_convolutions_round_to_float32():
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        devices.exact_float32()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.deterministic
        assert "tf32" not in (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_the_end_of_memory_has_a_remedy():
    expected = pytest.raises(PdiffError, match=r"^a test: CUDA out of memory; lower zoo\.runs_per_program, or")
    with expected, devices.enough_memory("a test", "zoo.runs_per_program"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


def test_a_driver_that_is_too_old_is_found(monkeypatch):
    """NVML counts its GPUs all the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = next(finding for finding in doctor.examine(Experiment(name="x")) if finding.what == "devices")
    assert not found.ok
    assert "update their driver" in found.text
