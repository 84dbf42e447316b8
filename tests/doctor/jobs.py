"""Jobs that do not exist, for judging made-up facts."""

from types import SimpleNamespace

from cutp.doctor.check import Job


def job(*hosts, **facts):
    """A Job whose rank r runs on hosts[r], with the facts of earlier checks (_ in a name stands for a blank)."""
    comm = SimpleNamespace(rank=0, size=len(hosts), hosts=hosts, local_rank=0, local_size=len(hosts))
    return Job(comm, facts={name.replace("_", " "): value for name, value in facts.items()})


def assert_finding(finding, status, *parts, ranks=()):
    """The finding has the status, its line all the parts, and a fix unless it is OK."""
    assert finding.status == status, finding
    for part in parts:
        assert str(part) in finding.line(), finding.line()
    assert finding.ranks == tuple(ranks), finding
    assert (finding.fix is None) == (status == "OK") and (finding.fix is None or len(finding.fix) > 5)
