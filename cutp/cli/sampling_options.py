"""The options that say how to sample: one for each of SamplingParams."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cutp.cli.options import positive_int

if TYPE_CHECKING:
    from cutp.engine.sampling_params import SamplingParams


_SEED_HELP = ("0 to 2**64 - 1, of the first prompt; the next ones have S + 1, S + 2, ...; drawn and reported when not "
              "given")


def add_sampling_options(parser: argparse.ArgumentParser, seed_help: str = _SEED_HELP) -> None:
    """One option for each of SamplingParams, but for bad_words, which has two. seed_help: what --seed is there."""
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json, else temperature 1)")
    group.add_argument("--max-tokens", type=positive_int, metavar="N", help="tokens to generate at most")
    group.add_argument("--min-tokens", type=int, metavar="N", help="tokens to generate before anything may end it")
    group.add_argument("--n", type=int, default=1, metavar="N", help="samples of each prompt (default: 1)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens; 0 from all")
    group.add_argument("--top-p", type=float, metavar="P",
                       help="sample from the likeliest tokens of total probability P")
    group.add_argument("--min-p", type=float, metavar="P",
                       help="sample from tokens at least P times as likely as the likeliest")
    group.add_argument("--seed", type=int, metavar="S", help=seed_help)
    group.add_argument("--repetition-penalty", type=float, metavar="R",
                       help="divide logits of tokens of prompt and output by R, multiply negative ones; 1 is off")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X",
                       help="subtract X from the logits of tokens of the output")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X",
                       help="subtract X for each time a token is in the output")
    group.add_argument("--logit-bias", action="append", type=_bias, default=[], metavar="ID=BIAS",
                       help="add BIAS (-100 to 100) to a token's logit; may be given several times")
    group.add_argument("--bad-words", action="append", default=[], metavar="TEXT",
                       help="a text that must not appear; may be given several times")
    group.add_argument("--bad-word-ids", action="append", type=token_ids, default=[], metavar="1,2,3",
                       help="tokens that must not follow each other so; may be given several times")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end the text before this string; may be given several times")
    group.add_argument("--stop-token-ids", type=token_ids, default=[], metavar="1,2,3", help="tokens that end the text")
    group.add_argument("--ignore-eos", action="store_true", help="do not end at the end-of-sequence token")
    group.add_argument("--logprobs", type=int, metavar="K",
                       help="with --json: log-probabilities of the tokens and of the K likeliest, 0 to 20")
    group.add_argument("--prompt-logprobs", type=int, metavar="K", help="with --json: the same for the prompt's tokens")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The checked parameters. Raises RequestError for a value out of range, ConfigError for options at odds."""
    from cutp.engine.sampling_params import SamplingParams
    from cutp.errors import ConfigError

    params = SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        seed=args.seed, stop=args.stop, stop_token_ids=args.stop_token_ids, ignore_eos=args.ignore_eos,
        logprobs=args.logprobs, prompt_logprobs=args.prompt_logprobs, n=args.n, min_tokens=args.min_tokens,
        repetition_penalty=args.repetition_penalty, presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty, logit_bias=args.logit_bias,
        bad_words=[*args.bad_words, *args.bad_word_ids])
    params.check()
    for option in ("logprobs", "prompt_logprobs"):
        if getattr(args, option) is not None and not args.json:
            raise ConfigError(f"--{option.replace('_', '-')} needs --json")
    return params


def token_ids(text: str) -> list[int]:
    """The type of an option that takes token ids."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _bias(text: str) -> tuple[int, float]:
    token, separator, bias = text.partition("=")
    try:
        if separator:
            return int(token), float(bias)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a token id and a number such as 42=-1.5") from None
