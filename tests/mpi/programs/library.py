"""`LLM` in a program of its own under mpirun; the first argument says what happens. No cutp command is involved."""

import sys

from mpi4py import MPI

from cutp import LLM, SamplingParams
from cutp.engine.runner import ModelRunner
from cutp.errors import RequestError

RANK = MPI.COMM_WORLD.rank
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def say(*words):
    # One write per line, so that the ranks' lines do not mix.
    sys.stdout.write(f"[{RANK}] {' '.join(map(str, words))}\n")
    sys.stdout.flush()


def bug_in_generate():
    run, count = ModelRunner.run, 0

    def counted(self, *args):
        nonlocal count
        count += 1
        if RANK == 1 and count == 4:
            raise ZeroDivisionError("a bug on one rank")
        return run(self, *args)

    ModelRunner.run = counted
    with LLM() as llm:
        llm.generate("Once upon a time", GREEDY)


def bug_between_calls():
    with LLM() as llm:
        llm.generate("Once upon a time", GREEDY)
        if RANK == 1:
            raise ZeroDivisionError("a bug on one rank")
        llm.generate("Once upon a time", GREEDY)


def bug_in_the_input():
    """A prompt on rank 0 that is no prompt at all, in a way that cutp does not look for."""
    class Prompts(list):
        def __iter__(self):
            raise ZeroDivisionError("a bug on one rank")

    with LLM() as llm:
        llm.generate(Prompts(["a"]) if RANK == 0 else None)


def inputs():
    """Bad input is refused on every rank, and the engine goes on."""
    cases = {
        "differs": ("The king" if RANK == 1 else "Once", GREEDY),
        "params": ("Once", SamplingParams(temperature=RANK, seed=1)),
        "missing": (None if RANK == 0 else "Once", GREEDY),
        "type": ([5, 6.5] if RANK == 0 else None, GREEDY),
        "range": ([[5, 99999]] if RANK == 0 else None, GREEDY),
    }
    with LLM() as llm:
        expected = llm.generate("Once", GREEDY)[0].token_ids
        for name, (prompts, params) in cases.items():
            try:
                llm.generate(prompts, params)
            except RequestError as error:
                say(name, type(error).__name__, error)
            given = "Once" if RANK == 0 else None
            assert llm.generate(given, GREEDY if RANK == 0 else None)[0].token_ids == expected
        say("text", repr(llm.generate("Once", GREEDY)[0].text))


def twice():
    """Models come and go, also after errors that all ranks share; the caller's communicator stays usable."""
    for attempt in range(3):
        try:
            with LLM(comm=MPI.COMM_WORLD) as llm:
                llm.generate("Once" if RANK == 0 else None, GREEDY if attempt == 1 else SamplingParams(top_k=-1))
        except RequestError as error:
            say("refused", error)
    say("sum", MPI.COMM_WORLD.allreduce(RANK))


globals()[sys.argv[1]]()
