"""What the pages read of rankings, data sets and results."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.dashboard import stored_results
from api.dashboard.stored_results import add_texts, read_answers, read_difficulty
from domain.artifacts import ArtifactStore
from domain.jobs.models import JobArtifact
from pocl.samples.sample import Message, Sample
from pocl.samples.stored import stored_line


def store_lines(tmp_path: Path, content: bytes, name: str = "file.jsonl") -> tuple[ArtifactStore, JobArtifact]:
    store = ArtifactStore(tmp_path / "store")
    source = tmp_path / "source"
    source.write_bytes(content)
    stored = store.publish_file(source, f"jobs/{name}")
    return store, JobArtifact(store_key=f"jobs/{name}", size_bytes=stored.size, sha256=stored.sha256)


def ranking(values: list[float]) -> bytes:
    rows = [
        {
            "row": n,
            "digest": f"{n:064}",
            "rouge_l": 1.0,
            "cross_entropy": value,
            "response": "x",
            "rank": n + 1,
        }
        for n, value in enumerate(values)
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@given(st.lists(st.floats(0, 20), min_size=1, max_size=60))
def test_every_sample_is_in_one_bin(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    ordered = sorted(values)
    difficulty = read_difficulty(*store_lines(tmp_path_factory.mktemp("x"), ranking(ordered)))
    assert sum(each.count for each in difficulty.bins) == len(values) == difficulty.counted
    assert max(each.share for each in difficulty.bins) == 1
    assert not difficulty.is_partial
    assert [each.rank for each in difficulty.easiest] == list(range(1, min(5, len(values)) + 1))
    assert [each.rank for each in difficulty.hardest] == list(range(len(values), max(0, len(values) - 5), -1))


def test_a_long_ranking_is_read_in_pieces_that_lie_evenly_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_results, "_MAX_WHOLE_BYTES", 1000)
    monkeypatch.setattr(stored_results, "_PIECE_BYTES", 4096)
    count = 20_000
    store, artifact = store_lines(tmp_path, ranking([n / count for n in range(count)]))
    difficulty = read_difficulty(store, artifact)
    assert difficulty.is_partial
    assert 500 < difficulty.counted < count / 2
    assert [each.rank for each in difficulty.easiest] == [1, 2, 3, 4, 5]
    assert [each.rank for each in difficulty.hardest] == [count, count - 1, count - 2, count - 3, count - 4]
    # The values are spread evenly, and so are the bins.
    assert min(each.share for each in difficulty.bins[:-1]) > 0.5


def test_a_ranking_by_a_column_or_of_another_form_is_no_error(tmp_path: Path) -> None:
    lines = b'{"rank": 1, "score": 0.5, "cross_entropy": null}\nnot json\n[1]\n{"rank": 2, "score": 0.7}\n'
    difficulty = read_difficulty(*store_lines(tmp_path, lines))
    assert (difficulty.counted, difficulty.measure) == (2, "difficulty")
    assert read_difficulty(*store_lines(tmp_path, b"")).bins == []


@pytest.mark.parametrize("is_split", [False, True])
def test_samples_get_their_texts_by_their_digest(tmp_path: Path, is_split: bool) -> None:
    samples = [
        Sample((Message("user", f"question {n}"), Message("assistant", f"answer {n}")), context="about it")
        for n in range(10)
    ]
    file = tmp_path / "samples.jsonl"
    file.write_bytes(b"".join(stored_line(sample) for sample in samples))
    rows = [
        {"row": n if not is_split else 0, "digest": samples[n].digest, "rank": n, "cross_entropy": 1.0} for n in (3, 7)
    ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    difficulty = read_difficulty(*store_lines(tmp_path, lines))
    add_texts(difficulty.easiest, file, is_split=is_split)
    shown = {each.rank: (each.prompt, each.reference) for each in difficulty.easiest}
    assert shown == {n: (f"question {n}\n\nabout it", f"answer {n}") for n in (3, 7)}


def test_answers_are_those_of_the_result(tmp_path: Path) -> None:
    answers = [{"split": "validation", "prompt": "p", "reference": None, "answers": {"teacher": "t"}}]
    store, artifact = store_lines(tmp_path, json.dumps({"answers": [*answers, 1]}).encode())
    assert read_answers(store, artifact) == answers
    for content in (b"[]", b"{", b"{}", b'{"answers": null}'):
        assert read_answers(*store_lines(tmp_path, content)) == []
    artifact.size_bytes = stored_results.MAX_RESULT_BYTES + 1
    assert read_answers(store, artifact) == []
