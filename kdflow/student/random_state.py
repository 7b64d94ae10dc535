"""The random state of a rank: what dropout goes by."""

from __future__ import annotations

import pickle
import random

import numpy as np
import torch


def random_state() -> bytes:
    """That of torch (CPU and current GPU), of Python and of NumPy."""
    states = {"torch": torch.get_rng_state().numpy(), "python": random.getstate(), "numpy": np.random.get_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy()
    return pickle.dumps(states)


def set_random_state(state: bytes) -> None:
    """Puts back what `random_state` took."""
    states = pickle.loads(state)
    torch.set_rng_state(torch.from_numpy(states["torch"]))
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(states["cuda"]))


def seed_random_state(seed: int, num_steps_done: int, rank: int) -> None:
    """A state of its own for each rank and each step that a run may begin at."""
    (number,) = np.random.SeedSequence((seed, num_steps_done, rank)).generate_state(1)
    torch.manual_seed(int(number))
    random.seed(int(number))
    np.random.seed(int(number))
