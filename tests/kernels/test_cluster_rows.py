"""Rows in the shared memory of a cluster: on a GPU that has clusters, else the same source on a host whose threads go
on in random order and which shows nothing before a wait or a barrier says so (tests/support/cluster_rows)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kd_oracle
import pytest
import torch
from test_fused_kd_loss import FACTORS, covering_case, describe, make, one_hot_case, pairwise
from test_triton_backend import DIVERGENCES, JUMPING

from bench.tune.phases import PHASES, ClockedKernel
from kdflow_kernels import aot, cluster_rows, fused_kd_loss, get_divergence, nvrtc, triton_backend
from kdflow_kernels.cluster_rows import RESERVED_BYTES, SHARED_BYTES, ClusterLauncher
from kdflow_kernels.cpp_divergences import cpp_twin
from support import cluster_rows as host

pytest.importorskip("triton")
pytestmark = pytest.mark.any_device

HAS_CLUSTERS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
DEVICE = "cuda" if HAS_CLUSTERS else "cpu"
COVERED = [name for name in DIVERGENCES if cpp_twin(get_divergence(name)) is not None]
PLAIN = {"HAS_LABELS": False, "OWN_CE": False, "FORM_GRADIENT": True}
CASES = {
    **{name: FACTORS[name] for name in ("ce_weight", "kd_weight", "temperature", "reduction", "labels", "row_weight")},
    "divergence": tuple(COVERED),
    "dtype": (torch.bfloat16,),
    "chunk_size": (None, 3),
    # Fewer columns than blocks have vectors, whole vectors, and a part of one at the end.
    "vocab": (7, 64, 1003),
    "shape": ((1, 64), (2, 32), (4, 32)),
}


@pytest.fixture(autouse=True)
def forms(monkeypatch: pytest.MonkeyPatch) -> list[host.Form]:
    """The forms of the kernel that problems asked for; on a GPU nobody counts."""
    monkeypatch.setattr(triton_backend, "CLUSTER_ROWS", True)
    monkeypatch.setattr(triton_backend, "LOGITS_BYTES", 10 * 2048 * 2)  # several groups
    if torch.cuda.is_available():
        if not HAS_CLUSTERS:
            pytest.skip("this GPU has no clusters")
        return []
    return host.use(monkeypatch)


def cut_into(cluster: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_rows, "layout", lambda columns, _: cluster_rows.cut(columns, cluster, 2, threads))


def check(case: kd_oracle.Case, *, factor: float = 1.5) -> None:
    kd_oracle.check_against_oracle(case.to(DEVICE), torch.bfloat16, "triton", factor=factor)


@pytest.mark.parametrize("case", pairwise(CASES), ids=describe)
def test_covering_design(case: dict, forms: list[host.Form], monkeypatch: pytest.MonkeyPatch):
    case = dict(case)
    cut_into(*case.pop("shape"), monkeypatch)
    made, _ = covering_case(case)
    check(made, factor=3.0 if case["divergence"] in JUMPING else 1.5)
    twin = cpp_twin(get_divergence(case["divergence"]))
    assert twin is not None
    assert HAS_CLUSTERS or {divergence for _, divergence, _ in forms} == {twin[0]}


@pytest.mark.parametrize("vocab, cluster, threads", [(1003, 2, 64), (9, 4, 32), (520, 8, 32)])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("gradients", [True, False])
def test_rows_of_output_are_the_row_kernels(
    vocab: int, cluster: int, threads: int, divergence: str, gradients: bool, forms, monkeypatch: pytest.MonkeyPatch
):
    """Entropies, agreement and both terms, per row, with statistics that several blocks and warps bring together."""
    cut_into(cluster, threads, monkeypatch)
    case = make(vocab=vocab, divergence=divergence, ce_weight=0.5, temperature=1.7, reduction="none")
    case = case.cast(torch.bfloat16).to(DEVICE)
    with torch.set_grad_enabled(gradients):
        found = fused_kd_loss(**case.tensors, **case.options, backend="triton")
        assert HAS_CLUSTERS or len(forms) == 1
        monkeypatch.setattr(triton_backend, "CLUSTER_ROWS", False)
        expected = fused_kd_loss(**case.tensors, **case.options, backend="triton")
    for name, value in found._asdict().items():
        other = getattr(expected, name)
        torch.testing.assert_close(value, other, rtol=2e-5, atol=4e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_widest_vocabularies_as_they_are_laid_out(divergence: str):
    """The very blocks and threads of a GPU, 3,840 fibers here."""
    vocab, g = 151_939, torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(vocab, 4, generator=g).to(DEVICE, torch.bfloat16) for _ in range(2))
    hidden = torch.randn(2, 4, generator=g).to(DEVICE, torch.bfloat16)
    found, expected = [], []
    for backend, results in (("triton", found), ("torch", expected)):
        h, w = hidden.clone().requires_grad_(), student.clone().requires_grad_()
        output = fused_kd_loss(h, w, hidden, teacher, divergence=divergence, backend=backend)
        output.loss.backward()
        results += [output.loss.detach(), h.grad.float(), w.grad.float(), output.student_entropy, output.top1_agreement]
    for value, other in zip(found, expected, strict=True):
        assert (value - other).norm() <= 4e-3 * other.norm()


@pytest.mark.parametrize("divergence", COVERED)
def test_logits_of_ten_thousand(divergence: str, monkeypatch: pytest.MonkeyPatch):
    cut_into(2, 32, monkeypatch)
    check(one_hot_case(divergence))


@pytest.mark.parametrize("token", [0, 31, 128, 255, 256])
def test_agreement_finds_the_first_of_the_top_tokens(token: int, monkeypatch: pytest.MonkeyPatch):
    cut_into(2, 32, monkeypatch)
    hidden = torch.ones(1, 1, device=DEVICE, dtype=torch.bfloat16)
    student, teacher = (torch.zeros(257, 1, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    student[[token, 256]] = teacher[[token, min(token + 1, 256)]] = 5.0
    assert fused_kd_loss(hidden, student, hidden, teacher, backend="triton").top1_agreement == 1
    teacher[max(token - 1, 0)] = 5.0
    assert fused_kd_loss(hidden, student, hidden, teacher, backend="triton").top1_agreement == (token == 0)


def test_nan_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    cut_into(2, 32, monkeypatch)
    case = make(vocab=150, num_rows=3, labels="none").cast(torch.bfloat16).to(DEVICE)
    case.tensors["teacher_weight"][77] = torch.nan
    assert fused_kd_loss(**case.tensors, backend="triton").loss.isnan()


@pytest.mark.parametrize(
    "why, options",
    {
        "fp16": {"dtype": torch.float16},
        "a bias": {"student_bias": True},
        "a softcap": {"teacher_softcap": 4.0},
        "paired vocabularies": {"vocabulary": "paired"},
        "columns that are not compared": {"vocabulary": "padded", "vocab_size": 50, "ce_weight": 0.5},
        "a filter": {"grad_filter_eps": 1e-6},
        "cross-entropy's gradient alone": {"kd_weight": 0.0, "ce_weight": 0.5},
        "a divergence of whole rows": {"divergence": "adaptive_kl"},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_row_kernel_takes(why: str, options: dict, forms: list[host.Form]):
    options = dict(options)
    dtype = options.pop("dtype", torch.bfloat16)
    case = make(**options).to(DEVICE)
    kd_oracle.check_against_oracle(case, dtype, "triton", factor=3.0 if "divergence" in options else 1.5)
    assert forms == []


def test_fp32_logits_are_the_row_kernels(forms: list[host.Form], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_backend, "_fp32_logits", True)
    check(make())
    assert forms == []


@pytest.mark.parametrize("vocab", [5, 1000, 32_000, 49_152, 128_256, 129_280, 151_936, 152_064, 256_000, 262_144])
def test_layout_fits_a_multiprocessor(vocab: int):
    found = cluster_rows.layout(vocab)
    assert found is not None
    assert found.cluster <= 8
    assert found.cluster * found.slice >= vocab
    assert found.blocks_per_processor == (2 if vocab < 220_000 else 1)
    assert found.blocks_per_processor * (found.shared_bytes + RESERVED_BYTES) <= SHARED_BYTES
    assert found.blocks_per_processor * found.threads <= 1024
    vectors = found.slice // 8
    idle = -(-vectors // found.threads) * found.threads / vectors
    assert idle < 1.05 or vectors < 1024


def test_layout_of_smaller_multiprocessors():
    """100 KB, as the architectures after Hopper have that are not for data centres."""
    found = cluster_rows.layout(151_936, 100 * 1024)
    assert found is not None
    assert (found.cluster, found.blocks_per_processor) == (8, 1)
    assert cluster_rows.layout(262_144, 100 * 1024) is None


def test_rows_that_do_not_fit_are_the_row_kernels(forms: list[host.Form], monkeypatch: pytest.MonkeyPatch):
    assert cluster_rows.layout(500_000) is None
    monkeypatch.setattr(cluster_rows, "shared_bytes", lambda device: 2048)
    check(make(vocab=1003))
    assert forms == []


def test_why_a_device_cannot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # the host's answer
    assert cluster_rows.unavailable(torch.device("cpu")) == "it needs a CUDA device, got cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    why = cluster_rows.unavailable(torch.device("cuda:0"))
    assert why == "it needs clusters, compute capability 9.0; cuda:0 has 8.9"


@pytest.mark.skipif(HAS_CLUSTERS, reason="of the host alone")
def test_what_the_driver_refuses_is_told(monkeypatch: pytest.MonkeyPatch):
    found = cluster_rows.cut(1003, 2, 2, 64)
    library = host.build(found, "JSD", tuple(PLAIN.items()))
    with pytest.raises(RuntimeError, match=r"cuFuncSetAttribute\(8, 300000\): invalid value \(1\)"):
        nvrtc.Function(b"", "cluster_rows", shared_bytes=300_000, driver=library)
    with pytest.raises(RuntimeError, match=r"cuModuleGetFunction\(\): not found \(500\)"):
        nvrtc.Function(b"", "another", shared_bytes=1000, driver=library)
    function = nvrtc.Function(b"", "cluster_rows", shared_bytes=1000, driver=library)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel\(3, 1, 1, 64, 1, 1, 1000\): invalid value"):
        function.launch(3, 64, cluster_rows.Parameters(), stream=0)


def test_what_does_not_compile_is_told_with_the_compilers_words(tmp_path: Path):
    reason = nvrtc.unavailable()
    if reason is not None:
        pytest.skip(reason)
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void wrong() { nonsense(); }')
    words = r'wrong.cu: NVRTC does not compile it for sm_90:\n.*"nonsense" is undefined'
    with pytest.raises(RuntimeError, match=words):
        nvrtc.compile_cubin(source, {}, architecture=90)
    with pytest.raises(RuntimeError, match="invalid value for --gpu-architecture"):
        nvrtc.compile_cubin(cluster_rows.SOURCE, {}, architecture=12345)


def test_a_machine_without_nvrtc_is_told_where_it_comes_from():
    # It is looked for among the packages, which are gone when all has been imported from there.
    code = "import sys; from kdflow_kernels import nvrtc; import torch; sys.path.clear(); print(nvrtc.unavailable())"
    environment = {**os.environ, "LD_LIBRARY_PATH": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    if torch.version.cuda is not None:
        assert done.stdout == "None\n"
        return
    assert done.stdout == (
        "no NVRTC library (libnvrtc.so.13 or .12); CUDA builds of torch bring it along, elsewhere pip install "
        "nvidia-cuda-nvrtc\n"
    ), done.stderr


WAITS = re.findall(
    r"device::(?:wait_copies<\d>|commit_copies|sync_threads|cluster_wait)\(.*\);", cluster_rows.SOURCE.read_text()
)


@pytest.mark.skipif(HAS_CLUSTERS, reason="of the host alone")
@pytest.mark.parametrize("number", range(len(WAITS)), ids=[wait.removeprefix("device::") for wait in WAITS])
def test_on_the_host_a_missing_wait_is_found(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stand-in's own test: without any one of the kernel's waits a number is wrong, or a stop is told."""
    pieces = re.split("|".join(map(re.escape, sorted(set(WAITS)))), cluster_rows.SOURCE.read_text())
    kept = [wait if index != number else "(void)0;" for index, wait in enumerate(WAITS)]
    changed = tmp_path / "cluster_rows.cu"
    changed.write_text("".join(text for pair in zip(pieces, [*kept, ""], strict=True) for text in pair))
    found, told = cluster_rows.cut(4003, 2, 2, 64), []
    monkeypatch.setattr(cluster_rows, "layout", lambda *_: found)
    for divergence, name, gradients in (("jsd", "JSD", True), ("forward_kl", "ForwardKL", True), ("jsd", "JSD", False)):
        options = {**PLAIN, "FORM_GRADIENT": gradients}
        library = host.build(found, name, tuple(options.items()), source=changed)
        monkeypatch.setattr(cluster_rows, "kernel", lambda *_, library=library: host.starter(found, library))
        case = make(vocab=4003, num_rows=7, divergence=divergence, labels="none").cast(torch.bfloat16)
        expected = fused_kd_loss(**case.tensors, **case.options, backend="torch").loss
        try:
            with torch.set_grad_enabled(gradients):
                loss = fused_kd_loss(**case.tensors, **case.options, backend="triton").loss
        except RuntimeError as error:
            told.append(str(error))
        else:
            told.append("" if torch.isclose(loss, expected, rtol=1e-4) else "a wrong number")
    assert any(words == "a wrong number" or "cuLaunchKernel" in words for words in told)


OF_FORMS = {
    "sum known": {"divergence": "forward_kl", "labels": "none"},
    "sum not known": {"divergence": "jsd", "labels": "none"},
    "all softmaxes": {"divergence": "reverse_kl", "ce_weight": 0.5, "temperature": 1.7},
}


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("options", OF_FORMS.values(), ids=OF_FORMS)
def test_with_a_clock_the_numbers_are_the_same_and_the_phases_add_up(
    options: dict, gradients: bool, monkeypatch: pytest.MonkeyPatch
):
    cut_into(2, 64, monkeypatch)
    monkeypatch.setattr(cluster_rows, "ROWS_PER_CLUSTER", 3)
    case = make(vocab=1003, num_rows=7, **options).cast(torch.bfloat16).to(DEVICE)
    clocked: list[ClockedKernel] = []

    class Clocked(ClusterLauncher):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.kernel = ClockedKernel(self)
            clocked.append(self.kernel)

    def numbers() -> list[torch.Tensor]:
        leaves = [case.tensors[name].detach().requires_grad_(gradients) for name in ("student_input", "student_weight")]
        tensors: dict[str, Any] = {**case.tensors, "student_input": leaves[0], "student_weight": leaves[1]}
        output = fused_kd_loss(**tensors, **case.options, backend="triton")
        if gradients:
            output.loss.backward()
        return [value.detach() for value in output if value is not None] + [
            x.grad for x in leaves if x.grad is not None
        ]

    plain = numbers()
    monkeypatch.setattr(triton_backend, "ClusterLauncher", Clocked)
    with_clock = numbers()
    assert len(plain) == len(with_clock) > 3
    assert all(torch.equal(value, other) for value, other in zip(plain, with_clock, strict=True))

    assert len(clocked) == 1
    cycles = clocked[0].cycles.cpu().long() & 0xFFFFFFFF
    assert cycles.shape[1] == len(PHASES) + 1
    assert torch.equal(cycles[:, :-1].sum(1), cycles[:, -1])
    of_phases = dict(zip(PHASES, cycles.T, strict=False))
    unused = {"gradient", "store"} if not gradients else {"sums"} if options["divergence"] == "forward_kl" else set()
    assert {name for name, of_blocks in of_phases.items() if not of_blocks.any()} == unused
    found = clocked[0].found(2)
    assert found.of_row * 2 * clocked[0]._num_rows == pytest.approx(float(cycles[:, -1].sum()))


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("divergence", ["ForwardKL", "JSD"])
def test_without_a_clock_the_machine_code_knows_of_none(divergence: str, architecture: int, tmp_path: Path):
    """It is that of the source without any line about it; with one, the processor's clock is read."""
    reason = nvrtc.unavailable()
    if reason is not None:
        pytest.skip(reason)
    for file in cluster_rows.SOURCE.parent.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    source = cluster_rows.SOURCE.read_text()
    source, num_lines = re.subn(r"\n *(?:clock\.(?:end|write)\(.*\)|Clock clock);", "", source)
    source, num_arguments = re.subn(r", (?:Clock& )?clock(?=\))", "", source)
    assert (num_lines, num_arguments) == (19, 3)
    stripped = tmp_path / "cluster_rows.cu"
    stripped.write_text(source)
    found = cluster_rows.layout(151_936)
    assert found is not None
    options = tuple(PLAIN.items())
    plain = cluster_rows.compile_form(found, divergence, options, architecture=architecture)
    defines = cluster_rows.defines(found, divergence, options)
    without = nvrtc.compile_cubin(stripped, defines, architecture=architecture)
    clocked = cluster_rows.compile_form(found, divergence, (*options, ("PHASES", True)), architecture=architecture)
    for what in ("--dump-sass", "--dump-resource-usage"):
        assert aot._cuobjdump(what, plain) == aot._cuobjdump(what, without)
    assert "SR_CLOCK" not in aot._cuobjdump("--dump-sass", plain)
    sass = aot._cuobjdump("--dump-sass", clocked)
    assert sass.count("SR_CLOCK") > 10
    assert not re.search(r"\b(LDL|STL)\b", sass)
