"""Scores against independent formulas; bounded batches; stopping and progress."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count
from statistics import mean, stdev

import pytest
import torch

from pocl.callbacks import OnProgress, ShouldStop
from pocl.data.batches import EncodedSample
from pocl.errors import RunStopped
from pocl.evaluation.answers import GenerationSettings, generate_answers, generation_batches
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.evaluator import Evaluator
from pocl.evaluation.rouge import exact_match, rouge_l
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.scores import Scores
from pocl.evaluation.token_scores import ScoringSizes, last_turn_cross_entropy, scoring_batches, token_scores
from pocl.models.precision import Precision
from pocl.prompting.thoughts import AnswerForm, Thought
from pocl.spec import Evaluation, Sampling
from pocl.teacher.signal import LiveTeacher
from pocl.train.evaluations import unfinished_thoughts_of
from tests.pocl.byte_tokenizers import byte_tokenizer
from tests.pocl.tiny_models import EOS, VOCABULARY, tiny
from tests.support.operator_count import count_host_reads

FP32 = Precision("fp32", torch.device("cpu"))
TOKENIZER = byte_tokenizer()
GENERATION = GenerationSettings(max_new_tokens=6, batch_size=3, end_of_response_id=EOS, precision=FP32)
# Two or three of the samples below at a time.
SCORING = ScoringSizes(tokens=36, chunk_tokens=8)


def encoded_sample(number: int) -> EncodedSample:
    generator = torch.Generator().manual_seed(number)
    length = 4 + number % 9
    ids = torch.randint(3, VOCABULARY, (length + 5,), generator=generator).tolist()
    # The second token answers an earlier turn.
    return EncodedSample(f"{number:064x}", tuple(ids), length, ((1, 2),))


SAMPLES = tuple(encoded_sample(number) for number in range(7))
DATASET = EncodedDataset(SAMPLES, tuple((f"answer {number}", "word") for number in range(7)))


def scores(sampling: Sampling | None = None, on_progress: OnProgress = lambda _done, _total: None) -> Scores:
    generation = replace(GENERATION, sampling=sampling)
    evaluator = Evaluator(DATASET, TOKENIZER, generation, SCORING, on_progress=on_progress)
    return evaluator.score(tiny("llama"), None)


def unbatched_log_probabilities(model_name: str, sample: EncodedSample, seed: int = 0) -> torch.Tensor:
    """Log-probabilities after each token of a sample, `[L, V]` float64, without batch or padding."""
    ids = torch.tensor([sample.input_ids])
    return torch.log_softmax(tiny(model_name, seed)(input_ids=ids).logits[0].double(), dim=-1)


def response_positions(sample: EncodedSample) -> list[int]:
    return [position for position, is_response in enumerate(sample.label_mask) if is_response]


def test_cross_entropy_and_divergence_are_means_over_response_tokens() -> None:
    ce, kl = [], []
    for sample in SAMPLES:
        student = unbatched_log_probabilities("llama", sample)
        teacher = unbatched_log_probabilities("llama", sample, seed=1)
        for position in response_positions(sample):
            ce.append(-student[position - 1, sample.input_ids[position]].item())
            gap = teacher[position - 1] - student[position - 1]
            kl.append((teacher[position - 1].exp() * gap).sum().item())
    result = token_scores(
        tiny("llama"), SAMPLES, sizes=SCORING, precision=FP32, teacher=LiveTeacher(tiny("llama", 1), FP32)
    )
    assert result[:2] == pytest.approx((mean(ce), mean(kl)), rel=1e-5)
    by_sample = [sum(ce.pop(0) for _ in response_positions(sample)) for sample in SAMPLES]
    assert result.cross_entropy_sums == pytest.approx(by_sample, rel=1e-5)


def test_last_turn_cross_entropy_leaves_out_earlier_turns() -> None:
    expected = []
    for sample in SAMPLES:
        log_probabilities = unbatched_log_probabilities("llama", sample)
        last_turn = [position for position in response_positions(sample) if position > 1]
        expected.append(-mean(log_probabilities[at - 1, sample.input_ids[at]].item() for at in last_turn))
    result = last_turn_cross_entropy(tiny("llama"), SAMPLES, sizes=SCORING, precision=FP32)
    assert result == pytest.approx(expected, rel=1e-5)


def test_scoring_batches_bound_the_tokens_and_hold_every_sample() -> None:
    padded, packed = (
        list(scoring_batches(SAMPLES, 36, torch.device("cpu"), packed=packed)) for packed in (False, True)
    )
    # The samples have 9 to 15 tokens.
    assert [tuple(batch.input_ids.shape) for _, batch in padded] == [(3, 11), (2, 13), (2, 15)]
    assert [tuple(batch.input_ids.shape) for _, batch in packed] == [(1, 30), (1, 25), (1, 29)]
    for batches in (padded, packed):
        assert sorted(index for indices, _ in batches for index in indices) == list(range(7))
    single = scoring_batches(SAMPLES, 1, torch.device("cpu"), packed=True)
    assert [len(indices) for indices, _ in single] == [1] * 7


def test_host_reads_of_scoring_do_not_grow_with_the_batches() -> None:
    def reads(score: Callable[..., object], tokens: int) -> int:
        sizes = replace(SCORING, tokens=tokens)
        return count_host_reads(lambda: score(tiny("llama"), SAMPLES, sizes=sizes, precision=FP32))

    for score in (token_scores, last_turn_cross_entropy):
        assert reads(score, 1) == reads(score, 1000)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma2"])
def test_scores_do_not_depend_on_how_samples_are_batched(family: str) -> None:
    def scored(tokens: int) -> list[float]:
        sizes = replace(SCORING, tokens=tokens)
        scored = token_scores(tiny(family), SAMPLES, sizes=sizes, precision=FP32)
        return [
            scored.cross_entropy,
            *scored.cross_entropy_sums,
            *last_turn_cross_entropy(tiny(family), SAMPLES, sizes=sizes, precision=FP32),
        ]

    assert scored(1) == pytest.approx(scored(1000), rel=1e-5)


def test_generation_batches_do_not_depend_on_the_order_of_samples() -> None:
    def digests(samples: tuple[EncodedSample, ...]) -> list[list[str]]:
        return [[samples[index].digest for index in batch] for batch in generation_batches(samples, 3)]

    assert digests(SAMPLES) == digests(SAMPLES[::-1])
    lengths = [[SAMPLES[index].prompt_length for index in batch] for batch in generation_batches(SAMPLES, 3)]
    assert list(chain(*lengths)) == sorted(chain(*lengths), reverse=True)
    assert list(map(len, lengths)) == [3, 3, 1]


def test_sampled_scores_are_those_of_the_answers_of_each_seed() -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, seeds=(10, 20, 30))
    sampled = scores(sampling).sampled
    assert sampled is not None
    assert (sampled.seeds, sampled.temperature, sampled.top_p) == ((10, 20, 30), 1.5, 0.9)
    rouge, exact = [], []
    for seed in sampling.seeds:
        sampler = Sampler(1.5, 0.9, seed)
        visible = generate_answers(tiny("llama"), TOKENIZER, SAMPLES, generation=GENERATION, sampler=sampler)
        answers = [answer.text for answer in visible]
        pairs = list(zip(answers, DATASET.references, strict=True))
        rouge.append(sum(rouge_l(*pair) for pair in pairs) / 7)
        exact.append(100 * sum(exact_match(*pair) for pair in pairs) / 7)
    assert sampled.rouge_l.values == pytest.approx(rouge)
    assert (sampled.rouge_l.mean, sampled.rouge_l.sd) == pytest.approx((mean(rouge), stdev(rouge)))
    assert (sampled.exact_match.mean, sampled.exact_match.sd) == pytest.approx((mean(exact), stdev(exact)))


def test_sampling_leaves_the_greedy_figures_alone_and_one_seed_has_no_deviation() -> None:
    greedy, both = scores(), scores(Sampling(seeds=(10,)))
    assert greedy.sampled is None
    assert both.sampled is not None
    assert (both.sampled.rouge_l.sd, both.sampled.exact_match.sd) == (None, None)
    assert (both.rouge_l, both.exact_match, both.cross_entropy) == (
        greedy.rouge_l, greedy.exact_match, greedy.cross_entropy,
    )  # fmt: skip


def test_scores_of_each_sample_have_the_means_of_all() -> None:
    result = scores()
    rows = result.by_row
    assert rows is not None
    assert mean(rows.rouge_l) == pytest.approx(result.rouge_l, abs=1e-4)
    assert mean(rows.exact_match) == pytest.approx(result.exact_match)
    assert sum(rows.cross_entropy) / sum(rows.tokens) == pytest.approx(result.cross_entropy, rel=1e-5)
    assert [shown.reference for shown in rows.shown] == [f"answer {number}" for number in range(5)]


@pytest.mark.parametrize("waiting", [(0, 5), (6,), tuple(range(7))])
def test_samples_without_a_reference_are_answered_and_not_scored(waiting: tuple[int, ...]) -> None:
    kept = [number for number in range(7) if number not in waiting]
    # A reference that says nothing is none.
    references = tuple(
        ("\n",) * (number % 2) if number in waiting else DATASET.references[number] for number in range(7)
    )

    def scored(dataset: EncodedDataset) -> Scores:
        return Evaluator(dataset, TOKENIZER, GENERATION, SCORING).score(tiny("llama"), None)

    result = scored(EncodedDataset(SAMPLES, references))
    assert result.rows == len(kept)
    assert result.by_row is not None
    assert len(result.answers) == 7
    assert [shown.reference is None for shown in result.by_row.shown] == [
        number in waiting and number % 2 == 0 for number in range(5)
    ]
    if kept:
        alone = scored(
            EncodedDataset(tuple(SAMPLES[number] for number in kept), tuple(references[number] for number in kept))
        )
        assert (result.rouge_l, result.exact_match) == (alone.rouge_l, alone.exact_match)
        assert result.cross_entropy == pytest.approx(alone.cross_entropy)
        assert alone.by_row is not None
        assert result.by_row.tokens == alone.by_row.tokens


def test_progress_rises_over_all_seeds_to_its_end() -> None:
    reports: list[tuple[int, int]] = []
    scores(Sampling(seeds=(10, 20)), on_progress=lambda done, total: reports.append((done, total)))
    assert reports == [(done, 21) for done in range(1, 22)]


def stop_after(polls: int) -> ShouldStop:
    """Turns true once it was polled so often."""
    counter = count(1)
    return lambda: next(counter) > polls


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_scoring_tokens_stops_between_batches(batches: int) -> None:
    model = tiny("llama").train()
    forwards: list[int] = []
    # The hook is on the layers: probing the head at the start is not scoring.
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    for score in (token_scores, last_turn_cross_entropy):
        counts = []
        for polls in (0, batches):
            forwards.clear()
            with pytest.raises(RunStopped):
                score(model, SAMPLES, sizes=SCORING, precision=FP32, should_stop=stop_after(polls))
            counts.append(len(forwards))
        # Stopped at once, the model is only tried.
        assert counts[1] - counts[0] == batches
    assert model.training


def test_answers_that_end_inside_their_thought_score_0_and_are_counted_and_told() -> None:
    # Whatever is answered, the prompt has opened a thought that nothing closes.
    opened = Thought(str(TOKENIZER.decode(list(SAMPLES[0].prompt_ids))).rstrip()[-1:], "</never>")
    generation = replace(GENERATION, form=AnswerForm(opened))
    data = EncodedDataset(SAMPLES[:1] * 2, (("answer", "word"), ()))
    result = Evaluator(data, TOKENIZER, generation, SCORING).score(tiny("llama"), None)
    assert (result.rows, result.unfinished_thoughts, result.rouge_l, result.answers) == (1, 1, 0.0, ("", ""))
    # Of each answer, with a reference or without; the scores of the samples have it where there is a score.
    assert result.by_row is not None
    assert (result.in_thought, result.by_row.unfinished_thoughts) == ((True, True), (True,))
    assert [each.unfinished_thought for each in result.by_row.shown] == [True, True]
    warning = unfinished_thoughts_of("the teacher", "validation", result, Evaluation(max_new_tokens=5))
    assert warning is not None
    assert (warning.code, warning.pointer) == ("thoughts_not_closed", "/evaluation/max_new_tokens")
    assert "2 of 2 answers of the teacher to validation samples" in warning.message
    plain = Evaluator(data, TOKENIZER, GENERATION, SCORING).score(tiny("llama"), None)
    assert (plain.unfinished_thoughts, plain.in_thought, plain.answers == ("", "")) == (0, (False, False), False)
    assert unfinished_thoughts_of("the teacher", "validation", plain, Evaluation()) is None


def test_answers_are_cut_where_the_text_that_ends_them_begins() -> None:
    whole = generate_answers(tiny("llama"), TOKENIZER, SAMPLES, generation=replace(GENERATION, max_new_tokens=24))
    end = next(answer.text[3:5] for answer in whole if len(answer.text) > 6)
    cutting = replace(GENERATION, max_new_tokens=24, stop_text=end, form=AnswerForm(closings=(end,)))
    ended = generate_answers(tiny("llama"), TOKENIZER, SAMPLES, generation=cutting)
    assert [answer.text for answer in ended] == [answer.text.partition(end)[0].strip() for answer in whole]
    assert [answer.text for answer in ended] != [answer.text for answer in whole]
