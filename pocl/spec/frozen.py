"""What all parts of a specification have in common: immutable, and closed to unknown fields."""

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class FrozenModel(BaseModel):
    """A value: immutable, closed to unknown fields, with finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ExactlyOneOf(FrozenModel):
    """A reference written in exactly one of several forms; the class variable names them."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        forms = [name for name in self._field_names() if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"give exactly one of {', '.join(self._field_names())}; got {', '.join(forms) or 'none'}")
        return self

    @classmethod
    def _field_names(cls) -> tuple[str, ...]:
        raise TypeError(f"{cls.__name__} names no forms")
