"""Teacher and student share a vocabulary only where every token means the same to both."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pocl.errors import ModelUnsupported, VocabularyMismatch
from pocl.inspect import SharedVocabulary, TokenLimits, compare_vocabularies

TOKENS = {"a": 0, "b": 1, "c": 2, "d": 3}


def test_heads_of_different_sizes_share_the_smaller_range() -> None:
    assert compare_vocabularies(TOKENS, 64, TOKENS, 48) == compare_vocabularies(TOKENS, 48, TOKENS, 64)
    assert compare_vocabularies(TOKENS, 64, TOKENS, 48).size == 48


def test_tokens_that_only_one_side_has_are_no_conflict() -> None:
    assert compare_vocabularies(TOKENS, 4, {**TOKENS, "<pad>": 4}, 5) == SharedVocabulary(4)


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 30), min_size=1), st.integers(1, 50), st.integers(1, 50))
def test_equal_vocabularies_agree(tokens: dict[str, int], teacher: int, student: int) -> None:
    assume(len(set(tokens.values())) == len(tokens))
    assert compare_vocabularies(tokens, teacher, tokens, student) == SharedVocabulary(min(teacher, student))


@given(st.permutations(list(range(6))))
def test_permuted_ids_are_refused(ids: list[int]) -> None:
    assume(ids != sorted(ids))
    tokens = dict(zip("abcdef", range(6), strict=True))
    with pytest.raises(VocabularyMismatch):
        compare_vocabularies(tokens, 6, dict(zip("abcdef", ids, strict=True)), 6)


def test_message_names_the_token_and_both_ids() -> None:
    with pytest.raises(VocabularyMismatch, match=r"1 tokens: 'b' has id 7 for the student, 1 for the teacher"):
        compare_vocabularies(TOKENS, 10, {"a": 0, "b": 7}, 10)


def test_one_id_for_different_tokens_is_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="'x' has id 2 for the student, where the teacher has 'c'"):
        compare_vocabularies(TOKENS, 10, {"a": 0, "b": 1, "x": 2}, 10)


def test_message_names_a_few_of_many() -> None:
    other = {f"t{index}": index for index in range(4)}
    with pytest.raises(VocabularyMismatch) as raised:
        compare_vocabularies(TOKENS, 4, other, 4)
    assert raised.value.message.count("for the student") == 3
    assert "4 tokens" in raised.value.message


def test_vocabularies_without_a_common_token_are_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="no token in common"):
        compare_vocabularies({"a": 0}, 10, {"b": 1}, 10)


MANY = {f"t{index}": index for index in range(200)}


def renamed(tokens: dict[str, int], *ids: int) -> dict[str, int]:
    return {f"<new {id_}>" if id_ in ids else token: id_ for token, id_ in tokens.items()}


def test_a_few_renamed_tokens_are_conflicts_and_no_refusal() -> None:
    shared = compare_vocabularies(MANY, 220, renamed(MANY, 7, 9), 210)
    assert shared.size == 210
    assert set(shared.conflicts) == {7, 9}
    assert "'<new 7>' has id 7 for the student, where the teacher has 't7'" in shared.warnings()[0].message


def test_both_ids_of_a_moved_token_are_conflicts() -> None:
    student = {token: id_ for token, id_ in MANY.items() if token != "t3"} | {"t3": 205}
    assert set(compare_vocabularies(MANY, 220, student, 220).conflicts) == {3, 205}


def test_ids_that_a_head_does_not_score_are_no_conflicts() -> None:
    assert not compare_vocabularies(MANY | {"<a>": 200}, 200, MANY | {"<b>": 200}, 200).conflicts


def test_many_renamed_tokens_are_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="5 tokens"):
        compare_vocabularies(MANY, 200, renamed(MANY, 1, 2, 3, 4, 5), 200)


LIMITS = TokenLimits({"teacher": 30, "student": 20}, {7: "'x' has id 7 for the student, where the teacher has 'y'"})


def test_samples_within_the_limits_pass() -> None:
    LIMITS.check([0, 6, 19, 8], "row 1 of data.train", str)
    LIMITS.check([], "row 1 of data.train", str)


def test_a_sample_with_a_token_without_an_embedding_is_refused_by_token_and_row() -> None:
    with pytest.raises(ModelUnsupported, match=r"row 3 of data.train has the token '<20>' \(id 20\), and the student"):
        LIMITS.check([1, 20, 3], "row 3 of data.train", lambda id_: f"<{id_}>")


def test_a_sample_with_a_token_in_conflict_is_refused_by_token_and_row() -> None:
    with pytest.raises(VocabularyMismatch, match=r"row 2 of data.train has the token 'y' \(id 7\)"):
        LIMITS.check([1, 7], "row 2 of data.train", lambda _: "y")
