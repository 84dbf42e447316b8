"""`import cutp` costs next to nothing, needs neither MPI nor CUDA, and nothing ever opens a connection."""

import json
import socket
import subprocess
import sys

import pytest

import cutp
from cutp.cli.main import main
from tests.mpirun import CHECKOUT, clean_environment

MODULES = ["mpi4py", "cupy", "numpy", "ml_dtypes", "tokenizers", "jinja2", "threadpoolctl", "tqdm"]


def python(code, *argv, cwd=None):
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=200, cwd=cwd,
                          env=clean_environment(), stdin=subprocess.DEVNULL, check=False)


def test_import_imports_nothing_else():
    code = f"import sys, json, cutp\nprint(json.dumps([m for m in {MODULES} if m in sys.modules]))"
    done = python(code)
    assert (json.loads(done.stdout), done.stderr) == ([], "")


def test_help_starts_no_mpi():
    code = (f"import sys, json\nfrom cutp.cli.main import main\ntry:\n    main(['generate', '--help'])\n"
            f"finally:\n    print(json.dumps([m for m in {MODULES} if m in sys.modules]), file=sys.stderr)")
    assert not {"mpi4py", "cupy", "tokenizers", "jinja2"} & set(json.loads(python(code).stderr))


def test_import_is_quick():
    def seconds(code):
        # Of the processor: what else the machine does hardly counts. The quickest of several, because it does count.
        return min(float(python(code).stdout) for _ in range(5))

    total = "import time; print(time.process_time())"
    assert seconds(f"import cutp; {total}") - seconds(total) < 0.05
    assert seconds("import time; t = time.process_time(); import cutp; print(time.process_time() - t)") < 0.05


@pytest.mark.parametrize("name", cutp.__all__)
def test_public_names(name):
    assert getattr(cutp, name) is not None and name in dir(cutp)
    done = python(f"from cutp import {name}; import sys; print('mpi4py' in sys.modules, 'cupy' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False False\n", "")


def test_star_import_and_unknown_names():
    done = python("from cutp import *\nprint(LLM.__name__, run_threads.__name__)")
    assert (done.stdout, done.stderr) == ("LLM run_threads\n", "")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cutp.no_such_name


def test_without_mpi4py(tmp_path):
    """A part of these tests where mpi4py cannot be imported: one rank works, what needs more says why it is skipped."""
    code = "import sys; sys.modules['mpi4py'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    chosen = ["tests/cli/test_score.py", "tests/cli/test_generate.py::test_max_len", "tests/mpi/test_failures_mpi.py",
              "tests/engine/test_llm_stays_usable.py::test_none_on_other_ranks"]
    done = python(code, "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", str(CHECKOUT), "-c",
                  str(CHECKOUT / "setup.cfg"), *(str(CHECKOUT / name) for name in chosen), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and "mpi4py is not installed" in done.stdout


def test_no_connection_is_ever_opened(monkeypatch, capsys, tmp_path):
    def connect(self, address):
        raise AssertionError(f"a connection to {address} was tried")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: connect(None, args))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for argv, code in ((["generate", "-p", "Once upon a time", "--max-tokens", "5"], 0), (["info"], 0),
                       (["info", "some-org/some-model"], 3), (["generate", "some-org/some-model", "-p", "a"], 3)):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert (exit_.value.code or 0) == code, capsys.readouterr().err
    assert f"looked at some-org/some-model, {tmp_path}" in capsys.readouterr().err
