"""The student: training under FSDP2, checkpoints, export."""

from kdflow.student.checkpoint import CheckpointStore
from kdflow.student.checkpoint_folder import CheckpointFolder
from kdflow.student.export import export_checkpoint, export_model, read_weights
from kdflow.student.fsdp2 import FSDP2Student
from kdflow.student.random_state import seed_random_state

__all__ = [
    "CheckpointFolder",
    "CheckpointStore",
    "FSDP2Student",
    "export_checkpoint",
    "export_model",
    "read_weights",
    "seed_random_state",
]
