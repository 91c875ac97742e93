"""Tokens are drawn from the softmax, from exactly the nucleus, by randomness that belongs to the row."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate
from pocl.evaluation.sampling import Sampler
from tests.pocl.tiny_models import PAD, VOCABULARY, tiny

logit_rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30)


def chi_square_limit(freedom: int) -> float:
    """What chi-square with so many degrees of freedom exceeds once in a million (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * float((1 - spread + 4.753 * math.sqrt(spread)) ** 3)


def assert_drawn_from(expected: list[float], drawn: list[int]) -> None:
    counts = Counter(drawn)
    common = [token for token, share in enumerate(expected) if share * len(drawn) >= 5]
    cells = [(expected[token], counts[token]) for token in common]
    rest = 1 - sum(share for share, _ in cells)
    if rest * len(drawn) >= 5:
        cells.append((rest, len(drawn) - sum(count for _, count in cells)))
    statistic = sum((count - share * len(drawn)) ** 2 / (share * len(drawn)) for share, count in cells)
    assert len(cells) > 3
    assert statistic < chi_square_limit(len(cells) - 1)


def nucleus(logits: list[float], top_p: float) -> dict[int, float]:
    """Tokens and their shares, by the definition, in Python's own numbers; of equals the lower token goes first."""
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    kept: dict[int, float] = {}
    for token in sorted(range(len(logits)), key=lambda token: (-weights[token], token)):
        if sum(kept.values()) >= top_p * sum(weights):
            break
        kept[token] = weights[token]
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


def place_of(token: float, shares: dict[int, float], uniform: float) -> bool:
    """Whether the uniform falls into the token's part of the interval, give or take a rounding."""
    # Drawn from all, tokens lie in the order of the vocabulary; in a nucleus, the most likely first.
    for tokens in (sorted(shares), list(shares)):
        borders = [sum(shares[each] for each in tokens[:place]) for place in range(len(tokens) + 1)]
        parts = dict(zip(tokens, pairwise(borders), strict=True))
        if token in parts and parts[int(token)][0] - 1e-9 <= uniform <= parts[int(token)][1] + 1e-9:
            return True
    return False


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_sampled_tokens_follow_the_softmax_of_the_model(temperature: float, top_p: float) -> None:
    model, prompt = tiny("llama"), [5, 9, 4]
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature
    shares = nucleus(logits.tolist(), top_p)
    decoding = Decoding(1, 1000, set(), PAD, sampler=Sampler(temperature, top_p, seed=10))
    answers = generate(model, [prompt] * 1000, decoding)
    assert_drawn_from([shares.get(token, 0.0) for token in range(VOCABULARY)], [token for (token,) in answers])
    assert {token for (token,) in answers} <= shares.keys()


@given(logit_rows, st.floats(0.05, 1), st.floats(0, 1, exclude_max=True))
def test_sampled_token_inverts_the_cumulative_nucleus(logits: list[float], top_p: float, uniform: float) -> None:
    drawn = Sampler(1.0, top_p, seed=0).choose(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64))
    # Borders may lie a rounding apart.
    shares = {near: nucleus(logits, min(1.0, near)) for near in (top_p - 1e-9, top_p, top_p + 1e-9)}
    assert any(place_of(drawn.item(), of, uniform) for of in shares.values())


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.50001, 2), (0.75, 2), (0.8, 3), (1.0, 4), (1e-9, 1)])
def test_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p: float, kept: int) -> None:
    # Powers of two: the sums are exact.
    logits = torch.tensor([0.125, 0.5, 0.25, 0.125]).log2() * math.log(2)
    uniforms = torch.linspace(0, 1 - 1e-9, 400, dtype=torch.float64)
    drawn = Sampler(1.0, top_p, seed=0).choose(logits.expand(400, 4), uniforms)
    assert set(drawn.tolist()) == set([1, 2, 0, 3][:kept])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_token_without_mass_is_never_sampled(top_p: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).repeat(2, 1)
    drawn = Sampler(1.0, top_p, seed=0).choose(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert set(drawn.tolist()) <= {1, 2}


@given(logit_rows, st.floats(1e-9, 1, exclude_max=True))
def test_low_temperature_samples_the_greedy_token(logits: list[float], uniform: float) -> None:
    logits = sorted({round(logit, 1) for logit in logits})
    drawn = Sampler(1e-3, 1.0, seed=0).choose(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64))
    assert drawn.item() == len(logits) - 1


@settings(max_examples=15)
@given(order=st.permutations(range(6)), batch=st.integers(1, 6), seed=st.integers(0, 5))
def test_answer_depends_on_its_key_and_seed_and_not_on_its_batch(order: list[int], batch: int, seed: int) -> None:
    model = tiny("llama")
    prompts = [[3 + place, *range(4, 4 + place)] for place in range(6)]

    def drawn(places: list[int], batch_size: int) -> dict[int, list[int]]:
        decoding = Decoding(8, batch_size, {7, 8, 9, 20}, PAD, sampler=Sampler(1.0, 0.9, seed))
        keys = [str(place) for place in places]
        answers = generate(model, [prompts[place] for place in places], decoding, keys=keys)
        return dict(zip(places, answers, strict=True))

    assert drawn(order, batch) == drawn(list(range(6)), 1)


def test_keys_and_seeds_give_independent_streams() -> None:
    streams = torch.stack([Sampler(1.0, 1.0, seed).uniforms(["a", "b", "a"], 50) for seed in (10, 20)])
    assert torch.equal(streams[:, 0], streams[:, 2])
    assert len({tuple(row.tolist()) for row in streams[:, :2].reshape(-1, 50)}) == 4
    assert torch.equal(Sampler(1.0, 1.0, 10).uniforms(["b"], 50)[0], streams[0, 1])


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_invalid_samplers_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampler(temperature, top_p, seed=0)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sums_of_a_deterministic_run_draw_the_same_tokens(top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 60, generator=generator)
    uniforms = torch.rand(200, dtype=torch.float64, generator=generator)
    sampler = Sampler(temperature=1.0, top_p=top_p, seed=0)
    drawn = sampler.choose(logits, uniforms)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(sampler.choose(logits, uniforms), drawn)
    finally:
        torch.use_deterministic_algorithms(False)
