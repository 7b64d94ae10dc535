"""The one loop that every algorithm and source goes through."""

from kdflow.training.loop import Checkpoints, Observer, Trainer
from kdflow.training.metrics import EvalMetrics, StepMetrics, TeacherMetrics
from kdflow.training.no_teacher import NoTeacher
from kdflow.training.schedule import Evaluation, Save, plan
from kdflow.training.turns import Colocate, Overlap

__all__ = [
    "Checkpoints",
    "Colocate",
    "EvalMetrics",
    "Evaluation",
    "NoTeacher",
    "Observer",
    "Overlap",
    "Save",
    "StepMetrics",
    "TeacherMetrics",
    "Trainer",
    "plan",
]
