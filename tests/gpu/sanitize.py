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
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "tests" / "ops"
_HEADER = "========= COMPUTE-SANITIZER"
# A clean racecheck ends with "RACECHECK SUMMARY: 0 hazards displayed". pytest's dots may stand before any line.
_FINDING = re.compile(r"=========.*(?:Invalid __|Race reported|(?<! 0 )hazard|Uninitialized|Barrier error|Misaligned|"
                      r"leaked)")
_PADDING = 4096  # bytes
_BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=60.0)


def pytest_configure():
    """Each array an allocation of its own, whose bounds the sanitizer knows: CuPy's pool cuts arrays out of larger
    blocks and rounds their sizes up to 512 bytes.

    cutp sets no allocator that would undo this: it only refuses allocations inside captures (cutp.array.graph). Arrays
    out of one Arena (cutp.array.arena) are still parts of one allocation.
    """
    with suppress(ImportError):  # the tests are skipped then, and say why
        import cupy

        cupy.cuda.set_allocator(None)


def pytest_runtest_setup(item):
    if time.monotonic() - _BEGAN > item.config.getoption("--seconds"):
        item.session.shouldstop = "the time is up"


def run(root: Path, path: Path, tool: str, seconds: float) -> str:
    """What the sanitizer and pytest print about the tests of `path`, a file of the checkout at `root`."""
    # Memory that belongs to nobody behind each allocation, or an overrun may end in the next one and not be seen.
    padding = ["--padding", str(_PADDING)] if tool == "memcheck" else []
    # -s: pytest's capture of the file descriptors would keep the sanitizer's lines.
    command = ["compute-sanitizer", "--tool", tool, *padding, "--print-limit", "5", sys.executable, "-m", "pytest",
               "-q", "-x", "-s", "-m", "gpu", "-p", "tests.gpu.sanitize", "-p", "no:cacheprovider",
               "--seconds", str(seconds), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=4 * seconds + 120)
    return done.stdout + done.stderr


def judge(path: Path, text: str) -> tuple[bool, str]:
    """Whether nothing was found, and a line that says so."""
    findings = [line for line in text.splitlines() if _FINDING.search(line)]
    outcome = re.findall(r"^\d+ (?:passed|failed|skipped).*$", text, re.M)
    if _HEADER not in text:
        findings.append("the sanitizer said nothing")
    good = not findings and bool(outcome) and "passed" in outcome[-1] and not re.search("failed|error", outcome[-1])
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
        clean, line = judge(path, run(ROOT, path.resolve(), args.tool, args.seconds))
        good &= clean
        print(line, flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
