"""What the chunked backend promises beyond the right numbers: memory, the filter, where its blocks lie."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kdflow_kernels import fused_kd_loss, tiled_logits

MEASURE = """
import sys, threading, time, torch
torch.set_num_threads(1)
sys.path[:0] = {path!r}
from kdflow_kernels import fused_kd_loss

N, V, Hs, Ht, dtype = {num_rows}, 24000, 96, 128, torch.{dtype}
make = lambda *shape: torch.randn(*shape).mul_(0.3).to(dtype)
h, w, ht, wt = make(N, Hs).requires_grad_(), make(V, Hs).requires_grad_(), make(N, Ht), make(V, Ht)

def ours(n, v):
    fused_kd_loss(h[:n], w[:v], ht[:n], wt[:v]).loss.backward()

def eager(n, v):
    log_q = (h[:n] @ w[:v].T).float().log_softmax(-1)
    log_p = (ht[:n] @ wt[:v].T).float().log_softmax(-1)
    torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean").backward()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def peak(step):
    top, done = [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            top[0] = max(top[0], resident())
    watcher = threading.Thread(target=watch)
    before = resident()
    watcher.start()
    step(N, V)
    done.set()
    watcher.join()
    return top[0] - before - sum(t.grad.nbytes for t in (h, w))

step = {name}
step(2, 50)
h.grad = w.grad = None
print(peak(step))
"""


def peak_bytes(name: str, dtype: str, num_rows: int = 512) -> int:
    """Peak resident memory above inputs and gradients, in a process of its own."""
    code = MEASURE.format(path=sys.path, name=name, dtype=dtype, num_rows=num_rows)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_far_below_eagers():
    ours, eager = peak_bytes("ours", "float32"), peak_bytes("eager", "float32")
    assert eager > 200e6  # full logits, several times: else this measures nothing
    assert ours < eager / 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_rows():
    few, many = (peak_bytes("ours", "float32", num_rows) for num_rows in (1024, 4096))
    assert few > 512 * 24000 * 4  # a chunk's logits of the student: else this measures nothing
    assert many - few < 0.05 * 3072 * 24000 * 4  # of the logits of the rows more


@pytest.mark.parametrize("num_rows", [3, 8, 9, 20, 24])
@pytest.mark.parametrize("width", [5, 8, 64])
def test_weight_gradients_never_overwrite_logits_still_needed(num_rows: int, width: int, monkeypatch):
    """Replays the order of the writes: every block must be intact when its turn comes."""
    monkeypatch.setattr(tiled_logits, "TILE_COLUMNS", width)
    hidden_size, num_columns = 8, 37
    tiles = tiled_logits.tiles(num_columns, None)
    home = torch.full((num_columns * hidden_size,), -1.0)
    spans = tiled_logits.spans(num_columns, num_rows, home.dtype, home.device, home, hidden_size)
    blocks = [block for span in spans for block in span.blocks]
    assert [block.shape for block in blocks] == [(num_rows, tile.width) for tile in tiles]
    for number, block in enumerate(blocks):
        block.fill_(float(number))
    for number in reversed(range(len(tiles))):
        assert (blocks[number] == number).all()
        home.view(num_columns, hidden_size)[tiles[number].tokens] = -2.0
    assert (home == -2.0).all()
    outside = sum(b.numel() for b in blocks if b.untyped_storage().data_ptr() != home.untyped_storage().data_ptr())
    # Beyond the rows that do not fit, at most one tile's worth is lost to the cut.
    assert outside <= max(num_rows - hidden_size, 0) * num_columns + num_rows * width


@pytest.mark.parametrize("columns", [1, 127, 128, 255, 256, 257, 640, 700])
def test_argmax_is_torchs(columns: int):
    from kdflow_kernels.torch_rows import argmax

    z = torch.randn(50, columns, generator=torch.Generator().manual_seed(columns))
    assert torch.equal(argmax(z), z.argmax(-1, keepdim=True))


def student_near_its_teacher(seed: int = 0, vocab: int = 4000) -> dict[str, torch.Tensor]:
    """Peaked rows, a student that differs by a little noise: most of p - q is nearly 0, as in a real vocabulary."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, 32, generator=g)
    # Embeddings have a mean in real models, too; it is what the rank-1 term keeps.
    weight += 2.0 * torch.randn(32, generator=g)
    hidden = 0.7 * torch.randn(96, 32, generator=g)
    return {
        "student_input": (hidden + 0.1 * torch.randn(96, 32, generator=g)).requires_grad_(),
        "student_weight": weight.clone().requires_grad_(),
        "teacher_input": hidden,
        "teacher_weight": weight,
    }


def gradients(tensors: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    loss = fused_kd_loss(**tensors, **options).loss
    return list(torch.autograd.grad(loss, [tensors["student_input"], tensors["student_weight"]]))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_filter_is_exact_where_nothing_is_dropped(ce_weight: float):
    tensors = student_near_its_teacher(vocab=900)
    tensors["shift_labels"] = torch.randint(0, 900, (96,), generator=torch.Generator().manual_seed(1))
    exact = gradients(tensors, ce_weight=ce_weight)
    for found, wanted in zip(gradients(tensors, ce_weight=ce_weight, grad_filter_eps=1e-30), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)


def test_filter_drops_columns_and_its_rank_one_term_pays():
    tensors = student_near_its_teacher()
    exact_input, exact_weight = gradients(tensors)
    found_input, found_weight = gradients(tensors, grad_filter_eps=1e-3, chunk_size=32)
    active = (found_weight != 0).any(-1)
    assert 0 < active.sum() < 0.7 * len(active)
    assert relative_error(found_weight, exact_weight) < 0.05
    with_term = relative_error(found_input, exact_input)
    # The same without the term: the full dz with the dropped columns blanked.
    hidden = tensors["student_input"].detach()
    z = (hidden @ tensors["student_weight"].detach().T).requires_grad_()
    log_p = (tensors["teacher_input"] @ tensors["teacher_weight"].T).log_softmax(-1)
    (dz,) = torch.autograd.grad(
        torch.nn.functional.kl_div(z.log_softmax(-1), log_p, log_target=True, reduction="batchmean"), z
    )
    without_term = []
    for rows in range(0, 96, 32):
        part = dz[rows : rows + 32]
        kept = (part.abs() * 96 > 1e-3).any(0)
        without_term.append((part * kept) @ tensors["student_weight"].detach())
    without = relative_error(torch.cat(without_term), exact_input)
    assert with_term < 0.6 * without


def test_filter_that_drops_everything_leaves_the_rank_one_term():
    tensors = student_near_its_teacher(vocab=300)
    found_input, found_weight = gradients(tensors, grad_filter_eps=10.0)
    assert (found_weight == 0).all()
    # dz sums to 0 over the vocabulary: times the mean weight nothing is left.
    assert found_input.abs().max() < 1e-6


def test_filter_ignores_how_the_loss_is_divided():
    """eps is compared with a row's own loss: the reduction's denominator does not move it."""
    tensors = student_near_its_teacher(vocab=900)
    few = gradients(tensors, grad_filter_eps=1e-4, num_items=1e4)
    many = gradients(tensors, grad_filter_eps=1e-4, num_items=1)
    for a, b in zip(few, many, strict=True):
        torch.testing.assert_close(a * 1e4, b, rtol=1e-4, atol=1e-6)


def test_filter_with_a_frozen_head_and_with_paired_ids():
    tensors = student_near_its_teacher(vocab=900)
    ids = torch.randperm(900, generator=torch.Generator().manual_seed(2))[:700]
    paired = {**tensors, "student_token_ids": ids, "teacher_token_ids": ids}
    exact = gradients(paired)
    for found, wanted in zip(gradients(paired, grad_filter_eps=1e-6), exact, strict=True):
        assert relative_error(found, wanted) < 0.02
    frozen = {**tensors, "student_weight": tensors["student_weight"].detach()}
    loss = fused_kd_loss(**frozen, grad_filter_eps=1e-6).loss
    (found_input,) = torch.autograd.grad(loss, frozen["student_input"])
    assert relative_error(found_input, gradients(tensors)[0]) < 0.02


def test_chunk_size_moves_rounding_only():
    tensors = student_near_its_teacher(vocab=900)
    whole = gradients(tensors)
    for chunk_size in (1, 7, 96, 1000):
        for found, wanted in zip(gradients(tensors, chunk_size=chunk_size), whole, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_many_groups_add_up_in_fp32():
    """bf16 sums of many groups would lose the small ones: against fp64, one rounding to bf16 is all that shows."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "student_input": torch.randn(300, 4, generator=g).bfloat16(),
        "student_weight": torch.randn(50, 4, generator=g).bfloat16().requires_grad_(),
        "teacher_input": torch.randn(300, 6, generator=g).bfloat16(),
        "teacher_weight": torch.randn(50, 6, generator=g).bfloat16(),
    }
    (found,) = torch.autograd.grad(fused_kd_loss(**tensors, chunk_size=1).loss, tensors["student_weight"])
    wide = {n: t.detach().double() for n, t in tensors.items()}
    wide["student_weight"].requires_grad_()
    (truth,) = torch.autograd.grad(fused_kd_loss(**wide, backend="reference").loss, wide["student_weight"])
    assert relative_error(found.double(), truth) < 5e-3
