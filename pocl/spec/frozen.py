"""Base classes of all parts of a specification."""

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class FrozenModel(BaseModel):
    """An immutable value that refuses unknown fields and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ExactlyOneOf(FrozenModel):
    """A reference that sets exactly one of the fields that :meth:`_alternatives` names."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in self._alternatives() if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self._alternatives())}; got {', '.join(given) or 'none'}")
        return self

    @classmethod
    def _alternatives(cls) -> tuple[str, ...]:
        raise TypeError(f"{cls.__name__} names no alternatives")
