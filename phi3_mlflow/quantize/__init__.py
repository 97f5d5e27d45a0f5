"""A model of transformers as int4 ONNX for the CPU, with evidence of what rounding costs."""

from .check import Check
from .choices import Choices
from .exporter import export

__all__ = ["Check", "Choices", "export"]
