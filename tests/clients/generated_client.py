"""A Python client that `openapi-python-client` generates from the document in `docs/`."""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from openapi_python_client import generate
from openapi_python_client.config import Config, ConfigFile, MetaType

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "openapi.json"
PACKAGE: Final = "generated_from_openapi"
_FILE_TYPES: Final = ("jsonl", "x-tar", "x-ndjson", "x-jsonlines", "vnd.apache.parquet", "gzip")
"""Media types of files, which the generator must be told to send and take as bytes."""


def generate_client(directory: Path) -> list[str]:
    """Write the package into a directory; what the generator warns of."""
    as_bytes = {f"application/{name}": "application/octet-stream" for name in _FILE_TYPES}
    as_bytes |= {f"text/{name}": "application/octet-stream" for name in ("csv", "tab-separated-values")}
    config = Config.from_sources(
        # Without a formatter, which says nothing of the document.
        ConfigFile(post_hooks=[], content_type_overrides=as_bytes),
        MetaType.NONE,
        document_source=DOCUMENT,
        file_encoding="utf-8",
        overwrite=False,
        output_path=directory / PACKAGE,
    )
    return [f"{error.header} {error.detail}" for error in generate(config=config)]


def operation_ids() -> list[str]:
    """The names of all operations of the document."""
    paths = json.loads(DOCUMENT.read_text(encoding="utf-8"))["paths"]
    return [operation["operationId"] for path in paths.values() for operation in path.values()]


class GeneratedClient:
    """The modules of the package that was generated into a directory."""

    def module(self, name: str) -> Any:
        """A module of the package, for instance `api.jobs.create_job`."""
        return importlib.import_module(f"{PACKAGE}.{name}")

    def model(self, name: str) -> Any:
        """A class of the package's models."""
        return getattr(self.module("models"), name)


@contextmanager
def imported(directory: Path) -> Iterator[GeneratedClient]:
    """The package, importable for as long as the block lasts."""
    sys.path.insert(0, str(directory))
    try:
        yield GeneratedClient()
    finally:
        sys.path.remove(str(directory))
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
