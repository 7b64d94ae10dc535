"""grad_filter_eps in the Triton backend: against the torch backend, the exact gradients and the formula by hand."""

from __future__ import annotations

import pytest
import torch
from test_fused_kd_loss import make
from test_torch_backend import gradients, relative_error, student_near_its_teacher

from kdflow_kernels import fused_kd_loss, products, triton_backend

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-4 if DEVICE == "cuda" else 1e-5  # the GPU's logarithm is good to 2^-22


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Several blocks, several gatherings a group."""
    monkeypatch.setattr(triton_backend, "LANES", 128)
    monkeypatch.setattr(products, "GATHERED_COLUMNS", 100)


def near_its_teacher(vocab: int = 900) -> dict[str, torch.Tensor]:
    made = student_near_its_teacher(vocab=vocab)
    return {n: t.detach().to(DEVICE).requires_grad_(t.requires_grad) for n, t in made.items()}


# Down to one row a chunk, and an uneven last one.
@pytest.mark.parametrize("chunk_size", [32, 50])
@pytest.mark.parametrize("eps", [1e-3, 4e-3])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_same_as_the_torch_backend(divergence: str, eps: float, chunk_size: int):
    tensors = near_its_teacher()
    options = {"grad_filter_eps": eps, "chunk_size": chunk_size, "divergence": divergence}
    found = gradients(tensors, backend="triton", **options)
    wanted = gradients(tensors, backend="torch", **options)
    active = (wanted[1] != 0).any(-1)
    assert 0 < active.sum() < 0.9 * len(active)
    assert torch.equal((found[1] != 0).any(-1), active)
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < CLOSE


@pytest.mark.parametrize("vocabulary", ["same", "padded", "paired"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_options_as_the_torch_backend_has_them(vocabulary: str, ce_weight: float):
    """Which columns count: all with cross-entropy, else the compared ones; with bias, softcap and ignored rows."""
    # Without cross-entropy labels would have the torch backend count the columns of a tile that are not compared, too.
    labels = "some ignored" if ce_weight else "none"
    case = make(
        vocabulary=vocabulary, labels=labels, ce_weight=ce_weight, vocab=300, num_rows=20, row_weight=True,
        student_bias=True, student_softcap=4.0, student_logit_scale=0.5, temperature=1.5,
        grad_filter_eps=2e-3, chunk_size=7,
    )  # fmt: skip
    case = case.cast(torch.float32).to(DEVICE)
    found, wanted = (
        case.gradients(fused_kd_loss(**case.tensors, **case.options, backend=name).loss) for name in ("triton", "torch")
    )
    assert found.keys() == wanted.keys()
    for name in found:
        assert relative_error(found[name], wanted[name]) < CLOSE, name
    assert (found["student_weight"] == 0).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype):
    exact = gradients(near_its_teacher())
    low = {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in near_its_teacher().items()}
    unfiltered = gradients(low, backend="triton")
    filtered = gradients(low, backend="triton", grad_filter_eps=1e-4, chunk_size=32)
    for found, plain, wanted in zip(filtered, unfiltered, exact, strict=True):
        assert found.dtype == dtype
        assert relative_error(found.float(), wanted) < 1.5 * relative_error(plain.float(), wanted) + 0.02


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_exact_where_nothing_is_dropped(ce_weight: float):
    tensors = near_its_teacher()
    tensors["shift_labels"] = torch.randint(0, 900, (96,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = gradients(tensors, ce_weight=ce_weight, backend="triton")
    kept = gradients(tensors, ce_weight=ce_weight, grad_filter_eps=1e-30, backend="triton")
    for found, wanted in zip(kept, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)


def test_all_dropped_leaves_the_rank_one_term():
    found_input, found_weight = gradients(near_its_teacher(300), grad_filter_eps=10.0, backend="triton")
    assert (found_weight == 0).all()
    # dz sums to 0 over the vocabulary: times the mean weight nothing is left.
    assert found_input.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["student_input", "student_weight"])
def test_frozen(name: str):
    tensors = near_its_teacher()
    other = {"student_input": "student_weight", "student_weight": "student_input"}[name]
    both = gradients(tensors, grad_filter_eps=1e-4, backend="triton")[other == "student_weight"]
    frozen = {**tensors, name: tensors[name].detach()}
    (found,) = torch.autograd.grad(fused_kd_loss(**frozen, grad_filter_eps=1e-4, backend="triton").loss, frozen[other])
    assert torch.equal(found, both)


def test_loss_per_row():
    tensors = near_its_teacher(300)
    seed = torch.linspace(0.5, 2.0, 96, device=DEVICE)
    found, wanted = (
        torch.autograd.grad(
            fused_kd_loss(**tensors, grad_filter_eps=1e-4, chunk_size=96, reduction="none", backend=name).loss,
            tensors["student_input"],
            seed,
        )[0]
        for name in ("triton", "torch")
    )
    assert relative_error(found, wanted) < CLOSE


@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch):
        """As users have them."""
        monkeypatch.undo()
        torch.cuda.empty_cache()  # workers beside this one need it

    @staticmethod
    def tensors() -> dict[str, torch.Tensor]:
        """5000 rows of bf16, several groups; a student near its teacher."""
        g = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g, device="cuda")

        weight = normal(100_000, 256) / 16 + normal(256) / 8
        hidden = 3.0 * normal(5000, 256)
        tensors = {
            "student_input": hidden + 0.3 * normal(5000, 256), "student_weight": weight,
            "teacher_input": hidden, "teacher_weight": weight,
        }  # fmt: skip
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        return {n: t.clone().requires_grad_() if n.startswith("student") else t for n, t in tensors.items()}

    @pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "adaptive_kl"])
    def test_close_to_the_exact_gradients(self, divergence: str):
        tensors = self.tensors()
        exact = gradients(tensors, divergence=divergence)
        found = gradients(tensors, divergence=divergence, grad_filter_eps=6e-5, chunk_size=512)
        active = (found[1] != 0).any(-1)
        assert 0 < active.sum() < len(active)
        for a, b in zip(found, exact, strict=True):
            assert relative_error(a.float(), b.float()) < 0.05

    def test_the_host_waits_once_a_group(self):
        tensors = self.tensors()
        options = {"grad_filter_eps": 6e-5, "chunk_size": 1000}
        fused_kd_loss(**tensors, **options).loss.backward()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing") as waits:
                fused_kd_loss(**tensors, **options).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert sum("synchronizing" in str(wait.message) for wait in waits) == 5
