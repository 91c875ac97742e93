"""A create that the package sends again makes one job.

The package repeats a POST that timed out, twice, and sends no idempotency key: one call could make three jobs. What it
does send is `x-stainless-retry-count`. So a create without a key gets one of its own: of the key of the API and of the
request. The first try forgets what an earlier call of the same content has left under it, and a repeated one is
answered as the first was, or waits for it. Two calls of the same content make two jobs, unless they come at the same
moment.
"""

import hashlib
from typing import Annotated, Final

from anyio.to_thread import run_sync
from fastapi import Depends, Header, Request

from api.auth import Caller
from api.dependencies import DatabaseDep
from api.idempotency.keys import KeyClaim
from api.idempotency.writes import IdempotentWrite, OptionalClaim, fingerprint_request
from api.sessions import PlanningSlot
from api.strict_json import body_of

RETRY_SECONDS: Final = 1800.0
"""How long a repeated create finds the first one: three tries of the package take no longer, with its own timeouts."""

RetryCount = Annotated[
    int,
    Header(
        alias="x-stainless-retry-count",
        ge=0,
        lt=1000,
        description="How often the client has sent this request before, as the `openai` package counts.",
    ),
]


async def _prepare_create(
    request: Request,
    caller: Caller,
    database: DatabaseDep,
    _slot: PlanningSlot,
    claim: OptionalClaim,
    retry_count: RetryCount = 0,
) -> IdempotentWrite:
    fingerprint = fingerprint_request(request, body_of(request))
    if claim is None:
        digest = hashlib.sha256(f"{caller.key_id} {fingerprint}".encode()).hexdigest()
        claim = KeyClaim(database, caller.project, f"retried-create-{digest}", seconds=RETRY_SECONDS)
        if not retry_count:
            await run_sync(claim.forget)
    await run_sync(claim.check_duplicate, fingerprint)
    return IdempotentWrite(database, claim, fingerprint)


CreateOnceDep = Annotated[IdempotentWrite, Depends(_prepare_create, scope="function")]
"""The write of a create; a response that is not of this request has `Idempotent-Replayed: true`."""
