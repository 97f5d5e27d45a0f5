"""A folder that the model builder of onnxruntime-genai exported: what genai_config.json says of the graph in it.

Knows names and sizes; it does not look into the graph.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .base import CannotBatch


@dataclass(frozen=True)
class Exported:
    """What genai_config.json says of the graph."""

    filename: str
    layers: int
    heads: int
    head_size: int
    context_length: int
    eos: frozenset[int]
    input_ids: str
    attention_mask: str
    position_ids: str | None  # an input that older exports have
    past: tuple[str, ...]  # key and value of layer 0, of layer 1 and so on; `present` alike
    present: tuple[str, ...]
    logits: str


def read(folder: Path) -> Exported:
    """Reads genai_config.json.

    Raises:
        CannotBatch: it is missing or broken, or asks for something that only onnxruntime-genai does.
    """
    path = folder / "genai_config.json"
    try:
        model = json.loads(path.read_text("utf-8"))["model"]
        decoder = model["decoder"]
        inputs, outputs = dict(decoder["inputs"]), dict(decoder["outputs"])
        layers = range(decoder["num_hidden_layers"])

        def pairs(names: dict[str, str], kind: str) -> tuple[str, ...]:
            patterns = [names.pop(f"{kind}_key_names"), names.pop(f"{kind}_value_names")]
            return tuple(pattern % layer for layer in layers for pattern in patterns)

        eos = model["eos_token_id"]
        shape = Exported(
            filename=decoder["filename"],
            layers=len(layers),
            heads=decoder["num_key_value_heads"],
            head_size=decoder["head_size"],
            context_length=model["context_length"],
            eos=frozenset(eos if isinstance(eos, list) else [eos]),
            input_ids=inputs.pop("input_ids"),
            attention_mask=inputs.pop("attention_mask"),
            position_ids=inputs.pop("position_ids", None),
            past=pairs(inputs, "past"),
            present=pairs(outputs, "present"),
            logits=outputs.pop("logits"),
        )
        options = dict(decoder.get("session_options", {}))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CannotBatch(f"{path} is not as expected: {error!r}") from error
    providers = [name for entry in options.pop("provider_options", []) for name in entry]
    options.pop("log_id", None)
    if providers:
        raise CannotBatch(f"{path} asks for {', '.join(providers)}; batching runs on the CPU")
    for what, rest in (("the session options", options), ("the inputs", inputs), ("the outputs", outputs)):
        if rest:
            raise CannotBatch(f"{path} names {what} {', '.join(rest)}, which batching does not know")
    for section in ("sliding_window", "pipeline"):
        if decoder.get(section):
            raise CannotBatch(f"{path} has a section `{section}`, which batching does not know")
    return shape
