"""Streaming parser for a multipart form with one file: the file is held neither in memory nor twice on disk."""

from collections.abc import Collection

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from domain.errors import Unprocessable
from pocl.errors import FieldError

_MAX_FIELD_BYTES = 8192


class MultipartInvalid(Unprocessable):
    """Send a multipart form with one file under the name `file`, and options in fields of their names."""

    code = "multipart_invalid"


class MultipartFile:
    """Takes the bytes of a form and returns those of its file."""

    def __init__(self, content_type: str, field_names: Collection[str] = ()) -> None:
        """
        Args:
            field_names: the fields that the form may have besides its file.

        Raises:
            MultipartInvalid: the header names no boundary, or too long a one.
        """
        self.filename: str | None = None
        self.fields: dict[str, str] = {}
        """The other fields, as text; whole once :meth:`finish` has returned."""
        self._field_names = field_names
        self._names: list[str] = []
        self._ended = False
        self._header, self._value = bytearray(), bytearray()
        self._file = bytearray()
        self._field = bytearray()
        try:
            self._parser = MultipartParser(
                parse_options_header(content_type)[1].get(b"boundary", b""),
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError:
            raise MultipartInvalid from None

    def feed(self, chunk: bytes) -> bytes:
        """The bytes of the file that `chunk` completes.

        Raises:
            MultipartInvalid: the bytes are no form of this kind.
        """
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise MultipartInvalid from None
        content = bytes(self._file)
        self._file.clear()
        return content

    def finish(self) -> None:
        """
        Raises:
            MultipartInvalid: the form broke off, or has no file.
        """
        if not self._ended:
            raise MultipartInvalid("The multipart form broke off before its last boundary; send it again.")
        if "file" not in self._names:
            raise MultipartInvalid

    def _on_part_begin(self) -> None:
        self._names.append("")

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(bytes(self._value))[1]
            name = options.get(b"name", b"").decode("utf-8", "replace")
            if name != "file" and name not in self._field_names:
                detail = f"The form may have the parts {', '.join(('file', *self._field_names))}, and no other."
                raise MultipartInvalid(field_errors=[FieldError("/file", "unknown", detail)])
            if name in self._names:
                raise MultipartInvalid(field_errors=[FieldError(f"/{name}", "ambiguous", "The form has it twice.")])
            self._names[-1] = name
            if name == "file":
                self.filename = options.get(b"filename", b"").decode("utf-8", "replace") or None
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        if not self._names[-1]:
            raise MultipartInvalid

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._names[-1] == "file":
            self._file.extend(data[start:end])
            return
        self._field.extend(data[start:end])
        if len(self._field) > _MAX_FIELD_BYTES:
            error = FieldError(f"/{self._names[-1]}", "too_long", f"use at most {_MAX_FIELD_BYTES} bytes")
            raise MultipartInvalid(field_errors=[error])

    def _on_part_end(self) -> None:
        if self._names[-1] == "file":
            return
        try:
            self.fields[self._names[-1]] = self._field.decode("utf-8")
        except UnicodeDecodeError:
            error = FieldError(f"/{self._names[-1]}", "not_utf8", "send it as UTF-8")
            raise MultipartInvalid(field_errors=[error]) from None
        self._field.clear()

    def _on_end(self) -> None:
        self._ended = True
