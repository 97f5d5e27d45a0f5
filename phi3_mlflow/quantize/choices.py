"""How weights may be rounded: what the model builder of onnxruntime-genai and onnxruntime's MatMulNBits offer."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from phi3_mlflow.runtime.errors import Phi3Error, shorten

Precision = Literal["int4", "fp32"]
Method = Literal["rtn", "k_quant", "k_quant_mixed"]

PRECISIONS = ("int4", "fp32")
METHODS = ("rtn", "k_quant", "k_quant_mixed")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (1, 4)
OUTPUT_BITS = (4, 8)


@dataclass(frozen=True)
class Choices:
    """What a user may choose; None where it follows from the rest.

    Attributes:
        precision: `int4` rounds the matrices; `fp32` keeps them, and has no use for the rest.
        method: `rtn` rounds each weight to the nearest number; `k_quant` searches a scale and a zero point for each
            block, as llama.cpp does; `k_quant_mixed` keeps the output matrix and the most sensitive matrices (those
            of values and of the feed-forward's end, in the first and last eighth of the layers and in every third
            between) in 8 bits.
        block_size: how many weights share a scale: 16, 32, 64, 128 or 256.
        accuracy_level: 4 also rounds the activations to 8 bits, which is the fastest on a CPU; 1 computes in fp32.
        symmetric: whether blocks have a scale alone, or a zero point too. None: with `rtn`; k-quant always has both.
        output_bits: of the output matrix, 4 or 8. None: 8 with `k_quant_mixed`, else 4.
    """

    precision: Precision = "int4"
    method: Method = "rtn"
    block_size: int = 32
    accuracy_level: int = 4
    symmetric: bool | None = None
    output_bits: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("precision", self.precision, PRECISIONS),
            ("method", self.method, METHODS),
            ("block_size", self.block_size, BLOCK_SIZES),
            ("accuracy_level", self.accuracy_level, ACCURACY_LEVELS),
            ("symmetric", self.symmetric, (None, True, False)),
            ("output_bits", self.output_bits, (None, *OUTPUT_BITS)),
        ):
            if not any(value is each or (type(value) is type(each) and value == each) for each in allowed):
                choices = ", ".join(str(each) for each in allowed if each is not None)
                raise Phi3Error(f"`{name}` is {shorten(value)}; it must be one of {choices}")
        if self.precision == "fp32" and any(getattr(self, each.name) != each.default for each in fields(self)[1:]):
            raise Phi3Error("`precision` is 'fp32', which rounds nothing: leave the other choices out")
        if self.method != "rtn" and self.symmetric:
            raise Phi3Error(f"`symmetric` is True, and {self.method} always has zero points: leave it out, or use rtn")
        if self.method == "k_quant_mixed" and self.output_bits == 4:
            raise Phi3Error("`output_bits` is 4, and k_quant_mixed keeps the output matrix in 8: use k_quant")

    @property
    def is_symmetric(self) -> bool:
        """Whether blocks have a scale alone."""
        return self.method == "rtn" if self.symmetric is None else self.symmetric

    @property
    def last_bits(self) -> int:
        """Bits of the output matrix."""
        return self.output_bits or (8 if self.method == "k_quant_mixed" else 4)

    def algorithm(self, tied: bool) -> str:
        """The model builder's name for the function that rounds; empty for none.

        Args:
            tied: whether the embeddings are the output matrix.
        """
        if self.precision == "fp32":
            return ""
        # `default` rounds to nearest too, by another function. With `rtn` alone the builder (0.18) writes zero points
        # and 8 bits into embeddings that are shared with the output.
        plain = not tied or (self.is_symmetric and self.last_bits == 4)
        return "default" if self.method == "rtn" and plain else self.method

    def check(self, config: Mapping[str, Any]) -> None:
        """Compares the block size with the matrices.

        Args:
            config: of the model, as transformers has it.

        Raises:
            Phi3Error: the function that rounds cannot pack the zero points of an odd number of blocks (onnxruntime
                1.31, quantization/neural_compressor/weight_only.py).
        """
        if self.algorithm(bool(config.get("tie_word_embeddings"))) not in ("rtn", "k_quant", "k_quant_mixed"):
            return
        for name in ("hidden_size", "intermediate_size"):
            blocks = -(-int(config[name]) // self.block_size)
            if blocks % 2 and not self.is_symmetric:
                raise Phi3Error(
                    f"`block_size` is {self.block_size}, which makes {blocks} blocks of this model's {name} "
                    f"({config[name]}), and with {self.method} and zero points that has to be an even number: "
                    "choose another"
                )

    def options(self, tied: bool) -> list[str]:
        """The model builder's own, for `--extra_options`; see `algorithm`."""
        if self.precision == "fp32":
            return []
        options = [
            f"algo_config={self.algorithm(tied)}",
            f"block_size={self.block_size}",
            f"accuracy_level={self.accuracy_level}",
            f"is_symmetric={str(self.is_symmetric).lower()}",
        ]
        if self.last_bits == 8 and self.method != "k_quant_mixed":
            options.append("matmul_mixed_precision=last_matmul:int8")
        return options

    def to_dict(self) -> dict[str, Any]:
        """The choices with nothing left open, as quantization.json has them."""
        if self.precision == "fp32":
            return {"precision": "fp32"}
        return {
            "precision": self.precision,
            "method": self.method,
            "block_size": self.block_size,
            "accuracy_level": self.accuracy_level,
            "symmetric": self.is_symmetric,
            "output_bits": self.last_bits,
        }
