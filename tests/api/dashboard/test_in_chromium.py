"""The dashboard in a real browser: from an upload to a finished job, live and without a reload, and for everybody."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from api.app import create_app
from api.http_limits import ConnectionLimits
from domain.jobs.models import Job
from domain.jobs.states import JobStatus
from domain.local_key import make_local_key
from domain.settings import Settings
from domain.workers.models import Device
from domain.workers.repository import register_worker
from tests.api.dashboard import shown_jobs
from tests.support.harness import ServiceHarness
from tests.support.http_server import http_server
from tests.support.requests import jsonl

sync_api = pytest.importorskip("playwright.sync_api", reason="The browser is driven by the package `playwright`.")
pytestmark = [pytest.mark.system, pytest.mark.slow]

AXE = Path(__file__).with_name("axe.min.js")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
FIRST = (SCHEMES[0], WIDTHS[0])
PATIENCE_MILLISECONDS = 60_000


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("TEST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = find_chromium()
    if path is None:
        pytest.skip("There is no Chromium: install the package `chromium`, or name a binary in TEST_CHROMIUM.")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def harness(sqlite_template: Path, tmp_path: Path) -> Iterator[ServiceHarness]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copyfile(sqlite_template, home / "pocl.sqlite3")
    made = ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}")
    yield made
    made.close()


@contextmanager
def logged_in(chromium: Any, harness: ServiceHarness) -> Iterator[Any]:
    """A page of a browser that is logged in with the key of the first start; the service runs in this process."""
    settings = Settings(home=harness.home, database_url=harness.database_url, encoding_check_seconds=0)
    key = make_local_key(harness.home)
    with http_server(create_app(settings), ConnectionLimits(max_connections=64)) as server:
        context = chromium.new_context(
            base_url=f"http://127.0.0.1:{server.port}", viewport={"width": 1280, "height": 900}
        )
        context.set_default_timeout(PATIENCE_MILLISECONDS)
        page = context.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto("/")
        # By the keyboard alone.
        page.keyboard.press("Tab")
        page.locator("#key").focus()
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        page.wait_for_selector("header.top")
        yield page
        context.close()
        assert faults == []


def test_a_job_is_submitted_and_followed_to_its_end_without_a_reload(
    chromium: Any, harness: ServiceHarness, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with logged_in(chromium, harness) as page:
        page.get_by_role("link", name="Data sets").click()
        page.get_by_label("File").set_input_files(
            [{"name": "count.jsonl", "mimeType": "text/plain", "buffer": jsonl(8)}]
        )
        page.get_by_role("button", name="Upload").click()
        page.get_by_role("link", name="New job with it").click()
        page.locator("#field-name").fill("from the browser")
        for role, layers in (("teacher", "4"), ("student", "2")):
            page.locator("summary", has_text=role.capitalize()).click()
            page.locator(f"[name='/spec/{role}/random/layers']").fill(layers)
        page.locator("summary", has_text="Curriculum").click()
        stages = page.locator("[name='/spec/curriculum/stages']")
        stages.fill("0")
        stages.blur()
        page.wait_for_selector("[data-error-of='/spec/curriculum/stages']:not(:empty)")
        assert stages.get_attribute("aria-invalid") == "true"
        stages.fill("2")
        stages.blur()
        page.get_by_role("heading", name="Plan").wait_for()
        assert page.locator("#plan tbody tr").count() == 2
        page.get_by_role("button", name="Submit the job").click()
        page.locator(".badge-queued").wait_for()
        page.evaluate("window.sameDocument = true")
        worker = harness.supervisor("--hold", "6", "--gate", str(gate))
        thread = threading.Thread(target=worker.work_one)
        thread.start()
        try:
            page.locator(".badge-running").wait_for()
            page.locator("#job-stages .stage-running").wait_for()
        finally:
            gate.touch()
            thread.join()
        page.locator(".badge-succeeded").wait_for()
        page.locator("#job-checkpoints code", has_text="checkpoints download ckpt_").wait_for()
        assert page.evaluate("window.sameDocument") is True
        # Nothing is asked for any more.
        assert page.locator("#poller").get_attribute("hx-get") is None


def test_every_page_is_for_everybody(chromium: Any, harness: ServiceHarness, tmp_path: Path) -> None:
    finished, running, failed = harness.submit(), harness.submit(), harness.submit()
    shown_jobs.fill_job(harness.database, harness.store, tmp_path, finished, steps=100)
    shown_jobs.fill_job(harness.database, harness.store, tmp_path, running, steps=62)
    reason = {
        "code": "out_of_memory",
        "message": "Too little memory.",
        "hint": "",
        "fault": "capacity",
        "retryable": False,
    }
    with harness.database.transaction(write=True) as session:
        register_worker(session, "cpu-box-7", [Device("cpu", "cpu", 2**34)])
        changes = {"status": JobStatus.FAILED, "end_reason": reason}
        session.execute(sa.update(Job).where(Job.id == failed).values(**changes))
        (dataset,) = session.scalars(sa.select(Job.spec).where(Job.id == finished)).all()
    dataset_id = dataset["data"]["train"]["dataset"]
    paths = (
        "/",
        "/ui/queue",
        f"/ui/jobs/{finished}",
        f"/ui/jobs/{running}",
        f"/ui/jobs/{failed}",
        f"/ui/jobs/{finished}/events",
        f"/ui/jobs/{finished}/try",
        f"/ui/jobs/new?dataset={dataset_id}",
        "/ui/datasets",
        f"/ui/datasets/{dataset_id}",
        f"/ui/compare?job={finished}&job={running}",
        "/ui/settings",
    )
    found: list[str] = []
    with logged_in(chromium, harness) as page:
        for path in paths:
            page.goto(path)
            if page.locator("[data-chart]").count():
                page.locator("[data-chart='loss'] canvas, [data-chart='loss'].chart-empty").wait_for()
            # The fields of the form are alike, so some of its sections stand for all.
            for summary in page.locator("summary").all()[:3]:
                summary.click()
            page.evaluate(AXE.read_text())
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                for width in WIDTHS:
                    page.set_viewport_size({"width": width, "height": 900})
                    found += [
                        f"{path} {scheme} {width}: {each}"
                        for each in faults_of(page, is_first=(scheme, width) == FIRST)
                    ]
    assert found == []


def faults_of(page: Any, *, is_first: bool) -> list[str]:
    """What axe finds serious or worse, and whether the page is wider than the window."""
    # The others differ by colours and sizes alone.
    rules = {} if is_first else {"runOnly": ["color-contrast", "scrollable-region-focusable"]}
    result = page.evaluate("options => axe.run(document, options)", {"resultTypes": ["violations"], **rules})
    faults = [
        f"{each['id']} {json.dumps(each['nodes'][0]['html'][:200])}"
        for each in result["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    root = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    return [*faults, f"it is {root[0]} px wide"] if root[0] > root[1] else faults
