"""Shared-memory transport between teacher and student processes."""

from kdflow.transport.channel import (
    HiddenStatesClient,
    HiddenStatesServer,
    PendingRows,
    PrefillRequest,
    request_bytes,
)
from kdflow.transport.ring import HiddenRing, ReadSlot, RequestRing, RingStats, WriteSlot

__all__ = [
    "HiddenRing",
    "HiddenStatesClient",
    "HiddenStatesServer",
    "PendingRows",
    "PrefillRequest",
    "ReadSlot",
    "RequestRing",
    "RingStats",
    "WriteSlot",
    "request_bytes",
]
