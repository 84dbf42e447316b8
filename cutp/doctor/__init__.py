"""Examining a job before it is needed: launcher, MPI, hosts, GPUs, NCCL, caches.

A check looks at every rank (`probe`) and judges what all of them saw (`judge`); one function each. Whatever happens in
a probe on any rank, an exception or a hang, becomes a FAIL line and holds nobody up.
"""

from cutp.doctor.checks import all_checks
from cutp.doctor.examination import examine
from cutp.doctor.report import EXIT_FAIL, Finding, Report

__all__ = ["EXIT_FAIL", "Finding", "Report", "all_checks", "examine"]
