"""The file of all answers: whole lines for whatever a model says, each evaluation once."""

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pocl.data.batches import EncodedSample
from pocl.evaluation.answers_file import AnswersFile, EvaluationKey
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.row_scores import RowScores
from pocl.evaluation.scores import Scores

TEST, TEACHER = EvaluationKey("test", "stage", 0), EvaluationKey("test", "teacher", None)


def dataset(references: list[tuple[str, ...]]) -> EncodedDataset:
    samples = tuple(EncodedSample(f"{row:064x}", (1, 2), 1) for row in range(len(references)))
    return EncodedDataset(samples, tuple(references))


def scored(answers: list[str], rouge_l: list[float], *, unfinished: int | None = None) -> Scores:
    """
    Args:
        unfinished: the row of the answer that ends inside its thought.
    """
    rows = RowScores(
        rouge_l=tuple(rouge_l),
        exact_match=(0.0,) * len(rouge_l),
        cross_entropy=(1.0,) * len(rouge_l),
        tokens=(1,) * len(rouge_l),
    )
    in_thought = tuple(row == unfinished for row in range(len(answers)))
    return Scores(len(rouge_l), 0.0, 0.0, 1.0, None, by_row=rows, answers=tuple(answers), in_thought=in_thought)


def lines(file: AnswersFile) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.path.read_bytes().decode().split("\n") if line]


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_answers_are_read_back_as_they_were_said(answers: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = AnswersFile(Path(directory) / "answers.jsonl")
        for key in (TEST, TEACHER, TEST):
            file.add(key, dataset([("word",)] * len(answers)), scored(answers, [5.0] * len(answers)))
        assert [(line["subject"], line["answer"]) for line in lines(file)] == [
            (subject, answer) for subject in ("teacher", "stage") for answer in answers
        ]


def test_samples_without_a_reference_have_an_answer_and_no_score(tmp_path: Path) -> None:
    file = AnswersFile(tmp_path / "answers.jsonl")
    file.add(TEST, dataset([("a",), (), ("b",)]), scored(["one", "two", "three"], [1.0, 3.0], unfinished=1))
    assert [(line["answer"], line["rouge_l"]) for line in lines(file)] == [("one", 1.0), ("two", None), ("three", 3.0)]
    assert [line["unfinished_thought"] for line in lines(file)] == [False, True, False]


def test_answers_of_evaluations_that_are_made_again_are_dropped(tmp_path: Path) -> None:
    file = AnswersFile(tmp_path / "answers.jsonl")
    for key in (TEST, TEACHER):
        file.add(key, dataset([("a",)]), scored(["one"], [1.0]))
    with file.path.open("ab") as stream:
        stream.write(b'{"split": "test", "subj')
    file.keep_only({TEACHER})
    assert [line["subject"] for line in lines(file)] == ["teacher"]
