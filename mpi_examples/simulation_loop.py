"""A simulation that keeps computing while a model comments on it: one engine step after each of its own steps.

    mpirun -n 2 python mpi_examples/simulation_loop.py

All ranks simulate (heat in a rod, divided among them) and all hold a part of the model. Every 20 steps rank 0 asks for
a comment, and the text comes in while the simulation goes on.
"""

import numpy as np
from mpi4py import MPI

from cutp import LLM, SamplingParams

STEPS, POINTS, EVERY = 60, 64, 20


def advance(rod: np.ndarray, comm) -> np.ndarray:
    """One explicit step of the heat equation on this rank's part; neighbours exchange their border points."""
    left, right = np.zeros(1), np.zeros(1)
    below, above = (comm.rank - 1, comm.rank + 1)
    below = below if below >= 0 else MPI.PROC_NULL
    above = above if above < comm.size else MPI.PROC_NULL
    comm.Sendrecv(rod[-1:], dest=above, recvbuf=left, source=below)
    comm.Sendrecv(rod[:1], dest=below, recvbuf=right, source=above)
    padded = np.concatenate([left, rod, right])
    return rod + 0.25 * (padded[:-2] - 2 * rod + padded[2:])


def main() -> None:
    comm = MPI.COMM_WORLD
    rod = np.zeros(POINTS)
    rod[POINTS // 2] = 100.0 * (comm.rank == 0)
    params = SamplingParams(max_tokens=12, temperature=0.7, seed=7)
    with LLM(comm=comm) as llm:
        for step in range(STEPS):
            rod = advance(rod, comm)
            if step % EVERY == 0:
                hottest = reduce(comm, rod.max(), MPI.MAX)
                # Rank 0's prompt counts; the others need not make one.
                prompt = f"The fire was {hottest:.0f} paces high, and" if llm.is_root else None
                llm.add_request(prompt, params, request_id=step)
            report(llm)
        while llm.has_unfinished:
            report(llm)
        heat = reduce(comm, rod.sum(), MPI.SUM)
        if llm.is_root:
            print(f"after {STEPS} steps: heat {heat:.1f}, {llm.stats()['generated_tokens']} tokens generated")


def reduce(comm, value: float, operation) -> float:
    result = np.array(value)
    comm.Allreduce(MPI.IN_PLACE, result, op=operation)
    return float(result)


def report(llm: LLM) -> None:
    for event in llm.step():
        if event.output is not None and llm.is_root:
            text = (event.output.prompt + event.output.text).replace("\n", " ")
            print(f"asked at step {event.index}: {text}")


if __name__ == "__main__":
    main()
