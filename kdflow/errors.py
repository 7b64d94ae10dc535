"""Every error kdflow raises on purpose, but for ValueError and TypeError on bad arguments."""

from __future__ import annotations


class KdflowError(Exception):
    """Base of all."""


class TransportError(KdflowError):
    """Something went wrong with a ring; `ticket` names the record, where there is one."""

    def __init__(self, message: str, *, ticket: int | None = None) -> None:
        super().__init__(message)
        self.ticket = ticket


class PeerDied(TransportError):
    """The process that would have written the record, or read it, is gone."""


class RingTimeout(TransportError):
    """The peers are alive, and nothing happened in time."""


class RingCorrupt(TransportError):
    """The shared memory holds numbers that no healthy peer writes."""


class SlotAborted(TransportError):
    """The producer is alive and gave the slot up; its own error is in the message."""


class ConfigError(KdflowError):
    """An option, a name or a pair of models that cannot work."""


class DataError(KdflowError):
    """A source, a row or a tokenizer that cannot be used."""


class CheckpointError(KdflowError):
    """A checkpoint that is missing or of another run, or a folder of a model that could not be written."""


class TrainingError(KdflowError):
    """Training came to numbers it must not go on with."""


class TeacherDied(KdflowError):
    """A teacher process ended before its time; its last log lines are in the message."""


class TeacherTimeout(KdflowError):
    """A teacher process did not load in time."""


class TeacherFault(KdflowError):
    """A teacher whose hidden states cannot be trusted; the message names the likely cause and the remedy."""


class EngineDied(KdflowError):
    """A process of a teacher's engine ended; another try may go well."""
