"""Chat templates: Jinja's, in a sandbox in which every one comes to an end, in time and in memory.

Knows roles and texts of messages; no tokens.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from functools import partial, update_wrapper
from typing import Any, Literal

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import WeightsError

# What one rendering may cost, in characters and items that it makes and in parts of the template that it runs: for
# the template itself, and for each message. Phi-3's own takes about 100 a message.
_BASE, _EACH = 200_000, 20_000
# Characters or items that a template may make by a product, or by `range`.
_MOST_PRODUCT = 10_000
# Of Jinja's filters those whose result is about as large as what they are given.
_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float forceescape groupby int items last length list
    lower map max min reject rejectattr reverse round safe select selectattr sort string title trim unique upper
"""
# Of these those that take as long for a long text or list as for a short one.
_QUICK = frozenset(("attr", "count", "d", "default", "first", "int", "last", "length"))
# Methods of texts and numbers that make something of any size out of little.
_GROWING = """
    center encode expandtabs format format_map join ljust replace rjust to_bytes translate zfill
"""


class ChatTemplate:
    """A Jinja chat template, rendered in the sandbox and with the settings that transformers uses.

    Args:
        source: the template.
        config: `tokenizer_config.json`, parsed.

    Raises:
        WeightsError: it is no template, or one that changes the text of messages.
    """

    def __init__(self, source: Any, config: Mapping[str, Any]):
        if not isinstance(source, str) or not source:
            raise WeightsError("tokenizer_config.json has no chat_template, and there is no chat_template.jinja")
        self._sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        try:
            self._template = self._sandbox.compiled(source)
        except Exception as error:  # also what Python's compiler and memory say of what jinja made of it
            raise WeightsError(f"the tokenizer's chat template is not valid: {error}") from error
        tokens = {key: token for key, token in config.items() if key.endswith("_token") and token}
        # Transformers always gives these two.
        self._given: dict[str, Any] = {"tools": None, "documents": None}
        self._given |= {key: token_text(token) for key, token in tokens.items() if not isinstance(token, bool)}
        self._check_contents()

    def render(self, messages: Sequence[tuple[str, str]], **tools: Any) -> str:
        """The prompt's text; jinja2.TemplateError where the template refuses these messages.

        Args:
            messages: role and content of each.
            tools: what the model may call: `in_system`, text that the first message carries along, or `tools`, objects.
        """
        turns: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in messages]
        self._sandbox.budget.left = _BASE + _EACH * len(turns)
        given = self._given
        if "in_system" in tools:
            turns[0]["tools"] = tools["in_system"]
        elif tools:
            self._sandbox.budget.left += 10 * len(json.dumps(tools))
            given = {**given, **tools}
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **given)
        except jinja2.TemplateError:
            raise
        except Exception as error:
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error

    @property
    def place_of_tools(self) -> Literal["system", "variable"] | None:
        """Where the template takes tools: in the system message (Phi-4-mini), or as a variable (Qwen and others)."""
        name, turns = "\ue000tool\ue001", [("system", "a"), ("user", "a")]
        probe = {"type": "function", "function": {"name": name, "description": "a", "parameters": {"type": "object"}}}
        for place, tools in (("system", {"in_system": name}), ("variable", {"tools": [probe]})):
            with suppress(jinja2.TemplateError):
                if name in self.render(turns, **tools):
                    return place  # type: ignore[return-value]
        return None

    def refuses(self, messages: Sequence[tuple[str, str]]) -> bool:
        """Whether the template cannot express these messages."""
        try:
            self.render(messages)
        except jinja2.TemplateError:
            return True
        return False

    def _check_contents(self) -> None:
        """Contents must come out as they went in, or trimmed of all white space."""
        for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
            found = []
            for space in ("   ", "\n\n\n"):  # more than a template puts there itself
                turns = [(role, f"{space}\ue000{i}aA\n\ue001{space}") for i, role in enumerate(roles)]
                rendered = "" if self.refuses(turns) else self.render(turns)
                contents = [content for i, (_, content) in enumerate(turns) if f"\ue000{i}" in rendered]
                found.append([content in rendered for content in contents])
                if not all(content.strip() in rendered for content in contents):
                    found.append([])
            if any(each != found[0] for each in found):
                problem = "changes the text of messages other than by trimming it, which is not supported"
                raise WeightsError(f"the tokenizer's chat template {problem}")


def token_text(token: Any) -> str:
    """The text of a token, which may be an object with more about it."""
    return token["content"] if isinstance(token, Mapping) else str(token)


class _Budget(threading.local):
    """What the rendering in this thread may still cost."""

    left = _BASE

    def charge(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise jinja2.sandbox.SecurityError("it asks for more work than a conversation needs")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a budget.

    Loops pay for each pass, calls and filters for themselves and what they give, and so does whatever joins texts: what
    is left between two payments is a part of the template that runs once.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, finalize=self._paid)
        self.budget = _Budget()
        self._call_cost = 1
        self.filters = {name: self._charged(self.filters[name], quick=name in _QUICK) for name in _FILTERS.split()}
        self.filters |= {"join": self._join, "replace": self._replace, "tojson": self._tojson}
        self.filters |= {"passes": self._passes, "paid": self._paid}
        own = {name: self.globals[name] for name in ("dict", "namespace", "joiner", "cycler")}
        self.globals = {**own, "range": self._range, "raise_exception": _raise_template_error}

    def compiled(self, source: str) -> jinja2.Template:
        """A template that pays for what it does."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise jinja2.TemplateError("it has a recursive loop")
            loop.iter = _filter(loop.iter, "passes", nodes.Const(_cost(loop)))
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _filter(block.filter, "paid")
        _pay_for_joining(tree)
        # A call of the template's own runs no more than this beside its loops and calls.
        self._call_cost = max([1, *map(_cost, tree.find_all((nodes.Macro, nodes.CallBlock, nodes.Block)))])
        return self.from_string(tree)

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:  # noqa: N805, as in jinja
        """What a call in the template gives."""
        __self.budget.charge(__self._call_cost)
        return __self._paid(super().call(__context, __obj, *arguments, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator."""
        parts, times = (left, right) if isinstance(right, int) else (right, left)
        large = operator == "*" and isinstance(parts, Sized) and len(parts) * int(times) > _MOST_PRODUCT
        if operator == "**" or large or (operator == "%" and isinstance(left, str)):
            raise jinja2.sandbox.SecurityError(f"it asks for a product that is too large ({operator})")
        return self._paid(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or an item of that name."""
        method = self._method(obj, attribute)
        return super().getattr(obj, attribute) if method is None else method

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, or an attribute of that name."""
        method = self._method(obj, argument)
        return super().getitem(obj, argument) if method is None else method

    def _method(self, obj: Any, name: Any) -> Any:
        """In place of a method of texts or numbers that makes something of any size out of little."""
        if not isinstance(obj, str | int) or name not in _GROWING.split():
            return None
        if name == "replace":
            return partial(self._replace, obj)
        if name == "join":
            return lambda items: self._join(items, str(obj))
        return self.unsafe_undefined(obj, name)

    def _charged(self, function: Callable[..., Any], *, quick: bool) -> Callable[..., Any]:
        def charged(*arguments: Any, **named: Any) -> Any:
            if quick:
                self.budget.charge(1)
                return function(*arguments, **named)
            for value in (*arguments, *named.values()):
                self._paid(value)
            return self._paid(function(*arguments, **named))

        # Jinja notes on the function whether it wants its own context first.
        return update_wrapper(charged, function)

    def _paid(self, value: Any) -> Any:
        """The value itself, when what it takes was paid for."""
        if isinstance(value, int) and value.bit_length() > 64:
            raise jinja2.sandbox.SecurityError("it asks for a number that is too large")
        if isinstance(value, Sized) and not isinstance(value, jinja2.Undefined):
            self.budget.charge(1 + len(value))
        else:
            self.budget.charge(1)
        return value

    def _passes(self, items: Iterable[Any], cost: int) -> Iterator[Any]:
        for item in items:
            self.budget.charge(cost)
            yield item

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > _MOST_PRODUCT:
            raise jinja2.sandbox.SecurityError("it asks for a range that is too large")
        return numbers

    def _tojson(self, value: Any, indent: int | None = None) -> Any:
        if (indent or 0) > 16:
            raise jinja2.sandbox.SecurityError("it asks for an indentation that is too large")
        return self._paid(json.dumps(value, ensure_ascii=False, indent=indent))  # as in transformers

    def _join(self, items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        texts = [str(item if attribute is None else self.getitem(item, attribute)) for item in items]
        self.budget.charge(sum(map(len, texts)) + len(texts) * (1 + len(separator)))
        return separator.join(texts)

    def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
        text = str(text)
        self.budget.charge(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        return text.replace(old, new, -1 if count is None else count)


def _cost(node: nodes.Node) -> int:
    """What running a part of a template once makes and takes at most, without its loops and calls."""
    return 1 + sum(
        1 + len(part.data) if isinstance(part, nodes.TemplateData) else 1 for part in node.find_all(nodes.Node)
    )


def _filter(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None)


def _pay_for_joining(node: nodes.Node) -> None:
    """Puts the filter around every `~` below a node."""
    for name, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, nodes.Node):
                _pay_for_joining(child)
        paid = [_filter(child, "paid") if isinstance(child, nodes.Concat) else child for child in children]
        setattr(node, name, paid if isinstance(value, list) else paid[0])


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
