"""Settings for the whole test session."""

from collections import Counter
from threading import Lock

import numpy as np  # noqa: F401  (loads BLAS, so that its threads can be capped)
import pytest
from threadpoolctl import threadpool_limits

from tests import tiny_llama, tiny_models

# The matrices of the tests are tiny: more BLAS threads only get in each other's way.
threadpool_limits(1, user_api="blas")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(case): the directory of that tiny checkpoint (of tiny_llama or tiny_models), written once a session."""
    root = tmp_path_factory.mktemp("tiny")
    lock = Lock()  # ranks that are threads ask at the same time

    def directory(case: str):
        path = root / case
        with lock:
            if not path.exists():
                (tiny_models if case in tiny_models.CASES else tiny_llama).write_checkpoint(case, path)
        return path

    return directory


def pytest_terminal_summary(terminalreporter):
    """Why tests were skipped, a line a reason: a machine without a GPU skips hundreds for the same one."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
