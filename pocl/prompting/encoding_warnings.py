"""What encoding a data set cut, left out and fell back to, in sentences for whoever runs the job."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from pocl.encoding_counts import EncodingCounts

if TYPE_CHECKING:
    # The API makes the sentences about counts, and loads no tokenizer.
    from pocl.prompting.encoding import SampleEncoder


class EncodingWarning(NamedTuple):
    """One thing to know about the samples as tokens."""

    code: str
    message: str
    pointer: str | None = None
    """The field of the specification that it is about; null where there is none."""


_TEMPLATE: Final = "/data/template"


def encoding_warnings(encoder: "SampleEncoder", counts_by_set: Mapping[str, EncodingCounts]) -> list[EncodingWarning]:
    """Everything to know, by a stable code each; the names of the sets begin the sentences about them."""
    warnings = list(template_warnings(encoder))
    for name, counts in counts_by_set.items():
        warnings += set_warnings(name, counts, pointer_of_part(name))
    return warnings


def template_warnings(encoder: "SampleEncoder") -> Iterator[EncodingWarning]:
    """What is to be known about the template, whatever the samples are."""
    if encoder.chat is None:
        return
    profile = encoder.chat.profile
    if profile.prompt_surplus:
        yield EncodingWarning(
            "thought_not_trained",
            f"the generation prompt of the chat template ends with {profile.prompt_surplus!r}, which finished answers "
            "without a thought do not have: they are trained and scored behind the prompt without it",
            _TEMPLATE,
        )
    if profile.end is not None and profile.end.token is None:
        yield EncodingWarning(
            "end_is_plain_text",
            f"answers end with {profile.end.text!r}, which is no token of its own: answers are ended there, and "
            "generation_config.json of the student names it in stop_strings, for which generate() wants the tokenizer",
            _TEMPLATE,
        )


def pointer_of_part(part: str) -> str:
    """The field of the specification that names samples: of `train`, `validation`, `test` or an evaluation set."""
    return f"/data/{part}" if part in ("train", "validation", "test") else f"/evaluation/sets/{part}"


def set_warnings(name: str, counts: EncodingCounts, pointer: str | None = None) -> Iterator[EncodingWarning]:
    """What is to be known about a set of samples; its name begins each sentence.

    Args:
        pointer: the field of the specification that names the set; null where a data set is looked at by itself.
    """
    for code, message in _about_counts(counts):
        yield EncodingWarning(code, f"{name}: {message}", pointer)


def _about_counts(counts: EncodingCounts) -> Iterator[tuple[str, str]]:
    if counts.rows_too_long:
        yield "samples_cut", _cuts(counts)
    if counts.questions_lost:
        message = (
            f"nothing of the last question is left in {counts.questions_lost} of {counts.rows} prompts, which are cut "
            "from their left to data.max_prompt_length: what stands behind the question fills it"
        )
        yield "questions_lost", message
    if counts.left_out:
        parts = ", ".join(f"{part} ({rows} of {counts.rows})" for part, rows in sorted(counts.left_out.items()))
        yield "text_left_out", f"the template leaves out what samples hold as {parts}"
    if counts.turns_unlabelled:
        message = f"{counts.turns_unlabelled} answers of earlier turns are not trained on: the template rewrites them"
        yield "turns_unlabelled", message
    if counts.ends_added:
        message = "the chat template writes no end of an answer: the end-of-sequence token is added to last answers"
        yield "end_added", message
    if counts.tokenised_apart:
        message = f"prompt and answer of {counts.tokenised_apart} of {counts.rows} samples are tokenised apart"
        yield "tokenised_apart", f"{message}: tokens would merge across their border"


def _cuts(counts: EncodingCounts) -> str:
    parts = []
    if counts.prompts_cut:
        dropped = f", and {counts.turns_dropped} earlier turns dropped" if counts.turns_dropped else ""
        parts.append(f"{counts.prompts_cut} of {counts.rows} prompts are cut to data.max_prompt_length{dropped}")
    if counts.answers_cut:
        parts.append(
            f"{counts.answers_cut} of {counts.rows} answers are cut at data.max_length and do not teach where to stop"
        )
    share = 100 * counts.tokens_cut / max(1, counts.tokens + counts.tokens_cut)
    return f"{'; '.join(parts)}; {share:.1f} % of all tokens are gone"
