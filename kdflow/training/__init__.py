"""The one loop that every algorithm and source goes through."""

from kdflow.training.loop import Checkpoints, Observer, Trainer
from kdflow.training.metrics import EvalMetrics, StepMetrics, TeacherMetrics
from kdflow.training.no_teacher import NoTeacher
from kdflow.training.schedule import Evaluation, Save, plan

__all__ = [
    "Checkpoints",
    "EvalMetrics",
    "Evaluation",
    "NoTeacher",
    "Observer",
    "Save",
    "StepMetrics",
    "TeacherMetrics",
    "Trainer",
    "plan",
]
