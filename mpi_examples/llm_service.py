"""Half of the ranks run a model, the others work with what it says: here 2 of 4 ranks.

    mpirun -n 4 python mpi_examples/llm_service.py

The workers send prompts to the first rank of the model's group and get the text back piece by piece, while it is
generated. Requests of all workers run together in one batch.
"""

import json

from mpi4py import MPI

from cutp import LLM, SamplingParams

REQUEST, PIECE = 1, 2
QUESTIONS = ("Once upon a time", "There was a king who", "The little dog")


def send(comm, value, dest: int, tag: int) -> None:
    comm.Send(json.dumps(value).encode(), dest=dest, tag=tag)


def receive(comm, source: int, tag: int):
    status = MPI.Status()
    comm.Probe(source=source, tag=tag, status=status)
    message = bytearray(status.Get_count(MPI.BYTE))
    comm.Recv(message, source=status.source, tag=tag)
    return status.source, json.loads(message)


def serve(world, group, workers: int) -> None:
    """Takes prompts from the workers until each has said that it is done; streams the answers."""
    with LLM(comm=group) as llm:
        if not llm.is_root:
            llm.follow()
            return
        active = workers
        while active or llm.has_unfinished:
            # With nothing to generate there is time to wait for a message; otherwise one is only looked for.
            while active and (not llm.has_unfinished or world.Iprobe(source=MPI.ANY_SOURCE, tag=REQUEST)):
                worker, request = receive(world, MPI.ANY_SOURCE, REQUEST)
                if request is None:
                    active -= 1
                    continue
                params = SamplingParams(max_tokens=24, temperature=0.8, seed=request["seed"])
                llm.add_request(request["prompt"], params, request_id=f"{worker}:{request['number']}")
            for event in llm.step():
                worker, number = event.index.split(":")
                send(world, {"number": int(number), "text": event.text, "done": event.output is not None},
                     int(worker), PIECE)


def work(world, server: int) -> None:
    """Sends its prompts, receives the pieces of all answers as they come, and prints each that is complete."""
    for number, prompt in enumerate(QUESTIONS):
        send(world, {"number": number, "prompt": prompt, "seed": world.rank}, server, REQUEST)
    answers = [""] * len(QUESTIONS)
    unfinished = len(QUESTIONS)
    while unfinished:
        _, piece = receive(world, server, PIECE)
        answers[piece["number"]] += piece["text"]
        if piece["done"]:
            unfinished -= 1
            text = (QUESTIONS[piece["number"]] + answers[piece["number"]]).replace("\n", " ")
            # The end of the line with the line: it may be written at once, and other ranks print meanwhile.
            print(f"rank {world.rank}: {text}\n", end="", flush=True)
    send(world, None, server, REQUEST)


def main() -> None:
    world = MPI.COMM_WORLD
    serving = max(1, world.size // 2)
    group = world.Split(color=0 if world.rank < serving else 1, key=world.rank)
    if world.rank < serving:
        serve(world, group, world.size - serving)
    else:
        work(world, server=0)
    group.Free()


if __name__ == "__main__":
    main()
