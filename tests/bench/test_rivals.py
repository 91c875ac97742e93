"""The rivals' losses against the formulas in float64."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from bench.rivals import IGNORED
from bench.rivals.published import PADDED_LENGTH, Padded, published_loss
from bench.rivals.trl_distillation import distillation_loss
from bench.rivals.trl_gkd import gkd_loss
from pocl.data.batches import EncodedSample

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL comes with the extra `bench`")
B, L, V, D = 3, 7, 40, 16


@pytest.fixture
def labels() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(V, (B, L), generator=generator)
    labels[torch.rand(B, L, generator=generator) < 0.5] = IGNORED
    return labels


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, kd_weight: float) -> Tensor:
    """(1 - w) CE + w tau^2 (-sum p log q), token by token in float64."""
    terms = []
    for row, column in (labels != IGNORED).nonzero().tolist():
        s, t = student[row, column].double(), teacher[row, column].double()
        p, q = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (t, s))
        cross_entropy = -torch.log(torch.exp(s)[labels[row, column]] / torch.exp(s).sum())
        terms.append((1 - kd_weight) * cross_entropy - kd_weight * temperature**2 * (p * torch.log(q)).sum())
    return torch.stack(terms).mean()


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KL(p, q), mean over labelled tokens, in float64."""
    is_labelled = labels != IGNORED
    p, q = (torch.softmax(z[is_labelled].double() / temperature, dim=-1) for z in (teacher, student))
    return (p * (p.log() - q.log())).sum(dim=-1).mean()


def assert_agree(value: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Equal values and gradients at `at`."""
    one, other = (at.clone().requires_grad_() for _ in range(2))
    left, right = value(one), expected(other)
    assert left.item() == pytest.approx(right.item(), rel=1e-5)
    torch.autograd.backward(left)
    torch.autograd.backward(right)
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("kd_weight", [0.7, 1.0])
def test_published_loss_equals_its_formula(temperature: float, kd_weight: float, labels: Tensor) -> None:
    teacher = 3 * normal(2, B, L, V)
    assert_agree(
        lambda z: published_loss(z, teacher, labels, temperature=temperature, kd_weight=kd_weight),
        lambda z: oracle(z, teacher, labels, temperature, kd_weight),
        3 * normal(3, B, L, V),
    )


@needs_trl
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_trl_gkd_at_beta_0_equals_the_forward_kl(temperature: float, labels: Tensor) -> None:
    teacher = 3 * normal(2, B, L, V)
    assert_agree(
        lambda z: gkd_loss(z, teacher, labels, temperature=temperature),
        lambda z: divergence(z, teacher, labels, temperature),
        3 * normal(3, B, L, V),
    )


@needs_trl
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_trl_chunked_divergence_at_beta_0_equals_the_forward_kl(temperature: float) -> None:
    hidden, teacher_hidden, head, teacher_head = (normal(seed, n, D) for seed, n in enumerate((9, 9, V, V)))
    labels = torch.zeros(9, dtype=torch.long)
    assert_agree(
        lambda h: distillation_loss(h, teacher_hidden, head, teacher_head, temperature=temperature),
        lambda h: divergence(h @ head.T, teacher_hidden @ teacher_head.T, labels, temperature),
        hidden,
    )


def test_padding_shifts_the_labels_once() -> None:
    sample = EncodedSample(digest="0", input_ids=(5, 6, 7, 8), prompt_length=2)
    padded = Padded.collate([sample])
    assert padded.input_ids.shape == (1, PADDED_LENGTH)
    assert padded.labels[0, :5].tolist() == [IGNORED, 7, 8, IGNORED, IGNORED]
    assert padded.attention_mask.sum() == 4
    assert Padded.collate([sample], length=None).input_ids.shape == (1, 4)
