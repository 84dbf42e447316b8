"""The check that every kernel compiles in every variant it declares, without spilling registers, and that the
assembler warns of no loss of speed.

The budget file allows spills: {"rms_norm.cu/rms_norm/DTYPE=BF16 HEAD_DIM=64/sm_80": 16}, the bytes of spill stores
and loads together. What it does not name may not spill.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cutp.array.compile import ResourceUsage
from cutp.array.kernel_cache import KernelCache
from cutp.array.kernel_source import OPS_DIRECTORY, KernelSource
from cutp.array.precompile import usable_cores
from cutp.errors import KernelCompileError

# wgmma instructions that wait for each other, a register budget that is ignored; a wait for results of wgmma where the
# kernel has none.
_LOSS = re.compile(r"Potential Performance Loss|warpgroup\.wait is injected")
BUDGET_FILE = OPS_DIRECTORY / "spill_budget.json"


@dataclass
class Outcome:
    errors: list[str] = field(default_factory=list)
    usage: dict[str, ResourceUsage] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)  # of speed, as the assembler says

    def over_budget(self, budget: dict[str, int]) -> list[str]:
        return [
            f"{key}: {usage.spills} bytes of spills, {budget.get(key, 0)} allowed ({usage.registers} registers)"
            for key, usage in self.usage.items() if usage.spills > budget.get(key, 0)
        ]

    def unknown(self, budget: dict[str, int]) -> list[str]:
        """Entries of the budget that name no kernel, variant and architecture that is compiled."""
        return [key for key in budget if key not in self.usage]


def compile_all(sources: Iterable[KernelSource], cache: KernelCache) -> Outcome:
    """Compile all declared variants of all sources."""
    outcome = Outcome()
    jobs = [(source, arch, defines) for source in sources for arch, defines in source.builds()]

    def compile_one(job):
        source, arch, defines = job
        try:
            return cache.get(source.text, source.name, arch, defines, source.headers)
        except KernelCompileError as error:
            return error

    with ThreadPoolExecutor(usable_cores()) as pool:
        for (source, arch, defines), result in zip(jobs, pool.map(compile_one, jobs), strict=True):
            if isinstance(result, KernelCompileError):
                outcome.errors.append(str(result))
            elif not result.resources:
                outcome.errors.append(f"{source.name} has no kernel for {arch} with {' '.join(defines)}")
            else:
                outcome.losses += [f"{source.name}/{' '.join(defines)}/{arch}: {line.strip()}"
                                   for line in result.log.splitlines() if _LOSS.search(line)]
                for name, usage in result.resources.items():
                    outcome.usage[f"{source.name}/{name}/{' '.join(defines)}/{arch}"] = usage
    return outcome


def read_budget(path: Path = BUDGET_FILE) -> dict[str, int]:
    """The allowed bytes; none if there is no such file."""
    if not path.exists():
        return {}
    budget = json.loads(path.read_text())
    assert all(isinstance(v, int) and v > 0 for v in budget.values()), f"{path}: bytes are numbers above 0"
    return budget
