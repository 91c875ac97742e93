"""Lists of jobs: each state of a job is rendered once, however often it is listed."""

from collections import OrderedDict
from threading import Lock
from typing import Annotated, Final

import orjson
from fastapi import Depends, Request
from sqlalchemy.orm import Session

from api.jobs.presenter import summarize_job
from domain.db import KeysetPage
from domain.jobs import repository
from domain.jobs.repository import ListedJob

_CACHED: Final = 4096
"""Of about a kibibyte each."""


class SummaryCache:
    """The summaries of jobs as JSON, by id and version: all that a summary shows changes with the row's version.

    It is used by several threads at a time.
    """

    def __init__(self, size: int = _CACHED) -> None:
        self._size = size
        self._entries: OrderedDict[ListedJob, bytes] = OrderedDict()
        self._lock = Lock()

    def render_page(self, session: Session, page: KeysetPage[ListedJob]) -> bytes:
        """A page of jobs as JSON, in the transaction that has read the page."""
        with self._lock:
            rendered = {job: self._entries[job] for job in page.rows if job in self._entries}
            for job in rendered:
                self._entries.move_to_end(job)
        missing = [job.id for job in page.rows if job not in rendered]
        if missing:
            new = {
                ListedJob(row.id, row.version): summarize_job(row).model_dump_json().encode()
                for row in repository.get_listed_jobs(session, missing)
            }
            rendered |= new
            with self._lock:
                self._entries |= new
                while len(self._entries) > self._size:
                    self._entries.popitem(last=False)
        ids = [job.id for job in page.rows]
        rest = {"has_more": page.has_more, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
        data = b",".join(rendered[job] for job in page.rows)
        return b'{"object":"list","data":[' + data + b"]," + orjson.dumps(rest)[1:]


async def _get_summary_cache(request: Request) -> SummaryCache:
    cache: SummaryCache = request.app.state.summaries
    return cache


SummaryCacheDep = Annotated[SummaryCache, Depends(_get_summary_cache)]
