"""Sandbox for chat templates of checkpoints: a jinja2 environment without escapes, bounded in time and memory.

A template comes with the weights and is untrusted. jinja2's immutable sandbox isolates it from Python's objects, but
does not keep it from running for hours or allocating terabytes. Here every loop step, call and filter checks the time,
and every value that a template creates is measured, strings and lists that would grow too large before they are
created. Operations that amplify small input and that chat templates do not need (string formatting, padding to a width)
are removed.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

INTEGER_BITS = 1024
TOTAL_FACTOR = 64
"""Bound on all values together, as a multiple of the largest single value."""

FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float groupby indent int items join last length list "
    "lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title tojson "
    "trim unique upper wordcount"
)
STRING_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind "
    "rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
"""Names that templates may use, with spaces between them."""


class TemplateLimitError(TemplateError):
    """Error: a template exceeded its bound on time or memory."""


class Budget:
    """The remaining budget of one rendering.

    Args:
        seconds: wall-clock time.
        size: characters and entries of any one value, and of the text that is rendered.
    """

    def __init__(self, *, seconds: float, size: int):
        self.seconds, self.size = seconds, size
        self.deadline = time.monotonic() + seconds
        self.total = 0

    def step(self) -> None:
        """Check the time."""
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"it ran longer than {self.seconds:g} s")

    def check(self, size: int) -> None:
        """Raise unless a value of this size is within the limits."""
        if size > self.size:
            raise TemplateLimitError(f"it made a value of {size} characters or entries; the limit is {self.size}")

    def measure(self, value: Any) -> Any:
        """Return the value if its fully expanded size is within the limits."""
        self.step()
        size, stack = 1, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, int):
                if item.bit_length() > INTEGER_BITS:
                    raise TemplateLimitError(
                        f"it made a number of {item.bit_length()} bits; the limit is {INTEGER_BITS}"
                    )
            elif isinstance(item, ChatNamespace):
                size += 1
                stack.append(item._Namespace__attrs)  # jinja2 has no public way to list them
            elif isinstance(item, Mapping | list | tuple | set | frozenset):
                size += len(item)
                self.check(size)
                stack.extend(item)
                if isinstance(item, Mapping):
                    stack.extend(item.values())
            self.check(size)
        self.total += size
        if self.total > TOTAL_FACTOR * self.size:
            raise TemplateLimitError(f"all its values together passed {TOTAL_FACTOR * self.size} characters")
        return value

    def metered(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, with a time check before each."""
        for value in values:
            self.step()
            yield value


BUDGET: ContextVar[Budget] = ContextVar("BUDGET")
"""The budget of the rendering that runs in this thread."""


class MeteredLoop:
    """The iterable of a `for`: the same values, with a time check before each."""

    def __init__(self, values: Any):
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return BUDGET.get().metered(self._values)

    def __len__(self) -> int:
        return len(self._values)


class ChatNamespace(Namespace):
    """The `namespace` of jinja2 without private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameter, so that a template may use the keyword "self".
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


class GenerationBlock(Extension):
    """The `{% generation %}` tag, which marks the assistant's text for training; renders its body unchanged."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        """Parse up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Meter(NodeTransformer):
    """AST transformer that wraps a filter around every expression that loops or creates a value without a call."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Add a time check to each of a loop's values."""
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Measure `a ~ b` before it is joined."""
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        """Measure list literals: one that holds a list twice has its entries twice, so doubling ends early."""
        self.generic_visit(node)
        return _filter(node, "_measured")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        """Measure dict literals, like lists."""
        self.generic_visit(node)
        return _filter(node, "_measured")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """Measure tuple literals, like lists, unless they are assignment targets."""
        self.generic_visit(node)
        return _filter(node, "_measured") if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Measure slices, which are copies."""
        self.generic_visit(node)
        return _filter(node, "_measured") if isinstance(node.arg, nodes.Slice) else node


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """jinja2 as transformers configures it for chat templates, with every step metered by `BUDGET`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant expressions would be evaluated while compiling, outside any budget
            finalize=_finalize,
            extensions=[loopcontrols, GenerationBlock],
        )
        builtin = {name: function for name, function in self.filters.items() if name in FILTERS.split()}
        builtin.update(join=_join, replace=_replace, indent=_indent, round=_round, sum=_sum, tojson=_tojson)
        self.filters = {name: _measured_filter(function) for name, function in builtin.items()}
        self.filters.update(_metered=MeteredLoop, _measured=lambda value: BUDGET.get().measure(value), _concat=_concat)
        self.globals = {
            "range": self.globals["range"],  # the sandbox's, of at most 100,000 numbers
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": ChatNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Meter().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def concat(self, parts: Iterable[str]) -> str:  # generated code calls environment.concat
        """Join the output of a macro or a block."""
        parts = list(parts)
        BUDGET.get().measure(parts)
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply `+ * ** %` unless the result would be too large."""
        budget = BUDGET.get()
        if operator == "%" and isinstance(left, str):
            raise SecurityError("string formatting with % is not available; join the parts with ~")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    budget.check(len(value) * max(times, 0))
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * abs(right) > INTEGER_BITS:
            raise TemplateLimitError(f"it raised a number to the power {right}")
        return budget.measure(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> None:
        """Disable str.format: `is_safe_attribute` refuses it."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow only those methods of strings that cannot amplify small input."""
        if isinstance(obj, str) and attr not in STRING_METHODS.split():
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call with a time check, and measure the result."""
        budget = BUDGET.get()
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and not kwargs:
            if __obj.__name__ == "join" and len(args) == 1:
                args = (list(budget.metered(args[0])),)
                _check_join(args[0], owner)
            elif __obj.__name__ == "replace" and len(args) >= 2:
                _check_replace(owner, args[0], args[1])
        return budget.measure(super().call(__context, __obj, *args, **kwargs))


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile a template, to be rendered while `BUDGET` is set; the same object for the same source.

    Raises:
        jinja2.TemplateSyntaxError, RecursionError and other errors of Python's compiler: the source is not a template.
    """
    return ChatEnvironment().from_string(source)


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> Any:
    # Because it takes the context, jinja2 does not run this while compiling.
    return value if isinstance(value, str) else BUDGET.get().measure(value)


def _measured_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks the time, takes its values one by one and measures its result."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        budget.step()
        value = args[first]
        if isinstance(value, Iterator):
            value = budget.measure(list(budget.metered(value)))
        return budget.measure(function(*args[:first], value, *args[first + 1 :], **kwargs))

    return run


def _concat(parts: list[Any]) -> str:
    BUDGET.get().measure(parts)
    return "".join(map(str, parts))


@jinja2.pass_eval_context
def _join(eval_context: Any, values: Any, d: str = "", attribute: str | int | None = None) -> str:
    values = list(values)
    _check_join(values, d)
    return jinja2.filters.do_join(eval_context, values, d, attribute)


@jinja2.pass_eval_context
def _replace(eval_context: Any, text: str, old: str, new: str, count: int | None = None) -> str:
    _check_replace(str(text), str(old), str(new))
    return jinja2.filters.do_replace(eval_context, text, old, new, count)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    BUDGET.get().check((text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return jinja2.filters.do_indent(text, width, first, blank)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 32:
        raise TemplateLimitError(f"it rounded to {precision} digits")
    return jinja2.filters.do_round(value, precision, method)


@jinja2.pass_environment
def _sum(environment: Any, values: Any, attribute: str | int | None = None, start: float = 0) -> Any:
    if not isinstance(start, int | float):
        raise SecurityError("only numbers can be summed")
    return jinja2.filters.sync_do_sum(environment, values, attribute, start)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML; a prompt is not HTML.
    budget, pieces, size = BUDGET.get(), [], 0
    budget.measure(value)
    budget.check(indent or 0)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for piece in encoder.iterencode(value):
        size += len(piece)
        budget.check(size)
        pieces.append(piece)
    return "".join(pieces)


def _check_join(values: list[Any], separator: Any) -> None:
    budget = BUDGET.get()
    budget.measure(values)
    budget.check(len(str(separator)) * len(values))


def _check_replace(text: str, old: str, new: str) -> None:
    BUDGET.get().check(len(text) + text.count(old) * max(len(new) - len(old), 0))


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names there do not begin with an underscore")


def _strftime_now(form: str) -> str:
    if any(character.isdigit() for character in form):
        raise SecurityError("a date format takes no widths")  # the C library pads to any width
    return datetime.now().strftime(form)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message)[:1000])
