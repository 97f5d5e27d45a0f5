"""Bodies of /v1/chat/completions and /v1/completions: OpenAI's fields in, OpenAI's objects and chunks out.

The shapes are those of OpenAI's API reference (https://platform.openai.com/docs/api-reference), the additions vLLM's.
Knows no HTTP, no model and no MLflow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from phi3_mlflow.runtime import chat
from phi3_mlflow.runtime.answers import Answer, Piece, TokenLogprob
from phi3_mlflow.runtime.chat import Request
from phi3_mlflow.runtime.errors import InvalidRequest, shorten
from phi3_mlflow.runtime.options import Flag, Options
from phi3_mlflow.runtime.tokens import Tokens

Kind = Literal["llm/v1/chat", "llm/v1/completions"]

# Fields that clients send and that mean nothing here: who asks, and how the provider is to bill it.
MEANINGLESS = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields of a message that OpenAI's own client sends back with an answer of the assistant, empty.
_EMPTY_MESSAGE_FIELDS = {"annotations", "audio", "function_call", "refusal", "tool_calls"}
MAX_PROMPTS = 64


@dataclass(frozen=True)
class Wanted:
    """What a body asks for.

    Attributes:
        kind: which of the two.
        requests: one, or for completions one for each prompt.
        stream: whether as server-sent events.
        include_usage: whether the stream ends with a chunk that has the usage.
    """

    kind: Kind
    requests: Sequence[Request]
    stream: bool
    include_usage: bool


def parse_chat(body: Mapping[str, Any], defaults: Options, *, tools: bool = False) -> Wanted:
    """Checks a body of /v1/chat/completions.

    Args:
        body: without `model`.
        defaults: the model's own options.
        tools: whether the model can call tools.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    values, stream, include_usage = _common(body)
    if values.get("tools") == []:
        del values["tools"]
    if values.get("tool_choice") == "none" and "tools" not in values:
        del values["tool_choice"]
    most = values.pop("max_completion_tokens", None)
    if most is not None:
        if values.get("max_tokens") not in (None, most):
            given = f"is {shorten(most)}, and `max_tokens` is {shorten(values['max_tokens'])}"
            raise InvalidRequest("max_completion_tokens", f"{given}; give one of them")
        values["max_tokens"] = most
    if isinstance(values.get("messages"), list):
        values["messages"] = [_message(index, message) for index, message in enumerate(values["messages"])]
    request = chat.parse_chat(values, defaults, stream=stream, tools=tools)
    return Wanted("llm/v1/chat", [request], stream, include_usage)


def parse_completion(body: Mapping[str, Any], defaults: Options, *, tools: bool = False) -> Wanted:
    """Checks a body of /v1/completions; a prompt is taken as it is, without the chat template.

    Args:
        body: without `model`.
        defaults: the model's own options.
        tools: whether the model can call tools, which chats alone take.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    values, stream, include_usage = _common(body)
    echo = Flag().check("echo", values.pop("echo", False))
    if (best := values.pop("best_of", None)) not in (None, values.get("n", 1)):
        raise InvalidRequest("best_of", f"is {shorten(best)}; choices are not ranked here, leave it out or give `n`")
    if values.pop("suffix", None) is not None:
        raise InvalidRequest("suffix", "is given, and Phi-3 does not fill in text; leave it out")
    prompt = values.pop("prompt", None)
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
    prompts = prompt if several else [prompt]
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest("prompt", f"has {len(prompts)} entries; at most {MAX_PROMPTS} are allowed")
    requests = []
    for index, each in enumerate(prompts):
        try:
            asked = {**values, "prompt": each}
            request = chat.parse_completion(asked, defaults, template=False, stream=stream, tools=tools)
        except InvalidRequest as error:
            if several and error.field == "prompt":
                raise InvalidRequest(f"prompt[{index}]", str(error).removeprefix("`prompt` ")) from None
            raise
        requests.append(replace(request, echo=echo, field=f"prompt[{index}]" if several else "prompt"))
    return Wanted("llm/v1/completions", requests, stream, include_usage)


def _common(body: Mapping[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """The fields that were given and mean something, and what of the stream was asked for."""
    values = {name: value for name, value in body.items() if value is not None and name not in MEANINGLESS}
    if values.pop("store", False) is not False:
        raise InvalidRequest("store", "is given, and nothing is stored here; leave it out, or set it to false")
    if "custom_inputs" in values:
        raise InvalidRequest("custom_inputs", "is for /invocations; give its options at the top level")
    stream = Flag().check("stream", values.get("stream", False))
    options = values.pop("stream_options", None)
    include_usage = False
    if options is not None:
        if not stream:
            raise InvalidRequest("stream_options", "is given, and `stream` is not true; leave it out")
        if not isinstance(options, Mapping):
            raise InvalidRequest("stream_options", f"is {shorten(options)}; it must be an object")
        for name, value in options.items():
            if name == "include_obfuscation" and value in (None, False):
                continue
            if name != "include_usage":
                raise InvalidRequest(f"stream_options.{name}", "is not known; it may hold `include_usage`")
            include_usage = Flag().check("stream_options.include_usage", False if value is None else value)
    return values, stream, include_usage


def _message(index: int, message: Any) -> Any:
    """A message with OpenAI's liberties taken out: content in parts, the role `developer`, fields that are empty."""
    if not isinstance(message, Mapping):
        return message
    kept = {key: value for key, value in message.items() if key not in _EMPTY_MESSAGE_FIELDS or value}
    if kept.get("role") == "developer":
        kept["role"] = "system"
    if isinstance(kept.get("content"), list):
        kept["content"] = text_of(kept["content"], f"messages[{index}].content", ("text",))
    return kept


def text_of(parts: Sequence[Any], field: str, kinds: Sequence[str]) -> str:
    """The text of a content in parts, one part a line.

    Raises:
        InvalidRequest: a part is no text.
    """
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            shape = f'{{"type": "{kinds[0]}", "text": ...}}'
            raise InvalidRequest(f"{field}[{index}]", f"is {shorten(part)}; this model reads text: it must be {shape}")
        texts.append(part["text"])
    return "\n".join(texts)


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """OpenAI's `usage` of all answers together."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(choice.tokens for answer in answers for choice in answer.choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in answers)},
    }


class Shape:
    """The objects and chunks of one response.

    Args:
        wanted: the request.
        answers: one for each of its prompts, in the making.
        model: what the response names as the model.
        prompts: the text with which the answers to each of them begin, see `echoed`.
    """

    def __init__(self, wanted: Wanted, answers: Sequence[Answer], model: str, prompts: Sequence[str | None]):
        self._wanted = wanted
        self._answers = answers
        self._chat = wanted.kind == "llm/v1/chat"
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + answers[0].id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": answers[0].created,
            "model": model,
        }
        if self._chat and wanted.stream:
            self._head["object"] = "chat.completion.chunk"
        self._opened: set[int] = set()
        self._held: list[list[Piece]] = [[] for _ in answers]
        self._prompts = prompts

    def whole(self) -> dict[str, Any]:
        """The response object, when all answers have ended."""
        choices = []
        for place, answer in enumerate(self._answers):
            for index, choice in enumerate(answer.choices):
                text, likely = self._text(place, choice.text, choice.logprobs, first=True)
                body: dict[str, Any] = {"text": text}
                if self._chat:
                    body = {"message": {**chat.message(choice), "refusal": None}}
                choices.append(
                    {
                        "index": self._index(place, index),
                        **body,
                        "logprobs": self._logprobs(likely),
                        "finish_reason": chat.finish_reason(choice.reason),
                        "stop_reason": choice.reason,
                    }
                )
        return {**self._head, "choices": choices, "usage": usage(self._answers)}

    def chunks(self, place: int, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a piece: its text, and where it ends the choice, that.

        Args:
            place: which of the prompts.
            piece: what is new.
        """
        held = self._held[place]
        held.append(piece)
        if self._waits(place, piece):
            return []
        chunks = [chunk for each in held for chunk in self._chunks(place, each)]
        held.clear()
        return chunks

    def _waits(self, place: int, piece: Piece) -> bool:
        """Whether a choice has come before the log probabilities of its prompt, which the first choice reads."""
        answer = self._answers[place]
        read = answer.prompt_logprobs
        return read is not None and piece.choice > 0 and len(read) < answer.prompt_tokens

    def _chunks(self, place: int, piece: Piece) -> list[dict[str, Any]]:
        index = self._index(place, piece.choice)
        first = index not in self._opened
        chunks = []
        if piece.text or piece.calls or piece.logprobs or first:
            self._opened.add(index)
            text, likely = self._text(place, piece.text, piece.logprobs, first=first)
            body: dict[str, Any] = {"text": text}
            if self._chat:
                body = {"delta": chat.delta_of(self._answers[place].choices[piece.choice], piece, first=first)}
            chunks.append(
                self._chunk([{"index": index, **body, "logprobs": self._logprobs(likely), "finish_reason": None}])
            )
        if piece.reason is not None:
            end: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
            ended = {"finish_reason": chat.finish_reason(piece.reason), "stop_reason": piece.reason}
            chunks.append(self._chunk([{"index": index, **end, "logprobs": None, **ended}]))
        return chunks

    def last(self) -> list[dict[str, Any]]:
        """What comes after all choices have ended: the usage, where it was asked for."""
        return [{**self._head, "choices": [], "usage": usage(self._answers)}] if self._wanted.include_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # The reference has a null in every chunk but the last, where the usage is asked for.
        return {**self._head, "choices": choices, **({"usage": None} if self._wanted.include_usage else {})}

    def _index(self, place: int, choice: int) -> int:
        return place * self._wanted.requests[place].options.n + choice

    def _logprobs(self, likely: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if likely is None:
            return None
        found: dict[str, Any] = chat.logprobs(likely, chat=self._chat)["logprobs"]
        return {**found, "refusal": None} if self._chat else found

    def _text(
        self, place: int, text: str, likely: Sequence[TokenLogprob] | None, *, first: bool
    ) -> tuple[str, Sequence[TokenLogprob] | None]:
        """A choice's text, which begins with the prompt where that was asked for."""
        before = self._prompts[place]
        if before is None:
            return text, likely
        if likely is not None:
            shifted = [replace(each, start=each.start + len(before)) for each in likely]
            likely = [*(self._answers[place].prompt_logprobs or ()), *shifted] if first else shifted
        return before * first + text, likely


def echoed(request: Request, tokens: Tokens) -> str | None:
    """The prompt's text as an answer repeats it; None where it does not."""
    if not request.echo:
        return None
    return request.prompt if isinstance(request.prompt, str) else tokens.decode(request.prompt)  # type: ignore[arg-type]
