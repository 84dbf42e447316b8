"""`cutp generate`: continue prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
from typing import TYPE_CHECKING

from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm
from cutp.cli.sampling_options import add_sampling_options, sampling_params, token_ids

if TYPE_CHECKING:
    from cutp.engine.outputs import GenerationOutput, StreamEvent
    from cutp.engine.sampling_params import SamplingParams

HELP = "continue prompts; all are processed together"
EXAMPLE = 'example: mpirun -n 2 cutp generate -p "Once upon a time" --max-tokens 40 --temperature 0'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: the bundled tales model)")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    prompts.add_argument("-f", "--file", metavar="FILE", help="a file with a prompt a line (- for standard input)")
    prompts.add_argument("--prompt-ids", action="append", type=token_ids, metavar="1,2,3",
                         help="a prompt as token ids; may be given several times")
    add_sampling_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print text as it is generated, prompt by prompt")
    output.add_argument("--chat", action="store_true", help="treat each prompt as a user message of a chat")
    output.add_argument("--json", action="store_true", help="one JSON line a result, in prompt order")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.comm import world
    from cutp.errors import ConfigError

    params = sampling_params(args)
    if args.chat and args.prompt_ids is not None:
        raise ConfigError("--chat needs prompts that are text, not --prompt-ids")
    with world() as comm:
        prompts = None
        with comm.host.agree("reading the prompts"):
            if comm.rank == 0:
                prompts = _prompts(args)
        printer = _Printer(args, prompts)
        if args.chat and prompts is not None:
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        each = None if prompts is None else _seeded(params, len(prompts))
        with open_llm(args, comm) as llm:
            for event in llm.stream(prompts, each, chat=args.chat):
                if llm.is_root:
                    printer.show(event)


def _seeded(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Parameters of each prompt, with seeds that follow each other, so that one number repeats the whole run."""
    first = secrets.randbits(63) if params.seed is None else params.seed
    return [dataclasses.replace(params, seed=(first + index) % 2**64) for index in range(count)]


def _prompts(args: argparse.Namespace) -> list:
    if args.prompt_ids is not None:
        return args.prompt_ids
    return args.prompt if args.prompt is not None else _read_lines(args.file)


def _read_lines(name: str) -> list[str]:
    from cutp.errors import RequestError

    try:
        if name == "-":
            text = sys.stdin.read()
        else:
            with open(name, encoding="utf-8") as file:
                text = file.read()
    except OSError as error:
        raise RequestError(f"the prompt file {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt file {name} is not UTF-8 at byte {error.start}") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise RequestError(f"the prompt file {name} is empty")
    for number, line in enumerate(lines, 1):
        if not line.rstrip("\r"):
            raise RequestError(f"line {number} of {name} is an empty prompt")
    return [line.rstrip("\r") for line in lines]


class _Printer:
    """Prints results in prompt order, however they come: with --stream the first unfinished one as it grows.

    A place is a result's number in that order: n samples of the first prompt, then those of the next.
    """

    def __init__(self, args: argparse.Namespace, prompts: list | None):
        self._args = args
        self._streams = args.stream and not args.json
        # What stands before the text of each result.
        self._heads = ["" if args.chat or args.prompt_ids is not None else prompt
                       for prompt in prompts or () for _ in range(args.n)]
        self._next = 0
        self._text: dict[int, str] = {}
        self._outputs: dict[int, GenerationOutput] = {}

    def show(self, event: StreamEvent) -> None:
        place = event.index * self._args.n + event.sample_index
        self._text[place] = self._text.get(place, "") + event.text
        if event.output is not None:
            self._outputs[place] = event.output
            if place == 0:
                self._report_seed(event.output)
        self._grow()
        while self._next in self._outputs:
            self._finish(self._outputs.pop(self._next))
            self._next += 1
            self._grow()

    def _grow(self) -> None:
        """With --stream, prints what is new of the first unfinished result, whose prompt stands before its text."""
        if not self._streams or self._next not in self._text:
            return
        piece = self._heads[self._next] + self._text[self._next]
        self._heads[self._next] = self._text[self._next] = ""
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def _finish(self, output: GenerationOutput) -> None:
        if self._args.json:
            line = self._json(output)
        elif output.text is None:
            line = ",".join(str(token) for token in output.token_ids)
        else:
            line = "" if self._streams else self._heads[self._next] + output.text
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def _json(self, output: GenerationOutput) -> str:
        fields = ["index", "sample_index", "prompt_token_ids", "token_ids", "text", "finish_reason"]
        fields += [name for name in ("logprobs", "prompt_logprobs") if getattr(self._args, name) is not None]
        result = output.to_dict()
        return json.dumps({name: result[name] for name in fields}, ensure_ascii=False)

    def _report_seed(self, output: GenerationOutput) -> None:
        if self._args.seed is None and self._args.temperature != 0:
            sys.stderr.write(f"cutp: seed {output.seed} (repeat this run with --seed {output.seed})\n")
