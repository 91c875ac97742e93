"""When a teacher's distribution over tokens means the same to a student."""

from collections.abc import Mapping
from dataclasses import dataclass

from pocl.errors import VocabularyMismatch
from pocl.inspect.facts import ModelFacts

_NAMED = 3


def shared_vocabulary(teacher: ModelFacts, student: ModelFacts) -> int:
    """Ids below this number mean the same to both models, and both heads score them.

    Raises:
        VocabularyMismatch: as :func:`shared_vocabulary_size`.
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
        named = "; ".join(str(conflict) for conflict in conflicts[:_NAMED])
        raise VocabularyMismatch(f"Teacher and student disagree about {len(conflicts)} tokens: {named}.")
    if teacher.keys().isdisjoint(student):
        raise VocabularyMismatch("Teacher and student have no token in common.")
    return min(teacher_size, student_size)


@dataclass(frozen=True, order=True)
class _Conflict:
    id: int
    """The student's."""
    token: str
    teacher_says: str

    def __str__(self) -> str:
        return f"{_shown(self.token)} has id {self.id} for the student, {self.teacher_says}"


def _conflicts(teacher: Mapping[str, int], student: Mapping[str, int]) -> list[_Conflict]:
    teacher_token_of = {id_: token for token, id_ in teacher.items()}
    found = []
    for token, id_ in student.items():
        known_as = teacher.get(token)
        if known_as is not None:
            if known_as != id_:
                found.append(_Conflict(id_, token, f"{known_as} for the teacher"))
            continue
        other = teacher_token_of.get(id_)
        # Where the student knows the other token as well, that token's own turn reports the conflict.
        if other is not None and other not in student:
            found.append(_Conflict(id_, token, f"where the teacher has {_shown(other)}"))
    return sorted(found)


def _shown(token: str) -> str:
    return repr(token if len(token) <= 40 else token[:40] + "…")
