"""Teacher and student share a vocabulary only where every token means the same to both."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pocl.errors import VocabularyMismatch
from pocl.inspect import shared_vocabulary_size

TOKENS = {"a": 0, "b": 1, "c": 2, "d": 3}


def test_heads_of_different_sizes_share_the_smaller_range() -> None:
    assert shared_vocabulary_size(TOKENS, 64, TOKENS, 48) == shared_vocabulary_size(TOKENS, 48, TOKENS, 64) == 48


def test_tokens_that_only_one_side_has_are_no_conflict() -> None:
    assert shared_vocabulary_size(TOKENS, 4, {**TOKENS, "<pad>": 4}, 5) == 4


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 30), min_size=1), st.integers(1, 50), st.integers(1, 50))
def test_equal_vocabularies_agree(tokens: dict[str, int], teacher: int, student: int) -> None:
    assume(len(set(tokens.values())) == len(tokens))
    assert shared_vocabulary_size(tokens, teacher, tokens, student) == min(teacher, student)


@given(st.permutations(list(range(6))))
def test_permuted_ids_are_refused(ids: list[int]) -> None:
    assume(ids != sorted(ids))
    tokens = dict(zip("abcdef", range(6), strict=True))
    with pytest.raises(VocabularyMismatch):
        shared_vocabulary_size(tokens, 6, dict(zip("abcdef", ids, strict=True)), 6)


def test_message_names_the_token_and_both_ids() -> None:
    with pytest.raises(VocabularyMismatch, match=r"1 tokens: 'b' has id 7 for the student, 1 for the teacher"):
        shared_vocabulary_size(TOKENS, 10, {"a": 0, "b": 7}, 10)


def test_one_id_for_different_tokens_is_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="'x' has id 2 for the student, where the teacher has 'c'"):
        shared_vocabulary_size(TOKENS, 10, {"a": 0, "b": 1, "x": 2}, 10)


def test_message_names_a_few_of_many() -> None:
    other = {f"t{index}": index for index in range(4)}
    with pytest.raises(VocabularyMismatch) as raised:
        shared_vocabulary_size(TOKENS, 4, other, 4)
    assert raised.value.message.count("for the student") == 3
    assert "4 tokens" in raised.value.message


def test_vocabularies_without_a_common_token_are_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="no token in common"):
        shared_vocabulary_size({"a": 0}, 10, {"b": 1}, 10)
