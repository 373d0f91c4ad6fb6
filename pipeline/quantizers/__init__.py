"""Quantizers: one algorithm a file, one base contract, one registry."""

from pipeline.quantizers.base import Quantizer, QuantizerOutput
from pipeline.quantizers.registry import QuantizerConfig, build_quantizer

__all__ = ["Quantizer", "QuantizerConfig", "QuantizerOutput", "build_quantizer"]
