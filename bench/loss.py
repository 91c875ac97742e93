"""Head and loss alone: hidden states in, gradients of hidden states and student head out."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.agreement import difference, require_agreement
from bench.machine import Machine
from bench.memory import peak_memories
from bench.ours import fused_loss
from bench.protocol import OURS, Rival, Work, add_timing_arguments, precision_of, time_interleaved
from bench.report import Report, timing_rows
from bench.rivals import DISTILLATION, GKD, IGNORED, PUBLISHED
from bench.rivals.published import published_loss
from bench.rivals.trl_distillation import chunked_divergence, distillation_loss
from bench.rivals.trl_gkd import gkd_loss, gkd_trainer
from pocl.models.precision import Precision
from pocl.spec import ForwardKL

TEMPERATURE, KD_WEIGHT = 1.5, 0.85
"""The values of the middle of the curriculum."""
FP32_LIMIT = 1e-5
_ROWS = 4


@dataclass(frozen=True)
class Inputs:
    """What reaches the heads: N positions, of which R predict a response token."""

    student_hidden: Tensor
    """`[N, d]`."""
    teacher_hidden: Tensor
    student_head: Tensor
    """`[V, d]` fp32."""
    teacher_head: Tensor
    labels: Tensor
    """`[N]`: the tokens that R positions predict, and `IGNORED` at the others."""

    @classmethod
    def random(cls, args: argparse.Namespace, precision: Precision) -> "Inputs":
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        response = torch.randperm(args.positions, generator=generator)[: args.response]
        labels = torch.full((args.positions,), IGNORED)
        labels[response] = torch.randint(args.vocabulary, (args.response,), generator=generator)
        # Logits with a standard deviation of 2 give distributions with a head and a tail.
        heads = [normal(args.vocabulary, args.width) * 2 / args.width**0.5 for _ in range(2)]
        hidden = [normal(args.positions, args.width).to(precision.weights) for _ in range(2)]
        return cls(
            hidden[0].requires_grad_(), hidden[1], heads[0].requires_grad_(), heads[1].to(precision.weights), labels
        )

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of the hidden states at response positions, and of the head."""
        assert self.student_hidden.grad is not None  # A backward pass has run.
        assert self.student_head.grad is not None
        return self.student_hidden.grad[self.labels != IGNORED].float(), self.student_head.grad.float()

    def clear(self) -> None:
        self.student_hidden.grad = self.student_head.grad = None


Loss = Callable[[Inputs], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser)
    parser.add_argument(
        "--positions", type=int, default=2048, help="positions of a batch, padding included (default 2048)"
    )
    parser.add_argument(
        "--response", type=int, default=820, help="positions that predict a response token (default 820)"
    )
    parser.add_argument("--width", type=int, default=576, help="width of the hidden states (default 576)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="number of tokens (default 49152)")


def rivals(args: argparse.Namespace) -> list[Rival]:
    precision = precision_of(args)
    shared: list[Inputs] = []

    def prepare(loss: Loss, load: Callable[[], object]) -> Work:
        load()
        if not shared:
            shared.append(Inputs.random(args, precision))
        return partial(_forward_backward, loss, shared[0], precision)

    return [
        Rival(OURS, partial(prepare, _ours, lambda: None)),
        Rival(PUBLISHED, partial(prepare, _published, lambda: None)),
        Rival(GKD, partial(prepare, _gkd, gkd_trainer)),
        Rival(DISTILLATION, partial(prepare, _distillation, chunked_divergence)),
    ]


def run(args: argparse.Namespace) -> Report:
    machine = Machine.measure()
    precision = precision_of(args)
    checks = _agreement(Inputs.random(args, precision), precision)
    require_agreement(FP32_LIMIT if precision.name == "fp32" else None, checks)
    timings = time_interleaved(rivals(args), args.rounds)
    results = timing_rows(timings, peak_memories(args, list(timings)))
    peak = machine.peak_gflops[precision.name]
    # Student and teacher forward, and the gradients of hidden states and head.
    flops = 4 * 2 * args.response * args.width * args.vocabulary
    for row, timing in zip(results, timings.values(), strict=True):
        row["share_of_peak_%"] = None if peak is None else 100 * flops / timing.median / 1e9 / peak
    return Report(
        "loss",
        {
            "d": args.width,
            "V": args.vocabulary,
            "positions": args.positions,
            "response tokens": args.response,
            "dtype": precision.name,
            "rounds": args.rounds,
        },
        results,
        machine,
        checks,
        notes=(
            "Ours and the published recipe compute cross-entropy and forward KL; the two of TRL compute the KL alone.",
            "Share of peak: the four head products over the response tokens, over the time, over the matrix peak.",
        ),
    )


def _forward_backward(loss: Loss, inputs: Inputs, precision: Precision) -> Tensor:
    inputs.clear()
    with precision.autocast():
        value = loss(inputs)
    torch.autograd.backward(value)
    return value


def _ours(inputs: Inputs, kd_weight: float = KD_WEIGHT, scaled: bool = True) -> Tensor:
    response = inputs.labels != IGNORED
    return fused_loss(
        inputs.student_hidden[response],
        inputs.teacher_hidden[response],
        inputs.student_head,
        inputs.teacher_head,
        inputs.labels[response],
        method=ForwardKL(scale_by_tau_squared=scaled),
        temperature=TEMPERATURE,
        kd_weight=kd_weight,
    )


def _logits(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of student and teacher at all positions, `[B, L, V]`, and the labels, `[B, L]`."""
    shape = (_ROWS, -1, inputs.student_hidden.shape[1])
    student = F.linear(inputs.student_hidden.view(shape), inputs.student_head)
    with torch.no_grad():
        teacher = F.linear(inputs.teacher_hidden.view(shape), inputs.teacher_head)
    return student, teacher, inputs.labels.view(_ROWS, -1)


def _published(inputs: Inputs) -> Tensor:
    return published_loss(*_logits(inputs), temperature=TEMPERATURE, kd_weight=KD_WEIGHT)


def _gkd(inputs: Inputs) -> Tensor:
    return gkd_loss(*_logits(inputs), temperature=TEMPERATURE)


def _distillation(inputs: Inputs) -> Tensor:
    response = inputs.labels != IGNORED
    return distillation_loss(
        inputs.student_hidden[response],
        inputs.teacher_hidden[response],
        inputs.student_head,
        inputs.teacher_head,
        temperature=TEMPERATURE,
    )


def _agreement(inputs: Inputs, precision: Precision) -> dict[str, float]:
    """The differences of each rival's loss and gradients from ours on the same objective."""
    response = inputs.labels != IGNORED
    with torch.no_grad(), precision.autocast():
        teacher = inputs.teacher_hidden[response] @ inputs.teacher_head.T
        log_p = torch.log_softmax(teacher.float() / TEMPERATURE, dim=-1)
        # The published loss omits the teacher's entropy.
        entropy_term = KD_WEIGHT * TEMPERATURE**2 * (log_p.exp() * log_p).sum(dim=-1).mean()
    pure = partial(_ours, kd_weight=1.0, scaled=False)
    checks = {}
    for name, rival, reference, constant in (
        (PUBLISHED, _published, _ours, entropy_term.item()),
        (GKD, _gkd, pure, 0.0),
        (DISTILLATION, _distillation, pure, 0.0),
    ):
        ours, theirs = (_value_and_gradients(loss, inputs, precision) for loss in (reference, rival))
        checks[f"{name}: loss differs by"] = difference(ours[0], theirs[0] + constant)
        checks[f"{name}: gradients differ by"] = max(
            difference(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True)
        )
    return checks


def _value_and_gradients(loss: Loss, inputs: Inputs, precision: Precision) -> tuple[Tensor, ...]:
    value = _forward_backward(loss, inputs, precision)
    return value.detach().float(), *inputs.gradients()
