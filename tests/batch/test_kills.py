"""A few of the kills of `kill_test.py`, which runs any number."""

import random
from pathlib import Path

import pytest

from tests.batch import kill_test

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes to kill in /proc")


def test_killed_and_started_again(tmp_path):
    report = kill_test.run_until(5, random.Random(20), tmp_path)
    assert report.kills.total() == 5
    assert report.different == []
