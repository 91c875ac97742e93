"""Whether teacher and student share a vocabulary, so that their distributions over tokens can be compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pocl.errors import ModelUnsupported, VocabularyMismatch
from pocl.inspect.facts import ModelFacts, ModelWarning

_MAX_NAMED = 3
_MAX_CONFLICTING_SHARE = 0.02
"""Families name a few special tokens anew. Vocabularies that differ in more are those of different tokenizers."""


@dataclass(frozen=True)
class SharedVocabulary:
    """How far the vocabularies of two models agree."""

    size: int
    """The ids from 0 up to it are scored by the output heads of both."""
    conflicts: Mapping[int, str] = field(default_factory=dict, repr=False)
    """Ids below `size` that mean something else to each, with a clause that says what: samples must not use them."""

    def warnings(self) -> tuple[ModelWarning, ...]:
        """A warning that names the first ids in conflict; none where there is no conflict."""
        if not self.conflicts:
            return ()
        clauses = [self.conflicts[id_] for id_ in sorted(self.conflicts)]
        named = "; ".join(clauses[:_MAX_NAMED])
        message = f"teacher and student disagree about {len(clauses)} ids, which samples must not use: {named}"
        return (ModelWarning("vocabulary_conflicts", message),)


@dataclass(frozen=True)
class TokenLimits:
    """Which token ids the samples of a run may use."""

    embeddings: Mapping[str, int]
    """Role of a model -> the rows of its embeddings."""
    conflicts: Mapping[int, str] = field(default_factory=dict, repr=False)
    """As of :class:`SharedVocabulary`."""

    def check(self, ids: Sequence[int], place: str, token_of: Callable[[int], str | None]) -> None:
        """Check the ids of one sample.

        Args:
            place: Names the sample in a sentence, as in `row 3 of data.train`.
            token_of: The token of an id, as the tokenizer spells it.

        Raises:
            ModelUnsupported: naming a token that has no embedding.
            VocabularyMismatch: naming a token that means something else to the teacher.
        """
        if not ids:
            return
        for role, rows in self.embeddings.items():
            if (largest := max(ids)) >= rows:
                raise ModelUnsupported(
                    f"{place} has the token {_abbreviated(token_of(largest) or '')} (id {largest}), and the {role} has "
                    f"embeddings for {rows} ids alone: resize its embeddings to its tokenizer "
                    "(resize_token_embeddings), or take the token out of the data."
                )
        if not self.conflicts.keys().isdisjoint(ids):
            used = min(self.conflicts.keys() & set(ids))
            raise VocabularyMismatch(
                f"{place} has the token {_abbreviated(token_of(used) or '')} (id {used}), about which teacher and "
                f"student disagree: {self.conflicts[used]}. Where the student shall learn the teacher's names for its "
                "ids, put the teacher's tokenizer files (tokenizer.json, tokenizer_config.json) into its directory; "
                "else use a student with the teacher's tokens, or data and a chat template without them."
            )


def shared_vocabulary(teacher: ModelFacts, student: ModelFacts) -> SharedVocabulary:
    """How far the vocabularies of both models agree.

    Raises:
        VocabularyMismatch: naming the first tokens that differ, where they are of different tokenizers.
    """
    return compare_vocabularies(teacher.tokens, teacher.vocabulary_size, student.tokens, student.vocabulary_size)


def compare_vocabularies(
    teacher: Mapping[str, int], teacher_size: int, student: Mapping[str, int], student_size: int
) -> SharedVocabulary:
    """How far two vocabularies agree, whose output heads have these sizes.

    A token known to both should have one id, and an id known to both should be one token. Ids that only one
    tokenizer knows are no conflict: heads are often padded, and one side may have added tokens at the end.

    Raises:
        VocabularyMismatch: naming the first tokens that differ, where they have no token in common or disagree about
            more than a few.
    """
    size = min(teacher_size, student_size)
    conflicts = [conflict for conflict in _conflicts(teacher, student) if any(id_ < size for id_ in conflict.ids)]
    if len(conflicts) > _MAX_CONFLICTING_SHARE * min(len(teacher), len(student)):
        named = "; ".join(str(conflict) for conflict in conflicts[:_MAX_NAMED])
        raise VocabularyMismatch(f"Teacher and student disagree about {len(conflicts)} tokens: {named}.")
    if teacher.keys().isdisjoint(student):
        raise VocabularyMismatch("Teacher and student have no token in common.")
    clauses = {id_: str(conflict) for conflict in reversed(conflicts) for id_ in conflict.ids if id_ < size}
    return SharedVocabulary(size, clauses)


def encodes_with_teacher_tokenizer(teacher_tokens: int, student_embeddings: int) -> bool:
    """Whether a run encodes its samples with the teacher's tokenizer, which has the template that the teacher was
    trained on: unless the student lacks embeddings for some of its ids.

    Args:
        teacher_tokens: the tokens of the teacher's tokenizer, added ones included.
        student_embeddings: the rows of the student's input embeddings.
    """
    return teacher_tokens <= student_embeddings


@dataclass(frozen=True, order=True)
class _Conflict:
    id: int
    """The id in the student's vocabulary."""
    token: str
    in_teacher: str
    """What the teacher's vocabulary has instead."""
    teacher_id: int
    """The id in the teacher's vocabulary of the token, or of what stands in its place."""

    @property
    def ids(self) -> tuple[int, int]:
        return self.id, self.teacher_id

    def __str__(self) -> str:
        return f"{_abbreviated(self.token)} has id {self.id} for the student, {self.in_teacher}"


def _conflicts(teacher: Mapping[str, int], student: Mapping[str, int]) -> list[_Conflict]:
    teacher_tokens = {id_: token for token, id_ in teacher.items()}
    conflicts = []
    for token, id_ in student.items():
        teacher_id = teacher.get(token)
        if teacher_id is not None:
            if teacher_id != id_:
                conflicts.append(_Conflict(id_, token, f"{teacher_id} for the teacher", teacher_id))
            continue
        teacher_token = teacher_tokens.get(id_)
        # Where the student knows the teacher's token as well, the conflict is reported under that token.
        if teacher_token is not None and teacher_token not in student:
            conflicts.append(_Conflict(id_, token, f"where the teacher has {_abbreviated(teacher_token)}", id_))
    return sorted(conflicts)


def _abbreviated(token: str) -> str:
    return repr(token if len(token) <= 40 else token[:40] + "…")
