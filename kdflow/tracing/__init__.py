"""What a run's processes do when: timeline, NVTX ranges, torch.profiler."""

from kdflow.tracing.recorders import FOLDER, open_shared_trace, open_trace, share_trace
from kdflow.tracing.timeline import merge, merged_timeline
from kdflow.tracing.trace import OFF, Recorder, Trace

__all__ = [
    "FOLDER",
    "OFF",
    "Recorder",
    "Trace",
    "merge",
    "merged_timeline",
    "open_shared_trace",
    "open_trace",
    "share_trace",
]
