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


def run(dtype: torch.dtype, sliding_window: int | None) -> list[torch.Tensor]:
    *inputs, grad_output = tensors(torch.bfloat16)
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    options = packed_options(LENGTHS, torch.device("cuda"))
    output, _ = packed_attention(
        torch.nn.Identity(), *inputs, None, scaling=0.1, sliding_window=sliding_window, **options
    )
    assert output.dtype == dtype
    output.backward(grad_output.to(dtype))
    return [output.detach().float(), *(x.grad.float() for x in inputs)]


@pytest.mark.parametrize("sliding_window", [None, 32, 1000])
def test_flash_equals_sdpa(sliding_window: int | None) -> None:
    """bfloat16 goes to the flash kernel, float32 to SDPA: within bfloat16's rounding of each other."""
    for flash, sdpa in zip(run(torch.bfloat16, sliding_window), run(torch.float32, sliding_window), strict=True):
        assert flash.shape == sdpa.shape
        assert (flash - sdpa).norm() / sdpa.norm() < 0.01


def test_no_sample_sees_another() -> None:
    query, key, value, _ = tensors(torch.bfloat16)
    options = packed_options(LENGTHS, torch.device("cuda"))
    before, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **options)
    key[:, :, : LENGTHS[0]] = 7.0
    value[:, :, : LENGTHS[0]] = -3.0
    after, _ = packed_attention(torch.nn.Identity(), query, key, value, None, **options)
    assert torch.equal(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])
    assert not torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])
