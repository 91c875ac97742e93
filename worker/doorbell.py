"""Empty messages that wake workers. One too many or too few never matters: a worker looks at the rows."""

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

RING = "pocl.ring"
_UNREACHABLE = (OperationalError, RedisError, OSError)


class BrokerUnreachable(Exception):
    """The broker does not answer; the scheduler tries again."""


class Doorbell:
    """Rings for workers, and counts the rings that no worker has taken yet."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._queue = str(app.conf.task_default_queue)

    def waiting(self) -> int:
        """Messages that no worker has taken.

        Raises:
            BrokerUnreachable: the broker does not answer.
        """
        try:
            with self._app.connection_for_write() as connection:
                # Declared, not only inspected: the queue does not exist until the first worker connects.
                declared = connection.default_channel.queue_declare(queue=self._queue)
                return int(declared.message_count)
        except _UNREACHABLE as error:
            raise BrokerUnreachable("The broker does not answer.") from error

    def ring(self) -> None:
        """Publish one message.

        Raises:
            BrokerUnreachable: it could not be published.
        """
        try:
            self._app.send_task(RING, queue=self._queue, retry=False, ignore_result=True)
        except _UNREACHABLE as error:
            raise BrokerUnreachable("The broker does not answer.") from error

    def ring_for(self, queued: int, *, limit: int) -> int:
        """Top the waiting messages up to one per queued job, `limit` at most; the number of messages added."""
        missing = min(queued, limit) - self.waiting() if queued else 0
        for _ in range(missing):
            self.ring()
        return max(missing, 0)
