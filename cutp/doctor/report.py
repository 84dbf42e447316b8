"""What an examination found: one Finding a check, as a line of text or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cutp import __version__

OK, WARN, FAIL = "OK", "WARN", "FAIL"
EXIT_FAIL = 7
"""Exit status of `cutp doctor` when a check fails. Warnings alone leave it at 0."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    fix: what to do about it, for WARN and FAIL. ranks: those it is about; empty where it is about the whole job.
    """

    status: str
    name: str
    message: str
    fix: str | None = None
    ranks: tuple[int, ...] = ()

    def line(self) -> str:
        """One line, whatever the message holds."""
        fix = f". Fix: {self.fix}" if self.fix else ""
        return f"{self.status:<4} {' '.join(f'{self.name}: {self.message}{fix}'.split())}"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "status": self.status, "message": self.message, "fix": self.fix,
                "ranks": list(self.ranks)}


def ok(name: str, message: str) -> Finding:
    return Finding(OK, name, message)


def warn(name: str, message: str, fix: str, ranks: Iterable[int] = ()) -> Finding:
    return Finding(WARN, name, message, fix, tuple(ranks))


def fail(name: str, message: str, fix: str | None, ranks: Iterable[int] = ()) -> Finding:
    return Finding(FAIL, name, message, fix, tuple(ranks))


@dataclass
class Report:
    """All findings about a job whose rank r runs on hosts[r].

    stuck: a check hangs on some rank, or the ranks cannot talk to each other any more, so that the job must be ended
    by force. broken: the latter.
    """

    hosts: Sequence[str]
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    stuck: bool = False
    broken: bool = False

    @property
    def exit_code(self) -> int:
        return EXIT_FAIL if any(finding.status == FAIL for finding in self.findings) else 0

    def summary(self) -> str:
        counts = Counter(finding.status for finding in self.findings)
        return f"{counts[OK]} OK, {counts[WARN]} WARN, {counts[FAIL]} FAIL in {self.seconds:.1f} s"

    def to_dict(self) -> dict[str, Any]:
        """{"cutp", "size", "hosts" (of each rank), "exit_code", "seconds", "checks": [{"name", "status", "message",
        "fix", "ranks"}]}; "fix" is null for OK."""
        return {"cutp": __version__, "size": len(self.hosts), "hosts": list(self.hosts), "exit_code": self.exit_code,
                "seconds": round(self.seconds, 3), "checks": [finding.to_dict() for finding in self.findings]}


def ranks_text(ranks: Iterable[int]) -> str:
    """For example "rank 3" or "ranks 0-2, 5"."""
    numbers = sorted(set(ranks))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def by_value(values: Sequence[str]) -> dict[str, list[int]]:
    """Which ranks have each value, given values[rank]; in the order of the first ranks."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return groups


def differences(facts: Sequence[dict[str, Any]], labels: dict[str, str]) -> tuple[str, list[int]] | None:
    """What differs among the ranks' facts[rank][key], for the keys of `labels`, and the ranks that differ from most
    others; None if all agree."""
    texts, odd = [], set()
    for key, label in labels.items():
        groups = by_value([str(fact[key]) for fact in facts])
        if len(groups) > 1:
            texts.append(f"{label} is " + ", ".join(f"{value} on {ranks_text(r)}" for value, r in groups.items()))
            most = max(groups.values(), key=len)
            odd.update(rank for ranks in groups.values() if ranks is not most for rank in ranks)
    return ("; ".join(texts), sorted(odd)) if texts else None
