"""Scores against independent formulas; bounded batches; stopping and progress."""

from collections.abc import Callable
from itertools import chain
from statistics import mean, stdev

import pytest
import torch

from pocl.data.batches import EncodedSample
from pocl.errors import RunStopped
from pocl.evaluation.evaluate import (
    EncodedDataset,
    GenerationSettings,
    Scores,
    evaluate,
    generate_answers,
    generation_batches,
    last_turn_cross_entropy,
    scoring_batches,
    token_scores,
)
from pocl.evaluation.rouge import exact_match, rouge_l
from pocl.evaluation.sampling import Sampler
from pocl.models.precision import Precision
from pocl.spec import Sampling
from pocl.teacher.signal import LiveTeacher
from tests.pocl.byte_tokenizers import byte_tokenizer
from tests.pocl.tiny_models import EOS, VOCABULARY, tiny

FP32 = Precision("fp32", torch.device("cpu"))
TOKENIZER = byte_tokenizer()
GENERATION = GenerationSettings(max_new_tokens=6, batch_size=3, end_id=EOS)


def row(place: int) -> EncodedSample:
    generator = torch.Generator().manual_seed(place)
    length = 4 + place % 9
    ids = torch.randint(3, VOCABULARY, (length + 5,), generator=generator).tolist()
    # The second token answers an earlier turn.
    return EncodedSample(f"{place:064x}", tuple(ids), length, ((1, 2),))


ENCODED = tuple(row(place) for place in range(7))
ROWS = EncodedDataset(ENCODED, tuple((f"answer {place}", "word") for place in range(7)))


def scored(**settings: object) -> Scores:
    return evaluate(tiny("llama"), TOKENIZER, ROWS, generation=GENERATION, precision=FP32, **settings)  # type: ignore[arg-type] # Each test names the settings it needs.


def alone(model_name: str, encoded: EncodedSample, seed: int = 0) -> torch.Tensor:
    """Log-probabilities after each token of a row, `[L, V]` float64, without batch or padding."""
    ids = torch.tensor([encoded.input_ids])
    return torch.log_softmax(tiny(model_name, seed)(input_ids=ids).logits[0].double(), dim=-1)


def response_places(encoded: EncodedSample) -> list[int]:
    return [place for place, labelled in enumerate(encoded.label_mask) if labelled]


def test_cross_entropy_and_divergence_are_means_over_response_tokens() -> None:
    ce, kl = [], []
    for encoded in ENCODED:
        student, teacher = alone("llama", encoded), alone("llama", encoded, seed=1)
        for place in response_places(encoded):
            ce.append(-student[place - 1, encoded.input_ids[place]].item())
            kl.append((teacher[place - 1].exp() * (teacher[place - 1] - student[place - 1])).sum().item())
    found = token_scores(
        tiny("llama"), ENCODED, batch_size=3, precision=FP32, teacher=LiveTeacher(tiny("llama", 1), FP32)
    )
    assert found == pytest.approx((mean(ce), mean(kl)), rel=1e-5)


def test_the_last_turns_cross_entropy_leaves_out_earlier_turns() -> None:
    expected = [
        -mean(alone("llama", each)[at - 1, each.input_ids[at]].item() for at in response_places(each) if at > 1)
        for each in ENCODED
    ]
    found = last_turn_cross_entropy(tiny("llama"), ENCODED, batch_size=4, precision=FP32)
    assert found == pytest.approx(expected, rel=1e-5)


def test_batches_hold_few_logits_and_every_row() -> None:
    # Room for the logits of two rows of six response tokens.
    batches = list(scoring_batches(ENCODED, 5, tiny("llama"), logits_at_once=12 * VOCABULARY))
    assert [batch.tokens for _, batch in batches] == [12, 12, 12, 6]
    assert sorted(index for indices, _ in batches for index in indices) == list(range(7))
    single = scoring_batches(ENCODED, 5, tiny("llama"), logits_at_once=1)
    assert [len(indices) for indices, _ in single] == [1] * 7


def test_batches_for_answers_do_not_depend_on_the_order_of_rows() -> None:
    def contents(encoded: tuple[EncodedSample, ...]) -> list[list[str]]:
        return [[encoded[index].digest for index in batch] for batch in generation_batches(encoded, 3)]

    assert contents(ENCODED) == contents(ENCODED[::-1])
    lengths = [[ENCODED[index].prompt_length for index in batch] for batch in generation_batches(ENCODED, 3)]
    assert list(chain(*lengths)) == sorted(chain(*lengths), reverse=True)
    assert list(map(len, lengths)) == [3, 3, 1]


def test_sampled_scores_are_those_of_each_seeds_answers() -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, seeds=(10, 20, 30))
    found = scored(sampling=sampling).sampled
    assert found is not None
    assert (found.seeds, found.temperature, found.top_p) == ((10, 20, 30), 1.5, 0.9)
    rouge, exact = [], []
    for seed in sampling.seeds:
        sampler = Sampler(1.5, 0.9, seed)
        answers = generate_answers(
            tiny("llama"), TOKENIZER, ENCODED, generation=GENERATION, precision=FP32, sampler=sampler
        )
        pairs = list(zip(answers, ROWS.references, strict=True))
        rouge.append(sum(rouge_l(*pair) for pair in pairs) / 7)
        exact.append(100 * sum(exact_match(*pair) for pair in pairs) / 7)
    assert found.rouge_l.values == pytest.approx(rouge)
    assert (found.rouge_l.mean, found.rouge_l.sd) == pytest.approx((mean(rouge), stdev(rouge)))
    assert (found.exact_match.mean, found.exact_match.sd) == pytest.approx((mean(exact), stdev(exact)))


def test_sampling_leaves_the_greedy_figures_alone_and_one_seed_has_no_deviation() -> None:
    greedy, both = scored(), scored(sampling=Sampling(seeds=(10,)))
    assert greedy.sampled is None
    assert both.sampled is not None
    assert (both.sampled.rouge_l.sd, both.sampled.exact_match.sd) == (None, None)
    assert (both.rouge_l, both.exact_match, both.cross_entropy) == (
        greedy.rouge_l, greedy.exact_match, greedy.cross_entropy,
    )  # fmt: skip


def test_progress_rises_over_all_seeds_to_its_end() -> None:
    seen: list[tuple[int, int]] = []
    scored(sampling=Sampling(seeds=(10, 20)), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 21) for done in (3, 6, 7, 10, 13, 14, 17, 20, 21)]


def after(answers: int) -> Callable[[], bool]:
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) > answers

    return should_stop


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_scoring_tokens_stops_between_batches(batches: int) -> None:
    model = tiny("llama").train()
    forwards: list[int] = []
    # The layers alone: what is tried on the head at the start is not scoring.
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    for score in (token_scores, last_turn_cross_entropy):
        forwards.clear()
        with pytest.raises(RunStopped):
            score(model, ENCODED, batch_size=3, precision=FP32, should_stop=after(batches))
        assert len(forwards) == batches
    assert model.training
