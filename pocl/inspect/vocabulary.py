"""Whether teacher and student share a vocabulary, so that their distributions over tokens can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass

from pocl.errors import VocabularyMismatch
from pocl.inspect.facts import ModelFacts

_MAX_NAMED = 3


def shared_vocabulary(teacher: ModelFacts, student: ModelFacts) -> int:
    """The number below which all ids mean the same to both models and are scored by both heads.

    Raises:
        VocabularyMismatch: naming the first tokens that differ.
    """
    return shared_vocabulary_size(teacher.tokens, teacher.vocabulary_size, student.tokens, student.vocabulary_size)


def shared_vocabulary_size(
    teacher: Mapping[str, int], teacher_size: int, student: Mapping[str, int], student_size: int
) -> int:
    """The smaller of both heads, provided that the tokenizers agree wherever both define something.

    A token known to both must have one id, and an id known to both must be one token. Ids that only one
    tokenizer knows are no conflict: heads are often padded, and one side may have added tokens at the end.

    Raises:
        VocabularyMismatch: naming the first tokens that differ.
    """
    conflicts = _conflicts(teacher, student)
    if conflicts:
        named = "; ".join(str(conflict) for conflict in conflicts[:_MAX_NAMED])
        raise VocabularyMismatch(f"Teacher and student disagree about {len(conflicts)} tokens: {named}.")
    if teacher.keys().isdisjoint(student):
        raise VocabularyMismatch("Teacher and student have no token in common.")
    return min(teacher_size, student_size)


@dataclass(frozen=True, order=True)
class _Conflict:
    id: int
    """The id in the student's vocabulary."""
    token: str
    in_teacher: str
    """What the teacher's vocabulary has instead."""

    def __str__(self) -> str:
        return f"{_abbreviated(self.token)} has id {self.id} for the student, {self.in_teacher}"


def _conflicts(teacher: Mapping[str, int], student: Mapping[str, int]) -> list[_Conflict]:
    teacher_tokens = {id_: token for token, id_ in teacher.items()}
    conflicts = []
    for token, id_ in student.items():
        teacher_id = teacher.get(token)
        if teacher_id is not None:
            if teacher_id != id_:
                conflicts.append(_Conflict(id_, token, f"{teacher_id} for the teacher"))
            continue
        teacher_token = teacher_tokens.get(id_)
        # Where the student knows the teacher's token as well, the conflict is reported under that token.
        if teacher_token is not None and teacher_token not in student:
            conflicts.append(_Conflict(id_, token, f"where the teacher has {_abbreviated(teacher_token)}"))
    return sorted(conflicts)


def _abbreviated(token: str) -> str:
    return repr(token if len(token) <= 40 else token[:40] + "…")
