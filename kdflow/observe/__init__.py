"""What people see of a run: progress, JSON lines, TensorBoard."""

from kdflow.observe.progress import Progress
from kdflow.observe.recorder import Recorder

__all__ = ["Progress", "Recorder"]
