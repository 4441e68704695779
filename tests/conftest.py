"""One thread, as tests share the machine, and a cache of their own."""

import os

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    os.environ["PDIFF_CACHE"] = str(tmp_path_factory.mktemp("cache"))
