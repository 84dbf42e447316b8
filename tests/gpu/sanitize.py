"""The kernels' GPU tests under compute-sanitizer:

    python tests/gpu/sanitize.py [--planted] [--tool memcheck] [--seconds 60] [FILE...]

Each file of tests/ops (by default all *_cuda.py and prefill attention) runs in a process of its own; tests that have
not begun after so many seconds are left out, for under the sanitizer each takes long. Prints a line a file and ends
with 1 if any has a finding or a failed test, or if the sanitizer was not there. With --planted, a copy of residual.cu
that writes out of bounds comes first: nothing else runs, and the script ends with 1, unless memcheck sees that.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "tests" / "ops"
_HEADER = "========= COMPUTE-SANITIZER"
# A clean racecheck ends with "RACECHECK SUMMARY: 0 hazards displayed". pytest's dots may stand before any line.
_FINDING = re.compile(r"=========.*(?:Invalid __|Race reported|(?<! 0 )hazard|Uninitialized|Barrier error|Misaligned|"
                      r"leaked)")
_OVERRUN = re.compile(r"========= Invalid __global__ write")
_PADDING = 4096  # bytes
_RIGHT = "store_activations(out + first_element(), here, sum);"
_PLANTED = "store_activations(out + first_element() + width, here, sum);"
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
    # What the driver refuses to cuda-bindings as it starts is no finding, and would use up the limit of lines.
    options = ["--padding", str(_PADDING), "--report-api-errors", "no"] if tool == "memcheck" else []
    # -s: pytest's capture of the file descriptors would keep the sanitizer's lines.
    command = ["compute-sanitizer", "--tool", tool, *options, "--print-limit", "5", sys.executable, "-m", "pytest",
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


def plant(root: Path) -> None:
    """A copy of what the tests need at `root`, in which `residual_add` writes a vector beyond where it should."""
    for folder in ("cutp", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", root)
    source = root / "cutp" / "ops" / "residual.cu"
    text = source.read_text()
    if text.count(_RIGHT) != 1:
        sys.exit(f"BAD planted: cutp/ops/residual.cu has the line to change {text.count(_RIGHT)} times: {_RIGHT}")
    source.write_text(text.replace(_RIGHT, _PLANTED))


def planted(seconds: float) -> tuple[bool, str]:
    """Whether memcheck sees a write out of bounds in a kernel of ours, and a line that says so."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        plant(root)
        text = run(root, root / "tests" / "ops" / "test_residual_cuda.py", "memcheck", seconds)
    seen = [line for line in text.splitlines() if _OVERRUN.search(line)]
    return bool(seen), f"ok  planted: {seen[0]}" if seen else f"BAD planted: no finding in {text[-2000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tool", default="memcheck", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--planted", action="store_true", help="first show that a write out of bounds would be seen")
    args = parser.parse_args()
    files = args.files or sorted({*OPS.glob("test_*_cuda.py"), *OPS.glob("test_prefill_attention*.py")})
    good = True
    if args.planted:
        good, line = planted(args.seconds)
        print(line, flush=True)
        if not good:
            sys.exit(1)
    for path in files:
        clean, line = judge(path, run(ROOT, path.resolve(), args.tool, args.seconds))
        good &= clean
        print(line, flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
