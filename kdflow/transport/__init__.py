"""Shared-memory transport between teacher and student processes."""

from kdflow.transport.channel import (
    HiddenStatesClient,
    HiddenStatesServer,
    PendingRows,
    PrefillRequest,
    request_bytes,
)
from kdflow.transport.claim import claim
from kdflow.transport.cuda import RingChoice, choose_ring, cuda_available, cuda_unavailable_reason
from kdflow.transport.cuda_ring import CudaReadSlot, CudaRing, CudaWriteSlot
from kdflow.transport.hidden import Seats, attach_hidden_ring, choose_hidden_ring, create_hidden_ring
from kdflow.transport.ring import HiddenRing, RequestRing, RingStats
from kdflow.transport.slots import ReadSlot, WriteSlot
from kdflow.transport.turns import SleepOrder, Turns, create_turn_ring

__all__ = [
    "CudaReadSlot",
    "CudaRing",
    "CudaWriteSlot",
    "HiddenRing",
    "HiddenStatesClient",
    "HiddenStatesServer",
    "PendingRows",
    "PrefillRequest",
    "ReadSlot",
    "RequestRing",
    "RingChoice",
    "RingStats",
    "Seats",
    "SleepOrder",
    "Turns",
    "WriteSlot",
    "attach_hidden_ring",
    "choose_hidden_ring",
    "choose_ring",
    "claim",
    "create_hidden_ring",
    "create_turn_ring",
    "cuda_available",
    "cuda_unavailable_reason",
    "request_bytes",
]
