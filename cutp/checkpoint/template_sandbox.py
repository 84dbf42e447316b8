"""A Jinja environment in which a hostile template can neither reach Python nor use much time or memory.

Jinja's immutable sandbox keeps templates away from Python internals but lets them loop and grow strings at will. Here
every operation that can repeat or grow is metered: the template's syntax tree is rewritten so that loops,
output, `~` and literals report to a meter, and operators, calls and filters are checked before they run and weighed
after (see `template_limits`).
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from cutp.checkpoint.template_limits import FILTER_CHECKS, Meter, TemplateLimitError, check_binop, check_method

# Unmetered inner loops (pprint, striptags, wordwrap, urlize), random results, or output that is not text (xmlattr).
_REMOVED_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")


class TemplateRaised(TemplateError):
    """The template itself refused its input through raise_exception."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs chat templates the way Hugging Face does, inside the limits above.

    Rendering needs `metered()` around it.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would run filters while compiling, outside the meter
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        self._current = threading.local()
        self.globals = {key: value for key, value in self.globals.items() if key != "lipsum"}
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=self._strftime_now, dict=_make_dict, namespace=_Namespace
        )
        filters = {name: f for name, f in self.filters.items() if name not in _REMOVED_FILTERS}
        filters.update(tojson=_tojson, sum=_sum)
        self.filters = {name: self._metered_filter(name, f) for name, f in filters.items()}

    @property
    def meter(self) -> Meter:
        return self._current.meter

    def use(self, meter: Meter | None) -> None:
        """Sets the meter for renderings by the calling thread."""
        self._current.meter = meter

    # Called by rewritten templates.
    def tick(self) -> None:
        self.meter.tick()

    def emit(self, value: Any) -> str:
        return self.meter.emit(value)

    def bounded(self, value: Any) -> Any:
        return self.meter.bounded(value)

    def concat_text(self, *parts: Any) -> str:
        self.meter.need(sum(self.meter.weigh(part) for part in parts))
        return "".join(part if isinstance(part, str) else str(part) for part in parts)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Rewriter().visit(source), *args, **kwargs)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__self__", None) is self and getattr(obj, "__name__", "") in _HOOKS:
            return obj(*args)  # kwargs holds only Jinja's own loop variables here
        self.meter.tick()
        args = check_method(self.meter, obj, args, kwargs)
        return self.meter.bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.tick()
        check_binop(self.meter, operator, left, right)
        return self.meter.bounded(super().call_binop(context, operator, left, right))

    def _metered_filter(self, name: str, function: Callable) -> Callable:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0
        check = FILTER_CHECKS.get(name)

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            if check is not None:
                args = (*args[:first], *check(self.meter, args[first:], kwargs))
            return self.meter.bounded(function(*args, **kwargs))

        return metered

    def _strftime_now(self, format: str) -> str:
        # C libraries take field widths such as %100000d.
        if not isinstance(format, str) or len(format) > 256 or re.search(r"\d\d", format):
            raise TemplateLimitError("it formats the date in an unreasonable way")
        return (self.meter.now or datetime.now()).strftime(format)


_HOOKS = ("tick", "emit", "bounded", "concat_text")


class _Rewriter(NodeTransformer):
    """Makes a template report to the environment's hooks."""

    def _hook(self, name: str, args: list, like: nodes.Node) -> nodes.Call:
        attribute = nodes.EnvironmentAttribute(name, lineno=like.lineno, environment=like.environment)
        return nodes.Call(attribute, args, [], None, None, lineno=like.lineno, environment=like.environment)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        tick = nodes.ExprStmt(self._hook("tick", [], node), lineno=node.lineno, environment=node.environment)
        node.body.insert(0, tick)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [self._hook("emit", [_constant(child)], child) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._hook("concat_text", node.nodes, node)

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or all(isinstance(n, nodes.Const) for n in node.items):
            return node
        return self._hook("bounded", [node], node)

    visit_List = visit_Tuple = visit_Dict = _literal


def _constant(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.TemplateData):
        return nodes.Const(node.data, lineno=node.lineno, environment=node.environment)
    return node


class _GenerationTag(Extension):
    """{% generation %} marks text by the assistant for training; for inference it is a plain scope."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Holds values that are weighed one by one, so its own text must not show them."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` stays free as a keyword
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: Any = "") -> None:
    raise TemplateRaised(str(message))


def _make_dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Unlike Jinja's own filter this one leaves <, > and & alone, which is what models were trained on.
    for limited in (indent, *(separators or ())):
        if (isinstance(limited, int) and limited > 32) or (isinstance(limited, str) and len(limited) > 32):
            raise TemplateLimitError("it writes JSON with unreasonable spacing")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _sum(values: Any, attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        values = [v.get(attribute) if isinstance(v, Mapping) else v[attribute] for v in values]
    total = start
    for value in values:
        if not isinstance(value, (int, float)) or not isinstance(total, (int, float)):
            raise TemplateError("the sum filter adds numbers only")
        total += value
    return total
