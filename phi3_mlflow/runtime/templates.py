"""Chat templates: Jinja's, in a sandbox. Knows roles and texts of messages; no tokens."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import jinja2

from .errors import WeightsError, shorten
from .sandbox import Sandbox

# What one rendering may cost: for the template itself, and for each message. Qwen3's takes about 500 a message.
_BASE, _EACH = 200_000, 5_000


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
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.compiled(source)
        except jinja2.TemplateError as error:
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
        given, budget = self._given, _BASE + _EACH * len(turns)
        if "in_system" in tools:
            turns[0]["tools"] = tools["in_system"]
        elif tools:
            budget += 10 * len(json.dumps(tools))
            given = {**given, **tools}
        return self._sandbox.render(self._template, budget, messages=turns, add_generation_prompt=True, **given)

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
    """The text of a token, which may be an object with more about it.

    Raises:
        WeightsError: it has none.
    """
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise WeightsError(f"tokenizer_config.json has the token {shorten(token)}: copy or download it again")
    return text
