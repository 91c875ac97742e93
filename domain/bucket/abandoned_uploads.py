"""Multipart uploads that killed processes left: their parts take space, and no list of objects shows them.

`obstore` has no request for them, so they are found by `botocore`, which reads the same variables.
"""

import os
from datetime import UTC, datetime

import structlog

from domain.bucket.location import CONNECT_SECONDS, SILENCE_SECONDS, Bucket

_log = structlog.get_logger(__name__)


def abort_uploads(bucket: Bucket, older_than: float) -> int:
    """Abort the multipart uploads below the prefix that killed processes left; how many there were."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    virtual = os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("1", "true")
    client = Session().create_client(
        "s3",
        endpoint_url=bucket.endpoint,
        region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=SILENCE_SECONDS,
            retries={"max_attempts": 2},
            s3={"addressing_style": "virtual" if virtual else "path"},
        ),
    )
    prefix = f"{bucket.prefix}/" if bucket.prefix else ""
    aborted = 0
    try:
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket.name, Prefix=prefix)
        for upload in (each for page in pages for each in page.get("Uploads", [])):
            if (datetime.now(UTC) - upload["Initiated"]).total_seconds() >= older_than:
                client.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
                aborted += 1
    except (BotoCoreError, ClientError) as error:
        # The rest of the garbage is collected all the same, and these the next time.
        _log.warning("uploads_not_aborted", error=type(error).__name__)
    finally:
        client.close()
    return aborted
