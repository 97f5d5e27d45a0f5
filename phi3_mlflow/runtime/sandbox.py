"""Jinja's sandbox, in which every template comes to an end: in time, in memory and in depth. It knows nothing of chats.

Statements, operators, filters, tests, methods and types of values are those listed here; all others are refused. Of
these, whatever makes a container or a text, or may go through all of one, pays for everything that is in it, as often
as it is in it. So no value outgrows the budget, and no step on a value takes longer than paying for it. A loop pays
for each pass and a call for itself: what is left between two payments is a part of the template that runs once.
"""

import json
import threading
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from functools import update_wrapper
from itertools import chain
from types import BuiltinMethodType, FunctionType, MethodType, NoneType
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.ext import loopcontrols
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

# Characters of a template, of which Phi-3's has 400 and the longest of large models some 30,000.
_MOST_SOURCE = 65_536
# Characters or items that a template may make by a product, or by `range`.
_MOST_PRODUCT = 10_000
# Containers in containers.
_MOST_DEPTH = 40
# Characters of a text that is given to a text's method: some take the product of both.
_MOST_ARGUMENT = 1000
_MOST_MESSAGE = 200  # characters of an error

_STATEMENTS = (
    nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With,
    nodes.Assign, nodes.AssignBlock, nodes.Continue, nodes.Break,
)  # fmt: skip
_EXPRESSIONS = (
    nodes.Literal, nodes.Name, nodes.NSRef, nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call,
    nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.BinExpr,
    nodes.UnaryExpr,
)  # fmt: skip

# Of Jinja's filters those whose result is about as large as what they are given.
_FILTERS = """
    abs capitalize count d default dictsort e escape first float forceescape int items last length list lower map max
    min reject rejectattr reverse safe select selectattr sort string title upper
"""
# Of these those that take as long for a long text or list as for a short one.
_QUICK = frozenset(("count", "d", "default", "first", "last", "length"))
_TESTS = """
    boolean callable defined divisibleby eq equalto escaped even false filter float ge greaterthan gt in integer
    iterable le lessthan lower lt mapping ne none number odd sameas sequence string test true undefined upper
    == != > >= < <=
"""
# Of these those that format a text by `%`.
_NUMERIC = frozenset(("divisibleby", "even", "odd"))
# Methods whose result is about as large as what they are given. `join` and `replace` are the sandbox's own.
_TEXT_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower
    isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
_METHODS: Mapping[type, Collection[str]] = {
    str: frozenset(_TEXT_METHODS.split()),
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("copy", "count", "index"),
    tuple: ("count", "index"),
}
_OPERANDS = (int, float, str, list, tuple, NoneType, jinja2.Undefined)
# Values with attributes of their own, and values that are one thing each, whatever they hold: nothing looks into them.
_OBJECTS = (LoopContext, Macro, Namespace, jinja2.Undefined)
_SINGLE: tuple[type, ...] = (
    *_OBJECTS,
    int,
    float,
    NoneType,
    FunctionType,
    MethodType,
    BuiltinMethodType,
    type(iter([])),
)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for templates that nobody vouches for, with the settings that transformers uses for chats."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=self._text, optimized=False
        )
        self.code_generator_class = _Generator
        self.budget = _Budget()
        self._call_cost = 1
        filters: Mapping[str, Any] = self.filters
        tests: Mapping[str, Any] = self.tests
        self.filters = {name: self._charged(name, filters[name]) for name in _FILTERS.split()}
        self.filters |= {"join": self._join, "replace": self._replace, "tojson": self._tojson, "trim": self._trim}
        self.tests = {name: self._charged(name, tests[name]) for name in _TESTS.split()}
        self.globals = {
            "dict": self._dict,
            "namespace": self._namespace,
            "range": self._range,
            "raise_exception": _raise_template_error,
        }

    def compiled(self, source: str) -> jinja2.Template:
        """A template that pays for what it does.

        Raises:
            jinja2.TemplateError: the source is no template, too long, too deep, or has what is not allowed.
        """
        if len(source) > _MOST_SOURCE:
            raise jinja2.TemplateError(f"it has more than {_MOST_SOURCE} characters")
        with _told():
            tree = self.parse(source)
            # A call of the template's own runs no more than this beside its loops and calls.
            self._call_cost = max([1, *map(_cost, tree.find_all((nodes.Macro, nodes.CallBlock)))])
            return self.from_string(tree)

    def render(self, template: jinja2.Template, budget: int, **given: Any) -> str:
        """What a template of `compiled` gives.

        Args:
            template: the template.
            budget: what this may cost, in characters and items that are made and in parts of the template that run;
                about a microsecond each.
            given: the values of its variables.

        Raises:
            jinja2.TemplateError: it fails, or costs more; the message is one line.
        """
        self.budget.left = budget
        with _told():
            return template.render(**given)

    def paid(self, value: Any, depth: int = 0) -> Any:
        """The value itself, when all that is in it was paid for."""
        size = 0
        parts: Iterable[Any] = ()
        if isinstance(value, str | range):
            size = len(value)
        elif isinstance(value, dict):
            size, parts = len(value), chain(value, value.values())
        elif isinstance(value, list | tuple | KeysView | ValuesView | ItemsView):
            size, parts = len(value), value
        elif isinstance(value, Macro):
            size = len(value.name or "")
        elif not isinstance(value, _SINGLE):
            raise SecurityError(f"it makes a value of the type {type(value).__name__}")
        elif isinstance(value, int) and value.bit_length() > 64:
            raise SecurityError("it asks for a number that is too large")
        self.budget.charge(1 + size)
        for part in parts:
            if depth == _MOST_DEPTH:
                raise SecurityError(f"it makes containers within containers, more than {_MOST_DEPTH} deep")
            self.paid(part, depth + 1)
        return value

    def sliced(self, value: Any) -> Any:
        """A slice, when its items were paid for: what is in them is no more than before."""
        self.budget.charge(1 + len(value))
        return value

    def key(self, value: Any) -> Any:
        """The key of a dict. A dict with many tuples takes the square of that, since one can choose their hashes."""
        if isinstance(value, tuple):
            raise SecurityError("it makes a tuple the key of a dict")
        return value

    def passes(self, items: Iterable[Any], cost: int) -> Iterator[Any]:
        """The items of a loop, each of them paid for."""
        for item in items:
            self.budget.charge(cost)
            yield item

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:  # noqa: N805, as in jinja
        """What a call in the template gives."""
        __self.budget.charge(__self._call_cost)
        # A macro keeps what it has no name for in containers of its own.
        names = __obj.arguments if isinstance(__obj, Macro) else []
        __self.paid(arguments[len(names) :])
        __self.paid([value for name, value in named.items() if name not in (*names, "_loop_vars", "_block_vars")])
        if isinstance(__obj, BuiltinMethodType):
            __self.paid(__obj.__self__)
            if any(isinstance(value, str) and len(value) > _MOST_ARGUMENT for value in arguments):
                raise SecurityError(f"it gives {__obj.__name__} a text of more than {_MOST_ARGUMENT} characters")
        return __self.paid(super().call(__context, __obj, *arguments, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator."""
        for value in (left, right):
            if not isinstance(value, _OPERANDS):
                raise SecurityError(f"it uses {operator} with a value of the type {type(value).__name__}")
        parts, times = (left, right) if isinstance(right, int) else (right, left)
        large = operator == "*" and isinstance(parts, str | list | tuple) and len(parts) * int(times) > _MOST_PRODUCT
        if operator == "**" or large or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it asks for a product that is too large ({operator})")
        return self.paid(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or an item of that name."""
        self.budget.charge(1)
        if isinstance(obj, _OBJECTS):
            return super().getattr(obj, attribute)
        kind: type = next((kind for kind in _METHODS if isinstance(obj, kind)), object)
        if kind is str and attribute == "join":
            return lambda items: self._join(items, obj)
        if kind is str and attribute == "replace":
            return lambda *arguments: self._replace(obj, *arguments)
        if attribute in _METHODS.get(kind, ()):
            return getattr(obj, attribute)
        if hasattr(kind, attribute):
            return self.unsafe_undefined(obj, attribute)
        try:
            return obj[attribute]
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, or an attribute of that name."""
        self.paid(argument)
        try:
            return obj[argument]
        except (TypeError, LookupError):
            return self.getattr(obj, argument) if isinstance(argument, str) else self.undefined(obj=obj, name=argument)

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or a test that pays for what it is given and what it gives."""

        def charged(*arguments: Any, **named: Any) -> Any:
            if name in _QUICK:
                self.budget.charge(1)
                return function(*arguments, **named)
            own = [value for value in arguments if not isinstance(value, Context | nodes.EvalContext | Sandbox)]
            self.paid([*own, *named.values()])
            if name in _NUMERIC and not all(isinstance(value, int | float) for value in own):
                raise SecurityError(f"it asks whether something that is no number is {name}")
            result = function(*arguments, **named)
            # Jinja's generators would do the work later, out of sight.
            return iter(self.paid(list(result))) if isinstance(result, Iterator) else self.paid(result)

        # Jinja notes on the function whether it wants its own context first.
        return update_wrapper(charged, function)

    @pass_context  # so that nothing is computed while the template is compiled
    def _text(self, _: Context, value: Any) -> str:
        text = str(self.paid(value))
        self.budget.charge(len(text))
        return text

    def _dict(self, pairs: Any = (), **named: Any) -> dict[Any, Any]:
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        return {self.key(name): value for name, value in pairs} | named

    def _namespace(self, pairs: Any = (), **named: Any) -> Namespace:
        return _Namespace(self._dict(pairs, **named))

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > _MOST_PRODUCT:
            raise SecurityError("it asks for a range that is too large")
        return numbers

    def _tojson(self, value: Any, indent: int | None = None, **settings: Any) -> str:
        if indent is not None and not 0 <= indent <= 16:
            raise SecurityError(f"it asks for an indentation of {indent}")
        texts = []
        for text in json.JSONEncoder(ensure_ascii=False, indent=indent, **settings).iterencode(self.paid(value)):
            self.budget.charge(len(text))
            texts.append(text)
        return "".join(texts)

    def _join(self, items: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        texts = []
        for item in self.paid(items):
            texts.append(str(item if attribute is None else self.getitem(item, attribute)))
            self.budget.charge(1 + len(texts[-1]) + len(d))
        return d.join(texts)

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text = str(self.paid(text))
        self.budget.charge(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _trim(self, text: Any, chars: str | None = None) -> str:
        if chars is not None and len(chars) > _MOST_ARGUMENT:
            raise SecurityError(f"it gives trim a text of more than {_MOST_ARGUMENT} characters")
        return str(self.paid(self.paid(text))).strip(chars)


class _Budget(threading.local):
    """What the rendering in this thread may still cost."""

    left = 0

    def charge(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise SecurityError("it asks for more work than a conversation needs")


class _Namespace(Namespace):
    """Jinja's, shown without what it holds, which may be itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generator(CodeGenerator):
    """Jinja's compiler, for templates that pay for what they do."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._wrapped: dict[int, tuple[str, str]] = {}  # by the ids of nodes: what is written before and behind them

    def visit(self, node: nodes.Node, *arguments: Any, **named: Any) -> Any:
        """Writes the code of a node."""
        if not isinstance(node, _STATEMENTS + _EXPRESSIONS) or getattr(node, "recursive", False):
            raise jinja2.TemplateError(f"it has a part that is not allowed ({type(node).__name__})")
        if isinstance(node, nodes.For):
            self._wrapped[id(node.iter)] = ("environment.passes(", f", {_cost(node)})")
        elif isinstance(node, nodes.Compare):
            for operand in (node.expr, *(part.expr for part in node.ops)):
                self._wrapped[id(operand)] = ("environment.paid(", ")")
        elif isinstance(node, nodes.Dict):
            for pair in node.items:
                self._wrapped[id(pair.key)] = ("environment.key(", ")")
        before, behind = self._wrapped.get(id(node), ("", ""))
        loaded = getattr(node, "ctx", "load") == "load"
        if isinstance(node, nodes.List | nodes.Dict | nodes.Concat) or (isinstance(node, nodes.Tuple) and loaded):
            before, behind = f"{before}environment.paid(", f"){behind}"
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            before, behind = f"{before}environment.sliced(", f"){behind}"
        if before:
            self.write(before)
        result = super().visit(node, *arguments, **named)
        if behind:
            self.write(behind)
        return result


@contextmanager
def _told() -> Iterator[None]:
    """Makes of whatever a template raises, or Python's own compiler of what Jinja made of it, an error of one line."""
    try:
        yield
    except RecursionError as error:
        raise jinja2.TemplateError("it nests too deeply, or calls itself without an end") from error
    except jinja2.TemplateError as error:
        raise jinja2.TemplateError(_line(str(error))) from error
    except Exception as error:
        raise jinja2.TemplateError(_line(f"{type(error).__name__}: {error}")) from error


def _line(text: str) -> str:
    line = " ".join(text[: 2 * _MOST_MESSAGE].split())
    return line if len(line) <= _MOST_MESSAGE else f"{line[:_MOST_MESSAGE]}..."


def _cost(node: nodes.Node) -> int:
    """What running a part of a template once makes and takes at most, without its loops and calls."""
    return 1 + sum(
        1 + len(part.data) if isinstance(part, nodes.TemplateData) else 1 for part in node.find_all(nodes.Node)
    )


def _raise_template_error(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
