"""launch: what reaches the backend, and what is refused before."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cutp.array import cuda
from cutp.array.kernel import backend, launch, set_backend, use_backend
from cutp.comm import run_threads
from cutp.errors import ConfigError, DeviceError

ROOT = Path(__file__).resolve().parents[2]


class Recorder:
    def __init__(self):
        self.calls = []

    def launch(self, source, name, grid, block, args, shared_bytes, defines, pdl):
        self.calls.append((source, name, grid, block, args, shared_bytes, defines, pdl))


def test_the_backend_gets_everything_in_one_form():
    x, n = np.zeros(3), np.int32(3)
    with use_backend(Recorder()) as recorder:
        launch("k.cu", "k", 4, (32, np.int64(2)), (x, n))
        launch("k.cu", "k", (1, 2, 3), 64, [None], shared_bytes=100, defines=["B=2", "A"], pdl=True)
    assert recorder.calls == [
        ("k.cu", "k", (4, 1, 1), (32, 2, 1), (x, n), 0, (), False),
        ("k.cu", "k", (1, 2, 3), (64, 1, 1), [None], 100, ("A", "B=2"), True),
    ]
    assert type(recorder.calls[0][3][1]) is int


def test_what_was_settled_for_one_launch_is_not_taken_for_another():
    same = {"grid": 4, "block": 32, "args": ()}
    expected = [
        ({}, (4, 1, 1), (32, 1, 1), 0, ()), ({"grid": (4, 2)}, (4, 2, 1), (32, 1, 1), 0, ()),
        ({"block": (32, 2)}, (4, 1, 1), (32, 2, 1), 0, ()), ({"shared_bytes": 8}, (4, 1, 1), (32, 1, 1), 8, ()),
        ({"defines": ["A"]}, (4, 1, 1), (32, 1, 1), 0, ("A",)), ({"grid": (5, 1)}, (5, 1, 1), (32, 1, 1), 0, ()),
        ({"defines": ("B", "A")}, (4, 1, 1), (32, 1, 1), 0, ("A", "B")),
        ({"grid": np.int64(5)}, (5, 1, 1), (32, 1, 1), 0, ()),
    ]
    for _ in range(2):
        with use_backend(Recorder()) as recorder:
            for change, *_ in expected:
                launch("k.cu", "k", **{**same, **change})
            for wrong in ({"grid": -4}, {"block": 0}, {"shared_bytes": -8}, {"defines": ("A", "A")}, {"args": (1,)}):
                with pytest.raises(ConfigError):
                    launch("k.cu", "k", **{**same, **wrong})
            launch("k.cu", "k", (0, 4), 32, (), defines=("A", "A"))
        assert [(c[2], c[3], c[5], c[6]) for c in recorder.calls] == [tuple(settled) for _, *settled in expected]
        assert all(type(n) is int for c in recorder.calls for n in (*c[2], *c[3]))


def test_an_empty_grid_launches_nothing():
    with use_backend(Recorder()) as recorder:
        launch("k.cu", "k", (4, 0), 32, ())
    assert recorder.calls == []


def test_a_stream_is_current_during_the_launch():
    order = []

    @contextmanager
    def stream():
        order.append("enter")
        yield
        order.append("exit")

    class Backend(Recorder):
        def launch(self, *args):
            order.append("launch")

    with use_backend(Backend()):
        launch("k.cu", "k", 1, 1, (), stream=stream())
    assert order == ["enter", "launch", "exit"]


@pytest.mark.parametrize(("change", "message"), [
    ({"grid": (1, 1, 1, 1)}, r"kernel k: grid \(1, 1, 1, 1\) is not one to three numbers of at least 0"),
    ({"grid": -1}, "kernel k: grid -1"),
    ({"grid": 1.5}, "kernel k: grid 1.5"),
    ({"grid": ()}, "kernel k: grid"),
    ({"block": 0}, "kernel k: block 0 is not one to three numbers of at least 1"),
    ({"args": (np.int32(1), 2)}, "kernel k: argument 1 is a bare int: use np.int32"),
    ({"args": (0.5,)}, "argument 0 is a bare float"),
    ({"args": (True,)}, "argument 0 is a bare bool"),
    ({"shared_bytes": -1}, "shared_bytes is -1"),
    ({"defines": ("A=1", "A=2")}, "A is given twice"),
])
def test_arguments_that_cannot_work(change, message):
    with use_backend(Recorder()) as recorder, pytest.raises(ConfigError, match=message):
        launch("k.cu", "k", **{"grid": 1, "block": 1, "args": (), **change})
    assert recorder.calls == []


def test_backends_are_of_the_process_and_are_put_back():
    outer, inner = Recorder(), Recorder()
    before = set_backend(outer)
    try:
        with pytest.raises(ZeroDivisionError), use_backend(inner):
            run_threads(2, lambda comm: launch("k.cu", "k", 1, 1, ()))
            assert len(inner.calls) == 2 and backend() is inner
            raise ZeroDivisionError
        assert backend() is outer and outer.calls == []
    finally:
        assert set_backend(before) is outer


@pytest.mark.skipif(cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_default_backend_says_so():
    before = set_backend(None)
    try:
        with pytest.raises(DeviceError):
            launch("k.cu", "k", 1, 1, ())
    finally:
        set_backend(before)


def test_importing_the_room_touches_no_gpu_library():
    names = sorted(f"cutp.array.{p.stem}" for p in (ROOT / "cutp" / "array").glob("*.py") if p.stem != "__init__")
    code = f"import sys\nimport {', '.join(names)}\nprint([m for m in sys.modules if m.split('.')[0] in {{'cupy', " \
           "'cupy_backends', 'nvmath', 'cuda', 'mpi4py'}])"
    done = subprocess.run([sys.executable, "-c", code.replace("}}", "}")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
