"""What people see of a run: progress, JSON lines, TensorBoard, W&B."""

from kdflow.observe.progress import Progress, Terminal
from kdflow.observe.recorder import Recorder
from kdflow.observe.wandb_recorder import WandbRecorder, check_wandb

__all__ = ["Progress", "Recorder", "Terminal", "WandbRecorder", "check_wandb"]
