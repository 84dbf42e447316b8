"""`cutp generate`: continue prompts."""

from __future__ import annotations

import argparse
import json
import sys

from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm, positive_int

HELP = "continue prompts; all are processed together"
EXAMPLE = 'example: mpirun -n 2 cutp generate -p "Once upon a time" --max-tokens 40 --temperature 0'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: the bundled tales model)")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    prompts.add_argument("-f", "--file", metavar="FILE", help="a file with a prompt a line (- for standard input)")
    prompts.add_argument("--prompt-ids", action="append", type=_token_ids, metavar="1,2,3",
                         help="a prompt as token ids; may be given several times")
    sampling = parser.add_argument_group("sampling (defaults: the model's generation_config.json, else temperature 1)")
    sampling.add_argument("--max-tokens", type=positive_int, metavar="N", help="tokens to generate at most")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens; 0 from all")
    sampling.add_argument("--top-p", type=float, metavar="P",
                          help="sample from the likeliest tokens of total probability P")
    sampling.add_argument("--min-p", type=float, metavar="P",
                          help="sample from tokens at least P times as likely as the likeliest")
    sampling.add_argument("--seed", type=int, metavar="S", help="0 to 2**64 - 1; drawn and reported when not given")
    sampling.add_argument("--ignore-eos", action="store_true", help="do not end at the end-of-sequence token")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT",
                          help="end the text before this string; may be given several times")
    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print text as it is generated, prompt by prompt")
    output.add_argument("--chat", action="store_true", help="treat each prompt as a user message of a chat")
    output.add_argument("--json", action="store_true", help="one JSON line a prompt, in prompt order")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.comm import world
    from cutp.engine.sampling_params import SamplingParams
    from cutp.errors import ConfigError

    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k,
                            top_p=args.top_p, min_p=args.min_p, seed=args.seed, ignore_eos=args.ignore_eos,
                            stop=tuple(args.stop))
    params.check()
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
        with open_llm(args, comm) as llm:
            for index, piece, output in llm.stream(prompts, params, chat=args.chat):
                if llm.is_root:
                    printer.show(index, piece, output)


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


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


class _Printer:
    """Prints results in prompt order, however they come: with --stream the first unfinished one as it grows."""

    def __init__(self, args: argparse.Namespace, prompts: list | None):
        self._args = args
        self._streams = args.stream and not args.json
        # What stands before the text of each prompt.
        self._heads = ["" if args.chat or args.prompt_ids is not None else prompt for prompt in prompts or ()]
        self._next = 0
        self._text: dict[int, str] = {}
        self._outputs: dict[int, object] = {}

    def show(self, index: int, piece: str, output) -> None:
        self._text[index] = self._text.get(index, "") + piece
        if output is not None:
            self._outputs[index] = output
            self._report_seed(output)
        self._grow()
        while self._next in self._outputs:
            self._finish(self._outputs.pop(self._next))
            self._next += 1
            self._grow()

    def _grow(self) -> None:
        """With --stream, prints what is new of the first unfinished prompt, which stands before its text."""
        if not self._streams or self._next not in self._text:
            return
        piece = self._heads[self._next] + self._text[self._next]
        self._heads[self._next] = self._text[self._next] = ""
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def _finish(self, output) -> None:
        if self._args.json:
            line = json.dumps({"index": output.index, "prompt_token_ids": output.prompt_token_ids,
                               "token_ids": output.token_ids, "text": output.text,
                               "finish_reason": output.finish_reason}, ensure_ascii=False)
        elif output.text is None:
            line = ",".join(str(token) for token in output.token_ids)
        else:
            line = "" if self._streams else self._heads[output.index] + output.text
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def _report_seed(self, output) -> None:
        if self._args.seed is None and self._args.temperature != 0 and output.index == 0:
            sys.stderr.write(f"cutp: seed {output.seed} (repeat this run with --seed {output.seed})\n")
