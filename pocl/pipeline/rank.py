"""The phase `ranking`: the training samples from easy to hard."""

from dataclasses import replace

from pocl.curriculum.measurer import DifficultyMeasurer
from pocl.curriculum.ranking import RankedSample, load_or_rank, rank_by_column, save_column_ranking
from pocl.errors import DatasetInvalid
from pocl.evaluation.answers import thoughts_not_closed
from pocl.evaluation.constant_scores import constant_ranking
from pocl.evaluation.sampling import Sampler
from pocl.events import ArtifactWritten, PhaseChanged
from pocl.layout import RANKING_FILE
from pocl.out_of_memory import retry_halved
from pocl.pipeline.context import RunContext
from pocl.pipeline.generation import generation_settings, scoring_sizes
from pocl.pipeline.input_pins import InputPins
from pocl.pipeline.load import LoadedRun
from pocl.prepare import Corpus
from pocl.rankers import RankerSetup, choose_ranker
from pocl.run_inputs import ranker_inputs
from pocl.spec import ColumnRanker


def rank(context: RunContext, run: LoadedRun, inputs: InputPins) -> list[RankedSample]:
    """Rank the training samples by their difficulty, or load an equal ranking; empty where nothing uses it.

    Raises:
        DatasetInvalid: a row lacks the difficulty that the specification ranks by.
        InputsChanged: the model that ranks is not the one that the run began with; nothing is ranked.
        RunStopped: what was measured is kept.
    """
    if not context.spec.curriculum.uses_ranking:
        return []
    context.sink(PhaseChanged(phase="ranking"))
    ranker = context.spec.curriculum.ranking.ranker
    if isinstance(ranker, ColumnRanker):
        return _rank_by_column(context, ranker, run.corpus)
    ranking, was_here = retry_halved(lambda: _rank_by_model(context, run, inputs), context.halve)
    if not was_here:
        context.sink(ArtifactWritten(kind="ranking", path=RANKING_FILE))
    _warn_of_answers(context, ranking)
    return ranking


def _warn_of_answers(context: RunContext, ranking: list[RankedSample]) -> None:
    """Say what of the answers makes the ranking tell less, also of a ranking that was made before."""
    settings = context.spec.curriculum.ranking
    unfinished = thoughts_not_closed(
        [sample.unfinished_thought for sample in ranking],
        "/curriculum/ranking/max_new_tokens",
        settings.max_new_tokens,
        "answers to training samples, by which they are ranked,",
    )
    constant = constant_ranking([sample.rouge_l for sample in ranking if sample.rouge_l is not None])
    for warning in (unfinished, constant):
        if warning is not None:
            context.sink(warning)


def _rank_by_model(context: RunContext, run: LoadedRun, inputs: InputPins) -> tuple[list[RankedSample], bool]:
    """The ranking, and whether the directory of the run had it already."""
    ranking, corpus = context.spec.curriculum.ranking, run.corpus
    should_stop = context.host.should_stop
    setup = RankerSetup(
        run.models, corpus, context.precision, context.sizes, run.digests, inputs.hub, context.sink, should_stop
    )
    ranker = choose_ranker(context.spec, setup)
    inputs.add(ranker_inputs(context.posted_spec, ranker.digest))
    if ranker.origin is not None:
        inputs.ranking_model = {**ranker.origin, "digest": ranker.digest}
    generation = generation_settings(context, corpus.ending, max_new_tokens=ranking.max_new_tokens)
    measurer = DifficultyMeasurer(
        ranker,
        run.models.tokenizer,
        corpus.train,
        template=corpus.template,
        rrf_k=ranking.rrf_k,
        generation=replace(generation, no_repeat_ngram=ranking.no_repeat_ngram),
        sampler=(
            None
            if ranking.temperature is None
            else Sampler(temperature=ranking.temperature, top_p=1.0, seed=context.spec.seed)
        ),
        scoring=scoring_sizes(context),
        on_progress=context.progress("ranking", "samples"),
        should_stop=should_stop,
    )
    return load_or_rank(
        context.workdir,
        measurer.cache_key,
        corpus.train.sample_digests,
        measurer.measure,
        context.shared_cache,
    )


def _rank_by_column(context: RunContext, ranker: ColumnRanker, corpus: Corpus) -> list[RankedSample]:
    """Rank the training samples by the difficulties that their rows have.

    Raises:
        DatasetInvalid: a row has none.
    """
    difficulties = [each for each in corpus.difficulties if each is not None]
    if missing := len(corpus.difficulties) - len(difficulties):
        raise DatasetInvalid(
            f"{missing} of {len(corpus.difficulties)} training rows have no difficulty, by which "
            "curriculum.ranking.ranker ranks: give each row a number in the column `difficulty`, or map "
            "the column that has it with `columns`."
        )
    digests = [sample.digest for sample in corpus.train.samples]
    ranking = rank_by_column(difficulties, digests, easiest=ranker.easiest)
    if not save_column_ranking(context.workdir, ranking):
        context.sink(ArtifactWritten(kind="ranking", path=RANKING_FILE))
    return ranking
