"""Taking the ticket of a message, which may come to more than one: the death of who had it returns it to its ring."""

from __future__ import annotations

from kdflow.errors import PeerDied, TransportError
from kdflow.transport.cuda_ring import CudaRing, CudaWriteSlot
from kdflow.transport.ring import HiddenRing
from kdflow.transport.slots import WriteSlot


def claim(ring: HiddenRing | CudaRing, ticket: int, *, timeout_s: float = 30.0) -> WriteSlot | CudaWriteSlot | None:
    """The slot, or None where nobody waits for it from us: the student has left, or somebody else has the ticket or
    has answered it, as it was asked for twice.
    """
    try:
        return ring.reserve(ticket, timeout_s=timeout_s)
    except PeerDied:
        return None
    except TransportError as error:
        # A refusal is of no other kind, and names the ticket; all else is a failure of the ring or the device.
        if type(error) is not TransportError or error.ticket is None:
            raise
        return None


def grant_again(ring: HiddenRing | CudaRing, ticket: int) -> bool:
    """Consumer: after PeerDied, whether the ticket is to be asked for again.

    False where nobody died over its slot: what was asked is still in its ring, and nobody is there to take it.
    """
    if ring.is_free(ticket):
        return False
    try:
        ring.reclaim(ticket)
    except TransportError:  # somebody came and took it meanwhile
        return False
    return True
