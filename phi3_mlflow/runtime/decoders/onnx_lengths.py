"""What of an ONNX graph depends on the attention mask alone: computed for a few masks, and not to be translated.

Knows the integer operators that occur there; no weights, and nothing of what the lengths are used for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .onnx_file import Graph, Node


class Lengths:
    """The nodes that depend on the mask alone, and what comes of them.

    Args:
        graph: the whole graph.
        mask: the name of its attention mask, of (rows, tokens), 1 for a token and 0 behind a row's last one.

    Attributes:
        tables: pairs of rotary tables by the name of the value that is one or the other, the one for short first.
        switch: sequences of more positions than this take the second table.
    """

    def __init__(self, graph: Graph, mask: str):
        self._mask = mask
        self._graph = graph
        self.tables: dict[str, list[np.ndarray]] = {}
        self.switch: int | None = None
        # Two rows of different lengths, as they are decoded together.
        self._known = self._evaluate(np.array([[1] * 7, [1] * 5 + [0] * 2]))
        for node in graph.nodes:
            if node.op == "If" and node.input(0) in self._known:
                self._take_branches(node)

    def explains(self, node: Node) -> bool:
        """Whether the node is part of it."""
        return all(name in self._known or name in self.tables for name in node.outputs if name)

    def are(self, last: str, total: str) -> bool:
        """Whether the values are the rows' lengths less one, and the length of the longest one."""
        expected = {last: [6, 4], total: [7]}
        return all(name in self._known and self._known[name].ravel().tolist() == expected[name] for name in expected)

    def _evaluate(self, mask: np.ndarray) -> dict[str, np.ndarray]:
        known = {self._mask: mask}
        for node in self._graph.nodes:
            if node.op == "Constant" and isinstance(value := node.attributes.get("value"), np.ndarray):
                known[node.outputs[0]] = value
            compute = None if node.domain else _INTEGERS.get(node.op)
            inputs = [known.get(name, self._graph.tensors.get(name)) for name in node.inputs if name]
            if compute and any(name in known for name in node.inputs) and all(value is not None for value in inputs):
                known[node.outputs[0]] = np.asarray(compute(node.attributes, *inputs))
        return known

    def _take_branches(self, node: Node) -> None:
        """An If that gives rotary tables: which is for which length is tried out."""
        branches = [node.attributes.get(name) for name in ("else_branch", "then_branch")]
        tables = [_branch(branch) for branch in branches]
        if any(len(table) != len(node.outputs) for table in tables):
            return  # It stays unknown, and is refused by its name.
        short = len(tables[0][0])
        taken = [bool(self._evaluate(np.ones((1, length)))[node.input(0)].all()) for length in (1, short, short + 1)]
        if taken != [False, False, True]:
            return
        self.switch = short
        self.tables |= {name: [table[index] for table in tables] for index, name in enumerate(node.outputs)}


_INTEGERS: Mapping[str, Callable[..., Any]] = {
    "Cast": lambda attributes, x: x,
    "Gather": lambda attributes, x, index: np.take(x, index.astype(int), attributes.get("axis", 0)),
    "Greater": lambda attributes, x, y: x > y,
    "ReduceSum": lambda attributes, x, axes: x.sum(tuple(axes.tolist()), keepdims=bool(attributes.get("keepdims", 1))),
    "Shape": lambda attributes, x: x.shape,
    "Sub": lambda attributes, x, y: x - y,
}


def _branch(graph: Any) -> list[np.ndarray]:
    """What a branch of an If gives, where that is constants only; else nothing."""
    if not isinstance(graph, Graph):
        return []
    known = dict(graph.tensors)
    for node in graph.nodes:
        if node.op == "Constant" and isinstance(value := node.attributes.get("value"), np.ndarray):
            known[node.outputs[0]] = value
    return [known[name] for name in graph.outputs if name in known]
