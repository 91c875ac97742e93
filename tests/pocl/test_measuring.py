"""Measuring goes on where a kill cut it off, with the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pocl.curriculum.difficulty import Measured
from pocl.curriculum.measuring import PARTIAL_FILE, forget_pieces, measure
from pocl.data.batches import Encoded
from pocl.errors import RunStopped
from pocl.evaluate import Answering, Rows
from pocl.models.precision import Precision
from pocl.models.random import byte_level_tokenizer
from tests.pocl.tiny_models import VOCABULARY, tiny

ROWS = 11


def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for row in range(ROWS):
        ids = torch.randint(3, VOCABULARY, (6 + row,), generator=generator).tolist()
        encoded.append(Encoded(digest=f"{row:064x}", input_ids=tuple(ids), prompt_length=3 + row % 3))
    return Rows(tuple(encoded), tuple(("a reference",) for _ in encoded))


def measured(
    directory: Path, key: str = "k", *, answers: int | None = None, told: list[tuple[int, int]] | None = None
) -> list[Measured]:
    """Measure with batches of one, so pieces of four, until so many tokens were asked for."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return answers is not None and asked > answers

    def tell(done: int, total: int) -> None:
        if told is not None:
            told.append((done, total))

    return measure(
        tiny("llama"),
        byte_level_tokenizer(64),
        rows(),
        answering=Answering(max_new_tokens=2, batch_size=1, end_id=1),
        precision=Precision("fp32", torch.device("cpu")),
        directory=directory,
        key=key,
        on_progress=tell,
        should_stop=should_stop,
    )


@pytest.mark.parametrize("answers", [1, 14, 22])
def test_a_continued_measurement_has_the_same_numbers(tmp_path: Path, answers: int) -> None:
    undisturbed = measured(tmp_path)
    forget_pieces(tmp_path)
    with pytest.raises(RunStopped):
        measured(tmp_path, answers=answers)
    assert measured(tmp_path) == undisturbed
    assert [each.row for each in undisturbed] == list(range(ROWS))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-7], id="cut in the last line"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut in the middle"),
        pytest.param(lambda content: content[:5], id="cut in the first line"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: b"\xff\x00\n[]\n", id="not ours"),
    ],
)
def test_what_a_kill_left_of_the_file_is_enough(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    undisturbed = measured(tmp_path)
    file = tmp_path / PARTIAL_FILE
    file.write_bytes(damage(file.read_bytes()))
    assert measured(tmp_path) == undisturbed


def test_finished_pieces_are_not_measured_again(tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        measured(tmp_path, answers=14)
    before = len((tmp_path / PARTIAL_FILE).read_text().splitlines()) - 1
    assert before > 0
    told: list[tuple[int, int]] = []
    measured(tmp_path, told=told)
    assert told[0] == (before + 1, ROWS)
    assert told[-1] == (ROWS, ROWS)


def test_pieces_of_other_inputs_are_not_used(tmp_path: Path) -> None:
    measured(tmp_path, key="old")
    lines = (tmp_path / PARTIAL_FILE).read_text().splitlines()
    changed = [lines[0], *(json.dumps({**json.loads(line), "cross_entropy": 0.0}) for line in lines[1:])]
    (tmp_path / PARTIAL_FILE).write_text("\n".join(changed) + "\n")
    assert all(each.cross_entropy == 0 for each in measured(tmp_path, key="old"))
    assert all(each.cross_entropy > 0 for each in measured(tmp_path, key="new"))
