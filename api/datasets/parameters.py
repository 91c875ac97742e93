"""How an upload is to be read: parameters of the query, or fields of a form."""

import json
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from domain.errors import Unprocessable
from pocl.errors import FieldError
from pocl.spec import FileFormat, ReadOptions, RowForm, field_errors

MAX_NAME_LENGTH = 200


class UploadParameters(BaseModel):
    """The parameters of an upload."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_NAME_LENGTH,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        description="The name that people call the data set; the name of the file in a form unless given.",
    )
    format: FileFormat | None = Field(
        default=None, description="The format of the file, alone or in gzip; told from its content unless given."
    )
    form: RowForm | None = Field(
        default=None,
        description="The form of the rows; told from their columns unless given. `prompt_only` leaves answers out.",
    )
    columns: str | None = Field(
        default=None,
        max_length=4096,
        description="Columns that have other names, as a JSON object: the name of the field, and that of the column,"
        ' for instance `{"instruction": "question", "output": "best_answer"}`.',
    )
    delimiter: str | None = Field(
        default=None,
        min_length=1,
        max_length=1,
        description="The delimiter of a CSV file; told from its header unless given.",
    )
    on_bad_rows: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="Whether rows that are no samples refuse the file, or are left out, counted, and the first named.",
    )

    def with_form_fields(self, fields: Mapping[str, str]) -> Self:
        """The parameters with those of the fields of a form.

        Raises:
            Unprocessable: one is given in both places, or is not valid.
        """
        twice = sorted(self.model_fields_set & set(fields))
        if twice:
            detail = "It is given in the query and in the form; give it once."
            raise Unprocessable(field_errors=[FieldError(f"/{name}", "ambiguous", detail) for name in twice])
        try:
            return self.model_validate(self.model_dump(exclude_unset=True) | dict(fields))
        except ValidationError as error:
            raise Unprocessable(field_errors=field_errors(error, UploadParameters)) from None

    def read_options(self) -> ReadOptions:
        """How the file is read.

        Raises:
            Unprocessable: `columns` is no JSON object of known fields and names of columns.
        """
        try:
            columns = {} if self.columns is None else json.loads(self.columns)
        except (ValueError, RecursionError):
            raise Unprocessable(field_errors=[FieldError("/columns", "json_invalid", "It is not JSON.")]) from None
        options = {name: getattr(self, name) for name in ("format", "form", "delimiter", "on_bad_rows")}
        try:
            return ReadOptions.model_validate({**options, "columns": columns})
        except ValidationError as error:
            raise Unprocessable(field_errors=field_errors(error, ReadOptions)) from None
