"""Warnings are counted by their text, and never take more than a bounded place."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.warning_counts import FURTHER_WARNINGS, MAX_WARNINGS, WarningCounts
from tests.support.rows import EPOCH

TEXTS = st.tuples(st.sampled_from("abc"), st.integers(0, 60).map(str))


@given(given_warnings=st.lists(TEXTS, max_size=300), cut=st.integers(0, 300))
def test_every_warning_is_counted_once_wherever_the_batches_end(
    given_warnings: list[tuple[str, str]], cut: int
) -> None:
    first = WarningCounts([])
    firsts = [key for key in given_warnings[:cut] if first.add(*key, EPOCH)]
    second = WarningCounts(first.entries)
    firsts += [key for key in given_warnings[cut:] if second.add(*key, EPOCH)]
    kept = list(dict.fromkeys(given_warnings))[:MAX_WARNINGS]
    assert firsts == kept
    counts = Counter(given_warnings)
    entries = {(entry["code"], entry["message"]): entry["count"] for entry in second.entries}
    others = sum(counts.values()) - sum(counts[key] for key in kept)
    assert [entries[key] for key in kept] == [counts[key] for key in kept]
    assert sum(entries.values()) == len(given_warnings)
    assert len(entries) == len(kept) + bool(others)
    assert not others or second.entries[-1]["code"] == FURTHER_WARNINGS


def test_a_long_text_is_cut() -> None:
    counts = WarningCounts([])
    assert [counts.add("c" * 9999, "m" * 9999 + end, EPOCH) for end in "ab"] == [True, False]
    assert len(str(counts.entries)) < 1500
