"""Our reader of ONNX files against the package onnx. Run with: python -m pytest tests/test_onnx_file.py"""

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest

from phi3_mlflow.runtime.decoders import onnx_file
from phi3_mlflow.runtime.errors import WeightsError

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

ONNX = Path(__file__).resolve().parent.parent / "artifacts" / "onnx"


def compare(graph, expected, folder):
    assert [value.name for value in expected.input] == graph.inputs
    assert [value.name for value in expected.output] == graph.outputs
    assert [tensor.name for tensor in expected.initializer] == list(graph.tensors)
    for tensor in expected.initializer:
        array = numpy_helper.to_array(tensor, str(folder))
        np.testing.assert_array_equal(graph.tensors[tensor.name], array)
        assert graph.tensors[tensor.name].dtype == array.dtype
    assert len(graph.nodes) == len(expected.node)
    for node, other in zip(graph.nodes, expected.node, strict=True):
        assert (node.name, node.op, node.domain) == (other.name, other.op_type, other.domain)
        assert (list(node.inputs), list(node.outputs)) == (list(other.input), list(other.output))
        assert list(node.attributes) == [attribute.name for attribute in other.attribute]
        for attribute in other.attribute:
            found, value = node.attributes[attribute.name], helper.get_attribute_value(attribute)
            if isinstance(found, np.ndarray):
                np.testing.assert_array_equal(found, numpy_helper.to_array(value))
            elif isinstance(found, onnx_file.Graph):
                compare(found, value, folder)
            elif isinstance(value, bytes):
                assert found == value.decode()
            elif isinstance(value, list):
                assert found == [each.decode() if isinstance(each, bytes) else each for each in value]
            else:
                assert found == value


def test_the_embedded_model_is_read_as_onnx_reads_it():
    compare(onnx_file.read(ONNX / "model.onnx"), onnx.load(ONNX / "model.onnx", load_external_data=False).graph, ONNX)


def saved(path, nodes=(), initializers=()):
    graph = helper.make_graph(list(nodes), "graph", [], [], list(initializers))
    onnx.save(helper.make_model(graph), path)
    return path, graph


def test_every_kind_of_attribute_and_tensor_is_read_as_onnx_reads_it(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.arange(6, dtype=np.int64)))],
        "inner",
        [],
        [helper.make_tensor_value_info("c", onnx.TensorProto.INT64, [6])],
    )
    node = helper.make_node(
        "Some",
        ["a", "", "b"],
        ["", "d"],
        name="né",
        domain="of.ours",
        f=0.0,
        g=-1.5,
        i=0,
        j=-(2**62),
        k=300,
        s="text",
        floats=[1.0, -2.5],
        ints=[3, -4, 2**40],
        strings=["x", "yé"],
        branch=inner,
    )
    kinds = onnx.TensorProto
    tensors = [
        helper.make_tensor("float list", kinds.FLOAT, [2, 2], [1.0, 2.0, 3.0, -4.0]),
        helper.make_tensor("int list", kinds.INT64, [3], [1, -2, 3]),
        helper.make_tensor("bytes as a list", kinds.UINT8, [2], [0, 255]),
        helper.make_tensor("negative list", kinds.INT32, [2], [-1, 7]),
        helper.make_tensor("empty", kinds.INT64, [0], []),
        helper.make_tensor("scalar", kinds.INT64, [], [5]),
        numpy_helper.from_array(np.array([True, False]), "raw bool"),
        numpy_helper.from_array(np.arange(4, dtype=np.float16), "raw half"),
        numpy_helper.from_array(np.arange(4, dtype=np.float64), "raw double"),
    ]
    path, expected = saved(tmp_path / "model.onnx", [node], tensors)
    compare(onnx_file.read(path), expected, tmp_path)


def test_halves_and_doubles_that_are_listed_are_refused_not_guessed(tmp_path):
    for kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
        path, _ = saved(tmp_path / "model.onnx", (), [helper.make_tensor("odd", kind, [1], [2.0])])
        with pytest.raises(WeightsError, match="the tensor odd without its numbers"):
            onnx_file.read(path)
    path, _ = saved(tmp_path / "model.onnx", (), [helper.make_tensor("odd", onnx.TensorProto.BFLOAT16, [1], [2.0])])
    with pytest.raises(WeightsError, match="the tensor odd of data type 16"):
        onnx_file.read(path)


def test_a_file_that_is_cut_off_anywhere_is_an_error_or_a_part_and_never_something_else(tmp_path):
    content = (ONNX / "model.onnx").read_bytes()
    shutil.copyfile(ONNX / "model.onnx.data", tmp_path / "model.onnx.data")
    whole = onnx_file.read(ONNX / "model.onnx")
    for end in range(1, len(content), 97):
        (tmp_path / "model.onnx").write_bytes(content[:end])
        try:
            graph = onnx_file.read(tmp_path / "model.onnx")
        except WeightsError:
            continue
        assert graph.nodes == whole.nodes


def test_arrays_are_the_mapped_file_itself_read_only_and_live_without_the_graph():
    graph = onnx_file.read(ONNX / "model.onnx")
    array = graph.tensors["model.embed_tokens.weight"]
    del graph
    gc.collect()
    assert not array.flags.writeable
    assert not array.flags.owndata
    expected = np.fromfile(ONNX / "model.onnx.data", np.float32, array.size).reshape(array.shape)
    np.testing.assert_array_equal(array, expected)
