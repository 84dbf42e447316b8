"""Options that several commands share, and opening a model from them."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutp.comm import Communicator
    from cutp.engine.llm import LLM

MODEL_HELP = "a model directory, or a repository id in the local Hugging Face cache"


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype, --tp, --max-len, --kv-memory, --no-graphs and --batch-invariant."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
                       help="where to compute (default: auto)")
    group.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, on a GPU the 16-bit "
                       "dtype of the checkpoint or bfloat16)")
    group.add_argument("--tp", type=positive_int, metavar="N",
                       help="tensor-parallel size (default: the number of ranks)")
    group.add_argument("--max-len", type=positive_int, metavar="N",
                       help="longest request in tokens (default: what the model was made for)")
    group.add_argument("--kv-memory", metavar="SIZE",
                       help="memory of the key-value cache on each rank, for example 20GB (default: most of what the "
                       "weights leave free)")
    group.add_argument("--no-graphs", action="store_true",
                       help="on a GPU, launch kernels one by one instead of by captured graphs; same results, slower")
    group.add_argument("--batch-invariant", action="store_true",
                       help="on a GPU, give each request the same bits whatever runs beside it; slower")


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def open_llm(args: argparse.Namespace, comm: Communicator, *, quiet: bool = False, **options: Any) -> LLM:
    """The LLM that `args` describe, over `comm`; on rank 0 a long load shows its progress on a terminal.

    options: of `LLM`, beside those of the command line. quiet: neither warnings nor progress, for the second and later
    of several equal models.
    """
    from cutp.engine.llm import LLM

    level = logging.WARNING if comm.rank == 0 and not quiet else logging.ERROR
    logging.basicConfig(level=level, format="cutp: %(levelname)s: %(message)s")
    if level == logging.WARNING:
        logging.getLogger("cutp").setLevel(logging.INFO)  # what a GPU's memory is used for, and how fast weights came
    with _LoadProgress() as progress:
        return LLM(args.model, comm, args.tp, args.device, args.dtype, args.max_len, kv_memory=args.kv_memory,
                   use_graphs=not args.no_graphs, batch_invariant=args.batch_invariant, **options,
                   progress=progress.show if sys.stderr.isatty() and not quiet else None)


class _LoadProgress:
    """A tqdm bar that appears once loading has taken a second."""

    def __init__(self):
        self._bar = None

    def show(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=1.0, leave=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _LoadProgress:
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.close()
