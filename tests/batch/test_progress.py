"""What a job says: plain lines to a file, a bar to a terminal, nothing from other ranks."""

import io
import json

from cutp.batch import progress as progress_module
from cutp.batch.progress import JobCounts, Progress, Rates, peak_memory


class Terminal(io.StringIO):
    def isatty(self):
        return True


COUNTS = JobCounts(30, 2, 68)


def drive(shown, stream):
    progress = Progress(shown, stream)
    progress.start(JobCounts(20, 0, 80))
    progress.update(COUNTS)
    progress.say("hello")
    progress.report(COUNTS, (123.4, 56.7))
    progress.report(COUNTS, (1, 2), last=True)
    progress.close()
    progress.close()
    return stream.getvalue()


def test_plain_lines():
    assert drive(True, io.StringIO()) == (
        "cutp: hello\ncutp: 30 of 100 records done, 2 failed, 68 left; 123 prompt and 57 generated tokens/s\n"
        "cutp: 30 of 100 records done, 2 failed, 68 left; 1 prompt and 2 generated tokens/s\n")


def test_a_bar_on_a_terminal():
    shown = drive(True, Terminal())
    assert "32/100" in shown and "20/100" in shown and "cutp: hello\n" in shown and shown.count("tokens/s") == 1


def test_other_ranks_are_silent():
    assert drive(False, io.StringIO()) == drive(False, Terminal()) == ""


def test_rates(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    rates = Rates()
    clock[0] += 2
    assert rates.advance(20, 10) == (10, 5)
    clock[0] += 4
    assert rates.advance(20, 50) == (0, 10) and rates.overall(20, 50) == (20 / 6, 50 / 6)


def test_peak_memory():
    block = bytearray(30_000_000)
    found = peak_memory()
    assert found["peak_host_bytes"] >= len(block) and (found["peak_device_bytes"] or 0) >= 0
    json.dumps(found)
