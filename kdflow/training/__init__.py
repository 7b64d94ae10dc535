"""The one loop that every algorithm and source goes through."""

from kdflow.training.loop import Observer, Trainer
from kdflow.training.metrics import EvalMetrics, StepMetrics
from kdflow.training.schedule import Evaluation, plan

__all__ = ["EvalMetrics", "Evaluation", "Observer", "StepMetrics", "Trainer", "plan"]
