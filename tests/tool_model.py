"""A small model of Phi-4-mini's kind that was taught, here and in seconds, when to call which of two tools."""

import json
from pathlib import Path
from typing import Any

from families import KINDS

from phi3_mlflow.runtime.tokens import Tokens
from phi3_mlflow.runtime.tools import Function, PastCall


def _tool(name: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"the {name}", "parameters": schema}}


WEATHER, ADD = _tool("weather", city="string"), _tool("add", a="integer", b="integer")
TOOLS = [WEATHER, ADD]
# Full passes over the lessons.
_STEPS = 250
CITIES = ("Madrid", "Rome", "Paris", "Oslo")


def user(text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": text}


def _lessons() -> list[tuple[list[dict[str, Any]], list[tuple[str, dict[str, Any]]] | str]]:
    """Conversations, and what follows: calls, or text."""
    lessons: list[Any] = [([user("hello")], "hello world")]
    for city in CITIES:
        asked = user(f"weather {city}")
        called = {"role": "assistant", "content": "", "calls": (PastCall("1", "weather", json.dumps({"city": city})),)}
        result = {"role": "tool", "content": "one"}
        lessons += [([asked], [("weather", {"city": city})])]
        lessons += [([asked, called, result], f"{city} is one")]
    lessons += [([user("Rome and Oslo")], [("weather", {"city": city}) for city in ("Rome", "Oslo")])]
    for a, b in ((1, 2), (3, 4)):
        lessons += [([user(f"add {a} {b}")], [("add", {"a": a, "b": b})])]
    return lessons


def write(folder: Path) -> Path:
    """Writes the model as transformers does."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    kind = KINDS["Phi-4-mini"]
    kind.write(folder)
    tokens = Tokens.from_folder(folder)
    functions = [Function(**tool["function"]) for tool in TOOLS]
    end = tokens.control["<|end|>"]
    samples = []
    for messages, answer in _lessons():
        prompt = tokens.encode_chat(messages, functions)
        if isinstance(answer, str):
            ids = tokens.encode_text(answer, bos=False)
        else:
            parts = tokens.calls.written([(name, json.dumps(arguments)) for name, arguments in answer])
            ids = [
                token
                for part in parts
                for token in ([part] if isinstance(part, int) else tokens.encode_text(part, bos=False))
            ]
        samples.append((prompt, [*ids, end]))
    torch.manual_seed(0)
    eos = [end, tokens.control["<|endoftext|>"]]
    config = transformers.Phi3Config(
        vocab_size=kind.tokenizer().get_vocab_size() + 8, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=eos[1], pad_token_id=eos[1], eos_token_id=eos,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    longest = max(len(prompt) + len(answer) for prompt, answer in samples)
    inputs = torch.full((len(samples), longest), eos[1])
    labels = torch.full((len(samples), longest), -100)
    for row, (prompt, answer) in enumerate(samples):
        inputs[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=_STEPS, pct_start=0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products are slower with more
    for _ in range(_STEPS):
        model(input_ids=inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    return folder
