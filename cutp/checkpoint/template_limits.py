"""What one rendering of a chat template may use: a meter of steps, time and text, and checks of single operations.

A value's weight is roughly the length of its text, so a small tree of shared lists that would print as gigabytes
weighs what it would print.
"""

from __future__ import annotations

import re
import time
import types
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

MAX_TEXT = 10_000_000  # characters, of any one value and of all output together
MAX_STEPS = 5_000_000
MAX_SECONDS = 5.0  # of this thread's processor time
_MAX_BITS = 4096  # of an integer
_CONTAINERS = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


class TemplateLimitError(TemplateError):
    """The template asked for more time or memory than any chat needs."""


class Meter:
    """Counts what one rendering uses."""

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now
        self._deadline = time.thread_time() + MAX_SECONDS
        self._steps = 0
        self._emitted = 0
        # Weights of containers by id. The reference keeps the id from being reused; the sandbox keeps containers from
        # being changed, so that a weight stays true.
        self._weights: dict[int, tuple[Any, int]] = {}

    def tick(self, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS} steps")
        if time.thread_time() > self._deadline:
            raise TemplateLimitError(f"it takes more than {MAX_SECONDS:g} seconds")

    def need(self, size: int) -> None:
        if size > MAX_TEXT:
            raise TemplateLimitError(f"it makes a value of more than {MAX_TEXT} characters")

    def weigh(self, value: Any) -> int:
        if isinstance(value, str):
            return len(value) + 1
        if isinstance(value, bytes):
            return 4 * len(value) + 1
        if not isinstance(value, (dict, *_CONTAINERS)):
            return 8
        known = self._weights.get(id(value))
        if known is None:
            self.tick(1 + len(value) // 16)
            if isinstance(value, dict):
                weight = 2 + sum(self.weigh(k) + self.weigh(v) for k, v in value.items())
            else:
                weight = 2 + sum(self.weigh(v) for v in value)
            self._weights[id(value)] = known = (value, weight)
        return known[1]

    def bounded(self, value: Any) -> Any:
        """`value`, unless it is too large; a generator becomes the list of its items, so that it can be weighed."""
        if isinstance(value, types.GeneratorType):
            items, weight = [], 0
            for item in value:
                self.tick()
                weight += self.weigh(item)
                self.need(weight)
                items.append(item)
            value = items
        self.need(self.weigh(value))
        return value

    def emit(self, value: Any) -> str:
        text = value if isinstance(value, str) else str(value)
        self._emitted += len(text)
        self.tick()
        if self._emitted > MAX_TEXT:
            raise TemplateLimitError(f"it writes more than {MAX_TEXT} characters")
        return text


def _listed(value: Any) -> Any:
    return value if hasattr(value, "__len__") else list(value)


def _integers(meter: Meter, limit: int, values: Any) -> None:
    if any(isinstance(v, int) and abs(v) > limit for v in values):
        raise TemplateLimitError(f"it uses a number above {limit} as a size")


def check_binop(meter: Meter, operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if operator == "*" and left.bit_length() + right.bit_length() > _MAX_BITS:
            raise TemplateLimitError("it makes an unreasonably large number")
        if operator == "**" and abs(left) > 1 and left.bit_length() * right > _MAX_BITS:
            raise TemplateLimitError("it makes an unreasonably large number")
    elif operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int) and hasattr(sequence, "__len__"):
                meter.need(meter.weigh(sequence) * max(count, 0))
    elif operator == "%" and isinstance(left, (str, bytes)):
        _check_percent(meter, left if isinstance(left, str) else left.decode("latin-1"), right)


def _check_percent(meter: Meter, template: str, values: Any) -> None:
    if re.search(r"\d{5}|\*", template):
        raise TemplateLimitError("it formats with an unreasonable width")
    meter.need(len(template) + template.count("%") * (meter.weigh(values) + 10_000))


def _check_format(meter: Meter, template: str, values: Any) -> None:
    plain = template.replace("{{", "").replace("}}", "")
    if re.search(r"\d{5}", plain) or re.search(r"\{[^{}]*\{", plain):
        raise TemplateLimitError("it formats with an unreasonable width")
    meter.need(len(template) + plain.count("{") * (meter.weigh(values) + 10_000))


def check_method(meter: Meter, obj: Any, args: tuple, kwargs: dict) -> tuple:
    """`args`, unless calling this method of a built-in value with them would be too much."""
    method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    values = [*args, *kwargs.values()]
    if isinstance(owner, (str, bytes)):
        if name in ("translate", "maketrans", "striptags"):
            raise TemplateLimitError(f"it calls {name}, which is not available")
        if name in ("center", "ljust", "rjust", "zfill"):
            _integers(meter, MAX_TEXT, values)
        elif name == "expandtabs":
            _integers(meter, 1000, values)
            meter.need(len(owner) + owner.count("\t" if isinstance(owner, str) else b"\t") * 1000)
        elif name == "replace" and len(values) >= 2 and type(values[0]) is type(values[1]) is not int:
            meter.need(len(owner) + owner.count(values[0]) * len(values[1]))
        elif name == "join" and args:
            args = (_listed(args[0]), *args[1:])
            meter.need(meter.weigh(args[0]) + len(owner) * len(args[0]))
        elif name in ("format", "format_map"):
            _check_format(meter, owner if isinstance(owner, str) else "", values)
    elif isinstance(owner, int):
        _integers(meter, 1000, values)
    return args


def _argument(args: tuple, kwargs: dict, index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _center(meter: Meter, args: tuple, kwargs: dict) -> tuple:
    _integers(meter, MAX_TEXT, (*args[1:], *kwargs.values()))
    return args


def _small(meter: Meter, args: tuple, kwargs: dict) -> tuple:
    _integers(meter, 100_000, (*args[1:], *kwargs.values()))
    return args


def _round(meter: Meter, args: tuple, kwargs: dict) -> tuple:
    _integers(meter, 300, (*args[1:], *kwargs.values()))
    return args


def _indent(meter: Meter, args: tuple, kwargs: dict) -> tuple:
    width = _argument(args, kwargs, 1, "width", 4)
    width = len(width) if isinstance(width, str) else int(width)
    text = str(args[0])
    meter.need(len(text) + (1 + len(text.splitlines())) * max(width, 0))
    return args


def _join(meter: Meter, args: tuple, kwargs: dict) -> tuple:
    values = _listed(args[0])
    between = str(_argument(args, kwargs, 1, "d", ""))
    meter.need(meter.weigh(values) + len(between) * len(values))
    return (values, *args[1:])


def _replace(meter: Meter, args: tuple, kwargs: dict) -> tuple:
    text = str(args[0])
    old, new = (str(_argument(args, kwargs, i, n, "")) for i, n in ((1, "old"), (2, "new")))
    meter.need(len(text) + text.count(old) * len(new))
    return args


def _format(meter: Meter, args: tuple, kwargs: dict) -> tuple:
    _check_percent(meter, str(args[0]), [*args[1:], *kwargs.values()])
    return args


FILTER_CHECKS: dict[str, Callable[[Meter, tuple, dict], tuple]] = {
    "batch": _small,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "slice": _small,
    "truncate": _small,
}
