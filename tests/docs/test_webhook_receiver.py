"""The receiver in docs/webhooks.md verifies what the service sends, and the page names all there is."""

import json
import re
import threading
from dataclasses import replace
from http.server import HTTPServer
from typing import Any, get_args

import pytest

from api.webhooks.messages import example_of
from api.webhooks.schemas import WebhookCreate
from domain.webhooks.deliveries import DueMessage
from domain.webhooks.event_types import WebhookEventType
from domain.webhooks.models import DeliveryError
from domain.webhooks.signing import new_secret
from tests.support.compose_file import ROOT
from worker.webhooks.sender import WebhookSender

PAGE = (ROOT / "docs" / "webhooks.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_receiver_takes_signed_messages_once_and_refuses_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = new_secret()
    monkeypatch.setenv("WEBHOOK_SECRET", secret)
    names: dict[str, Any] = {"__name__": "receiver"}
    exec(compile(blocks("python")[0], "receiver.py", "exec"), names)
    names["Receiver"].log_message = lambda *_: None
    server = HTTPServer(("127.0.0.1", 0), names["Receiver"])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        body = json.dumps(example_of(WebhookEventType.SUCCEEDED))
        message = DueMessage("msg_1", "job.succeeded", body, url, (secret,))
        send = WebhookSender(frozenset({"127.0.0.1"}), "test").send
        assert [send(message).status_code for _ in range(2)] == [204, 204]
        assert send(replace(message, secrets=(new_secret(), secret))).status_code == 204
        assert send(replace(message, id="msg_2", secrets=(new_secret(),))).status_code == 400
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert capsys.readouterr().out.count("job.succeeded") == 1


def test_page_shows_a_request_and_a_message_as_they_are_sent() -> None:
    request, message = blocks("json")
    assert WebhookCreate.model_validate_json(request).url.startswith("https://")
    assert json.loads(message) == example_of(WebhookEventType.STAGE_COMPLETED)


def test_page_names_every_type_and_every_error() -> None:
    assert [each for each in (*WebhookEventType, *get_args(DeliveryError)) if f"`{each}`" not in PAGE] == []
