"""The flash kernel over packed samples beside SDPA on each sample."""

from __future__ import annotations

import pytest
import torch

from kdflow.modeling.attention import packed_attention, packed_options

pytestmark = pytest.mark.gpu
LENGTHS = (130, 1, 64, 257)


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    """Query with four heads, key and value with two, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (4, 2, 2)] + [(1, sum(LENGTHS), 4, 64)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def run(
    dtype: torch.dtype, sliding_window: int | None, sinks: list[float] | None = None, value_size: int = 64
) -> list[torch.Tensor]:
    *inputs, grad_output = tensors(torch.bfloat16)
    inputs = [x.to(dtype) for x in inputs]
    inputs[2], grad_output = inputs[2][..., :value_size], grad_output[..., :value_size]
    if sinks is not None:
        inputs.append(torch.tensor(sinks, device="cuda", dtype=dtype))
    inputs = [x.clone().requires_grad_() for x in inputs]
    options = packed_options(LENGTHS, torch.device("cuda"))
    output, _ = packed_attention(
        torch.nn.Identity(),
        *inputs[:3],
        None,
        scaling=0.1,
        sliding_window=sliding_window,
        s_aux=inputs[3] if sinks is not None else None,
        **options,
    )
    assert output.dtype == dtype
    output.backward(grad_output.to(dtype))
    return [output.detach().float(), *(x.grad.float() for x in inputs)]


@pytest.mark.parametrize("sliding_window", [None, 32, 1000])
def test_flash_equals_sdpa(sliding_window: int | None) -> None:
    """bfloat16 goes to the flash kernel, float32 to SDPA: within bfloat16's rounding of each other."""
    close(run(torch.bfloat16, sliding_window), run(torch.float32, sliding_window))


@pytest.mark.parametrize("sliding_window", [None, 32])
def test_attention_sinks(sliding_window: int | None) -> None:
    """The kernel's output scaled by its logsumexp, its backward with the sinks' in that; the sinks' own gradient."""
    sinks = [-2.0, 0.0, 1.5, 4.0]
    with_sinks = run(torch.bfloat16, sliding_window, sinks)
    close(with_sinks, run(torch.float32, sliding_window, sinks))
    without = run(torch.bfloat16, sliding_window)
    assert (with_sinks[0] - without[0]).norm() / without[0].norm() > 0.05, "the sinks take nothing"


def test_values_narrower_than_keys() -> None:
    """As of MLA: the flash kernel has one head size for both, so they go to SDPA."""
    close(run(torch.bfloat16, None, value_size=32), run(torch.float32, None, value_size=32))


def close(ours: list[torch.Tensor], true: list[torch.Tensor]) -> None:
    for found, expected in zip(ours, true, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() / expected.norm() < 0.01


def test_no_sample_sees_another() -> None:
    query, key, value, _ = tensors(torch.bfloat16)
    options = packed_options(LENGTHS, torch.device("cuda"))
    before, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **options)
    key[:, :, : LENGTHS[0]] = 7.0
    value[:, :, : LENGTHS[0]] = -3.0
    after, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **options)
    assert torch.equal(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])
    assert not torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])
