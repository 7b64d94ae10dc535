"""Which ring a run takes. Machines without a GPU have the host's alone; the rest is in test_train_cuda.py."""

from __future__ import annotations

import pytest
import torch

from kdflow.config import TransportConfig
from kdflow.errors import ConfigError
from kdflow.transport import HiddenRing, attach_hidden_ring, choose_hidden_ring, create_hidden_ring
from kdflow.transport import hidden as module
from kdflow.transport.cuda import RingChoice

CPU = torch.device("cpu")


def test_cpus_take_the_host_ring() -> None:
    choice = choose_hidden_ring(TransportConfig(), [(None, None)])
    assert choice.kind == "host"
    with create_hidden_ring(choice, TransportConfig(), name="h", slot_bytes=64) as ring:
        assert isinstance(ring, HiddenRing)
        with (
            attach_hidden_ring(ring.handle, placement="host", role="consumer", device=CPU) as consumer,
            attach_hidden_ring(ring.handle, placement="host", role="producer", device=CPU) as producer,
        ):
            with producer.reserve(0, timeout_s=5) as written:
                written.tensor((3,), torch.float32).fill_(2.0)
            with consumer.receive(0, timeout_s=5) as read:
                assert read.tensor().tolist() == [2.0] * 3


def test_the_pair_that_reaches_least_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose_ring(*, producer: int | None, consumer: int | None) -> RingChoice:
        return RingChoice("device" if producer == consumer else "pinned", f"{producer} to {consumer}")

    monkeypatch.setattr(module, "choose_ring", choose_ring)
    assert choose_hidden_ring(TransportConfig(), [(0, 0), (1, 1)]).kind == "device"
    assert choose_hidden_ring(TransportConfig(), [(0, 0), (1, 0)]) == RingChoice("pinned", "1 to 0")
    assert choose_hidden_ring(TransportConfig(placement="host"), [(0, 0)]).kind == "host"
    assert choose_hidden_ring(TransportConfig(schedule="colocate"), [(0, 0)]).kind == "pinned"
    assert choose_hidden_ring(TransportConfig(checksum=True), [(0, 0)]).kind == "host"
    with pytest.raises(ConfigError, match="device cannot be had, pinned can: 1 to 0; use auto"):
        choose_hidden_ring(TransportConfig(placement="device"), [(1, 0)])
    with pytest.raises(ConfigError, match="a device ring has none"):
        choose_hidden_ring(TransportConfig(placement="device", checksum=True), [(0, 0)])
