"""Bodies of /tokenize and /detokenize, in the shape of vLLM's server. Knows no HTTP."""

from collections.abc import Mapping
from typing import Any

from phi3_mlflow.runtime.chat import check_text
from phi3_mlflow.runtime.errors import InvalidRequest, shorten
from phi3_mlflow.runtime.options import Flag, Options
from phi3_mlflow.runtime.service import Service

from . import openai

_MOST_TOKENS = 1_000_000
# Reading holds up everybody else. A message's role takes about as long as so many characters.
_MOST_CHARACTERS, _ROLE = 200_000, 10


def tokenize(body: Mapping[str, Any], service: Service) -> dict[str, Any]:
    """`prompt`, or `messages` as the model would read them, as token ids.

    Args:
        body: also `add_special_tokens` (BOS before a prompt, the default) and `return_token_strs`.
        service: of the model.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    values = {name: value for name, value in body.items() if value is not None}
    strings = Flag().check("return_token_strs", values.pop("return_token_strs", False))
    if "messages" in values:
        if Flag().check("add_generation_prompt", values.pop("add_generation_prompt", True)) is False:
            raise InvalidRequest("add_generation_prompt", "is false; prompts of this server always end with one")
        if Flag().check("add_special_tokens", values.pop("add_special_tokens", False)):
            raise InvalidRequest("add_special_tokens", "is true, and a chat has those of its template; leave it out")
        request = openai.parse_chat(values, Options(), tools=service.calls_tools).requests[0]
        messages: Any = request.prompt
        _bound("messages", sum(_ROLE + len(message["content"]) for message in messages))
        functions = () if request.tools is None else request.tools.functions
        ids = service.tokens.encode_chat(messages, functions)
    else:
        special = Flag().check("add_special_tokens", values.pop("add_special_tokens", True))
        prompt = values.pop("prompt", None)
        if prompt is None:
            raise InvalidRequest("prompt", "is missing; give it, or `messages`")
        text = check_text("prompt", prompt)
        _bound("prompt", len(text))
        for name in values:
            raise InvalidRequest(name, "is not a field of this request")
        # Evaluation harnesses ask for the ids of control tokens so, one alone; within a text they are text.
        control = service.tokens.control.get(text)
        ids = service.tokens.encode_text(text, bos=special) if control is None else [control]
    found: dict[str, Any] = {"count": len(ids), "max_model_len": service.context_length, "tokens": ids}
    decoder = service.tokens.decoder()
    return found | {
        "token_strs": [decoder.piece(token).decode("utf-8", "replace") for token in ids] if strings else None
    }


def _bound(field: str, characters: int) -> None:
    if characters > _MOST_CHARACTERS:
        raise InvalidRequest(field, f"has {characters} characters; at most {_MOST_CHARACTERS} are read at once")


def info(service: Service) -> dict[str, Any]:
    """What an evaluation harness has to know of the tokenizer, as vLLM's /tokenizer_info has it."""
    named = {name: service.tokens.named.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": service.context_length,
        "chat_template": service.tokens.chat_template,
        **named,
    }


def detokenize(body: Mapping[str, Any], service: Service) -> dict[str, Any]:
    """`tokens` as text, control tokens left out.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
    """
    ids = body.get("tokens")
    for name in body:
        if name != "tokens":
            raise InvalidRequest(name, "is not a field of this request; it has `tokens`")
    if not isinstance(ids, list) or len(ids) > _MOST_TOKENS:
        raise InvalidRequest("tokens", f"is {shorten(ids)}; it must be a list of at most {_MOST_TOKENS} token ids")
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < service.tokens.vocab_size:
            allowed = f"it must be a token id below {service.tokens.vocab_size}"
            raise InvalidRequest(f"tokens[{place}]", f"is {shorten(token)}; {allowed}")
    return {"prompt": service.tokens.decode(ids)}
