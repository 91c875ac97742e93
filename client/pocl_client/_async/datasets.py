"""Data sets: uploaded, looked at, deleted."""

import io
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from pocl_client._async.concurrency import in_thread
from pocl_client._async.downloads import OnProgress
from pocl_client._async.pages import iterate
from pocl_client._async.transport import AsyncTransport
from pocl_client.errors import DatasetRefused, WaitTimedOut, field_problems
from pocl_client.models import Dataset, Preview
from pocl_client.responses import given, segment

_PIECE_BYTES: Final = 1 << 20
_UPLOAD_SECONDS: Final = 600.0
"""How long the service may take to answer once a file has arrived: it reads small ones first."""
_POLL_SECONDS: Final = 1.0


class AsyncDatasets:
    """`client.datasets`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def upload(
        self,
        source: str | Path | bytes,
        *,
        name: str | None = None,
        format: str | None = None,
        form: str | None = None,
        columns: Mapping[str, str] | None = None,
        delimiter: str | None = None,
        on_bad_rows: str | None = None,
        on_progress: OnProgress | None = None,
        idempotency_key: str | None = None,
        timeout: float | None = None,
    ) -> Dataset:
        """Upload a file of samples, and wait until the service has read it.

        Args:
            source: the path of a file, JSONL, JSON, CSV or Parquet, also in gzip; or its content.
            name: what people call the data set; that of the file unless given.
            format: of the file; told from its content unless given.
            form: of the rows; told from their columns unless given.
            columns: the columns that have other names: the name of the field, and that of the column.
            delimiter: of a CSV file.
            on_bad_rows: `refuse`, or `skip` to leave out rows that are no samples.
            on_progress: called with the bytes that were sent and with all.
            timeout: how long to wait for the service to read a large file, in seconds; null for as long as it takes.

        Raises:
            RequestInvalid: the file is no data set; `errors` names the wrong rows.
            DatasetRefused: the same of a large file, which the service read later.
            OSError: the file cannot be read.
        """
        content = source if isinstance(source, bytes) else Path(source)
        size = len(content) if isinstance(content, bytes) else (await in_thread(content.stat)).st_size
        name = name or (None if isinstance(content, bytes) else content.name)
        texts = None if columns is None else json.dumps(dict(columns))
        params = given(name=name, format=format, form=form, columns=texts, delimiter=delimiter, on_bad_rows=on_bad_rows)
        response = await self._transport.send(
            "POST",
            "/v1/datasets",
            params=params,
            content=lambda: _pieces(content, size, on_progress),
            headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)},
            idempotency_key=idempotency_key,
            read_timeout=_UPLOAD_SECONDS,
        )
        return await self._wait_until_read(response.model(Dataset), timeout)

    async def get(self, dataset_id: str) -> Dataset:
        """A data set; of one that was refused, why."""
        return (await self._transport.send("GET", f"/v1/datasets/{segment(dataset_id)}")).model(Dataset)

    def list(self, *, limit: int | None = None) -> AsyncIterator[Dataset]:
        """The data sets of the project, newest first."""
        return iterate(self._transport, "/v1/datasets", Dataset, limit=limit)

    async def preview(self, dataset_id: str, model: str, **options: Any) -> Preview:
        """Rows as a run would train on them: tokens, and which of them are trained.

        Args:
            model: whose tokenizer is used, as a specification names it.
            options: `offset`, `rows`, `template`, `template_name`, `chat_template`, `chat_template_kwargs`, `system`,
                `date`, `max_length`, `max_prompt_length`.
        """
        path = f"/v1/datasets/{segment(dataset_id)}/preview"
        response = await self._transport.send("GET", path, params={"model": model, **options})
        return response.model(Preview)

    async def delete(self, dataset_id: str) -> None:
        """Delete a data set that no job needs."""
        await self._transport.send("DELETE", f"/v1/datasets/{segment(dataset_id)}")

    async def _wait_until_read(self, dataset: Dataset, timeout: float | None) -> Dataset:
        clock = self._transport.clock
        deadline = None if timeout is None else clock.monotonic() + timeout
        while dataset.status == "validating":
            if deadline is not None and clock.monotonic() >= deadline:
                raise WaitTimedOut(f"The service still reads {dataset.id} after {timeout:g} s; it goes on.")
            await clock.sleep(_POLL_SECONDS)
            dataset = await self.get(dataset.id)
        if dataset.refusal is not None:
            errors = field_problems([each.model_dump() for each in dataset.refusal.errors])
            raise DatasetRefused(dataset.refusal.code, dataset.refusal.message, errors)
        return dataset


async def _pieces(source: Path | bytes, size: int, on_progress: OnProgress | None) -> AsyncIterator[bytes]:
    """The body of an upload, read as it is sent, and as many bytes as were promised."""
    file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else await in_thread(lambda: source.open("rb"))
    with file:
        sent = 0
        while sent < size and (piece := await in_thread(file.read, min(_PIECE_BYTES, size - sent))):
            yield piece
            sent += len(piece)
            if on_progress is not None:
                on_progress(sent, size)
