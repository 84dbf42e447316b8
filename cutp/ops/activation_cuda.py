"""Launchers of activation.cu. The specifications are in `cutp.ops.activation`."""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, remembered
from cutp.errors import ConfigError
from cutp.ops.activation import activation_name
from cutp.ops.launch_arguments import (
    DTYPE_DEFINES,
    MAX_ROWS,
    VECTOR_BYTES,
    LaunchPlan,
    check_array,
    check_axes,
    check_dtype,
    vector_width,
)

# In the order of the enum in activation.cu.
_NUMBERS = {name: i for i, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid"))}
_WARP, _THREADS, _MAX_GRID_Y = 32, 256, 65535


def activation(x: Any, name: str, *, out: Any, pdl: bool = False) -> None:
    """out = act(x) elementwise. x, out: any shape, contiguous, of one dtype (bfloat16, float16 or float32); `out` may
    be `x`. `name` as in `cutp.ops.activation`. ConfigError (UnsupportedModelError for `name`) otherwise."""
    number = _NUMBERS[activation_name(name)]
    plan = _plan(layout(x), layout(out), number)
    launch("activation.cu", "activation", plan.grid, plan.block, [x, out, *plan.numbers], defines=plan.defines, pdl=pdl)


def gated_activation(gate_up: Any, name: str, *, limit: float | None = None, out: Any, pdl: bool = False) -> None:
    """out = act(gate) * up. gate_up: [T, 2F], the gate in the first F columns, up in the others; out: [T, F].

    Contiguous, of one dtype (bfloat16, float16 or float32); F is a multiple of 16 bytes. `limit` clamps gate from above
    and up from both sides before the activation. ConfigError (UnsupportedModelError for `name`) otherwise.
    """
    number = np.int32(_NUMBERS[activation_name(name)])
    _launch_gated("gated_activation", gate_up, out, [number, np.float32(inf if limit is None else limit)], pdl)


def clamped_swiglu(gate_up: Any, *, alpha: float = 1.702, limit: float = 7.0, out: Any, pdl: bool = False) -> None:
    """out = gate * sigmoid(alpha * gate) * (up + 1), every step rounded; arrays as for `gated_activation`."""
    _launch_gated("clamped_swiglu", gate_up, out, [np.float32(alpha), np.float32(limit)], pdl)


def _launch_gated(op: str, gate_up: Any, out: Any, options: list[Any], pdl: bool) -> None:
    plan = _gated_plan(op, layout(gate_up), layout(out))
    launch("activation.cu", op, plan.grid, plan.block, [gate_up, out, *plan.numbers, *options], defines=plan.defines,
           pdl=pdl)


@remembered
def _plan(x: Layout, out: Layout, number: int) -> LaunchPlan:
    check_dtype("activation", "x", x)
    check_array("activation", "x", x, x.shape)
    check_array("activation", "out", out, x.shape, x.dtype)
    return LaunchPlan(-(-x.size // (_THREADS * vector_width(x.dtype))), _THREADS,
                      (f"DTYPE={DTYPE_DEFINES[x.dtype.name]}",), (np.int64(x.size), np.int32(number)))


@remembered
def _gated_plan(op: str, gate_up: Layout, out: Layout) -> LaunchPlan:
    check_dtype(op, "gate_up", gate_up)
    check_axes(op, "gate_up", gate_up, "T, 2F")
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    check_array(op, "gate_up", gate_up, (rows, 2 * columns))
    check_array(op, "out", out, (rows, columns), gate_up.dtype)
    width = vector_width(gate_up.dtype)
    if columns % width:
        raise ConfigError(f"{op}: {columns} columns of {gate_up.dtype}; they need a multiple of {VECTOR_BYTES} bytes")
    vectors = columns // width
    threads = max(_WARP, min(-(-vectors // _WARP) * _WARP, _THREADS))
    blocks = -(-vectors // threads)
    if rows > MAX_ROWS or blocks > _MAX_GRID_Y:
        raise ConfigError(f"{op}: gate_up of shape {gate_up.shape} is too large for one launch")
    return LaunchPlan((rows, blocks), threads, (f"DTYPE={DTYPE_DEFINES[gate_up.dtype.name]}",), (np.int32(columns),))
