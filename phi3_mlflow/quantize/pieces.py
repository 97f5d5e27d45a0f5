"""onnxruntime-genai's model builder, with one step of it done matrix by matrix: the process that `export` starts.

The builder (0.18, builders/base.py, Model.to_nbits) writes all float32 matrices into one protobuf before it quantizes
the first: 15 GiB for Phi-3-mini. Here each matrix is read, quantized by the same quantizer of onnxruntime, and let go;
the result is the same, bit by bit (tests/test_quantize_choices.py).

Takes the arguments of `python -m onnxruntime_genai.models.builder`.
"""

import gc
import logging
import runpy
from collections.abc import Iterator
from typing import Any

from phi3_mlflow.quantize.process import follow

if __name__ == "__main__":
    follow()  # the builder takes seconds to be imported

import onnx
import onnx_ir as ir
import onnxruntime_genai.models  # puts the builder's modules on Python's path  # noqa: F401
from builders.base import Model, QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

# What the builder calls its file's top-level code.
_BUILDER = "onnxruntime_genai.models.builder"
# The operators that are quantized, and which of their inputs holds the weights.
_WEIGHTS = {"MatMul": 1, "Gather": 0}


def to_nbits(self: Any) -> ir.Model:
    """Takes the place of the builder's `Model.to_nbits`."""
    gc.collect()  # the model of transformers, which is a cycle
    tensors = {}
    for value in _weights(self):
        # A tensor is a view of a mapped file, which stays in memory for as long as somebody holds one.
        tensors[value.name], value.const_value = value.const_value, None
        del self.model.graph.initializers[value.name]
    model = ir.to_proto(self.model)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    done = 0
    for node in nodes:
        name = node.input[_WEIGHTS[node.op_type]] if node.op_type in _WEIGHTS else ""
        if name not in tensors:
            model.graph.node.append(node)
            continue
        piece = _quantized(self, node, tensors.pop(name))
        model.graph.node.extend(piece.graph.node)
        model.graph.initializer.extend(piece.graph.initializer)
        done += 1
        print(f"Quantized {done} of {done + len(tensors)} matrices", flush=True)  # noqa: T201
    if all(domain.domain != "com.microsoft" for domain in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)
    return ir.from_proto(model)


def _weights(builder: Any) -> Iterator[ir.Value]:
    """The constant matrices of the operators that the builder quantizes."""
    for node in builder.model.graph:
        if node.op_type in builder.quant_attrs["op_types_to_quantize"]:
            value = node.inputs[_WEIGHTS[node.op_type]]
            if value.const_value is not None and len(value.const_value.shape) == 2:
                yield value


def _quantized(builder: Any, node: onnx.NodeProto, weights: Any) -> onnx.ModelProto:
    """A model of the one node, quantized as the builder's options say."""
    # Not by onnx.helper, which copies the weights into each message around them.
    piece = onnx.ModelProto(ir_version=10, opset_import=[onnx.helper.make_opsetid("", 21)])
    piece.graph.node.append(node)
    ir.serde.serialize_tensor_into(piece.graph.initializer.add(), weights)
    del weights
    bits = builder.int4_customized_weight_config.get(node.name, {}).get("bits", builder.quant_attrs["bits"])
    method = builder.quantization_algo
    quantizer = MatMulNBitsQuantizer(
        piece,
        bits=bits,
        block_size=builder.quant_attrs["matmul_block_size"],
        is_symmetric=builder.quant_attrs["is_symmetric"],
        accuracy_level=builder.quant_attrs["accuracy_level"],
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=builder.quant_attrs["op_types_to_quantize"],
        algo_config=None if method == "default" else builder.make_algo_config(method, {node.name: {"bits": bits}}),
    )
    quantizer.process()
    return quantizer.model.model


if __name__ == "__main__":
    for name in (MatMulNBitsQuantizer.__module__, "neural_compressor", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)  # a line for each node, and that a piece is no whole model
    Model.to_nbits = to_nbits
    runpy.run_module(_BUILDER, run_name="__main__", alter_sys=True)
