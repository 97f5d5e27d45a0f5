"""What genai_config.json may say: an allow-list, key by key.

onnxruntime-genai loads every native library and opens every file that this configuration names, so what is not in the
table is refused, whatever it is. The table has what the model builder of onnxruntime-genai writes for the models here
(0.3 of 2024 to 0.18: make_genai_config in models/builders/base.py), and harmless settings of onnxruntime's sessions.
"""

import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError, shorten
from . import files, rules
from .models import MODELS
from .onnx_graph import Graph

NAME = "genai_config.json"


def _is_digits(text: str) -> bool:
    return re.fullmatch("[0-9]{1,3}", text) is not None


_SWITCH = rules.one_of("0", "1")
_DIGITS = rules.Rule("1 to 3 digits as text", lambda value: isinstance(value, str) and _is_digits(value))
_TOKEN = rules.integer(-1, 2**31 - 1)
# The name of an input or output of the graph.
_VALUE = rules.Rule(
    "a name of 1 to 60 letters, digits and _ . / -",
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w./-]{1,60}", value, re.ASCII) is not None,
)
# onnxruntime-genai hands these to snprintf with a buffer of 64 bytes: of everything that printf knows, %d alone.
_LAYERS = rules.Rule(
    "a name of at most 50 letters, digits and _ . / - with one %d for the layer",
    lambda value: (
        isinstance(value, str) and len(value) <= 50 and re.fullmatch(r"[\w./-]*%d[\w./-]*", value, re.ASCII) is not None
    ),
)
_COUNT = rules.integer(1, 65536)
# Bytes of keys and values for a token, of which some thousands are held. Phi-3-mini has 0.8 MB.
_MOST_CACHE = 16 * files.MiB

# Everything that may be there, at its place. Nothing in it can name a library, and one key alone names a file.
_ALLOWED: Mapping[str, Any] = {
    "model": {
        "type": rules.one_of(*MODELS),
        "context_length": rules.integer(16, 2**20),
        "vocab_size": rules.integer(1, 2**20),
        "bos_token_id": _TOKEN,
        "eos_token_id": rules.Either((_TOKEN, rules.List(_TOKEN, 64))),  # one, or a list of them
        "pad_token_id": _TOKEN,
        # The begins and ends of tool calls and of reasoning, which the builder looks up in Qwen's vocabulary.
        **dict.fromkeys(("bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id"), _TOKEN),
        "decoder": {
            "filename": rules.text(200),  # of a file beside it, see `read`
            "head_size": rules.integer(1, 4096),
            "hidden_size": _COUNT,
            "num_attention_heads": rules.integer(1, 1024),
            "num_key_value_heads": rules.integer(1, 1024),
            "num_hidden_layers": rules.integer(1, 1024),
            "inputs": {
                "input_ids": _VALUE,
                "attention_mask": _VALUE,
                "position_ids": _VALUE,
                "past_key_names": _LAYERS,
                "past_value_names": _LAYERS,
            },
            "outputs": {
                "logits": _VALUE,
                "present_key_names": _LAYERS,
                "present_value_names": _LAYERS,
            },
            "sliding_window": {
                "window_size": rules.integer(1, 2**20),
                "pad_value": rules.integer(-(2**31), 2**31 - 1),
                "alignment": rules.one_of("left", "right"),
                "slide_key_value_cache": rules.FLAG,
                "slide_inputs": rules.FLAG,
                "layers": rules.List(rules.integer(0, 1023), 1024),
                "cache_slack": rules.integer(0, 2**20),
            },
            "session_options": {
                "log_id": rules.text(100),
                "log_severity_level": rules.integer(0, 4),
                "log_verbosity_level": rules.integer(0, 4),
                "intra_op_num_threads": rules.integer(0, 1024),
                "inter_op_num_threads": rules.integer(0, 1024),
                "enable_cpu_mem_arena": rules.FLAG,
                "enable_mem_pattern": rules.FLAG,
                "graph_optimization_level": rules.one_of(
                    "ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"
                ),
                "session.intra_op.allow_spinning": _SWITCH,
                "session.inter_op.allow_spinning": _SWITCH,
                "session.use_device_allocator_for_initializers": _SWITCH,
                "optimization.disable_specified_optimizers": rules.one_of("MatMulNBitsFusion"),
                "ep.cuda.fpa_intb_gemm": _SWITCH,
                "provider_options": rules.List(
                    {
                        "cpu": {},
                        "cuda": {"enable_cuda_graph": _SWITCH, "device_id": _DIGITS},
                        "dml": {"enable_graph_capture": _SWITCH, "device_id": _DIGITS},
                    },
                    3,
                ),
            },
        },
    },
    "search": {
        "batch_size": rules.integer(1, 1024),
        "chunk_size": rules.integer(1, 2**20),
        "diversity_penalty": rules.number(-100, 100),
        "do_sample": rules.FLAG,
        "early_stopping": rules.FLAG,
        "length_penalty": rules.number(-100, 100),
        "max_length": rules.integer(0, 2**20),
        "min_length": rules.integer(0, 2**20),
        "no_repeat_ngram_size": rules.integer(0, 2**20),
        "num_beams": rules.integer(1, 64),
        "num_return_sequences": rules.integer(1, 64),
        "past_present_share_buffer": rules.FLAG,
        "random_seed": rules.integer(-1, 2**31 - 1),
        "repetition_penalty": rules.number(0, 100),
        "temperature": rules.number(0, 100),
        "top_k": rules.integer(0, 2**20),
        "top_p": rules.number(0, 1),
    },
}

# Said of every key that is not in the table.
_WHY = (
    "which no model here needs and which may name code to run: do not use this copy, or remove the key if you know "
    "where it comes from"
)
# Without one of these onnxruntime-genai loads the model and fails at every request.
_REQUIRED = tuple(
    f"model.{name}"
    for name in ("type", "decoder.filename", "decoder.head_size", "context_length", "vocab_size", "eos_token_id")
)


def read(folder: Path) -> dict[str, Any]:
    """The configuration of an ONNX folder, every key of which is known and harmless.

    Args:
        folder: holds genai_config.json.

    Returns:
        Its content. `model.decoder.filename` is the name of a file in the folder that ends in `.onnx`; whether it is
        there was not looked at.

    Raises:
        WeightsError: a key is unknown or comes twice, or a value is not allowed; the message has the key's dotted path.
    """
    path = folder / NAME
    content = files.plain(path, files.json_object(path))
    rules.check(path, content, _ALLOWED, _WHY)
    rules.require(path, content, _REQUIRED)
    filename = content["model"]["decoder"]["filename"]
    files.beside(path, filename)
    # Any other ending can mean another format to onnxruntime, which this checks nothing of.
    if not filename.endswith(".onnx"):
        raise WeightsError(f"{path} has model.decoder.filename {shorten(filename)}: it must end in .onnx")
    return content


def check_fits(folder: Path, config: Mapping[str, Any], graph: Graph) -> None:
    """Compares the names and numbers of a configuration with those that the graph has.

    Args:
        folder: holds genai_config.json.
        config: what `read` gave.
        graph: of the folder.

    Raises:
        WeightsError: one differs; the message has the key, its value and what the graph has.
    """
    model = config["model"]
    decoder = model["decoder"]

    def refuse(key: str, value: object, has: str) -> None:
        raise WeightsError(
            f"{folder / NAME} has {key} {value}, and the graph in {decoder['filename']} has {has}: copy or download "
            "both again"
        )

    # Where the file has no names, these are onnxruntime-genai's own.
    keys = decoder.get("inputs", {}).get("past_key_names", "past_key_values.%d.key")
    logits = graph.outputs.get(decoder.get("outputs", {}).get("logits", "logits"), ())
    cache = graph.inputs.get(keys % 0, ())
    layers = _count(keys, graph.inputs)
    for section, names in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        taken: set[str] = set()
        for key, pattern in decoder.get(section, {}).items():
            for name in [pattern % layer for layer in range(max(layers, 1))] if "%d" in pattern else [pattern]:
                if name not in names:
                    refuse(f"model.decoder.{section}.{key}", pattern, "no such name")
                if name in taken:
                    refuse(f"model.decoder.{section}.{key}", pattern, f"one {name}, which another key names")
                taken.add(name)
    mask = decoder.get("inputs", {}).get("attention_mask", "attention_mask")
    if graph.mask not in (None, mask):
        refuse("model.decoder.inputs.attention_mask", mask, f"{shorten(graph.mask)} for attention's lengths")
    for key, value, has in (
        ("num_hidden_layers", decoder.get("num_hidden_layers"), layers),
        ("num_key_value_heads", decoder.get("num_key_value_heads"), cache[1] if len(cache) == 4 else None),
        ("head_size", decoder["head_size"], graph.head_size),
    ):
        if None not in (value, has) and value != has:
            refuse(f"model.decoder.{key}", value, str(has))
    size = 8 * layers * decoder.get("num_key_value_heads", 1) * decoder["head_size"]
    if size > _MOST_CACHE:
        raise WeightsError(
            f"{folder / NAME} has keys and values of {size} bytes for each token (num_hidden_layers, "
            f"num_key_value_heads, head_size): they must be at most {_MOST_CACHE}; do not use this copy"
        )
    if graph.positions is not None and model["context_length"] > graph.positions:
        refuse("model.context_length", model["context_length"], f"{graph.positions} positions")
    if logits and logits[-1] is not None:
        if model["vocab_size"] != logits[-1]:
            refuse("model.vocab_size", model["vocab_size"], f"{logits[-1]} logits")
        ends = model["eos_token_id"]
        listed = ends if isinstance(ends, list) else [ends]
        if not listed or not all(0 <= end < logits[-1] for end in listed):
            refuse("model.eos_token_id", ends, f"{logits[-1]} logits")
    if "sliding_window" in decoder:
        windowed = [layer for layer, window in enumerate(graph.windows) if window]
        if not windowed:
            refuse("model.decoder.sliding_window", shorten(decoder["sliding_window"]), "no layer that keeps a window")
        # Anything else onnxruntime-genai takes for caches of another kind, and answers nothing.
        fitting: dict[str, object] = {"window_size": graph.windows[windowed[0]], "layers": windowed}
        for key, wanted in {**fitting, "slide_key_value_cache": False, "slide_inputs": False}.items():
            if (found := decoder["sliding_window"].get(key)) != wanted:
                refuse(f"model.decoder.sliding_window.{key}", shorten(found), str(wanted))


def rows(config: Mapping[str, Any], graph: Graph) -> int:
    """How many tokens a model has, by its graph or else by what `read` gave."""
    logits = graph.outputs.get(config["model"]["decoder"].get("outputs", {}).get("logits", "logits"), ())
    known: int | None = logits[-1] if logits else None
    size: int = config["model"]["vocab_size"]
    return size if known is None else known


def _count(pattern: str, names: Collection[str]) -> int:
    """How many layers have a name."""
    return next(layer for layer in itertools.count() if pattern % layer not in names)
