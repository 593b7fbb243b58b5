"""Smaller networks: physical removal of channels, quantisation, files for integer runtimes, and how small a file can be."""

from .channels import Removal, remove_channels
from .encode import decode, encode
from .export import Exported, export_onnx
from .quantise import qat, quantise
from .runtime import Agreement, Runtime, agreement, kernels, safe_weight_bits, saturates

__all__ = [
    "Agreement",
    "Exported",
    "Removal",
    "Runtime",
    "agreement",
    "decode",
    "encode",
    "export_onnx",
    "kernels",
    "qat",
    "quantise",
    "remove_channels",
    "safe_weight_bits",
    "saturates",
]
