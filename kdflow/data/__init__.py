"""From conversations to packed microbatches."""

from kdflow.data.balance import balance
from kdflow.data.chat import ChatTokenizer
from kdflow.data.dataset import Dataset, load_datasets
from kdflow.data.mixture import Mixture, apportion
from kdflow.data.packing import Step, pack_step, training_steps
from kdflow.data.report import DatasetReport

__all__ = [
    "ChatTokenizer",
    "Dataset",
    "DatasetReport",
    "Mixture",
    "Step",
    "apportion",
    "balance",
    "load_datasets",
    "pack_step",
    "training_steps",
]
