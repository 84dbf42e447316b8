"""What the launchers of x weight^T for few rows of x check alike."""

from __future__ import annotations

from cutp.array.layout import Layout
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import check_axes, check_dtype

_X_ALIGNMENT = 16  # bytes, of the rows of x


def check_product(op: str, x: Layout, weight: Layout, bias: Layout | None, out: Layout, *, dtypes: tuple[str, ...],
                  max_rows: int, parts: int = 1) -> tuple[int, int, int]:
    """M, N and K of x [M, K], weight [parts * N, K], bias [parts * N], out [M, N]; ConfigError, naming the argument,
    unless they fit, x has one of `dtypes` and at most `max_rows` rows, and the others have x's dtype; `out` may be
    float32 if there is one part."""
    check_dtype(op, "x", x, dtypes)
    check_axes(op, "x", x, "M, K")
    check_axes(op, "weight", weight, "N, K")
    (m, k), rows = x.shape, weight.shape[0]
    n = rows // parts
    given = {"weight": (weight, (parts * n, k)), "out": (out, (m, n))}
    if bias is not None:
        given["bias"] = bias, (parts * n,)
    for name, (array, shape) in given.items():
        if array.shape != shape:
            raise ConfigError(f"{op}: {name} has shape {array.shape}; it needs {shape} for x of shape {x.shape}")
        if array.dtype != x.dtype and not (name == "out" and parts == 1 and array.dtype.name == "float32"):
            raise ConfigError(f"{op}: {name} has dtype {array.dtype}, but x has {x.dtype}")
        if name != "out" and not array.is_contiguous:
            raise ConfigError(f"{op}: {name} of shape {array.shape} and strides {array.strides} is not contiguous")
    if m > max_rows:
        raise ConfigError(f"{op}: x has {m} rows, more than {max_rows}")
    return m, n, k


def row_strides(op: str, x: Layout, out: Layout, most: int | None = None) -> tuple[int, int]:
    """Elements from one row of x, and of out, to the next. ConfigError unless rows are contiguous, do not overlap, come
    in order, at most `most` elements apart, and those of x lie multiples of 16 bytes apart."""
    _check_rows(op, "x", x, _X_ALIGNMENT, most)
    _check_rows(op, "out", out, out.itemsize, most)
    return _row_stride(x), _row_stride(out)


def _check_rows(op: str, name: str, array: Layout, alignment: int, most: int | None) -> None:
    if array.size == 0:
        return
    itemsize, columns = array.itemsize, array.shape[1]
    if columns > 1 and array.strides[1] != itemsize:
        raise ConfigError(f"{op}: {name} of shape {array.shape} and strides {array.strides} "
                          "has rows that are not contiguous")
    apart = _row_stride(array) * itemsize
    too_far = most is not None and apart > most * itemsize
    if array.shape[0] > 1 and (array.strides[0] != apart or apart < columns * itemsize or apart % alignment or too_far):
        limit = "" if most is None else f", at most {most} elements"
        raise ConfigError(f"{op}: {name} of shape {array.shape} has rows {array.strides[0]} bytes apart; they "
                          f"must not overlap and lie a multiple of {alignment} bytes apart{limit}")


def _row_stride(array: Layout) -> int:
    return array.strides[0] // array.itemsize if array.shape[0] > 1 else array.shape[1]
