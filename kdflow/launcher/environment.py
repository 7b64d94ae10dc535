"""What the processes of a run have in their environment."""

from __future__ import annotations

import os


def child_environment(num_threads: int, **more: object) -> dict[str, str]:
    """This process's own, with CPU threads, and without the folder it was started in as one of Python's modules."""
    options = {"OMP_NUM_THREADS": num_threads, "PYTHONSAFEPATH": 1, **more}
    return {**os.environ, **{name: str(value) for name, value in options.items()}}
