"""From conversations to packed microbatches."""

from kdflow.data.chat import ChatTokenizer
from kdflow.data.dataset import Dataset, DatasetReport, load_datasets
from kdflow.data.packing import Step, pack_step, training_steps
from kdflow.data.sources import load_rows

__all__ = [
    "ChatTokenizer",
    "Dataset",
    "DatasetReport",
    "Step",
    "load_datasets",
    "load_rows",
    "pack_step",
    "training_steps",
]
