"""The Celery application: a doorbell and nothing more. The database says what there is to do."""

from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from celery import Celery


def celery_app(redis_url: str, queue: str) -> Celery:
    """An application on a Redis or Valkey server.

    Args:
        redis_url: as :func:`broker_url` gives it.
        queue: the one queue that is used.
    """
    app = Celery("pocl", broker=_for_kombu(redis_url), set_as_current=False)
    app.conf.update(
        task_default_queue=queue,
        task_serializer="json",
        accept_content=["json"],
        # A result store would be one more thing to fail; outcomes are rows.
        task_ignore_result=True,
        # A message is done with as soon as it has woken the worker. Acknowledged late, a mere reset of the
        # connection would deliver it again while the job still runs.
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        # No message waits behind a running job while another worker is free.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        # Memory of one job never burdens the next.
        worker_max_tasks_per_child=1,
        # The scheduler rings again anyway; publishing never blocks for long.
        task_publish_retry=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # Cancel and pause go through the rows; remote control would leave keys of dead workers in the broker.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_transport_options={
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": not redis_url.startswith("unix:"),
        },
    )
    return app


def broker_url(redis_url: str, ca_file: Path | None = None) -> str:
    """The URL by which redis-py and Celery reach the broker alike: a server behind TLS is verified.

    Args:
        redis_url: as :mod:`domain.service_urls` has checked it.
        ca_file: the certificates of the authorities that are trusted; those of the system unless given here or in the
            URL (`ssl_ca_certs`).
    """
    parts = urlsplit(redis_url)
    if parts.scheme != "rediss":
        return redis_url
    options = dict(parse_qsl(parts.query))
    options.setdefault("ssl_cert_reqs", "required")
    options.setdefault("ssl_check_hostname", str(options["ssl_cert_reqs"] != "none").lower())
    if ca_file is not None:
        options.setdefault("ssl_ca_certs", str(ca_file))
    return urlunsplit(parts._replace(query=urlencode(options)))


def _for_kombu(redis_url: str) -> str:
    """The address as Kombu spells it, which takes every parameter of a `redis://` address for one of its own."""
    parts = urlsplit(redis_url)
    parameters = dict(parse_qsl(parts.query))
    is_socket = parts.scheme == "unix"
    database = parameters.pop("db", None) or ("" if is_socket else parts.path.strip("/")) or "0"
    if is_socket:
        return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={database}"
    return urlunsplit((parts.scheme, parts.netloc, f"/{database}", urlencode(parameters), ""))
