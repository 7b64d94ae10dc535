"""Distillation algorithms, one a file."""

from kdflow.algorithms.base import ALGORITHMS, Algorithm, ModelInfo

__all__ = ["ALGORITHMS", "Algorithm", "ModelInfo"]
