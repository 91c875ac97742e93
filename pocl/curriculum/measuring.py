"""What the student makes of each training sample, measured so that a kill loses a few batches and no bit."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.curriculum.difficulty import Measured
from pocl.evaluate import Answering, OnProgress, Rows, answer, last_turn_cross_entropy
from pocl.models.precision import Precision
from pocl.rouge import rouge_l

PARTIAL_FILE = "ranking.partial.jsonl"
_BATCHES_PER_PIECE = 4


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    answering: Answering,
    precision: Precision,
    directory: Path,
    key: str,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Measured]:
    """Answer and score every row, in the order of `rows`.

    Rows are done in pieces that follow from the rows alone, longest prompts first. Each finished piece is appended to
    a file in `directory`, from which the next call with the same `key` goes on.

    Raises:
        RunStopped: when `should_stop` turns true.
        OSError: the file cannot be written.
    """
    order = sorted(range(len(rows.encoded)), key=lambda i: (-rows.encoded[i].prompt_length, rows.encoded[i].content, i))
    size = _BATCHES_PER_PIECE * answering.batch_size
    path = directory / PARTIAL_FILE
    done = _read(path, key)
    if not done:
        path.write_text(_line({"key": key}), encoding="utf-8")

    def measured(piece: Sequence[int]) -> list[Measured]:
        before = len(done)
        encoded = [rows.encoded[i] for i in piece]
        answers = answer(
            model,
            tokenizer,
            encoded,
            answering=answering,
            precision=precision,
            on_progress=None if on_progress is None else lambda of_piece, _: on_progress(before + of_piece, len(order)),
            should_stop=should_stop,
        )
        entropies = last_turn_cross_entropy(
            model, encoded, batch_size=answering.batch_size, precision=precision, should_stop=should_stop
        )
        return [
            Measured(row, rows.encoded[row].digest, rouge_l(text, rows.references[row]), entropy, text)
            for row, text, entropy in zip(piece, answers, entropies, strict=True)
        ]

    with path.open("a", encoding="utf-8") as out:
        for start in range(0, len(order), size):
            piece = order[start : start + size]
            # Of a piece that was cut off some rows may be there; it is done again whole, for its bits.
            if not all(row in done for row in piece):
                fresh = measured(piece)
                out.writelines(_line(asdict(each)) for each in fresh)
                out.flush()
                os.fsync(out.fileno())
                done.update({each.row: each for each in fresh})
    return [done[row] for row in range(len(order))]


def forget_pieces(directory: Path) -> None:
    """The ranking is written: the pieces are not needed again."""
    (directory / PARTIAL_FILE).unlink(missing_ok=True)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _read(path: Path, key: str) -> dict[int, Measured]:
    """What was measured before under this key; a piece that was cut off counts for its whole lines only."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    whole = content[: content.rfind(b"\n") + 1]
    try:
        first, *lines = map(json.loads, whole.splitlines())
        if first != {"key": key}:
            return {}
        found = {line["row"]: Measured(**line) for line in lines}
    except (ValueError, TypeError, KeyError):
        return {}
    os.truncate(path, len(whole))
    return found
