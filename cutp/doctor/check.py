"""What a check is: a look at every rank, and a judgement of what all of them saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cutp.comm.communicator import Communicator
from cutp.doctor.report import Finding


@dataclass
class Job:
    """The job under examination, seen from one rank.

    group: a communicator of all ranks for what a check sends, apart from the doctor's own messages in `comm`.
    facts[check][rank]: what the probes of earlier checks returned, on all ranks; the same everywhere.
    """

    comm: Communicator
    group: Communicator | None = None
    facts: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.comm.size

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.comm.hosts

    def ranks_of_host(self) -> dict[str, list[int]]:
        """The ranks of each host, in the order of the first ranks."""
        groups: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            groups.setdefault(host, []).append(rank)
        return groups


def always(job: Job) -> bool:
    return True


@dataclass(frozen=True)
class Check:
    """One check.

    probe: run on every rank, with a deadline; returns JSON. An exception or a hang of it is a FAIL of the check.
    judge: what to make of the ranks' facts. Runs on all ranks and must give the same on all.
    applies: whether there is anything to check, from earlier facts; the same on all ranks.
    needs: checks which must not have failed; else this one is not run.
    collective: the probe uses `job.group`.
    """

    name: str
    probe: Callable[[Job], Any]
    judge: Callable[[Job, list[Any]], Finding]
    applies: Callable[[Job], bool] = always
    needs: tuple[str, ...] = ()
    collective: bool = False
