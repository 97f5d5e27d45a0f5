"""OpenVINO's paged attention: the operation, what it takes, and a proof that it computes what it should here.

Knows heads, windows and blocks; no model. What needs openvino takes it from here.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .base import CannotBatch

# Where this package is installed, `import openvino` tells its maker: it writes below the home folder, starts a process
# and connects. Where the package cannot be imported, openvino takes a stand-in that does nothing.
_TELEMETRY = "openvino_telemetry"
_absent = _TELEMETRY not in sys.modules
if _absent:
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
try:
    import openvino as ov
    from openvino import opset15 as ops
    from openvino.op import Constant, Parameter, _PagedAttentionExtension
finally:
    if _absent:
        del sys.modules[_TELEMETRY]

BLOCK = 32  # positions; the only size that OpenVINO's paged attention takes on the CPU

# By how much attention over values that spread by 1 may differ from its definition: what 8 bits leave of them.
_TOLERANCE = 0.1
_LISTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")


@dataclass(frozen=True)
class Heads:
    """Attention, which is the same in all layers.

    Attributes:
        query: heads of the queries.
        key: heads of the keys and values; each serves query // key heads of the queries.
        size: numbers in a head.
        scale: of the products of queries and keys.
        window: how many positions a token sees, itself included; 0 for all.
    """

    query: int
    key: int
    size: int
    scale: float
    window: int


def paging_inputs() -> dict[str, Any]:
    """Inputs of a model that say which sequences, and which of their blocks, the tokens of a step belong to.

    All are int32: `past_lens`, of each sequence the tokens that its blocks hold already; `subsequence_begins`, where
    its new ones begin, and where the last one's end; `block_indices`, the blocks of all sequences one after the other;
    `block_indices_begins`, where each one's begin, and where the last one's end; `max_context_len`, a scalar.
    """
    lists = {name: parameter(name, ov.Type.i32, [-1]) for name in _LISTS}
    return lists | {"max_context_len": parameter("max_context_len", ov.Type.i32, [])}


def cache_inputs(layer: int) -> tuple[Any, Any]:
    """Inputs for the keys and values of a layer. OpenVINO decides on type and shape when the model is compiled."""
    key, value = (parameter(f"{kind}_cache.{layer}", ov.Type.dynamic, [-1] * 4) for kind in ("key", "value"))
    return key, value


def give_caches(compiled: Any, request: Any, blocks: int) -> list[Any]:
    """Gives a request memory for so many blocks in each layer, which is used when it is first written; the tensors."""
    caches = []
    for port in compiled.inputs:
        name = port.get_any_name()
        if "_cache." in name:
            rest = [size.get_length() for size in list(port.get_partial_shape())[1:]]
            caches.append(ov.Tensor(port.get_element_type(), ov.Shape([blocks, *rest])))
            request.set_tensor(name, caches[-1])
    return caches


def attend(heads: Heads, parts: Sequence[Any], caches: Sequence[Any], paging: Mapping[str, Any]) -> Any:
    """Attention over queries, keys and values of (tokens, heads * size), which also fills the caches."""
    none_int, none_float, zero = number([], np.int32), number([]), number(0, np.int32)
    # The order is that of ov::op::PagedAttentionExtension in openvino 2026.4 (paged_attention.hpp).
    inputs = {
        **dict(zip(("query", "key", "value"), parts, strict=True)),
        **dict(zip(("key_cache", "value_cache"), caches, strict=True)),
        **{name: paging[name] for name in _LISTS},
        "scale": number(heads.scale),
        "sliding_window": number(heads.window, np.int32),
        "alibi_slopes": none_float,
        "max_context_len": paging["max_context_len"],
        "score_aggregation_window": none_int,
        "rotated_block_indices": none_int,
        "rotation_deltas": none_int,
        "rotation_trig_lut": none_float,
        "xattention_threshold": none_float,
        "xattention_block_size": zero,
        "xattention_stride": zero,
        "sinks": none_float,
        "adaptive_rkv_start_size": zero,
        "adaptive_rkv_evictable_sizes": none_int,
        "adaptive_rkv_diversity_block_set_indices": none_int,
        "adaptive_rkv_diversity_block_set_indices_begins": none_int,
        "token_type_ids": none_int,
        "qq_bias": number([], np.uint8),
        "qq_bias_begins": none_int,
    }
    found = _PagedAttentionExtension([_output(value) for value in inputs.values()])
    sizes = {"num_k_heads": heads.key, "num_v_heads": heads.key, "k_head_size": heads.size, "v_head_size": heads.size}
    for name, value in sizes.items():
        found.set_rt_info(value, name)
    return found.output(0)


def attention_model(heads: Heads) -> Any:
    """A model of attention alone: the inputs are `query`, `key` and `value`, those of paging, and a layer's caches."""
    counts = {"query": heads.query, "key": heads.key, "value": heads.key}
    parts = {name: parameter(name, ov.Type.f32, [-1, count * heads.size]) for name, count in counts.items()}
    paging, caches = paging_inputs(), cache_inputs(0)
    result = attend(heads, list(parts.values()), caches, paging)
    return ov.Model([ops.result(result)], [*parts.values(), *paging.values(), *caches], "attention")


def prove_attention(heads: Heads, properties: Mapping[str, Any], context_length: int) -> None:
    """Computes attention over random numbers with OpenVINO and by its definition, the window's edge included.

    Args:
        heads: as in the model; one head of the keys is tried.
        properties: how the model is compiled.
        context_length: the window is tried where sequences get longer than it is.

    Raises:
        CannotBatch: they differ.
    """
    heads = replace(heads, query=heads.query // heads.key, key=1)
    random = np.random.default_rng(0)
    length = heads.window + 40 if 0 < heads.window < context_length else 100
    keys, values = random.standard_normal((2, length, heads.size), np.float32)
    queries = random.standard_normal((length, heads.query, heads.size), np.float32)
    # The last token looks for the key at the window's edge, and more so for the one beyond it, which it may not see.
    edge = length - heads.window if 0 < heads.window < length else 1
    queries[-1] = 4 * random.standard_normal(heads.size, np.float32)
    keys[edge], keys[edge - 1] = queries[-1, 0], 2 * queries[-1, 0]
    compiled = ov.Core().compile_model(attention_model(heads), "CPU", dict(properties))
    request = compiled.create_infer_request()
    blocks = list(range(-(-length // BLOCK)))[::-1]
    caches = give_caches(compiled, request, len(blocks))
    # A prompt, several tokens behind it, and a single one.
    for start, end in ((0, length - 4), (length - 4, length - 1), (length - 1, length)):
        used = blocks[: -(-end // BLOCK)]
        inputs: dict[str, Any] = {
            "past_lens": [start],
            "subsequence_begins": [0, end - start],
            "block_indices": used,
            "block_indices_begins": [0, len(used)],
            "max_context_len": end,
        }
        inputs = {name: np.array(value, np.int32) for name, value in inputs.items()}
        inputs |= {"key": keys[start:end], "value": values[start:end]}
        inputs["query"] = queries[start:end].reshape(end - start, -1)
        for name, value in inputs.items():
            request.set_tensor(name, ov.Tensor(value))
        request.infer()
        found = request.get_output_tensor(0).data.reshape(end - start, heads.query, heads.size)
        for at in range(max(start, end - 4), end):
            expected = _attended(queries[at], keys[: at + 1], values[: at + 1], heads)
            if not np.abs(found[at - start] - expected).max() <= _TOLERANCE:
                raise CannotBatch(f"OpenVINO's attention is wrong for token {at} with a window of {heads.window}")
    del caches


def parameter(name: str, kind: Any, shape: Sequence[int]) -> Any:
    """An input of a model; -1 for a size that may be any."""
    found = Parameter(kind, ov.PartialShape(list(shape)))
    found.set_friendly_name(name)
    found.output(0).set_names({name})
    return found


def number(value: Any, dtype: Any = np.float32) -> Any:
    """A constant, of a number or of lists of numbers."""
    return Constant(np.array(value, dtype))


def _attended(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, heads: Heads) -> np.ndarray:
    """Attention of one token's queries (heads, size) over keys and values (tokens, size), by its definition."""
    seen = slice(-heads.window if heads.window else None, None)
    scores = heads.scale * queries @ keys[seen].T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights @ values[seen] / weights.sum(axis=1, keepdims=True)


def _output(value: Any) -> Any:
    return value.output(0) if hasattr(value, "output") else value
