"""Which ring carries the hidden states of a run: chosen once by the launcher, attached by both sides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kdflow import _ring
from kdflow.config import TransportConfig
from kdflow.errors import ConfigError
from kdflow.transport.cuda import RingChoice, choose_ring
from kdflow.transport.cuda_ring import CudaRing
from kdflow.transport.ring import HiddenRing, RequestRing, Role
from kdflow.transport.turns import students_have_the_turn

if TYPE_CHECKING:
    import torch

_BY_REACH = ("host", "pinned", "device")


def choose_hidden_ring(config: TransportConfig, pairs: Iterable[tuple[int | None, int | None]]) -> RingChoice:
    """One kind for all pairs of teacher GPU and student GPU (None: CPU): what suits the least of them.

    Raises:
        ConfigError: `transport.placement` asks for more than a pair has, or for checksums on GPUs.
    """
    choices = [choose_ring(producer=teacher, consumer=student) for teacher, student in pairs]
    found = min(choices, key=lambda choice: _BY_REACH.index(choice.kind))
    wanted = config.placement
    if config.checksum:
        if wanted in ("pinned", "device"):
            raise ConfigError(f"transport.checksum: a {wanted} ring has none; use transport.placement host or auto")
        return RingChoice("host", "only this one has checksums")
    if wanted == "auto" and config.schedule == "colocate" and found.kind == "device":
        return RingChoice("pinned", "what waits for the student's turn leaves the GPU to it")
    if wanted == "auto":
        return found
    if _BY_REACH.index(wanted) > _BY_REACH.index(found.kind):
        raise ConfigError(f"transport.placement: {wanted} cannot be had, {found.kind} can: {found.reason}; use auto")
    return RingChoice(wanted, "transport.placement asks for it")


def create_hidden_ring(
    choice: RingChoice, config: TransportConfig, *, name: str, slot_bytes: int
) -> HiddenRing | CudaRing:
    """The memory on the host's side; needs no GPU."""
    if choice.kind == "host":
        return HiddenRing.create(name=name, num_slots=config.num_slots, slot_bytes=slot_bytes, checksum=config.checksum)
    return CudaRing.create(name=name, num_slots=config.num_slots, slot_bytes=slot_bytes, placement=choice.kind)


def attach_hidden_ring(handle: str, *, placement: str, role: Role, device: torch.device) -> HiddenRing | CudaRing:
    """Joins as one side that computes on `device`; a CPU's side of a pinned ring is a host ring's.

    Args:
        placement: kind of the ring, as it was chosen.
    """
    if placement == "host" or device.type == "cpu":
        return HiddenRing.attach(handle, role=role)
    return CudaRing.attach(handle, role=role, device=device.index)


class Seats:
    """Peers that do nothing: while they sit, the other side of each ring knows that somebody will come.

    Args:
        requests: handle of the request ring, where a receiver sits.
        hidden: handles of the data rings, of any kind, where producers sit; no GPU is touched.
        turns: handle of the turn ring, where teachers and students take turns.
    """

    def __init__(self, requests: str, hidden: Iterable[str], turns: str | None = None) -> None:
        self._requests = RequestRing.attach(requests, role="consumer")
        self._hidden = [_ring.Ring.attach(handle, role="producer", many_consumers=False) for handle in hidden]
        self._turns = None if turns is None else HiddenRing.attach(turns, role="producer")

    def has_students(self) -> bool:
        """Whether anybody is there who asks."""
        return bool(self._requests.peers()["producer"])

    def students_have_the_turn(self) -> bool:
        return self._turns is not None and students_have_the_turn(self._turns)

    def leave(self) -> None:
        for ring in self._hidden:
            ring.close()
        if self._turns is not None:
            self._turns.close()
        self._requests.close()
