"""The student: training under FSDP2, checkpoints, export."""

from kdflow.student.checkpoint import CheckpointStore
from kdflow.student.export import export_model
from kdflow.student.fsdp2 import FSDP2Student

__all__ = ["CheckpointStore", "FSDP2Student", "export_model"]
