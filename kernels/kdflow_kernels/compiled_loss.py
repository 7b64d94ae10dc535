"""The loss as an operator of torch's, for ``torch.compile``, ``torch.export``, make_fx and fake tensors: kdflow::kd_loss.

Eager code goes through an autograd function that scales its gradients in place; a compiler can see neither into it nor
into the kernels. So while a graph is traced the whole loss, checks included, becomes one operator: it returns the output
and, for a scalar loss, the gradients, which the traced backward multiplies by the loss's own. For a loss per row the
backward calls the operator again with the rows' gradients. Inside, it is the code that eager runs.

Sizes and num_items may change from call to call; another temperature, weight or divergence compiles anew. The number of
num_items given as a tensor keeps CUDA graphs from being recorded for each.
"""

import ast
import contextlib
import dataclasses

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kdflow_kernels.chunked_loss import SecondDerivative, choose_backend, row_loss
from kdflow_kernels.divergences import Divergence, get_divergence, registered_name
from kdflow_kernels.problem import GradientNeeds
from kdflow_kernels.request import KDLossOutput, Options, Tensors, prepare

NUM_OUTPUTS = len(KDLossOutput._fields)


def is_traced(tensors: Tensors) -> bool:
    """Does somebody other than torch.compile look on, with tensors that have no memory or to write down every call?"""
    keys = torch._C._TorchDispatchModeKey
    modes = (torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY))
    return any(mode is not None for mode in modes) or any(isinstance(tensor, FakeTensor) for tensor in tensors)


def compiled_loss(tensors: Tensors, options: Options) -> KDLossOutput:
    """``fused_kd_loss`` while it is traced."""
    if options.vocab_parallel is not None:
        raise ValueError(
            "vocab_parallel: not inside torch.compile, whose operators cannot be given a process group; call the loss "
            "outside what is compiled, or from a function under @torch.compiler.disable"
        )
    num_items = tensors.num_items
    if num_items is not None and not isinstance(num_items, Tensor):
        # It changes every step; as a number of the operator's it would be compiled in.
        num_items = torch.full((), num_items, dtype=torch.float64, device=tensors.student_input.device)
    student = (tensors.student_input, tensors.student_weight, tensors.student_bias)
    outputs = kd_loss(
        *tensors[:-1],
        num_items,
        None,
        divergence=encode(options.divergence),
        temperature=options.temperature,
        kd_weight=options.kd_weight,
        ce_weight=options.ce_weight,
        ignore_index=options.ignore_index,
        reduction=options.reduction,
        student_logit_scale=options.student_logit_scale,
        teacher_logit_scale=options.teacher_logit_scale,
        student_softcap=options.student_softcap,
        teacher_softcap=options.teacher_softcap,
        vocab_size=options.vocab_size,
        chunk_size=options.chunk_size,
        grad_filter_eps=options.grad_filter_eps,
        backend=options.backend,
        needs=[torch.is_grad_enabled() and t is not None and t.requires_grad for t in student],
    )
    loss, *others = outputs[:NUM_OUTPUTS]
    return KDLossOutput(loss, *(other.detach() for other in others))


def encode(divergence: str | Divergence) -> str:
    """A registered divergence as text, "jsd(beta=0.3)": what operators can be given."""
    if isinstance(divergence, str):
        return divergence
    name = registered_name(type(divergence))
    given = [field.name for field in dataclasses.fields(divergence) if field.init] if name else []  # type: ignore[arg-type]
    return f"{name}({', '.join(f'{field}={getattr(divergence, field)!r}' for field in given)})"


def decode(text: str) -> Divergence:
    """Raises ValueError where there is no such divergence, or a parameter is no literal."""
    name, parenthesis, parameters = text.partition("(")
    if not parenthesis:
        return get_divergence(text)
    if not name:
        raise ValueError(
            "divergence: torch.compile needs a registered one, got an instance of a class that is not; put "
            "@register_divergence('name') on that very class"
        )
    try:
        call = ast.parse("f(" + parameters, mode="eval").body
        assert isinstance(call, ast.Call)
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"divergence: torch.compile carries parameters that are numbers, strings or tuples of them, got {text}"
        ) from None
    return get_divergence(name, **values)


@torch.library.custom_op("kdflow::kd_loss", mutates_args=())
def kd_loss(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    shift_labels: Tensor | None,
    row_weight: Tensor | None,
    student_token_ids: Tensor | None,
    teacher_token_ids: Tensor | None,
    num_items: Tensor | None,
    grad_rows: Tensor | None,
    *,
    divergence: str,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    ignore_index: int,
    reduction: str,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    vocab_size: int | None,
    chunk_size: int | None,
    grad_filter_eps: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """The fields of KDLossOutput, then the gradients of input, weight and bias: empty where not needed or not yet formed.

    grad_rows (N,): the gradient of a loss per row; given it, its gradients are formed, else only those of a scalar.
    """
    tensors = Tensors(
        student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, shift_labels, row_weight,
        student_token_ids, teacher_token_ids, num_items,
    )  # fmt: skip
    options = Options(
        decode(divergence), temperature, kd_weight, ce_weight, ignore_index, reduction, student_logit_scale,
        teacher_logit_scale, student_softcap, teacher_softcap, vocab_size, chunk_size, grad_filter_eps, backend, None,
    )  # fmt: skip
    with _as_in_eager(student_input.device.type):
        request = prepare(tensors, options)
        problem = request.problem
        if request.per_row and grad_rows is not None:
            grad_rows = grad_rows if request.kept_rows is None else grad_rows[request.kept_rows]
            problem = dataclasses.replace(problem, row_scale=problem.row_scale * grad_rows)
        module = choose_backend(backend, problem)
        assert module is not None
        later = request.per_row and grad_rows is None
        terms, gradients = module.run(problem, GradientNeeds(*(needed and not later for needed in needs)))
        loss = row_loss(problem, terms)
        output = request.output(loss if request.per_row else loss.sum(), terms)
        grad_input = gradients.input
        if grad_input is not None:
            grad_input = request.spread(grad_input)
            if request.counted is not None:
                grad_input.masked_fill_(~request.counted[:, None], 0.0)
        found = []
        for gradient, tensor in (
            (grad_input, student_input),
            (gradients.weight, student_weight),
            (gradients.bias, student_bias),
        ):
            if gradient is None or tensor is None:
                found.append(student_input.new_empty(0))
            else:
                found.append(gradient.to(_gradient_dtype(tensor)).contiguous())
        return [*output, *found]


def _gradient_dtype(tensor: Tensor) -> torch.dtype:
    """fp16's gradients stay in fp32 until the loss's own is known: a loss scale must still find them."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


@kd_loss.register_fake
def _(
    student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, shift_labels, row_weight,
    student_token_ids, teacher_token_ids, num_items, grad_rows, *, divergence, reduction, needs, **others,
):  # fmt: skip
    decode(divergence)
    wide = torch.promote_types(student_input.dtype, torch.float32)
    per_row = reduction == "none"
    shapes = [(student_input.shape[0],) if per_row else ()] * 3 + [()] * 3
    outputs = [student_input.new_empty(shape, dtype=wide) for shape in shapes]
    outputs.append(student_input.new_empty((), dtype=torch.int64))
    for tensor, needed in zip((student_input, student_weight, student_bias), needs, strict=True):
        if not needed or (per_row and grad_rows is None):
            outputs.append(student_input.new_empty(0))
        else:
            outputs.append(student_input.new_empty(tensor.shape, dtype=_gradient_dtype(tensor)))
    return outputs


def _keep_for_backward(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.per_row = keyword_only_inputs["needs"], keyword_only_inputs["reduction"] == "none"
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.options = keyword_only_inputs
    # The student's own, for SecondDerivative; whoever compiles the backward leaves them out.
    ctx.save_for_backward(*(inputs if ctx.per_row else (*inputs[:3], *output[NUM_OUTPUTS:])))


def _backward(ctx, grads):
    grad_loss = grads[0]
    formed: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        if ctx.per_row:
            inputs = (*ctx.saved_tensors[:-1], grad_loss)
            found = kd_loss(*inputs, **ctx.options)[NUM_OUTPUTS:]
        else:
            found = [gradient * grad_loss for gradient in ctx.saved_tensors[3:]]
        formed = [
            gradient.to(dtype) if needed else None
            for gradient, dtype, needed in zip(found, ctx.dtypes, ctx.needs, strict=True)
        ]
        if torch.is_grad_enabled():
            refusal = SecondDerivative.apply(grad_loss, *ctx.saved_tensors[:3])
            formed = [None if gradient is None else gradient + refusal for gradient in formed]
    return *formed, *[None] * 9


kd_loss.register_autograd(_backward, setup_context=_keep_for_backward)


@contextlib.contextmanager
def _as_in_eager(device_type: str):
    """Autocast off, and autograd there to be switched on, as an operator has it not: it derives some divergences."""
    keys = torch._C.DispatchKey
    with (
        torch.no_grad(),
        torch.autocast(device_type, enabled=False),
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
    ):
        yield
