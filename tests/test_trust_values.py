"""What the nodes of a graph may take, so that it makes nothing large. Run: pytest tests/test_trust_values.py."""

import attack
import numpy as np
import pytest
from click.testing import CliRunner

from phi3_mlflow.cli import cli
from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.trust import onnx_graph, onnx_values

onnx = pytest.importorskip("onnx")
MICROSOFT = "com.microsoft"
SHAPES = {
    "table": [64, 8], "matrix": [8, 8], "turned": [8, 64], "row": [8], "one": [], "axis": [1], "few": [2],
    "column": [12_000, 1], "long": [1, 12_000], "index": [100_000], "packed": [64, 1, 4], "scales": [64, 1],
    "cos": [16, 4], "wide": [8, 2**20 + 1], "wide row": [2**20 + 1],
}  # fmt: skip


def op(operator, *inputs, made="out", domain="", **attributes):
    """A node that is called as what it makes."""
    return onnx.helper.make_node(operator, inputs, made.split(), f"/{made.split()[0]}", domain=domain, **attributes)


def counted():
    """Rows' lengths less one, and the longest, as the model builder writes them."""
    return [
        op("ReduceSum", "attention_mask", "axis", made="sums"),
        op("Sub", "sums", "one", made="last"),
        op("Cast", "last", made="last32", to=6),
        op("Shape", "attention_mask", made="shape"),
        op("Gather", "shape", "one", made="total"),
        op("Cast", "total", made="total32", to=6),
    ]


@pytest.fixture
def check(tmp_path):
    """Checks a graph of some nodes, to which the states `x` of some tokens are given."""

    def run(*nodes):
        nodes = [op("Gather", "table", "input_ids", made="x"), *nodes]
        tensors = [onnx.TensorProto(name=name, dims=dims, data_type=1) for name, dims in SHAPES.items()]
        tensors += [onnx.numpy_helper.from_array(np.int64(number), f"={number}") for number in (-1, 0, 1, 2)]
        value = onnx.helper.make_tensor_value_info
        inputs = [value(name, 7, ["rows", "tokens"]) for name in ("input_ids", "attention_mask", "position_ids")]
        inputs += [value(f"past.{part}", 1, ["rows", 2, "past", 4]) for part in ("key", "value")]
        graph = onnx.helper.make_graph(nodes, "graph", inputs, [value("out", 1, None)], tensors)
        path = tmp_path / "model.onnx"
        onnx.save(onnx.helper.make_model(graph), path)
        return onnx_graph.check(path)

    return run


def attention(*more, **changed):
    inputs = {
        "query": "x", "key": "", "value": "", "past_key": "past.key", "past_value": "past.value",
        "seqlens_k": "last32", "total_sequence_length": "total32", "cos_cache": "cos", "sin_cache": "cos",
    } | changed  # fmt: skip
    outputs = "y present.key present.value"
    return [*counted(), *more, op("GroupQueryAttention", *inputs.values(), made=outputs, domain=MICROSOFT, num_heads=2)]


# What the model builder writes, of 2024 to today.
FINE = {
    "tied weights": [
        op("Transpose", "turned", made="t"),
        op("Gather", "t", "input_ids", made="e"),
        op("MatMul", "x", "turned"),
    ],
    "tied int4 weights": [
        op("Reshape", "packed", "few", made="p"),
        op("GatherBlockQuantized", "p", "input_ids", "scales", made="e", domain=MICROSOFT, block_size=32, bits=4),
        op("MatMulNBits", "x", "packed", "scales", domain=MICROSOFT, K=8, N=64, bits=4, block_size=32),
    ],
    "QDQ": [
        op("DequantizeLinear", "table", "scales", made="d"),
        op("Transpose", "d", made="t"),
        op("MatMul", "x", "t"),
    ],
    "norms of heads": [
        op("Reshape", "x", "few", made="h"),
        op("SimplifiedLayerNormalization", "h", "row", made="n"),
        op("Reshape", "n", "few", made="q"),
        *attention(query="q"),
    ],
    "positions in another shape": [
        *counted(),
        op("Unsqueeze", "total", "few", made="u"),
        op("Concat", "one", "u", made="s", axis=0),
        op("Reshape", "position_ids", "s", made="p"),
        op("RotaryEmbedding", "x", "p", "cos", "cos", domain=MICROSOFT),
    ],
    "a bias, an activation and a residual": [
        op("Add", "x", "row", made="b"),
        op("Sigmoid", "b", made="s"),
        op("Mul", "b", "s", made="m"),
        op("SkipSimplifiedLayerNormalization", "m", "x", "row", made="n", domain=MICROSOFT),
        op("Cast", "n", to=10),
    ],
    "padded rows": [op("Slice", "x", "few", "few", "few")],
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_what_the_model_builder_writes_is_taken(check, name):
    check(*FINE[name])


LARGE = {
    "a product of constants": ([op("MatMul", "matrix", "matrix")], "'matrix' (weights) as input 0 of the node '/out'"),
    "a sum of constants": ([op("Add", "column", "long")], "'long' (weights) as input 1 of the node '/out' (Add)"),
    "a table of all pairs": ([op("Add", "x", "column")], "'column' (weights) as input 1 of the node '/out' (Add)"),
    "a table of all pairs of states": (
        [op("Reshape", "x", "few", made="h"), op("Mul", "x", "h")],
        "'h' (heads) as input 1 of the node '/out' (Mul), which can only be states or counts or weights there",
    ),
    "a product with heads": ([op("Reshape", "x", "few", made="h"), op("MatMul", "h", "matrix")], "'h' (heads) as"),
    "a product of states": ([op("MatMul", "x", "x")], "'x' (states) as input 1 of the node '/out' (MatMul)"),
    "a sum of many counts": ([*counted(), op("Add", "sums", "index")], "'index' (weights) as input 1"),
    "rows by a constant": ([op("Gather", "table", "index")], "'index' (weights) as input 1 of the node '/out'"),
    "columns": ([op("Gather", "table", "input_ids", axis=1)], "'table' (weights) as input 0 of the node '/out'"),
    "rows of tokens in another shape": (
        [op("Reshape", "input_ids", "few", made="i"), op("Gather", "table", "i")],
        "'i' (heads) as input 1 of the node '/out' (Gather), which can only be tokens there",
    ),
    "wide rows": ([op("MatMul", "x", "wide")], "'wide' (weights) as input 1 of the node '/out' (MatMul), which is 10"),
    "a wide bias": ([op("Add", "x", "wide row")], "'wide row' (weights) as input 1 of the node '/out' (Add)"),
    "wide rows of int4": (
        [op("MatMulNBits", "x", "packed", "scales", domain=MICROSOFT, K=8, N=2**21)],
        "N 2097152 in the node '/out' (MatMulNBits), which must be from 1 to 1048576",
    ),
    "one tensor with itself": ([op("Concat", "table", "table", axis=0)], "'table' (weights) as input 0"),
    "states with themselves": ([op("Concat", "x", "x", axis=0)], "'x' (states) as input 0 of the node '/out' (Concat)"),
    "states in another rank": ([op("Unsqueeze", "x", "few")], "'x' (states) as input 0 of the node '/out' (Unsqueeze)"),
    "one matrix again and again": (
        [op("MatMul", "x", "matrix", made=f"m{i}") for i in range(3)],
        "'matrix' (weights) as input 1 of the node '/m2' (MatMul), which more than 2 nodes take",
    ),
    "one tensor turned again and again": (
        [op("Transpose", "table", made="t1"), op("Transpose", "t1", made="t2"), op("Transpose", "t2")],
        "'t2' (weights) as input 0 of the node '/out' (Transpose), which more than 2 nodes have made",
    ),
    "a value that comes later": ([op("Add", "y", "row"), op("Sigmoid", "x", made="y")], "'y' (nothing) as input 0"),
    "an input that is left out": ([op("Sigmoid", "")], "'' (nothing) as input 0 of the node '/out' (Sigmoid)"),
    "a constant without a tensor": ([op("Constant", value_int=1)], "no tensor in the node '/out' (Constant)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_what_could_make_much_of_little_is_refused_by_its_node(check, name):
    nodes, reason = LARGE[name]
    with pytest.raises(WeightsError) as refusal:
        check(*nodes)
    assert reason in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Range", "Tile", "GatherElements", "Trilu", "Where"])
def test_what_makes_large_tensors_of_a_shape_is_no_known_operator(check, operator):
    with pytest.raises(WeightsError, match=f"has the operator '{operator}' in the node '/out', which no decoder here"):
        check(op(operator, "few"))


def test_a_branch_gives_constants_alone(check):
    value = onnx.helper.make_tensor_value_info("b", 1, None)
    constant = onnx.helper.make_node("Constant", [], ["b"], value=onnx.TensorProto(dims=[16, 4], data_type=1))
    large = onnx.helper.make_node("MatMul", ["matrix", "matrix"], ["b"], "/large")

    def choice(node):
        graph = onnx.helper.make_graph([node], "branch", [], [value])
        return [*counted(), op("Greater", "total", "one", made="longer"),
                op("If", "longer", made="chosen", then_branch=graph, else_branch=graph)]  # fmt: skip

    check(*choice(constant), *attention(cos_cache="chosen"))
    with pytest.raises(WeightsError, match="has the operator 'MatMul' in the node '/large' of a branch"):
        check(*choice(large))
    with pytest.raises(WeightsError, match=r"has 'chosen' \(weights\) as input 1 of the node '/out' \(MatMul\)"):
        check(*choice(constant), op("MatMul", "x", "chosen"))


def test_a_graph_of_endless_nodes_is_refused(check, monkeypatch):
    monkeypatch.setattr(onnx_values, "_MOST_NODES", 100)
    check(*[op("Sigmoid", "x") for _ in range(99)])
    with pytest.raises(WeightsError, match="has 101 nodes, more than 100"):
        check(*[op("Sigmoid", "x") for _ in range(100)])


SUMS = "seqlens_k, which must be the attention mask's sums less one, as int32"
LENGTH = "which must be the attention mask's length, as int32"


@pytest.mark.parametrize(
    ("more", "changed", "reason"),
    [
        ([], {"seqlens_k": "total32"}, f"input 5 of the node '/y' (GroupQueryAttention), its {SUMS}"),
        ([], {"seqlens_k": "last"}, f"'last' (counts) as input 5 of the node '/y' (GroupQueryAttention), its {SUMS}"),
        ([], {"seqlens_k": "sums"}, f"'sums' (counts) as input 5 of the node '/y' (GroupQueryAttention), its {SUMS}"),
        ([], {"seqlens_k": "input_ids"}, "'input_ids' (tokens) as input 5 of the node '/y' (GroupQueryAttention)"),
        ([], {"seqlens_k": "x"}, "'x' (states) as input 5 of the node '/y' (GroupQueryAttention)"),
        ([], {"seqlens_k": "few"}, "'few' (weights) as input 5 of the node '/y' (GroupQueryAttention)"),
        ([], {"seqlens_k": ""}, "'' (nothing) as input 5 of the node '/y' (GroupQueryAttention)"),
        ([], {"total_sequence_length": "last32"}, "'last32' (counts) as input 6 of the node '/y' (GroupQ"),
        ([], {"total_sequence_length": "total"}, f"(GroupQueryAttention), its total_sequence_length, {LENGTH}"),
        (
            [op("Shape", "input_ids", made="s"), op("Gather", "s", "one", made="t"), op("Cast", "t", made="t32", to=6)],
            {"total_sequence_length": "t32"},
            f"'t32' (counts) as input 6 of the node '/y' (GroupQueryAttention), its total_sequence_length, {LENGTH}",
        ),
        ([op("Cast", "last", made="other", to=7)], {"seqlens_k": "other"}, f"its {SUMS}"),
        ([op("Sub", "sums", "=2", made="s"), op("Cast", "s", made="s32", to=6)], {"seqlens_k": "s32"}, f"its {SUMS}"),
        ([op("Sub", "=1", "sums", made="s"), op("Cast", "s", made="s32", to=6)], {"seqlens_k": "s32"}, f"its {SUMS}"),
        (
            [op("ReduceSum", "attention_mask", "=0", made="r"), op("Sub", "r", "=1", made="s"),
             op("Cast", "s", made="s32", to=6)],
            {"seqlens_k": "s32"},
            f"its {SUMS}",
        ),
        (
            [op("ReduceSum", "attention_mask", "few", made="r"), op("Sub", "r", "=1", made="s"),
             op("Cast", "s", made="s32", to=6)],
            {"seqlens_k": "s32"},
            f"its {SUMS}",
        ),
        (
            [op("Gather", "shape", "=0", made="t"), op("Cast", "t", made="t32", to=6)],
            {"total_sequence_length": "t32"},
            f"its total_sequence_length, {LENGTH}",
        ),
    ],
)  # fmt: skip
def test_attention_is_told_the_rows_lengths_and_nothing_else(check, more, changed, reason):
    assert check(*attention(*more)).mask == "attention_mask"
    with pytest.raises(WeightsError) as refusal:
        check(*attention(*more, **changed))
    assert reason in str(refusal.value)


def test_lengths_of_another_input_than_the_mask_are_refused(tmp_path):
    def swap(model):
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == "attention_mask":
                    node.input[place] = "input_ids"

    folder = attack.folder(tmp_path / "weights", {}, graph=swap)
    with pytest.raises(WeightsError, match=r"inputs\.attention_mask attention_mask, and .* has 'input_ids' for att"):
        trust.check(folder)


def test_wrong_lengths_in_one_layer_are_one_line_at_log(tmp_path):
    def rewire(model):
        node = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][2]
        node.input[5] = node.input[6]

    folder = attack.folder(tmp_path / "weights", {}, graph=rewire)
    result = CliRunner().invoke(cli, ["log", "onnx", "--weights", str(folder)])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert "as input 5 of the node '/model/layers.2/attn/GroupQueryAttention'" in line
    assert SUMS in line


def test_large_products_of_small_constants_are_refused_before_anything_is_computed(tmp_path):
    """33 KB, of which onnxruntime would make forty matrices of 12,000 by 12,000 at the load."""

    def chain(model):
        helper, graph = onnx.helper, model.graph
        size = helper.make_tensor("size", onnx.TensorProto.INT64, [2], [12_000, 12_000])
        graph.initializer.append(size)
        graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["c0"], "/c0"))
        for number in range(40):
            name = f"c{number + 1}"
            graph.node.append(helper.make_node("MatMul", [f"c{number}", "c0"], [name], f"/{name}"))

    folder = attack.folder(tmp_path / "weights", {}, graph=chain)
    assert (folder / "model.onnx").stat().st_size < 40_000
    with pytest.raises(WeightsError, match="has the operator 'ConstantOfShape' in the node '/c0'"):
        trust.check(folder)
