"""Jobs: submitted, followed, steered."""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import httpx2

from pocl_client._async.downloads import OnProgress, download_file
from pocl_client._async.pages import iterate
from pocl_client._async.transport import AsyncTransport, Outage
from pocl_client.errors import ClientError, ResponseInvalid, WaitTimedOut
from pocl_client.models import (
    Attempt,
    Checkpoint,
    Event,
    Job,
    JobSummary,
    Metrics,
    Plan,
    Stage,
    StageList,
)
from pocl_client.responses import ENDED, StreamMessage, given, parse_message, segment

Spec = Mapping[str, Any]
"""A specification as the service takes it: what is left out has the default of the preset."""
_LOG_PART_BYTES: Final = 2**20
"""The longest part of a log that the service sends at once."""
_POLL_SECONDS: Final = 30.0
"""How long the service may hold back the answer to a poll of a job that does not change."""
_POLL_PAUSE_SECONDS: Final = 0.5
"""The least time between two polls: a job in training changes all the time."""
_SILENCE_SECONDS: Final = 60.0
"""A stream that is silent for as long has broken: the service sends a sign of life every 15 s."""
_OUTAGE_SECONDS: Final = 600.0


class AsyncJobs:
    """`client.jobs`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, spec: Spec, *, idempotency_key: str | None = None, **options: Any) -> Job:
        """Submit a job.

        Args:
            spec: what is to be distilled.
            idempotency_key: makes this call and later ones with the same key one job; a random one unless given.
            options: `name`, `labels`, `priority`, `limits`, `retention`, `trackers`.

        Raises:
            RequestInvalid: a field is wrong; `errors` names each with a pointer.
        """
        body = {**given(**options), "spec": dict(spec)}
        response = await self._transport.send("POST", "/v1/jobs", json=body, idempotency_key=idempotency_key)
        return response.model(Job)

    async def validate(self, spec: Spec, **options: Any) -> Plan:
        """What a job would be: every default, stages, memory, disk, time and warnings. Nothing is queued."""
        response = await self._transport.send(
            "POST", "/v1/jobs/validate", json={**given(**options), "spec": dict(spec)}
        )
        return response.model(Plan)

    async def get(self, job_id: str) -> Job:
        """A job as it is now."""
        return (await self._transport.send("GET", self._path(job_id))).model(Job)

    def list(
        self, *, status: Sequence[str] | None = None, labels: Mapping[str, str] | None = None, limit: int | None = None
    ) -> AsyncIterator[JobSummary]:
        """The jobs of the project, newest first.

        Args:
            status: any of these statuses.
            labels: all of these labels.
            limit: how many at most; null for all.
        """
        wanted = [f"{key}={value}" for key, value in (labels or {}).items()]
        params = given(status=status, label=wanted or None)
        return iterate(self._transport, "/v1/jobs", JobSummary, params, limit=limit)

    async def update(self, job_id: str, **changes: Any) -> Job:
        """Change `name`, `labels`, `priority` or `retention` of a job; null is a value, too."""
        return (await self._transport.send("PATCH", self._path(job_id), json=changes)).model(Job)

    async def delete(self, job_id: str) -> None:
        """Delete a job that has ended."""
        await self._transport.send("DELETE", self._path(job_id))

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job. One that has been cancelled already stays so."""
        return await self._act(job_id, "cancel")

    async def pause(self, job_id: str, *, at: Literal["now", "stage_end"] = "now") -> Job:
        """Save a job and stop it, now or at the end of its stage."""
        return await self._act(job_id, "pause", {"at": at})

    async def resume(self, job_id: str) -> Job:
        """Let a paused job go on."""
        return await self._act(job_id, "resume")

    async def retry(
        self,
        job_id: str,
        *,
        start: Literal["checkpoint", "stage", "start"] = "checkpoint",
        stage: int | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Job:
        """A new job that does again, or goes on with, what an ended one did.

        Args:
            stage: at whose end it begins, counted from 0, with `start="stage"`.
            options: as of :meth:`create`; those of the ended job hold unless given.
        """
        body = {**given(**options, stage=stage), "start": start}
        return await self._act(job_id, "retry", body, idempotency_key)

    async def branch(
        self,
        job_id: str,
        *,
        stage: int,
        changes: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Job:
        """A new job that goes on from the end of a stage, counted from 0, with changes of the specification."""
        body = {**given(**options), "stage": stage, "changes": dict(changes or {})}
        return await self._act(job_id, "branch", body, idempotency_key)

    async def stages(self, job_id: str) -> Sequence[Stage]:
        """The stages of the curriculum, with their scores."""
        response = await self._transport.send("GET", f"{self._path(job_id)}/stages")
        return response.model(StageList).data

    def events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> AsyncIterator[Event]:
        """The history of a job from one event on, up to now."""
        return iterate(self._transport, f"{self._path(job_id)}/events", Event, {"after": after}, limit=limit)

    def attempts(self, job_id: str) -> AsyncIterator[Attempt]:
        """The attempts of a job."""
        return iterate(self._transport, f"{self._path(job_id)}/attempts", Attempt)

    def checkpoints(self, job_id: str) -> AsyncIterator[Checkpoint]:
        """The checkpoints of a job, newest first."""
        return iterate(self._transport, f"{self._path(job_id)}/checkpoints", Checkpoint)

    async def metrics(
        self,
        job_id: str,
        *,
        names: Sequence[str] | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
        resolution: int | None = None,
    ) -> Metrics:
        """The metrics of steps and the scores of evaluations.

        Args:
            resolution: how many values of each series at most.
        """
        params = given(names=names, from_step=from_step, to_step=to_step, resolution=resolution)
        return (await self._transport.send("GET", f"{self._path(job_id)}/metrics", params=params)).model(Metrics)

    async def logs(self, job_id: str, *, attempt: int | None = None, tail: int | None = None) -> str:
        """The log of an attempt, the newest one unless given, as far as the service keeps it; to follow it, see
        :meth:`stream`.

        Args:
            tail: how many lines of the end of it, of its last MiB at most.
        """
        path = f"{self._path(job_id)}/logs"
        if tail is not None:
            response = await self._transport.send("GET", path, params=given(attempt=attempt, tail=_LOG_PART_BYTES))
            lines = response.content.splitlines(keepends=True)
            return b"".join(lines[max(0, len(lines) - tail) :]).decode(errors="replace")
        parts, offset = [], 0
        while True:
            params = given(attempt=attempt, offset=offset, limit=_LOG_PART_BYTES)
            response = await self._transport.send("GET", path, params=params)
            parts.append(response.content)
            # A later attempt may begin meanwhile.
            attempt = attempt or int(response.headers.get("log-attempt", 0)) or None
            offset = int(response.headers.get("log-next-offset", 0))
            if not response.content or offset >= int(response.headers.get("log-size", 0)):
                return b"".join(parts).decode(errors="replace")

    async def result(self, job_id: str) -> dict[str, Any]:
        """The scores of every model that was evaluated, the best stage, and what else a succeeded job has found out."""
        result = (await self._transport.send("GET", f"{self._path(job_id)}/result")).json()
        if not isinstance(result, dict):
            raise ResponseInvalid("The result is no object.")
        return result

    async def download(
        self,
        job_id: str,
        file: Literal["report", "result", "ranking", "answers"],
        target: str | Path,
        *,
        on_progress: OnProgress | None = None,
    ) -> Path:
        """Download a file of a job, verified, in place of what has the name."""
        path = f"{self._path(job_id)}/{segment(file)}"
        return await download_file(self._transport, path, Path(target), on_progress=on_progress)

    async def wait(
        self,
        job_id: str,
        *,
        timeout: float | None = None,
        until: Collection[str] = ENDED,
        on_change: Callable[[Job], None] | None = None,
    ) -> Job:
        """Wait until a job has one of some statuses, or has ended; the job as it is then.

        The service answers when the job changes, so that nothing is asked in vain. It may be away for ten minutes, as
        during an upgrade.

        Args:
            timeout: in seconds; null for as long as it takes.
            until: statuses; those of an ended job unless given.
            on_change: called with the job at first, and whenever it has changed.

        Raises:
            WaitTimedOut: the time is over.
            ApiError: there is no such job (any more).
        """
        clock, outage = self._transport.clock, Outage(self._transport.clock, _OUTAGE_SECONDS)
        deadline = None if timeout is None else clock.monotonic() + timeout
        etag: str | None = None
        status = "not known"
        while True:
            asked_at = clock.monotonic()
            left = _POLL_SECONDS if deadline is None else max(0.0, min(_POLL_SECONDS, deadline - asked_at))
            try:
                response = await self._transport.send(
                    "GET",
                    self._path(job_id),
                    params=None if etag is None else {"wait": f"{left:.3f}"},
                    headers=given(**{"If-None-Match": etag}),
                    read_timeout=left + _SILENCE_SECONDS,
                )
                outage.end()
            except ClientError as error:
                outage.failed(error)
            else:
                if response.status != 304:
                    job, etag = response.model(Job), response.headers.get("etag")
                    status = job.status
                    if on_change is not None:
                        on_change(job)
                    if status in until or status in ENDED:
                        return job
            now = clock.monotonic()
            if deadline is not None and now >= deadline:
                raise WaitTimedOut(f"{job_id} is {status} after {timeout:g} s; it goes on.")
            await clock.sleep(max(0.0, asked_at + _POLL_PAUSE_SECONDS - now))

    async def stream(
        self, job_id: str, *, types: Iterable[str] = (), after: int = 0, last_event_id: str | None = None
    ) -> AsyncIterator[StreamMessage]:
        """What happens to a job, as it happens, until it has ended. Where the connection breaks, the stream goes on
        after the last message; only live progress can be lost.

        Args:
            types: of the messages: `progress`, `metric` and `log` besides those of the history; the history unless
                given.
            after: the number of the event that it begins after.
            last_event_id: the `id` of the last message of an earlier stream, to go on there.

        Raises:
            ApiError: there is no such job (any more).
        """
        outage = Outage(self._transport.clock, _OUTAGE_SECONDS)
        last, pause = last_event_id, 2.0
        params = given(types=list(types) or None, after=after or None)
        while True:
            headers = {"Accept": "text/event-stream", **given(**{"Last-Event-ID": last})}
            try:
                async with self._transport.stream(
                    f"{self._path(job_id)}/events/stream", params=params, headers=headers, read_timeout=_SILENCE_SECONDS
                ) as response:
                    if response.status_code == 204:
                        return
                    async for message in httpx2.EventSource(response):
                        outage.end()
                        last = message.id or last
                        if message.retry is not None:
                            pause = min(message.retry / 1000, _SILENCE_SECONDS)
                        if message.data:
                            yield parse_message(message.event, message.id, message.data)
                        if message.event == "end":
                            return
            except ClientError as error:
                outage.failed(error)
            # As the service asks, and not all clients at once.
            await self._transport.clock.sleep(pause * (0.5 + self._transport.retries.random()))

    async def _act(
        self, job_id: str, action: str, body: Mapping[str, Any] | None = None, idempotency_key: str | None = None
    ) -> Job:
        path = f"{self._path(job_id)}/{action}"
        return (await self._transport.send("POST", path, json=body, idempotency_key=idempotency_key)).model(Job)

    def _path(self, job_id: str) -> str:
        return f"/v1/jobs/{segment(job_id)}"
