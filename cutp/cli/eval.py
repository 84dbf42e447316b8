"""`cutp eval`: tasks of the language model evaluation harness."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from typing import Any

from cutp.cli.options import MODEL_HELP, add_engine_options, open_llm
from cutp.cli.whole_file import WholeFile

HELP = """run tasks of the language model evaluation harness (pip install lm-eval)

Rank 0 runs the harness, the other ranks compute with it. Tasks that are not in files of yours are fetched by the
harness from the network, unless they are in its cache already (HF_HUB_OFFLINE=1)."""
EXAMPLE = "example: mpirun -n 2 cutp eval path/to/model --tasks hellaswag,arc_easy --limit 100 --output results.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks or groups, or patterns")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the "
                                                                     "task's)")
    parser.add_argument("--limit", type=float, metavar="N", help="questions of each task; below 1, a share of them")
    parser.add_argument("--include-path", metavar="DIR", help="a directory with task files of yours")
    parser.add_argument("--chat", action="store_true", help="ask by the model's chat template")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of sampling and of few-shot examples "
                                                                            "(default: 1234)")
    parser.add_argument("--output", metavar="FILE", help="also write the results to FILE, as JSON")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from cutp.comm import world

    with world() as comm, contextlib.ExitStack() as stack:
        output = tasks = None
        with comm.host.agree("reading the tasks"):
            _check_installed()
            if comm.rank == 0:
                if args.output is not None:
                    output = stack.enter_context(contextlib.closing(WholeFile(args.output)))
                    output.check()
                tasks = _find_tasks(args)
        llm = open_llm(args, comm)
        if comm.rank != 0:
            llm.follow()
            return
        from cutp.contrib.lm_eval import CutpLM

        with CutpLM(llm, seed=args.seed) as lm:
            results = _evaluate(lm, tasks, args)
        _show(results)
        if output is not None:
            output.write(_json(results))
            output.finish()


def _check_installed() -> None:
    from cutp.errors import ConfigError

    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("the evaluation harness is not installed", hint="pip install lm-eval")


def _find_tasks(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """The harness's task manager, and the tasks that `--tasks` names."""
    from lm_eval.tasks import TaskManager

    from cutp.errors import ConfigError

    if args.include_path is not None and not os.path.isdir(args.include_path):
        raise ConfigError(f"--include-path {args.include_path} is not a directory")
    manager = TaskManager(include_path=args.include_path)
    tasks: dict[str, None] = {}
    for name in filter(None, args.tasks.split(",")):
        found = manager.match_tasks([name])
        if not found:
            raise ConfigError(f"the evaluation harness has no task {name}", hint="lm-eval ls tasks shows them")
        tasks.update(dict.fromkeys(found))
    return manager, list(tasks)


def _evaluate(lm: Any, tasks: tuple[Any, list[str]], args: argparse.Namespace) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    # The harness returns results only where this is 0; here it runs on one rank, whatever a launcher has set.
    os.environ.pop("LOCAL_RANK", None)
    return simple_evaluate(
        lm, tasks=tasks[1], task_manager=tasks[0], num_fewshot=args.num_fewshot, limit=args.limit,
        apply_chat_template=args.chat, log_samples=False, random_seed=args.seed, numpy_random_seed=args.seed,
        torch_random_seed=args.seed, fewshot_random_seed=args.seed)


def _show(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    sys.stdout.write(make_table(results) + "\n")
    if results.get("groups"):
        sys.stdout.write(make_table(results, "groups") + "\n")


def _json(results: dict[str, Any]) -> bytes:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False).encode() + b"\n"
