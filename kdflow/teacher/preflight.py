"""What must hold of a teacher before anybody learns from it, whatever its kind.

An engine can hand over wrong hidden states without a word: those of another request, shifted by a cached prefix, taken
before the final norm, or of weights that are gone. So the teacher is asked for rows of known text; these, times its
lm_head, must give the log-probabilities that the engine itself reports. What does not fit is traced to its cause.

Shapes: T tokens of a sample, R rows of all samples, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdflow.config import TeacherConfig
from kdflow.errors import ConfigError, TeacherFault
from kdflow.modeling import load_final_norm, load_lm_head, load_model_config, load_tokenizer
from kdflow.teacher.base import Teacher
from kdflow.types import LMHead

_TEXT = (
    "A teacher reads the same words as its student, and for each of them it has an opinion about the next.",
    "Rain fell on the harbour all night; by morning the nets were heavy and the boats sat low in the water.",
    "To sort a list, split it in two, sort both halves, and merge them while comparing their first elements.",
    "Seven plus five is twelve. Twelve times twelve is one hundred and forty-four, which is a gross.",
    "def area(radius): return 3.14159 * radius ** 2  # the unit is that of the radius, squared",
)
_LENGTHS = (11, 23, 17, 40, 31)
_TAILS = (" So it was, and so", " Nobody knew why, but", " In the end", " After that,", " print(area(2))")
_MAX_SHIFT = 24  # how far rows are looked for from where they belong
_UNIFORM = 5e-4  # an entropy this close to ln V, in parts of it, says nothing about any token


@dataclass(frozen=True)
class _Tolerance:
    """Of log-probabilities, and of rows relative to their norm: by how much two honest computations differ."""

    mean: float
    largest: float
    rows: float

    @staticmethod
    def of(dtype: torch.dtype) -> _Tolerance:
        return _Tolerance(1e-3, 1e-2, 1e-3) if dtype == torch.float32 else _Tolerance(0.05, 0.6, 0.05)


class Preflight:
    """Checks a teacher when it is made; `check_again` is the cheap part, for later.

    Raises:
        TeacherFault, ConfigError: something does not hold; likely cause and remedy are named.
    """

    def __init__(self, config: TeacherConfig, teacher: Teacher) -> None:
        self._teacher = teacher
        self._tolerance = _Tolerance.of(teacher.dtype)
        head = load_lm_head(config.model, teacher.dtype)
        tokenizer = load_tokenizer(config.model)
        check_vocabulary(config.model, tokenizer, head)
        self._samples = [ids[:n] for ids, n in zip(_tokenise(tokenizer, _TEXT), _LENGTHS, strict=True)]
        tails = _tokenise(tokenizer, _TAILS)
        longer = [np.concatenate(pair) for pair in zip(self._samples, tails, strict=True)][::-1]
        self._rows = self._ask(self._samples, head, config, "distinct prompts in one batch")
        # Whatever the engine keeps of the prompts, it has now; the rows must be there all the same.
        self._ask(longer, head, config, "prompts that begin with earlier ones")

    def _ask(self, samples: list[np.ndarray], head: LMHead, config: TeacherConfig, what: str) -> list[torch.Tensor]:
        rows = [r.float() for r in self._teacher.hidden_rows(samples)]
        logprobs = self._teacher.token_logprobs(samples)
        check_rows(samples, rows, logprobs, head, self._tolerance, config.model, what)
        return rows

    def check_again(self) -> None:
        """The rows of the first probe once more; they must be the same.

        Raises:
            TeacherFault: they are not.
        """
        for index, (old, new) in enumerate(zip(self._rows, self._teacher.hidden_rows(self._samples), strict=True)):
            difference = (new.float() - old).norm() / old.norm()
            if not difference <= self._tolerance.rows:
                gone = " They are all zero." if not new.any() else ""
                raise TeacherFault(
                    f"teacher changed: hidden states of probe {index} differ from those at the start by "
                    f"{difference:.3g} of their norm, expected at most {self._tolerance.rows:g}.{gone} Likely its "
                    "weights were lost or replaced, as by waking an engine whose weights were not backed up; start it "
                    "anew, and keep a backup (enable_weights_cpu_backup of sglang)"
                )


def _tokenise(tokenizer: Any, texts: Iterable[str]) -> list[np.ndarray]:
    return [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts]


def check_vocabulary(model: str, tokenizer: Any, head: LMHead) -> None:
    """Tokenizer, config and head of a model must mean the same ids.

    Raises:
        ConfigError: they do not.
    """
    config = load_model_config(model).get_text_config()
    if config.vocab_size != head.vocab_size:
        raise ConfigError(
            f"{model}: expected an lm_head of {config.vocab_size} rows (vocab_size of its config), got "
            f"{head.vocab_size}; its files are of two models, or padding was cut from one of them: fetch them again"
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= head.vocab_size:
        raise ConfigError(
            f"{model}: its tokenizer has ids up to {largest}, its lm_head {head.vocab_size} rows; tokens were added "
            "without resizing the model, or the tokenizer is another model's"
        )
    if head.hidden_size != config.hidden_size:
        raise ConfigError(f"{model}: expected an lm_head of width {config.hidden_size}, got {head.hidden_size}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.to_dict().get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < head.vocab_size:
                raise ConfigError(
                    f"{model}: {name} of its config is {token}, outside its vocabulary of {head.vocab_size}; "
                    "set it to the tokenizer's"
                )


def check_rows(
    samples: Sequence[np.ndarray],
    rows: Sequence[torch.Tensor],
    logprobs: Sequence[torch.Tensor],
    head: LMHead,
    tolerance: _Tolerance,
    model: str,
    what: str,
) -> None:
    """Rows times head must give the engine's log-probabilities of every next token.

    Args:
        samples: (T,) each; rows: (T - 1, H) each; logprobs: (T - 1,) each.
        what: the probe, for messages.

    Raises:
        TeacherFault: they do not.
    """
    for index, (sample, sample_rows) in enumerate(zip(samples, rows, strict=True)):
        if sample_rows.shape != (len(sample) - 1, head.hidden_size):
            raise TeacherFault(
                f"{what}: probe {index} expected hidden states ({len(sample) - 1}, {head.hidden_size}), got "
                f"{tuple(sample_rows.shape)}; is this the teacher of {model}?"
            )
        if not torch.isfinite(sample_rows).all():
            raise TeacherFault(
                f"{what}: hidden states of probe {index} are not finite; the weights are damaged or overflow in this "
                "dtype: try teacher.dtype float32, or fetch the model again"
            )
    probe = _Probe(samples, torch.cat(tuple(rows)), logprobs, head)
    uniform = math.log(head.vocab_size)
    entropy = probe.entropy()
    if entropy > uniform * (1 - _UNIFORM):
        raise TeacherFault(
            f"{what}: the teacher is uniform: its entropy is {entropy:.4f}, ln V is {uniform:.4f}. Its weights are "
            "zero or were never loaded (an engine that woke without a backup of its weights, load_format dummy); "
            "start it anew, and keep a backup (enable_weights_cpu_backup of sglang)"
        )
    wrong = probe.wrong(tolerance)
    if wrong.any():
        raise TeacherFault(
            f"{what}: hidden states and engine disagree about {int(wrong.sum())} of {len(wrong)} tokens (log-"
            f"probabilities differ by {probe.difference()[wrong].mean():.3g} on average): "
            + _likely_cause(probe, wrong, tolerance, model)
        )


class _Probe:
    """Rows and reported log-probabilities of all samples, one after another."""

    def __init__(
        self, samples: Sequence[np.ndarray], rows: torch.Tensor, logprobs: Sequence[torch.Tensor], head: LMHead
    ) -> None:
        self.rows, self.head = rows, head
        self.reported = torch.cat([p.float() for p in logprobs])
        self.targets = torch.cat([torch.from_numpy(s[1:].astype(np.int64)) for s in samples])
        self.owner = torch.cat([torch.full((len(s) - 1,), i) for i, s in enumerate(samples)])
        self.log_softmax = _log_softmax(rows, head)

    def entropy(self) -> float:
        return float(-(self.log_softmax.exp() * self.log_softmax).sum(-1).mean())

    def difference(self, log_softmax: torch.Tensor | None = None) -> torch.Tensor:
        """(R,) distance of computed and reported log-probabilities."""
        computed = self.log_softmax if log_softmax is None else log_softmax
        return (computed.gather(1, self.targets[:, None])[:, 0] - self.reported).abs()

    def wrong(self, tolerance: _Tolerance) -> torch.Tensor:
        """(R,) which rows are wrong: the far ones; all that are off at all where the mean is too large."""
        difference = self.difference()
        if difference.mean() > tolerance.mean:
            return difference > tolerance.mean
        return difference > tolerance.largest

    def fits(self, change: Callable[[torch.Tensor, LMHead], tuple[torch.Tensor, LMHead]], at: _Tolerance) -> bool:
        """Whether rows and head, changed so, agree with what was reported."""
        return float(self.difference(_log_softmax(*change(self.rows, self.head))).mean()) <= at.mean

    def source(self, wrong: torch.Tensor, sample: int, at: _Tolerance) -> tuple[int, int] | None:
        """(sample, shift) of where most of the wrong rows of `sample` come from."""
        places = torch.nonzero(wrong & (self.owner == sample))[:, 0]
        begin = {i: int(torch.nonzero(self.owner == i)[0]) for i in self.owner.unique().tolist()}
        for other in sorted(begin, key=lambda i: i != sample):
            for shift in sorted(range(-_MAX_SHIFT, _MAX_SHIFT + 1), key=abs):
                if (other, shift) == (sample, 0):
                    continue
                found = places - begin[sample] + begin[other] + shift
                inside = (found >= 0) & (found < len(self.owner))
                inside[inside.clone()] &= self.owner[found[inside]] == other
                if inside.sum() < max(2, len(places) // 2):
                    continue
                computed = self.log_softmax[found[inside], self.targets[places[inside]]]
                if (computed - self.reported[places[inside]]).abs().median() <= at.mean:
                    return other, shift
        return None


def _log_softmax(rows: torch.Tensor, head: LMHead) -> torch.Tensor:
    """(R, V) of what a student would compute, in float32."""
    logits = torch.cat([rows @ part.float().T for part in head.weight.split(16384)], -1)
    if head.bias is not None:
        logits += head.bias.float()
    logits *= head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)


def _likely_cause(probe: _Probe, wrong: torch.Tensor, tolerance: _Tolerance, model: str) -> str:
    for sample in probe.owner[wrong].unique().tolist():
        source = probe.source(wrong, sample, tolerance)
        if source is not None and source[0] != sample:
            return (
                f"rows of request {source[0]} were given to request {sample}. Batches are taken apart wrongly; update "
                "the engine, or turn off what reorders its batches"
            )
        if source is not None:
            return (
                f"rows of request {sample} are shifted by {source[1]}. A cached prefix was not counted; turn the "
                "engine's prefix cache off (disable_radix_cache of sglang) or update it"
            )
    norm = load_final_norm(model)
    if norm is not None and probe.fits(lambda rows, head: (norm(rows), head), tolerance):
        return "they were taken before the final norm. Hand over the input of the lm_head"
    head = probe.head
    told = f"logit scale {head.logit_scale:g}, softcap {head.softcap}"
    others = {
        "without its softcap": replace(head, softcap=None),
        "without its logit scale": replace(head, logit_scale=1.0),
        "with its logit scale as a divisor": replace(head, logit_scale=1.0 / head.logit_scale),
        "without its bias": replace(head, bias=None),
    }
    for how, other in others.items():
        if probe.fits(lambda rows, _, other=other: (rows, other), tolerance):
            return f"the engine computes {how}; the config says {told}. Correct config.json of {model}, or the engine"
    return (
        f"no shuffle, shift, missing norm or scale explains it ({told}). Likely the engine and the lm_head are of two "
        f"checkpoints, the engine's head is quantised, or it scales logits by an option of {model} that is not known"
    )
