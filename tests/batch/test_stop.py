"""Signals set a flag; a second one, or time, ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

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


def test_other_reasons():
    stop = StopFlag()
    stop.stop_after(0.05)
    assert stop.reason is None and 0 <= stop.age < 10
    time.sleep(0.06)
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


@pytest.mark.parametrize(("pauses", "grace", "words"), [((0.1, 1.1), 30, "a second signal"), ((0,), 0.2, "0.2 s")])
def test_ended_by_force(pauses, grace, words):
    code = (f"import time\nfrom cutp.batch.stop import StopFlag\nwith StopFlag({grace}):\n"
            "    print('ready', flush=True)\n    end = time.monotonic() + 20\n"
            "    while time.monotonic() < end:\n        time.sleep(0.05)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=clean_environment())
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    for pause in pauses:
        # One that comes at once is the same signal, passed on by a launcher.
        time.sleep(pause)
        if len(pauses) > 1:
            assert process.poll() is None
            process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (75, f"cutp: stopped by force after {words}; all written results are kept\n")
