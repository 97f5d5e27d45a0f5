"""A request's prompt as token ids that fit into the context. Knows no decoder and no answer."""

from bisect import bisect_left
from collections.abc import Sequence

from .chat import Message, Request
from .errors import InvalidRequest
from .tokens import Tokens
from .tools import Function

# What an answer may take where the request sets no max_tokens.
DEFAULT_MAX_TOKENS = 512


def encode(tokens: Tokens, request: Request, context_length: int) -> tuple[list[int], int]:
    """The prompt's ids, and how many messages were dropped to make it fit.

    Args:
        tokens: the model's tokenizer.
        request: its `context_overflow` says what happens to a conversation that does not fit.
        context_length: how many tokens prompt and answer may have together; at least one is the answer's.

    Raises:
        InvalidRequest: the prompt does not fit, or its ids are none of this tokenizer.
    """
    prompt, options = request.prompt, request.options
    functions = () if request.tools is None else request.tools.functions
    if not isinstance(prompt, tuple) or len(prompt) == 1:
        ids = _encoded(tokens, prompt, context_length, functions)
        if not isinstance(ids, list):
            raise _too_long(request.field, ids, context_length, "shorten it")
        return ids, 0
    reserve = min(options.max_tokens or DEFAULT_MAX_TOKENS, context_length // 2)
    drop = options.context_overflow == "drop_oldest"
    starts = _turn_starts(prompt) if drop else [0]

    def fits(start: int) -> bool:
        ids = _encoded(tokens, _kept(prompt, start), context_length, functions)
        return isinstance(ids, list) and len(ids) + reserve <= context_length

    # The later the start, the fewer the tokens; the last start is taken in any case.
    kept = _kept(prompt, starts[bisect_left(starts, True, hi=len(starts) - 1, key=fits)])
    ids = _encoded(tokens, kept, context_length, functions)
    if not isinstance(ids, list):
        asked = 'shorten them, or set `context_overflow` to "drop_oldest"'
        remedy = "shorten them: no older turn is left to drop" if drop else asked
        raise _too_long(request.field, ids, context_length, remedy)
    return ids, len(prompt) - len(kept)


def _encoded(
    tokens: Tokens, prompt: tuple[Message, ...] | str | list[int], context_length: int, functions: Sequence[Function]
) -> list[int] | str:
    """The ids, or in words how many they are where they do not fit."""
    if isinstance(prompt, list):
        ids = _checked(tokens, prompt)
        return ids if len(ids) < context_length else str(len(ids))
    text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    least = -(-len(text.encode("utf-8")) // tokens.longest_piece)
    least += 0 if isinstance(prompt, str) else len(prompt)  # each message has its role's token
    if least >= context_length:
        return f"at least {least}"  # not worth encoding: this may be megabytes
    ids = tokens.encode_text(prompt) if isinstance(prompt, str) else tokens.encode_chat(prompt, functions)
    return ids if len(ids) < context_length else str(len(ids))


def _checked(tokens: Tokens, ids: list[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token >= tokens.vocab_size:
            problem = f"is {token}, and this model's token ids are below {tokens.vocab_size}"
            raise InvalidRequest(f"prompt[{place}]", problem)
    return ids


def _too_long(name: str, count: str, context_length: int, remedy: str) -> InvalidRequest:
    verb = "are" if name == "messages" else "is"
    return InvalidRequest(
        name,
        f"{verb} {count} tokens long as the model reads it, and the context holds {context_length} "
        f"with at least one token of the answer; {remedy}",
    )


def _turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where the kept part of a conversation may begin: with any turn, at the latest with the last message."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages) - 1)
    last = len(messages) - 1
    turns = [i for i in range(first + 1, last) if messages[i]["role"] == "user"]
    return sorted({0, *turns, last})


def _kept(messages: Sequence[Message], start: int) -> tuple[Message, ...]:
    """The messages from a start on, and the system messages before it."""
    return (*(message for message in messages[:start] if message["role"] == "system"), *messages[start:])
