"""How answers are generated, and how many tokens are scored at once, for ranking and evaluation."""

from pocl.evaluation.answers import GenerationSettings
from pocl.evaluation.token_scores import ScoringSizes
from pocl.pipeline.context import RunContext
from pocl.prepare import AnswerEnding
from pocl.spec import Sampling


def generation_settings(
    context: RunContext, ending: AnswerEnding, *, max_new_tokens: int, sampling: Sampling | None = None
) -> GenerationSettings:
    """How answers of at most `max_new_tokens` tokens are generated."""
    resources = context.spec.resources
    return GenerationSettings(
        max_new_tokens,
        context.sizes.generation_rows,
        end_of_response_id=ending.end_of_response_id,
        end_tokens=ending.end_tokens,
        stop_text=ending.stop_text,
        form=ending.form,
        precision=context.precision,
        sampling=sampling,
        generator=resources.generator,
        graphs=resources.graphs,
        sink=context.report_once,
    )


def scoring_sizes(context: RunContext) -> ScoringSizes:
    """How many tokens are scored at once."""
    return ScoringSizes(context.sizes.scoring_tokens, context.sizes.loss_chunk_tokens)
