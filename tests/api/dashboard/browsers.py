"""Browsers as the tests of the dashboard have them: what a browser sends, and what it would make of a page."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from starlette.testclient import TestClient

HEADERS = {"accept": "text/html", "sec-fetch-site": "same-origin"}
"""What a browser sends beside its cookie, from a page of the service itself."""
SCRIPT_HEADERS = {**HEADERS, "hx-request": "true"}
"""What a script of a page sends."""
VOID = {"meta", "link", "input", "br", "rect", "img", "option"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """The elements of a page."""

    content: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1].text += data

    def find(self, tag: str, **attributes: str) -> list[Element]:
        return [
            each
            for each in self.elements
            if each.tag == tag and all(each.attributes.get(name) == value for name, value in attributes.items())
        ]

    @property
    def form_token(self) -> str:
        return str(self.find("input", name="form_token")[0].attributes["value"])

    @property
    def addresses(self) -> list[str]:
        """What the page leads to, loads or asks for."""
        names = ("href", "src", "action", "hx-get", "hx-post", "data-curves")
        found = [each.attributes[name] for each in self.elements for name in names if each.attributes.get(name)]
        return [str(each) for each in found if not str(each).startswith("#")]


class Browser:
    """A browser with a cookie jar, which follows no redirect by itself."""

    def __init__(self, client: TestClient, prefix: str = "") -> None:
        self._client = client
        self._prefix = prefix
        self.cookies: dict[str, str] = {}

    def get(self, path: str, **headers: str) -> Any:
        return self._send("GET", path, headers)

    def poll(self, path: str) -> Any:
        """Ask as a script of a page does."""
        return self._send("GET", path, SCRIPT_HEADERS)

    def post(self, path: str, fields: dict[str, Any] | None = None, **headers: str) -> Any:
        return self._send("POST", path, headers, data=fields or {})

    def submit(self, path: str, fields: dict[str, Any] | None = None) -> Any:
        """Post a form of a page of this session."""
        return self.post(path, {"form_token": self.form_token, **(fields or {})})

    def log_in(self, key: str, **fields: str) -> Any:
        return self.post("/ui/login", {"key": key, **fields})

    @property
    def form_token(self) -> str:
        return Page(self.get("/ui/settings").text).form_token

    def _send(self, method: str, path: str, headers: dict[str, str], **content: Any) -> Any:
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        sent = {**HEADERS, **({"cookie": cookie} if cookie else {}), **headers}
        self._client.cookies.clear()
        response = self._client.request(
            method, f"{self._prefix}{path}", headers=sent, follow_redirects=False, **content
        )
        for header in response.headers.get_list("set-cookie"):
            name, _, value = header.partition(";")[0].partition("=")
            if value.strip('"'):
                self.cookies[name] = value
            else:
                self.cookies.pop(name, None)
        return response
