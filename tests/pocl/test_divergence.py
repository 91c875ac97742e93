"""Laws that every divergence keeps, and its formula written a second time in float64 numpy."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocl.losses import divergence
from pocl.losses.divergence import FLOOR, smallest_of_head_by_bisection
from pocl.losses.registry import divergence_of
from pocl.spec import METHODS, SFT, KDMethod

Array = npt.NDArray[np.float64]

CASES: list[tuple[str, dict[str, float]]] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("tvd", {}),
    *[("js", {"beta": beta}) for beta in (0.01, 0.1, 0.5, 0.9)],
    *[(f"skew_{side}_kl", {"alpha": alpha}) for side in ("forward", "reverse") for alpha in (0.0, 0.1, 0.7)],
    *[("adaptive_kl", {"head_mass": mass}) for mass in (0.2, 0.5)],
    *[("alpha_beta", {"alpha": a, "beta": b}) for a, b in [(0.2, 0.7), (1, 0), (0, 0.6), (0.5, 0), (0, 0), (1, 1)]],
]
# Each law is put to every case, so few examples of each are many in all.
few_examples = settings(max_examples=25)
every_case = pytest.mark.parametrize(("method", "parameters"), CASES)

logits = arrays(np.float64, (3, 7), elements=st.floats(-30, 30))
LOGITS = st.tuples(logits, logits)


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def kl(a: Array, b: Array) -> Array:
    return np.asarray((a * np.log(a / b)).sum(axis=-1))


def alpha_beta_formula(p: Array, q: Array, a: float, b: float) -> Array:
    """The alpha-beta divergence by its cases (Cichocki et al. 2011)."""
    s = a + b
    if a and b:
        terms = -(p**a * q**b - a / s * p**s - b / s * q**s) / (a * b)
    elif a:
        terms = (p**a * np.log(p**a / q**a) - p**a + q**a) / a**2
    elif b:
        terms = (q**b * np.log(q**b / p**b) - q**b + p**b) / b**2
    else:
        terms = np.log(p / q) ** 2 / 2
    return np.asarray(terms.sum(axis=-1))


def weight_of_forward(p: Array, q: Array, head_mass: float) -> Array:
    """The share of the gap that lies on the tokens without which the teacher's mass is less than `head_mass`."""
    weights = []
    for p_row, q_row in zip(p, q, strict=True):
        # Mass of the tokens that are likelier than each: those of equal probability stand together.
        likelier = np.array([p_row[p_row > each].sum() for each in p_row])
        gap = np.abs(p_row - q_row)
        weights.append(gap[likelier < head_mass].sum() / gap.sum() if gap.sum() else 0.5)
    return np.array(weights)


def adaptive_kl_formula(p: Array, q: Array, weight: Array) -> Array:
    return np.asarray(weight * kl(p, q) + (1 - weight) * kl(q, p))


def head_is_unambiguous(method: str, parameters: dict[str, float], z_p: Array, tau: float = 1.0) -> bool:
    """Whether rounding leaves the head of `adaptive_kl` as it is: the one place where a divergence jumps."""
    if method != "adaptive_kl":
        return True
    for row in z_p / tau:
        distinct_logits = np.sort(np.unique(row))[::-1]
        masses = np.cumsum([softmax(row)[row == each].sum() for each in distinct_logits])
        if np.abs(masses - parameters["head_mass"]).min() < 1e-9 or (np.diff(distinct_logits) > -1e-9).any():
            return False
    return True


def formula(
    method: str,
    z_p: Array,
    z_q: Array,
    weights_at: Array | None = None,
    /,
    tau: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    head_mass: float = 0.5,
) -> Array:
    """Each divergence from its definition, on probabilities; detached weights are taken at the logits `weights_at`."""
    p, q = softmax(z_p / tau), softmax(z_q / tau)
    m = beta * p + (1 - beta) * q
    weight = weight_of_forward(p, softmax((z_q if weights_at is None else weights_at) / tau), head_mass)
    values: dict[str, Array] = {
        "adaptive_kl": adaptive_kl_formula(p, q, weight),
        "alpha_beta": alpha_beta_formula(p, q, alpha, beta),
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "js": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tvd": np.abs(p - q).sum(axis=-1) / 2,
        "skew_forward_kl": kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": kl(q, (1 - alpha) * p + alpha * q),
    }
    return values[method]


def value_of(method: str, z_p: Array, z_q: Array, /, **parameters: float) -> Array:
    found: Array = divergence(method, torch.tensor(z_p), torch.tensor(z_q), **parameters).numpy()
    return found


def gradient(method: str, z_p: torch.Tensor, z_q: torch.Tensor, **parameters: float) -> torch.Tensor:
    z_q = z_q.clone().requires_grad_()
    divergence(method, z_p, z_q, **parameters).sum().backward()
    assert z_q.grad is not None
    return z_q.grad


def random_logits(seed: int, tokens: int = 4, vocabulary: int = 11, scale: float = 2.0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((tokens, vocabulary)), scale * rng.standard_normal((tokens, vocabulary))


def test_the_registry_is_total_over_the_methods() -> None:
    assert set(METHODS) == set(KDMethod)
    for name, specification in METHODS.items():
        value = specification()
        assert value.needs_teacher == (name is not KDMethod.SFT)
        if value.needs_teacher:
            divergence_of(value)


def test_every_distillation_method_is_under_these_laws() -> None:
    assert {method for method, _ in CASES} == set(KDMethod) - {SFT().name}


@every_case
@few_examples
@given(LOGITS)
def test_value_equals_the_float64_formula(method: str, parameters: dict[str, float], pair: tuple[Array, Array]) -> None:
    assume(head_is_unambiguous(method, parameters, pair[0], tau=1.5))
    actual = value_of(method, *pair, temperature=1.5, **parameters)
    np.testing.assert_allclose(actual, formula(method, *pair, None, tau=1.5, **parameters), rtol=1e-9, atol=1e-12)


@every_case
def test_gradient_equals_finite_differences_of_the_formula(method: str, parameters: dict[str, float]) -> None:
    z_p, z_q = random_logits(seed=1)
    step, expected = 1e-6, np.empty_like(z_q)
    for index in np.ndindex(z_q.shape):
        up, down = z_q.copy(), z_q.copy()
        up[index] += step
        down[index] -= step
        above, below = (formula(method, z_p, z, z_q, tau=1.7, **parameters) for z in (up, down))
        expected[index] = (above - below).sum() / (2 * step)
    actual = gradient(method, torch.tensor(z_p), torch.tensor(z_q), temperature=1.7, **parameters)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=1e-9)


@every_case
@few_examples
@given(LOGITS)
def test_divergence_is_never_negative(method: str, parameters: dict[str, float], pair: tuple[Array, Array]) -> None:
    z_p, z_q = (torch.tensor(z, dtype=torch.float32) for z in pair)
    assert (divergence(method, z_p, z_q, **parameters) >= 0).all()


@every_case
@few_examples
@given(logits)
def test_divergence_and_gradient_are_zero_for_equal_distributions(
    method: str, parameters: dict[str, float], z: Array
) -> None:
    np.testing.assert_allclose(value_of(method, z, z, **parameters), 0, atol=1e-13)
    assert gradient(method, torch.tensor(z), torch.tensor(z), **parameters).abs().max() < 1e-13


@every_case
def test_divergence_is_positive_for_different_distributions(method: str, parameters: dict[str, float]) -> None:
    z_p, z_q = random_logits(seed=2, scale=0.01)
    assert (value_of(method, z_p, z_q, **parameters) > 0).all()


@every_case
@few_examples
@given(LOGITS, st.floats(-50, 50))
def test_divergence_is_invariant_under_a_shift_of_all_logits_of_a_token(
    method: str, parameters: dict[str, float], pair: tuple[Array, Array], shift: float
) -> None:
    z_p, z_q = pair
    assume(head_is_unambiguous(method, parameters, z_p))
    shifted = value_of(method, z_p + shift, z_q - shift, **parameters)
    np.testing.assert_allclose(shifted, value_of(method, z_p, z_q, **parameters), rtol=1e-9, atol=1e-11)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [120.0, 1e4, 1e30])
def test_extreme_logits_give_finite_values_and_gradients(
    method: str, parameters: dict[str, float], dtype: torch.dtype, gap: float
) -> None:
    z = torch.tensor([[gap, 0.0, -gap], [-gap, gap, 0.0]], dtype=dtype)
    for z_q in (z, z.flip(-1), torch.zeros_like(z)):
        value = divergence(method, z, z_q, **parameters)
        assert value.isfinite().all()
        assert (value >= 0).all()
        assert gradient(method, z, z_q, **parameters).isfinite().all()


@every_case
@pytest.mark.parametrize("ruled_out_by", ["teacher", "student", "both"])
def test_minus_infinite_logits_give_finite_values_and_gradients(
    method: str, parameters: dict[str, float], ruled_out_by: str
) -> None:
    z_p, z_q = (torch.tensor(z, dtype=torch.float32) for z in random_logits(seed=3))
    if ruled_out_by in ("teacher", "both"):
        z_p[:, 2] = -math.inf
    if ruled_out_by in ("student", "both"):
        z_q[:, 2] = -math.inf
    value = divergence(method, z_p, z_q, **parameters)
    assert value.isfinite().all()
    assert (value > 0).all()
    assert gradient(method, z_p, z_q, **parameters).isfinite().all()


@every_case
def test_a_minus_infinite_logit_of_both_models_equals_a_smaller_vocabulary(
    method: str, parameters: dict[str, float]
) -> None:
    z_p, z_q = random_logits(seed=4)
    wider_p, wider_q = (np.pad(z, ((0, 0), (0, 1)), constant_values=-np.inf) for z in (z_p, z_q))
    np.testing.assert_allclose(
        value_of(method, wider_p, wider_q, **parameters), value_of(method, z_p, z_q, **parameters), rtol=1e-12
    )


def test_a_minus_infinite_logit_of_the_student_alone_costs_the_floor() -> None:
    actual = value_of("forward_kl", np.log([[0.5, 0.5]]), np.array([[0.0, -np.inf]]))
    np.testing.assert_allclose(actual, 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - FLOOR))


def test_float32_agrees_with_float64_over_a_large_vocabulary() -> None:
    z_p, z_q = random_logits(seed=5, vocabulary=50_000)
    for method, parameters in CASES:
        single = divergence(method, torch.tensor(z_p).float(), torch.tensor(z_q).float(), **parameters)
        np.testing.assert_allclose(single.numpy(), value_of(method, z_p, z_q, **parameters), rtol=1e-5)


@given(LOGITS)
def test_total_variation_is_at_most_one(pair: tuple[Array, Array]) -> None:
    assert (value_of("tvd", *pair) <= 1 + 1e-12).all()


def test_total_variation_has_subgradient_zero_at_a_tie() -> None:
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (gradient("tvd", z, z.clone()) == 0).all()


@pytest.mark.parametrize("side", ["forward", "reverse"])
def test_a_skew_of_zero_is_the_plain_kl_and_the_limit_of_small_skews(side: str) -> None:
    z_p, z_q = random_logits(seed=6)
    plain = value_of(f"{side}_kl", z_p, z_q)
    np.testing.assert_array_equal(value_of(f"skew_{side}_kl", z_p, z_q, alpha=0.0), plain)
    np.testing.assert_allclose(value_of(f"skew_{side}_kl", z_p, z_q, alpha=1e-12), plain, rtol=1e-9)


@given(LOGITS, st.floats(0.05, 0.95))
def test_js_is_symmetric_under_exchange_of_the_models(pair: tuple[Array, Array], beta: float) -> None:
    z_p, z_q = pair
    exchanged = value_of("js", z_q, z_p, beta=1 - beta)
    np.testing.assert_allclose(value_of("js", z_p, z_q, beta=beta), exchanged, rtol=1e-9, atol=1e-12)


def test_js_weighs_the_teacher_by_beta() -> None:
    p, q = np.array([[0.9, 0.1]]), np.array([[0.2, 0.8]])
    mixture = 0.1 * p + 0.9 * q
    expected = 0.1 * kl(p, mixture) + 0.9 * kl(q, mixture)
    np.testing.assert_allclose(value_of("js", np.log(p), np.log(q), beta=0.1), expected)


def test_adaptive_kl_weighs_forward_kl_by_the_gap_on_the_head() -> None:
    p, q = np.array([[0.4, 0.3, 0.2, 0.1]]), np.array([[0.1, 0.2, 0.3, 0.4]])
    # 0.4 and 0.3 reach one half together, and hold half of the gaps 0.3, 0.1, 0.1 and 0.3.
    np.testing.assert_allclose(value_of("adaptive_kl", np.log(p), np.log(q)), 0.5 * kl(p, q) + 0.5 * kl(q, p))
    # 0.4 alone reaches 0.35, and holds 0.3 of 0.8.
    expected = 0.375 * kl(p, q) + 0.625 * kl(q, p)
    np.testing.assert_allclose(value_of("adaptive_kl", np.log(p), np.log(q), head_mass=0.35), expected)


@few_examples
@given(arrays(np.float64, (2, 9), elements=st.sampled_from([-1.0, 0.0, 0.5])), st.permutations(range(9)))
def test_adaptive_kl_does_not_depend_on_the_order_of_equal_probabilities(z_p: Array, order: list[int]) -> None:
    _, z_q = random_logits(seed=10, tokens=2, vocabulary=9)
    # Sums of equal terms in another order may round to either side of one half.
    masses = [softmax(z_p)[z_p >= each].sum() for each in (0.0, 0.5)]
    assume(all(abs(mass - 0.5) > 1e-9 for mass in masses))
    np.testing.assert_allclose(value_of("adaptive_kl", z_p[:, order], z_q[:, order]), value_of("adaptive_kl", z_p, z_q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(logits, st.floats(0.05, 0.999))
def test_the_head_is_found_alike_without_a_look_at_the_numbers(dtype: torch.dtype, z: Array, head_mass: float) -> None:
    p = torch.softmax(torch.from_numpy(z), dim=-1).to(dtype)
    smallest = smallest_of_head_by_bisection(p, head_mass)
    for row, found in zip(p, smallest, strict=True):
        assert found in row
        # Without the smallest of the head, its mass is not reached; with it, it is.
        assert row[row >= found].sum() >= head_mass or found == row.min()
        assert row[row > found].sum() < head_mass


def test_the_head_of_adaptive_kl_may_be_most_of_a_large_vocabulary() -> None:
    z_p, z_q = random_logits(seed=11, vocabulary=3000, scale=0.1)
    actual = value_of("adaptive_kl", z_p, z_q, head_mass=0.97)
    np.testing.assert_allclose(actual, formula("adaptive_kl", z_p, z_q, head_mass=0.97))


def test_alpha_beta_includes_forward_kl_reverse_kl_and_hellinger() -> None:
    z_p, z_q = random_logits(seed=12)
    p, q = softmax(z_p), softmax(z_q)
    np.testing.assert_allclose(value_of("alpha_beta", z_p, z_q, alpha=1, beta=0), value_of("forward_kl", z_p, z_q))
    np.testing.assert_allclose(value_of("alpha_beta", z_p, z_q, alpha=0, beta=1), value_of("reverse_kl", z_p, z_q))
    hellinger = ((np.sqrt(p) - np.sqrt(q)) ** 2).sum(axis=-1)
    np.testing.assert_allclose(value_of("alpha_beta", z_p, z_q, alpha=0.5, beta=0.5), 2 * hellinger)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.7), (0.4, 0.0), (0.0, 0.0)])
def test_alpha_beta_at_zero_is_the_limit_of_small_parameters(alpha: float, beta: float) -> None:
    z_p, z_q = random_logits(seed=13)
    near = value_of("alpha_beta", z_p, z_q, alpha=alpha or 1e-5, beta=beta or 1e-5)
    np.testing.assert_allclose(value_of("alpha_beta", z_p, z_q, alpha=alpha, beta=beta), near, rtol=1e-3)


def test_omitted_parameters_have_the_defaults_of_the_specification() -> None:
    z_p, z_q = random_logits(seed=7)
    np.testing.assert_array_equal(value_of("js", z_p, z_q), value_of("js", z_p, z_q, beta=0.5))
    np.testing.assert_array_equal(
        value_of("skew_forward_kl", z_p, z_q), value_of("skew_forward_kl", z_p, z_q, alpha=0.1)
    )


def test_divergence_is_not_scaled_by_tau_squared() -> None:
    z_p, z_q = random_logits(seed=8)
    np.testing.assert_allclose(
        value_of("forward_kl", z_p, z_q, temperature=2.0), value_of("forward_kl", z_p / 2, z_q / 2)
    )


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("kl", {}),
        ("sft", {}),
        ("js", {"beta": 1.0}),
        ("js", {"alpha": 0.1}),
        ("adaptive_kl", {"head_mass": 1.0}),
        ("alpha_beta", {"alpha": -0.1}),
        ("skew_forward_kl", {"alpha": -0.1}),
        ("forward_kl", {"scale_by_tau_squared": True}),
        ("forward_kl", {"temperature": 0.0}),
        ("forward_kl", {"temperature": math.nan}),
    ],
)
def test_invalid_method_or_parameter_is_refused(method: str, parameters: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"."):
        value_of(method, *random_logits(seed=9), **parameters)


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="both be"):
        divergence("tvd", torch.zeros(2, 3), torch.zeros(2, 4))
