"""Counted operations: that the counting is right, and that a visit costs a tenth of the published recipe's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from bench.counting import count_flops
from bench.flops import PAPER, Geometry, count_ours, count_published, extrapolate
from bench.lengths import MAX_LENGTH, dolly_lengths, random_samples, representative_lengths

GATE = 10
ROWS = 16
"""A quarter of the paper's batch."""
SMALL = Geometry(3, 4, 700, student_width=32, teacher_width=64, student_heads=2, teacher_heads=2)


def test_matrix_products_are_counted_in_every_form() -> None:
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7)
    one = 2 * 3 * 5 * 7
    out = torch.empty(3, 7)
    assert count_flops(lambda: a @ b) == one
    assert count_flops(lambda: torch.mm(a, b, out=out)) == one
    assert count_flops(lambda: torch.addmm(c, a, b)) == one
    assert count_flops(lambda: c.addmm_(a, b)) == one
    assert count_flops(lambda: torch.bmm(a.expand(2, 3, 5), b.expand(2, 5, 7))) == 2 * one
    assert count_flops(lambda: a * 2) == 0


def test_gradients_and_attention_are_counted() -> None:
    rows, weight = torch.randn(3, 5), torch.randn(7, 5, requires_grad=True)
    assert count_flops(lambda: torch.autograd.backward(F.linear(rows, weight).sum())) == 2 * (2 * 3 * 5 * 7)
    query = torch.randn(1, 2, 6, 4)
    assert count_flops(lambda: F.scaled_dot_product_attention(query, query, query)) == 2 * (2 * 2 * 6 * 6 * 4)


@pytest.mark.parametrize(
    "count", [count_published, partial(count_ours, representative_lengths(3))], ids=["published", "ours"]
)
def test_extrapolated_count_is_exact(count: Callable[[Geometry], float]) -> None:
    assert extrapolate(count, SMALL, small=100) == pytest.approx(count(SMALL), rel=1e-12)


def test_count_of_the_published_recipe_equals_its_formula() -> None:
    """6 operations per student weight and token, 2 per teacher weight, over 512 tokens, and attention."""
    student, teacher = 12 * SMALL.student_layers * 32**2, 12 * SMALL.teacher_layers * 64**2
    attention = 4 * MAX_LENGTH**2 * (3.5 * SMALL.student_layers * 32 + SMALL.teacher_layers * 64)
    products = MAX_LENGTH * (6 * (student + 700 * 32) + 2 * (teacher + 700 * 64))
    assert count_published(SMALL) == pytest.approx(products + attention, rel=0.02)


def test_visit_costs_a_tenth_of_the_published_recipe() -> None:
    assert (
        extrapolate(count_published, PAPER) / extrapolate(partial(count_ours, representative_lengths(ROWS)), PAPER)
        >= GATE
    )


def test_representative_lengths_have_the_means_of_dolly() -> None:
    pairs = dolly_lengths()
    assert len(pairs) == 500
    assert max(map(sum, pairs)) == MAX_LENGTH
    for rows in (8, 16, 64):
        chosen = representative_lengths(rows)
        assert sum(map(sum, chosen)) / rows == pytest.approx(sum(map(sum, pairs)) / 500, rel=0.05)
        assert sum(r for _, r in chosen) / rows == pytest.approx(sum(r for _, r in pairs) / 500, rel=0.1)
    assert random_samples(representative_lengths(8), 100) == random_samples(representative_lengths(8), 100)
