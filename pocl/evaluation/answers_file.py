"""The greedy answers of a run's evaluations: `answers.jsonl`, one answer a line."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.row_scores import MAX_ROWS
from pocl.evaluation.scores import Scores
from pocl.storage.manifest import replace_file


class EvaluationKey(NamedTuple):
    """One evaluation of a run."""

    split: str
    """The samples: `validation`, `test`, or the name of an evaluation set."""
    subject: str
    """The model: `teacher`, `initial` or `stage`."""
    stage: int | None


@dataclass(frozen=True)
class AnswersFile:
    """The answers to the first samples of each evaluation, :data:`~pocl.evaluation.row_scores.MAX_ROWS` at most."""

    path: Path

    def keep_only(self, evaluations: Collection[EvaluationKey]) -> None:
        """Drop the answers of other evaluations, which this run makes anew, and lines that cannot be read.

        Raises:
            DiskFull: there is no space; the file has its old content.
        """
        if self.path.exists():
            self._write([line for key, line in self._lines() if key in evaluations])

    def add(self, key: EvaluationKey, dataset: EncodedDataset, scores: Scores) -> None:
        """Add the answers of an evaluation, in place of earlier ones of the same.

        Raises:
            DiskFull: there is no space; the file has its old content.
        """
        if scores.by_row is None:
            return
        measured = dict(
            zip(dataset.scored_rows, zip(scores.by_row.rouge_l, scores.by_row.exact_match, strict=True), strict=False)
        )
        lines = []
        answered = zip(dataset.samples[:MAX_ROWS], scores.answers, scores.in_thought, strict=False)
        for row, (sample, answer, unfinished) in enumerate(answered):
            rouge_l, exact_match = measured.get(row, (None, None))
            content = {
                **key._asdict(),
                "row": row,
                "sample": sample.digest,
                "answer": answer,
                "unfinished_thought": unfinished,
                "rouge_l": rouge_l,
                "exact_match": None if exact_match is None else exact_match > 0,
            }
            lines.append(json.dumps(content, ensure_ascii=False) + "\n")
        self._write([*(line for other, line in self._lines() if other != key), *lines])

    def read_last_rouge(self) -> dict[str, dict[tuple[int, str], float]]:
        """The ROUGE-L of the student's answers after its last stage, in points, by split, and by the number of the
        sample and its digest; without samples that have no score.

        Raises:
            OSError: the file cannot be read.
        """
        last: dict[str, int] = {}
        scores: dict[str, dict[tuple[int, str], float]] = {}
        for key, line in self._lines():
            if key.subject != "stage" or key.stage is None or key.stage < last.get(key.split, 0):
                continue
            if key.stage > last.get(key.split, -1):
                last[key.split], scores[key.split] = key.stage, {}
            content = json.loads(line)
            row, sample, rouge_l = (content.get(name) for name in ("row", "sample", "rouge_l"))
            if isinstance(row, int) and isinstance(sample, str) and isinstance(rouge_l, float):
                scores[key.split][row, sample] = rouge_l
        return scores

    def _write(self, lines: list[str]) -> None:
        # A lone surrogate, which a model's answer may hold, is no UTF-8.
        replace_file(self.path, "".join(lines).encode("utf-8", "replace").decode("utf-8"))

    def _lines(self) -> list[tuple[EvaluationKey, str]]:
        if not self.path.exists():
            return []
        lines = []
        # Only a newline ends a line: an answer may hold what other readers take for one.
        for line in self.path.read_bytes().decode("utf-8", "replace").split("\n"):
            try:
                content = json.loads(line)
                key = EvaluationKey(content["split"], content["subject"], content["stage"])
            except (ValueError, KeyError, TypeError):
                continue
            lines.append((key, line + "\n"))
        return lines
