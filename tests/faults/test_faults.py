"""Every kind of fault once, and many of them."""

import random

import pytest

from .cluster import missing
from .suite import Suite
from .sweeps import SHORT, SHORT_GRID, SHORT_KINDS, check, disturbed, undisturbed

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.mark.slow
def test_every_kind_of_fault_once(tmp_path):
    with Suite(tmp_path, {**SHORT, "sweep": SHORT_GRID}, random.Random(0)) as suite:
        expected = undisturbed(suite, in_process=True)
        suite.left = SHORT_KINDS
        while suite.left:  # a machine may be faster than the faults come
            check(suite, suite.left, 1.5, expected, f"disturbed-{len(suite.left)}")


@pytest.mark.long
def test_a_hundred_faults(tmp_path):
    disturbed(tmp_path, 100, 0)
