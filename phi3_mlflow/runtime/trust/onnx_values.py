"""What the nodes of an ONNX graph may take: never of what they would make more than the files hold or the caller gives.

A few kilobytes could ask for endless memory or work, at the load (onnxruntime computes at once what depends on no
input) or at the first token. So every value is of one kind, and no operator makes a large one of small ones:

- weights: what the file holds, as it is, turned or unpacked. A matrix is used twice at most, as tied embeddings are.
- tokens: an input with a number for each token, and cache: one with keys and values.
- counts: how long the rows are. A shape is made of them, which nothing but Reshape takes.
- states: for each token at most as many numbers as a matrix is wide. Heads are states or tokens in another shape, which
  nothing is added to or multiplied with: that could make a table of all pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ..errors import shorten
from .protobuf import Reader

_MOST_NODES = 20_000  # an exported layer has 12 to 20
_WIDEST = 2**20  # rows or columns of a matrix; a vocabulary has at most so many
_MOST_USES = 2  # of a matrix
_MOST_STEPS = 2  # from the file to a product: unpacked, and turned
_MOST_MADE = 5  # steps from an input that are remembered; attention's lengths have three
_INT32 = 6  # TensorProto.DataType

WEIGHTS, TOKENS, CACHE, COUNTS, SHAPE, STATES, HEADS = (
    "weights", "tokens", "a cache", "counts", "a shape", "states", "heads"
)  # fmt: skip


@dataclass
class Value:
    """What is known of a value.

    Attributes:
        kind: see above.
        shape: of weights; None where it is not known.
        number: of weights of one whole number; None where it is not known.
        steps: of weights, how many nodes made them of what the file holds.
        uses: of weights, how many nodes take them as a matrix.
        made: of tokens and counts, the input and the first operators that made it of that.
    """

    kind: str
    shape: Sequence[int] | None = None
    number: int | None = None
    steps: int = 0
    uses: int = 0
    made: tuple[str, ...] = ()

    @property
    def vector(self) -> bool:
        """Whether it is weights in one row, or a single number."""
        shape = self.shape
        return self.kind == WEIGHTS and shape is not None and len(shape) <= 1 and max(shape, default=1) <= _WIDEST

    @property
    def single(self) -> bool:
        """Whether it is weights of one number."""
        return self.kind == WEIGHTS and self.shape is not None and set(self.shape) <= {1}


@dataclass
class Node:
    """One operation, as far as it matters here.

    Attributes:
        domain: of the operator; empty for ONNX's own.
        numbers: its attributes that are whole numbers.
        tensors: those that are tensors.
    """

    name: str = ""
    domain: str = ""
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Value] = field(default_factory=dict)


def check(
    reader: Reader,
    nodes: Sequence[Node],
    inputs: Mapping[str, Sequence[int | None]],
    weights: Mapping[str, Value],
) -> str | None:
    """Follows the values through a graph.

    Args:
        reader: of the file.
        nodes: in their order; their operators are known.
        inputs: the shapes of the graph's inputs, by their names.
        weights: its tensors, by their names.

    Returns:
        The input that attention takes for its mask; None where there is no attention.

    Raises:
        WeightsError: a node takes a value of a kind that its operator must not take there; the message names both.
    """
    if len(nodes) > _MOST_NODES:
        raise reader.refused(f"has {len(nodes)} nodes, more than {_MOST_NODES}")
    values = {name: Value(TOKENS if len(shape) < 4 else CACHE, made=(name,)) for name, shape in inputs.items()}
    values |= weights
    mask = None
    for node in nodes:
        taking = _Taking(reader, node, values)
        made = OPERATORS[node.domain][node.operator](taking)
        others = made
        if node.operator == "GroupQueryAttention":
            others = Value(CACHE)
            mask = _check_lengths(taking, mask)
        values |= {name: others if place else made for place, name in enumerate(node.outputs) if name}
    return mask


class _Taking:
    """A node that takes its inputs one by one."""

    def __init__(self, reader: Reader, node: Node, values: Mapping[str, Value]):
        self.reader, self.node, self.values = reader, node, values

    @property
    def rest(self) -> range:
        """The places of its inputs behind the first."""
        return range(1, len(self.node.inputs))

    def refuse(self, place: int, why: str) -> NoReturn:
        """Raises what says that the node must not take an input."""
        name = self.node.inputs[place] if place < len(self.node.inputs) else ""
        kind = self.values[name].kind if name in self.values else "nothing"
        raise self.reader.refused(
            f"has {shorten(name)} ({kind}) as input {place} of the node {shorten(self.node.name)} "
            f"({self.node.operator}), {why}"
        )

    def take(self, place: int, *kinds: str) -> Value:
        """An input that has to be there, of one of these kinds."""
        value = self.values.get(self.node.inputs[place]) if place < len(self.node.inputs) else None
        if value is None or value.kind not in kinds:
            self.refuse(place, f"which can only be {' or '.join(kinds)} there")
        return value

    def take_if_there(self, place: int, *kinds: str) -> None:
        if place < len(self.node.inputs) and self.node.inputs[place]:
            self.take(place, *kinds)

    def vectors(self, start: int) -> None:
        """The inputs from a place on, which may be left out."""
        for place in range(start, len(self.node.inputs)):
            if self.node.inputs[place] and not self.take(place, WEIGHTS).vector:
                self.refuse(place, "which can only be one row of weights there")

    def matrix(self, place: int) -> Value:
        """Weights that the work or the size of what is made depends on."""
        value = self.take(place, WEIGHTS)
        value.uses += 1
        if value.uses > _MOST_USES:
            self.refuse(place, f"which more than {_MOST_USES} nodes take")
        if value.shape is not None and max(value.shape, default=1) > _WIDEST:
            self.refuse(place, f"which is {max(value.shape)} wide, more than {_WIDEST}")
        return value

    def counts(self, value: Value, by: Value | None = None) -> Value:
        """What the node makes of counts or tokens by a number: the axis of tokens, or what lengths are lessened by."""
        one = by is None or (by.single and by.number in (None, 1))
        return self.counted(value, self.node.operator if one else f"{self.node.operator} by another")

    def counted(self, value: Value, step: str) -> Value:
        """Counts that a step makes of others."""
        return Value(COUNTS, made=(*value.made, step)[:_MOST_MADE])

    def number(self, name: str, most: int) -> int:
        """An attribute from 1 on."""
        value = self.node.numbers.get(name, 0)
        if not 1 <= value <= most:
            raise self.reader.refused(
                f"has {name} {value} in the node {shorten(self.node.name)} ({self.node.operator}), which must be from "
                f"1 to {most}"
            )
        return value


def _check_lengths(taking: _Taking, mask: str | None) -> str:
    """The input whose rows' lengths an attention takes, which must be that of all."""
    for place, operators, words in (
        (5, ("ReduceSum", "Sub", "Cast"), "seqlens_k, which must be the attention mask's sums less one, as int32"),
        (6, ("Shape", "Gather", "Cast"), "total_sequence_length, which must be the attention mask's length, as int32"),
    ):
        made = taking.take(place, COUNTS).made
        if made[1:] != operators or mask not in (None, made[0]):
            taking.refuse(place, f"its {words}")
        mask = made[0]
    assert mask is not None
    return mask


def _same(taking: _Taking) -> Value:
    taking.vectors(1)  # the bias that some have
    return taking.take(0, STATES)


def _norm(taking: _Taking) -> Value:
    taking.vectors(1)
    return taking.take(0, STATES, HEADS)


def _skip_norm(taking: _Taking) -> Value:
    taking.vectors(2)
    taking.take(1, STATES)
    return taking.take(0, STATES)


def _identity(taking: _Taking) -> Value:
    return taking.take(0, WEIGHTS, TOKENS, CACHE, COUNTS, SHAPE, STATES, HEADS)


def _constant(taking: _Taking) -> Value:
    value = taking.node.tensors.get("value")
    if value is None:
        raise taking.reader.refused(f"has no tensor in the node {shorten(taking.node.name)} (Constant)")
    return value


def _cast(taking: _Taking) -> Value:
    value = taking.take(0, STATES, HEADS, TOKENS, COUNTS)
    step = "Cast" if taking.node.numbers.get("to") == _INT32 else "Cast to another type"
    return taking.counted(value, step) if value.kind == COUNTS else value


def _combined(taking: _Taking) -> Value:
    """Two operands, of which one may be a row of weights; with counts a single number."""
    left, right = (taking.take(place, STATES, COUNTS, WEIGHTS) for place in (0, 1))
    value, other = (right, left) if left.kind == WEIGHTS else (left, right)
    if value.kind == STATES and (other.kind == STATES or other.vector):
        return value
    if value.kind == COUNTS and other.single:
        return taking.counts(left, right)
    return taking.refuse(1, f"which cannot go with {left.kind}")


def _sums(taking: _Taking) -> Value:
    return taking.counts(taking.take(0, TOKENS), taking.take(1, WEIGHTS))


def _sizes(taking: _Taking) -> Value:
    return taking.counts(taking.take(0, TOKENS, CACHE, STATES))


def _gather(taking: _Taking) -> Value:
    data = taking.take(0, WEIGHTS, COUNTS)
    if data.kind == COUNTS:
        index = taking.take(1, WEIGHTS)
        if not index.single:
            taking.refuse(1, "which must be a single number there")
        return taking.counts(data, index)
    taking.take(1, TOKENS)
    return _rows(taking, "axis", taking.matrix(0).shape)


def _gather_quantized(taking: _Taking) -> Value:
    taking.matrix(0)
    taking.take(1, TOKENS)
    scales = taking.take(2, WEIGHTS).shape
    taking.take_if_there(3, WEIGHTS)
    if scales and scales[-1] * taking.number("block_size", _WIDEST) > _WIDEST:
        taking.refuse(2, f"which make rows of more than {_WIDEST}")
    return _rows(taking, "gather_axis", scales)


def _rows(taking: _Taking, axis: str, shape: Sequence[int] | None) -> Value:
    """A row of a matrix for each token."""
    if shape is None or len(shape) != 2 or taking.node.numbers.get(axis, 0):
        taking.refuse(0, "which must be a matrix there, of which rows are taken")
    return Value(STATES)


def _product(taking: _Taking) -> Value:
    shape = taking.matrix(1).shape
    if shape is None or len(shape) != 2:
        taking.refuse(1, "which must be a matrix there")
    return taking.take(0, STATES)


def _quantized_product(taking: _Taking) -> Value:
    taking.matrix(1)
    for place in range(2, len(taking.node.inputs)):
        taking.take_if_there(place, WEIGHTS)
    taking.number("N", _WIDEST)
    return taking.take(0, STATES)


def _reshaped(taking: _Taking) -> Value:
    value = taking.take(0, STATES, HEADS, TOKENS, WEIGHTS)
    taking.take(1, WEIGHTS, SHAPE)
    return _stored(taking, None) if value.kind == WEIGHTS else Value(HEADS)


def _turned(taking: _Taking) -> Value:
    shape = taking.take(0, WEIGHTS).shape
    # How is not read: both sides are taken for the longer one.
    return _stored(taking, None if shape is None else [max(shape, default=1)] * len(shape))


def _unpacked(taking: _Taking) -> Value:
    taking.take(1, WEIGHTS)
    taking.take_if_there(2, WEIGHTS)
    return _stored(taking, taking.take(0, WEIGHTS).shape)


def _stored(taking: _Taking, shape: Sequence[int] | None) -> Value:
    """Weights that are made of others when the graph is loaded."""
    steps = taking.matrix(0).steps + 1
    if steps > _MOST_STEPS:
        taking.refuse(0, f"which more than {_MOST_STEPS} nodes have made of what the file holds")
    return Value(WEIGHTS, shape, steps=steps)


def _parts(taking: _Taking) -> Value:
    for place in taking.rest:
        taking.take_if_there(place, WEIGHTS)
    return taking.take(0, STATES)


def _unsqueezed(taking: _Taking) -> Value:
    taking.vectors(1)
    return taking.counts(taking.take(0, COUNTS))


def _shape(taking: _Taking) -> Value:
    for place in range(len(taking.node.inputs)):
        if taking.take(place, COUNTS, WEIGHTS).kind == WEIGHTS and not taking.values[taking.node.inputs[place]].single:
            taking.refuse(place, "which must be a single number there")
    return Value(SHAPE)


def _chosen(taking: _Taking) -> Value:
    """One of two tables, whose shape nobody knows beforehand."""
    taking.take(0, COUNTS)
    return Value(WEIGHTS)


def _rotated(taking: _Taking) -> Value:
    taking.take(1, TOKENS, HEADS)  # the positions
    for place in (2, 3):
        taking.take(place, WEIGHTS)
    return taking.take(0, STATES, HEADS)


def _attention(taking: _Taking) -> Value:
    taking.take(0, STATES, HEADS)
    for place in (1, 2):
        taking.take_if_there(place, STATES, HEADS)
    for place in (3, 4):
        taking.take_if_there(place, CACHE)
    for place in range(7, len(taking.node.inputs)):
        taking.take_if_there(place, WEIGHTS, TOKENS)
    return Value(STATES)


# What the model builder of onnxruntime-genai writes for the models here (0.3 of 2024 to 0.18, for its attention on the
# CPU, on CUDA in half precision and on DirectML), and what onnxruntime fuses of it when it saves an optimised graph.
_Maker = Callable[[_Taking], Value]
_STANDARD: Mapping[str, _Maker] = {
    **dict.fromkeys(("Gelu", "Sigmoid"), _same),
    **dict.fromkeys(("LayerNormalization", "SimplifiedLayerNormalization"), _norm),
    **dict.fromkeys(("Add", "Greater", "Mul", "Sub"), _combined),
    **dict.fromkeys(("Slice", "Split"), _parts),
    "Cast": _cast,
    "Concat": _shape,
    "Constant": _constant,
    "DequantizeLinear": _unpacked,
    "Gather": _gather,
    "Identity": _identity,
    "If": _chosen,
    "MatMul": _product,
    "ReduceSum": _sums,
    "Reshape": _reshaped,
    "Shape": _sizes,
    "Transpose": _turned,
    "Unsqueeze": _unsqueezed,
}
_MICROSOFT: Mapping[str, _Maker] = {
    **dict.fromkeys(("BiasGelu", "FastGelu", "Gelu", "QuickGelu"), _same),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
    "GatherBlockQuantized": _gather_quantized,
    "GroupQueryAttention": _attention,
    "MatMulNBits": _quantized_product,
    "RotaryEmbedding": _rotated,
    "SimplifiedLayerNormalization": _norm,
}
# By domain; the standard one has two names.
OPERATORS = {"": _STANDARD, "ai.onnx": _STANDARD, "com.microsoft": _MICROSOFT}
