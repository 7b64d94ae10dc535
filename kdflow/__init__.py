"""Distillation of large language models: hidden states from an engine, a fused loss, FSDP2."""

from importlib.metadata import version

__version__ = version("kdflow")
