"""Two models in one job: half of the ranks tell a story, the other half says how likely it finds it.

    mpirun -n 4 python mpi_examples/two_models.py

Each half has a communicator and a model of its own (here the bundled model twice, in float32 and in bfloat16). The
story goes from one half to the other in an MPI message.
"""

import json

from mpi4py import MPI

from cutp import LLM, SamplingParams

PROMPT = "Once upon a time"


def main() -> None:
    world = MPI.COMM_WORLD
    tellers = max(1, world.size // 2)
    telling = world.rank < tellers
    half = world.Split(color=0 if telling else 1, key=world.rank)
    if telling:
        with LLM(comm=half) as llm:
            prompt = PROMPT if llm.is_root else None
            [output] = llm.generate(prompt, SamplingParams(max_tokens=40, temperature=0.7, seed=1))
        if half.rank == 0:
            print(output.prompt + output.text)
            if world.size > 1:
                world.Send(json.dumps(output.prompt_token_ids + output.token_ids).encode(), dest=tellers)
    else:
        ids = None
        if half.rank == 0:
            status = MPI.Status()
            world.Probe(source=0, status=status)
            message = bytearray(status.Get_count(MPI.BYTE))
            world.Recv(message, source=0)
            ids = [json.loads(message)]
        with LLM(comm=half, dtype="bfloat16") as llm:
            [score] = llm.score(ids)
        if half.rank == 0:
            print(f"perplexity of the story: {score.perplexity:.2f}")
    half.Free()


if __name__ == "__main__":
    main()
