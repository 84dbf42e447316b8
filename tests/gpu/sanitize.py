"""The kernels' GPU tests under compute-sanitizer:

    python tests/gpu/sanitize.py [--tool memcheck] [--seconds 60] [FILE...]

Each file of tests/ops (by default all *_cuda.py and prefill attention) runs in a process of its own; tests that have
not begun after so many seconds are left out, for under the sanitizer each takes long. Prints a line a file and ends
with 1 if any has a finding or a failed test, or if the sanitizer was not there. What the driver refuses to
cuda-bindings as it starts (cuGetProcAddress) is no finding.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

OPS = Path(__file__).resolve().parents[1] / "ops"
_HEADER = "========= COMPUTE-SANITIZER"
_FINDING = re.compile(r"Invalid __|Race reported|hazard|Uninitialized|Barrier error|Misaligned|leaked")
_BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=60.0)


def pytest_runtest_setup(item):
    if time.monotonic() - _BEGAN > item.config.getoption("--seconds"):
        item.session.shouldstop = "the time is up"


def run(path: Path, tool: str, seconds: float) -> tuple[bool, str]:
    """Whether nothing was found, and a line that says so."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "5", sys.executable, "-m", "pytest", "-q", "-x",
               "-m", "gpu", "-p", "tests.gpu.sanitize", "-p", "no:cacheprovider", "--seconds", str(seconds), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * seconds + 120)
    text = done.stdout + done.stderr
    findings = [line for line in text.splitlines() if _FINDING.search(line)]
    outcome = re.findall(r"^\d+ (?:passed|failed|skipped).*$", text, re.M)
    if _HEADER not in text:
        findings.append("the sanitizer said nothing")
    good = not findings and bool(outcome) and "failed" not in outcome[-1] and "passed" in outcome[-1]
    said = outcome[-1] if outcome else text[-300:]
    return good, f"{'ok ' if good else 'BAD'} {path.name}: {said} {findings[:3] or ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tool", default="memcheck", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    files = args.files or sorted({*OPS.glob("test_*_cuda.py"), *OPS.glob("test_prefill_attention*.py")})
    good = True
    for path in files:
        clean, line = run(path, args.tool, args.seconds)
        good &= clean
        print(line, flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
