"""Why a row is no sample."""

from typing import Literal

RowCode = Literal[
    "line_too_long",
    "not_utf8",
    "not_json",
    "not_csv",
    "wrong_columns",
    "nested_too_deeply",
    "duplicate_key",
    "not_an_object",
    "form_unknown",
    "missing",
    "wrong_type",
    "empty",
    "too_many",
    "role_unknown",
    "roles_out_of_order",
    "not_text",
    "weight_unknown",
    "nothing_to_train",
    "ambiguous",
]


class RowInvalid(ValueError):
    """A row is no sample; `code` is stable, and `detail` is a sentence that does not repeat the row's text."""

    def __init__(self, code: RowCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
