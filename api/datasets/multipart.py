"""Streaming parser for a multipart form with one file: the file is held neither in memory nor twice on disk."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from domain.errors import Unprocessable
from pocl.errors import FieldError


class MultipartInvalid(Unprocessable):
    """Send a multipart form with one part: a file under the name `file`."""

    code = "multipart_invalid"


class MultipartFile:
    """Takes the bytes of a form and returns those of its file."""

    def __init__(self, content_type: str) -> None:
        """
        Raises:
            MultipartInvalid: the header names no boundary, or too long a one.
        """
        self.filename: str | None = None
        self._parts = 0
        self._ended = False
        self._disposition = False
        self._header, self._value = bytearray(), bytearray()
        self._file = bytearray()
        try:
            self._parser = MultipartParser(
                parse_options_header(content_type)[1].get(b"boundary", b""),
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": lambda data, start, end: self._file.extend(data[start:end]),
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
            MultipartInvalid: the form broke off.
        """
        if not self._ended:
            raise MultipartInvalid("The multipart form broke off before its last boundary; send it again.")

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > 1:
            raise MultipartInvalid

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(bytes(self._value))[1]
            if options.get(b"name") != b"file":
                error = FieldError("/file", "missing", "The form has a part of another name.")
                raise MultipartInvalid(field_errors=[error])
            self._disposition = True
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace") or None
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        if not self._disposition:
            raise MultipartInvalid

    def _on_end(self) -> None:
        self._ended = True
