"""Signals set a flag; a second one, or time, ends the process."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from cutp.batch import stop as stop_module
from cutp.batch.stop import StopFlag
from tests.mpirun import clean_environment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered(number):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)
                and not thread.finished.is_set()]


def test_other_reasons(monkeypatch):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(stop_module, "time", clock)
    stop = StopFlag()
    clock.now += 2
    stop.stop_after(3)
    clock.now += 2.5
    assert stop.reason is None and stop.age == 4.5
    clock.now += 0.5
    assert stop.reason == "the time limit"
    stop = StopFlag()
    stop.stop_after(-5)
    assert stop.reason == "the time limit"
    stop.give_up("a later start")
    assert stop.reason == "a later start"


def test_without_the_main_thread():
    found = []

    def work():
        with StopFlag() as stop:
            found.append(stop.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


# Its clock is moved by what it reads. The call lets Python handle a signal that came before.
WAITS_FOR_SIGNALS = """
import sys, time
from types import SimpleNamespace
from cutp.batch import stop
clock = stop.time = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
def advance(seconds):
    clock.now += seconds
    print(clock.now, flush=True)
with stop.StopFlag(float(sys.argv[1])):
    print("ready", flush=True)
    for line in sys.stdin:
        advance(float(line))
    time.sleep(20)
"""


@pytest.mark.parametrize(("pauses", "grace", "words"), [((0.1, 1.1), 30, "a second signal"), ((), 0.2, "0.2 s")])
def test_ended_by_force(pauses, grace, words):
    process = subprocess.Popen([sys.executable, "-c", WAITS_FOR_SIGNALS, str(grace)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment())
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    for pause in pauses:
        # One that comes at once is the same signal, passed on by a launcher.
        process.stdin.write(f"{pause}\n")
        process.stdin.flush()
        assert process.stdout.readline(), "it has ended"
        process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (75, f"cutp: stopped by force after {words}; all written results are kept\n")
