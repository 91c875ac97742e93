"""The fused objective equals the dense one, in value and in every gradient, and never holds full logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example as explicit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from pocl.losses.buffers import LossExecution, Workspace
from pocl.losses.dense import cross_entropy_sum, objective_sum
from pocl.losses.fused import fused_objective_sum, fused_token_losses
from pocl.losses.fused_cross_entropy import fused_cross_entropy_sum, fused_token_cross_entropy
from pocl.losses.objective import ObjectiveTerms
from pocl.losses.sums import ObjectiveSum
from pocl.models.output_head import Head, HeadInputs
from pocl.spec import (
    JS,
    METHODS,
    SFT,
    TVD,
    AdaptiveKL,
    AlphaBeta,
    DistillationMethod,
    ForwardKL,
    Method,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)
from tests.pocl.test_objective import DISTILLING

WIDTH, TEACHER_WIDTH = 5, 7


@dataclass(frozen=True)
class Case:
    """Both sides of one micro-batch, and the terms of their objective."""

    hidden: Tensor
    student: Head
    teacher_hidden: Tensor
    teacher: Head
    labels: Tensor
    method: Method
    temperature: float = 1.5
    kd_weight: float = 0.7
    shared_vocabulary: int | None = None

    def dense(self) -> ObjectiveSum:
        logits = self.student.logits(self.hidden)
        if not self.method.needs_teacher:
            return cross_entropy_sum(logits, self.labels)
        return objective_sum(logits, self.teacher.logits(self.teacher_hidden), self.labels, self._terms(self.method))

    def fused(self, **options: Any) -> ObjectiveSum:
        chosen = {key: options.pop(key) for key in ("chunk_tokens", "workspace", "backend") if key in options}
        options["execution"] = LossExecution(**{"chunk_tokens": 3, **chosen})
        if not self.method.needs_teacher:
            return fused_cross_entropy_sum(self._student_inputs, self.labels, **options)
        return fused_objective_sum(
            self._student_inputs, self._teacher_inputs, self.labels, self._terms(self.method), **options
        )

    def fused_token_losses(self) -> tuple[Tensor, ...]:
        """Cross-entropy and, with a teacher, divergence of each token."""
        if not self.method.needs_teacher:
            return (fused_token_cross_entropy(self._student_inputs, self.labels, execution=LossExecution(3)),)
        terms = self._terms(self.method)
        return fused_token_losses(
            self._student_inputs, self._teacher_inputs, self.labels, terms, execution=LossExecution(3)
        )

    @property
    def _student_inputs(self) -> HeadInputs:
        return HeadInputs(self.hidden, self.student)

    @property
    def _teacher_inputs(self) -> HeadInputs:
        return HeadInputs(self.teacher_hidden, self.teacher)

    def _terms(self, method: DistillationMethod) -> ObjectiveTerms:
        return ObjectiveTerms(method, self.temperature, self.kd_weight, self.shared_vocabulary)

    @property
    def parameters(self) -> list[Tensor]:
        return [each for each in (self.hidden, self.student.weight, self.student.bias) if each is not None]


def case(
    method: Method,
    *,
    tokens: int = 8,
    vocabulary: int = 11,
    teacher_vocabulary: int | None = None,
    size: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
    **terms: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, by: float = 1.0) -> Tensor:
        return (by * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    teacher_size = teacher_vocabulary or vocabulary
    return Case(
        hidden=draw(tokens, WIDTH, by=size).requires_grad_(),
        student=Head(
            draw(vocabulary, WIDTH).requires_grad_(),
            draw(vocabulary).requires_grad_() if bias else None,
            scale,
            softcap,
        ),
        teacher_hidden=draw(tokens, TEACHER_WIDTH, by=size),
        teacher=Head(draw(teacher_size, TEACHER_WIDTH), None, scale, softcap),
        labels=labels,
        method=method,
        shared_vocabulary=terms.pop("shared_vocabulary", min(vocabulary, teacher_size)),
        **terms,
    )


def gradients(example: Case, objective: Callable[[], ObjectiveSum]) -> list[Tensor]:
    return list(torch.autograd.grad(objective().loss, example.parameters))


def in_float64(example: Case) -> Case:
    """The same numbers, for which the dense objective is exact beside one in float32."""

    def exact(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    def exact_head(head: Head) -> Head:
        return replace(head, weight=exact(head.weight), bias=None if head.bias is None else exact(head.bias))

    return replace(
        example,
        hidden=exact(example.hidden),
        student=exact_head(example.student),
        teacher_hidden=exact(example.teacher_hidden),
        teacher=exact_head(example.teacher),
    )


def assert_same(example: Case, tolerance: float, *, reference: Case | None = None, **options: Any) -> None:
    """The fused objective of `example` is the dense one of `reference`, in value and gradient."""
    reference = reference or example
    dense, fused = reference.dense(), example.fused(**options)
    pairs = [(fused.loss, dense.loss), (fused.cross_entropy, dense.cross_entropy)]
    if dense.divergence is not None:
        assert fused.divergence is not None
        pairs.append((fused.divergence, dense.divergence))
    else:
        assert fused.divergence is None
    for actual, expected in pairs:
        assert actual.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    for actual, expected in zip(
        gradients(example, lambda: example.fused(**options)), gradients(reference, reference.dense), strict=True
    ):
        actual = actual.to(expected.dtype)
        largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


every_method = pytest.mark.parametrize("method", [*DISTILLING, SFT()], ids=lambda method: method.name)
methods = st.one_of(
    st.sampled_from([ForwardKL(), ReverseKL(), TVD(), SFT()]),
    st.builds(JS, beta=st.floats(0.01, 0.99)),
    st.builds(SkewForwardKL, alpha=st.floats(0, 0.95)),
    st.builds(SkewReverseKL, alpha=st.floats(0, 0.95)),
    st.builds(AdaptiveKL, head_mass=st.floats(0.1, 0.9)),
    st.builds(AlphaBeta, alpha=st.floats(0.1, 1), beta=st.floats(0.1, 1)),
)
WORKSPACE = Workspace()
"""One for cases of all shapes and methods, as a run has one for all its batches."""


def test_every_method_is_among_the_cases() -> None:
    assert {method.name for method in DISTILLING} | {SFT().name} == set(METHODS)


@settings(deadline=None, max_examples=150)
@given(
    method=methods,
    tokens=st.integers(0, 9),
    vocabulary=st.integers(2, 12),
    teacher_vocabulary=st.integers(2, 12),
    chunk=st.integers(1, 10),
    temperature=st.floats(0.3, 5),
    kd_weight=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    size=st.sampled_from([0.1, 1.0, 5.0]),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_fused_equals_dense_in_float64(chunk: int, **drawn: Any) -> None:
    assert_same(case(**drawn), 1e-10, chunk_tokens=chunk, workspace=WORKSPACE)


@settings(deadline=None, max_examples=60)
@given(method=methods, temperature=st.floats(0.5, 3), kd_weight=st.floats(0, 1), seed=st.integers(0, 2**31))
@explicit(method=SkewForwardKL(alpha=0.90625), temperature=3.0, kd_weight=1.0, seed=1)
def test_fused_in_float32_equals_dense_in_float64(**drawn: Any) -> None:
    # The dense one in float32 is no reference: of a skewed divergence, whose terms cancel, it loses 2e-5.
    example = case(dtype=torch.float32, tokens=20, vocabulary=40, **drawn)
    assert_same(example, 1e-5, reference=in_float64(example), workspace=WORKSPACE)


@every_method
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_in_bfloat16_equals_dense_within_rounding(method: Method, temperature: float) -> None:
    exact = case(method, tokens=40, vocabulary=30, seed=1, temperature=temperature)
    rounded = case(method, tokens=40, vocabulary=30, seed=1, temperature=temperature, dtype=torch.bfloat16)
    for actual, expected in zip(gradients(rounded, rounded.fused), gradients(exact, exact.dense), strict=True):
        assert actual.dtype == torch.bfloat16
        # Logits of size 5 carry 2^-8 of themselves, which the softmax turns into 2 per cent of a probability.
        assert (actual.double() - expected).norm() <= 0.05 * expected.norm()


@every_method
def test_extreme_logits_give_finite_loss_and_gradient_as_dense(method: Method) -> None:
    example = case(method, size=2e3, temperature=1.0, kd_weight=1.0)
    assert example.fused().loss.isfinite()
    assert all(each.isfinite().all() for each in gradients(example, example.fused))
    assert_same(example, 1e-9)


@every_method
@pytest.mark.parametrize("kd_weight", [0.5, 1.0])
def test_minus_infinite_logits_count_as_in_the_dense_objective(method: Method, kd_weight: float) -> None:
    example = case(method, kd_weight=kd_weight)
    assert example.student.bias is not None
    with torch.no_grad():
        example.student.bias[2] = -math.inf
    ruled_out = torch.zeros(11, dtype=torch.float64)
    ruled_out[[2, 5]] = -math.inf
    example = replace(
        example,
        teacher=replace(example.teacher, bias=ruled_out),
        labels=example.labels.masked_fill(example.labels == 2, 0),
    )
    assert_same(example, 1e-10)


@every_method
def test_loss_and_gradient_are_zero_without_a_token(method: Method) -> None:
    example = case(method, tokens=0)
    assert example.fused().loss.item() == 0
    assert all(not each.any() for each in gradients(example, example.fused))


@every_method
def test_scale_multiplies_loss_and_gradient_alone(method: Method) -> None:
    example = case(method)
    whole, part = example.fused(), example.fused(scale=0.125)
    assert part.loss.item() == pytest.approx(whole.loss.item() / 8)
    assert part.cross_entropy.item() == whole.cross_entropy.item()
    for actual, expected in zip(
        gradients(example, lambda: example.fused(scale=0.125)), gradients(example, example.fused), strict=True
    ):
        torch.testing.assert_close(actual, expected / 8)


def test_a_factor_applied_to_the_loss_reaches_the_gradient() -> None:
    example = case(ForwardKL())
    tripled = torch.autograd.grad(example.fused().loss * 3, example.parameters)
    for actual, expected in zip(tripled, gradients(example, example.fused), strict=True):
        torch.testing.assert_close(actual, 3 * expected)


def test_weight_gradient_accumulates_in_place() -> None:
    example = case(JS())
    expected = gradients(example, example.dense)
    for _ in range(2):
        torch.autograd.backward(example.fused(accumulate_into_grad=True).loss)
    for parameter, once in zip(example.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once)


def test_weight_gradient_accumulates_in_place_in_another_dtype_than_the_losses() -> None:
    # A float64 teacher makes losses in float64.
    single, double = case(JS(), dtype=torch.float32), case(JS())
    mixed = replace(single, teacher_hidden=double.teacher_hidden, teacher=double.teacher)
    torch.autograd.backward(mixed.fused(accumulate_into_grad=True).loss)
    for actual, expected in zip(mixed.parameters, gradients(double, double.dense), strict=True):
        assert actual.grad is not None
        torch.testing.assert_close(actual.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_weight_gradient_in_place_is_zero_without_a_token() -> None:
    example = case(JS(), tokens=0)
    torch.autograd.backward(example.fused(accumulate_into_grad=True).loss)
    assert example.student.weight.grad is not None
    assert example.student.weight.grad.abs().max() == 0


@pytest.mark.parametrize("in_place", [False, True])
def test_a_tied_head_receives_the_gradients_of_head_and_embedding(in_place: bool) -> None:
    example = case(ReverseKL(), bias=False)
    ids = torch.arange(8) % 11

    def gradient(objective: Callable[[Case], ObjectiveSum]) -> Tensor:
        weight = example.student.weight.detach().clone().requires_grad_()
        tied = replace(example, student=Head(weight), hidden=torch.tanh(torch.nn.functional.embedding(ids, weight)))
        torch.autograd.backward(objective(tied).loss)
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(lambda c: c.fused(accumulate_into_grad=in_place)), gradient(Case.dense))


def test_frozen_parameters_receive_no_gradient() -> None:
    example = case(ForwardKL())
    example.student.weight.requires_grad_(False)
    assert example.student.bias is not None
    example.student.bias.requires_grad_(False)
    torch.autograd.backward(example.fused(accumulate_into_grad=True).loss)
    assert example.student.weight.grad is None
    torch.testing.assert_close(example.hidden.grad, torch.autograd.grad(example.dense().loss, example.hidden)[0])


@every_method
def test_token_losses_sum_to_the_objective(method: Method) -> None:
    example = case(method, temperature=2.0)
    cross_entropies, *divergences = example.fused_token_losses()
    dense = example.dense()
    assert cross_entropies.shape == example.labels.shape
    assert cross_entropies.sum().item() == pytest.approx(dense.cross_entropy.item())
    if dense.divergence is None:
        assert divergences == []
    else:
        assert [each.sum().item() for each in divergences] == [pytest.approx(dense.divergence.item())]


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch leaves it unannotated.
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@every_method
def test_full_logits_are_never_allocated(method: Method) -> None:
    example = case(method, tokens=400, vocabulary=64)
    with _LargestTensor() as largest:
        torch.autograd.backward(example.fused(chunk_tokens=16).loss)
    assert largest.elements <= max(16 * 64, 400 * TEACHER_WIDTH)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"kd_weight": 2.0}, {"shared_vocabulary": 12}])
def test_inconsistent_arguments_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"temperature|lie between"):
        replace(case(ForwardKL()), **change).fused()


@pytest.mark.slow
@pytest.mark.parametrize("method", DISTILLING, ids=lambda method: method.name)
def test_compiled_equals_dense(method: DistillationMethod) -> None:
    """For every method, with chunks of two sizes, a cap, two vocabularies and the head's own scale."""
    torch._dynamo.reset()  # Other tests compile the same function, and their number is limited.
    example = case(
        method, tokens=8, vocabulary=12, teacher_vocabulary=10, scale=0.5, softcap=3.0, size=2.0, kd_weight=0.7
    )
    assert_same(example, 1e-10, backend="aot_eager")


def test_compiled_once_for_all_steps_and_stages() -> None:
    torch._dynamo.reset()  # Other tests compile the same function, and their number is limited.
    compilations = CompileCounter()
    for tokens, temperature, kd_weight, scale in ((5, 1.0, 0.7, 0.1), (8, 1.5, 0.8, 0.2), (6, 2.0, 0.9, 0.3)):
        example = case(ForwardKL(), tokens=tokens, temperature=temperature, kd_weight=kd_weight)
        fused = example.fused(chunk_tokens=9, backend=compilations, scale=scale)
        torch.testing.assert_close(fused.loss, example.dense().loss * scale)
    assert compilations.frame_count == 1


@pytest.mark.slow
# Inductor imports a module of torch that still uses TorchScript.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_by_inductor_equals_dense() -> None:
    assert_same(case(JS(), tokens=8, vocabulary=12), 1e-10, backend="inductor")
