"""What `cutp bench` says beside the figures of its cases."""

from __future__ import annotations

import os
import time
from typing import Any

from cutp.array.dtypes import dtype_name
from cutp.engine.llm import LLM
from cutp.errors import ConfigError


def start_up(llm: LLM, begin: float) -> dict[str, float]:
    """Seconds of the phases before the first request, on this rank: from the start of the process to this command's
    begin, opening the model with reading its weights, and the reading alone with its GB/s where there was some."""
    now = time.time()
    phases = {"process_to_command_s": max(0.0, begin - _process_start()), "open_model_s": now - begin}
    report = llm.load_report
    if report is not None:
        phases |= {"read_weights_s": report["seconds"], "read_weights_gbps": report["gb_per_second"]}
    return phases


def host_line(llm: LLM, model: str, phases: dict[str, float], limits: dict[str, Any] | None) -> str:
    """One line on the model, the machine and the start."""
    parts = [model, f"tp {llm.tp}", dtype_name(llm.dtype), f"opened in {phases['open_model_s']:.2f} s"]
    if "read_weights_gbps" in phases:
        parts.append(f"weights read at {phases['read_weights_gbps']:.1f} GB/s")
    if limits:
        parts.append(f"{limits['gpu']}: reads {limits['read_gbps']:.0f} GB/s, "
                     f"multiplies {limits['matmul_tflops']:.0f} TFLOP/s")
    return ", ".join(parts)


def plot(cases: list[dict[str, Any]], path: str) -> None:
    """Draws decode tokens a second by batch size, a line a prompt length, to `path` (the ending says the format).

    ConfigError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("--plot needs matplotlib, which is not installed", hint="pip install matplotlib") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for length in sorted({case["prompt_len"] for case in cases}):
        chosen = [case for case in cases if case["prompt_len"] == length]
        axes.plot([case["batch"] for case in chosen], [case["decode_tokens_per_s"] for case in chosen], marker="o",
                  label=f"prompt of {length}")
    axes.set(xlabel="requests at once", ylabel="tokens a second", xscale="log", yscale="log")
    axes.legend()
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path)


def _process_start() -> float:
    """When this process began, in seconds since the epoch; now where the system does not tell."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()
