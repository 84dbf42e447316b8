"""`cutp` with something going wrong on rank 1 only: the first argument says what, the others are cutp's own."""

import os
import signal
import sys
import time

from cutp.cli.main import main
from cutp.comm import launcher_rank
from cutp.engine import loading
from cutp.engine.runner import ModelRunner
from cutp.errors import CapacityError, CheckpointError

FIRST_OF_DECODING = 4


def raise_(error):
    raise error


def at_load(action):
    load = loading.load_weights

    def load_weights(*args):
        action()
        return load(*args)

    loading.load_weights = load_weights


def at_pass(number, action):
    """Runs `action` in the given forward pass; the first reads the prompt."""
    run, count = ModelRunner.run, 0

    def counted(self, *args):
        nonlocal count
        count += 1
        if count == number:
            action()
        return run(self, *args)

    ModelRunner.run = counted


def a_bug():
    raise ZeroDivisionError("a bug on one rank")


WHAT = {
    "load": lambda: at_load(a_bug),
    "load-error": lambda: at_load(lambda: raise_(CheckpointError("damaged for one rank"))),
    "prefill": lambda: at_pass(1, a_bug),
    "decode": lambda: at_pass(FIRST_OF_DECODING, a_bug),
    "decode-error": lambda: at_pass(FIRST_OF_DECODING, lambda: raise_(CapacityError("no room on one rank"))),
    "exit": lambda: at_pass(FIRST_OF_DECODING, lambda: sys.exit(7)),
    "interrupt": lambda: at_pass(FIRST_OF_DECODING, lambda: raise_(KeyboardInterrupt())),
    "killed": lambda: at_pass(FIRST_OF_DECODING, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "absent": lambda: at_load(lambda: time.sleep(60)),
    "absent-decode": lambda: at_pass(FIRST_OF_DECODING, lambda: time.sleep(60)),
}

if launcher_rank() == int(os.environ.get("FAILING_RANK", "1")):
    WHAT[sys.argv[1]]()
main(sys.argv[2:])
