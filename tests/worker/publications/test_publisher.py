"""The law of publications, by the real client of the Hub against a real server.

A job that succeeds with `export.hub` ends with exactly the files of its student in the repository, by one commit,
whatever breaks in between.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
import structlog

from domain.jobs.models import Job
from domain.jobs.publication_feed import retry_publication
from domain.process_stat import PARENT, read_stat
from tests.support.harness import PROJECT
from tests.support.hub_server import TOKEN, Fault, HubServer
from tests.support.rows import dump_tables
from tests.worker.publications.conftest import FILES, REPO, PublishedJobs
from worker.publications.process import PushProcess
from worker.publications.push import CannotPush, Push, Pushed

pytestmark = pytest.mark.system

UPLOAD, COMMIT = "/objects/", "/commit/"


@pytest.fixture
def sqlite_jobs(published_jobs: Callable[..., PublishedJobs], sqlite_template: Path, tmp_path: Path) -> PublishedJobs:
    # What is pushed is the same on both databases.
    shutil.copyfile(sqlite_template, tmp_path / "test.db")
    return published_jobs(f"sqlite:///{tmp_path / 'test.db'}")


def test_the_student_is_pushed_once_by_the_real_client(published: PublishedJobs, hub: HubServer) -> None:
    job_id = published.succeed()
    row = published.turn(published.publisher())
    published.assert_pushed_once()
    assert hub.repositories[REPO].private
    assert (row.url, row.attempts) == (f"{hub.endpoint}/{REPO}", 1)
    event = published.harness.events(job_id, "published")[0]
    assert event.data == {
        "repo": REPO,
        "branch": "main",
        "checkpoint": row.checkpoint_id,
        "url": row.url,
        "commit": row.commit,
    }
    assert event.in_outbox
    assert not published.publishers[0].turn()


BREAKS: dict[str, tuple[Fault, str]] = {
    "away": (Fault("POST", "/repos/create"), "hub_unreachable"),
    "503 at the commit": (Fault("POST", COMMIT, status=503), "hub_busy"),
    "503 at an upload": (Fault("PUT", UPLOAD, status=503), "hub_busy"),
    "429": (Fault("POST", "/preupload/", status=429, headers={"retry-after": "1200"}), "hub_busy"),
    "429 of the Hub": (Fault("POST", COMMIT, status=429, headers={"ratelimit": '"api";r=0;t=1300'}), "hub_busy"),
    "an address that is good no more": (Fault("PUT", UPLOAD, status=403), "hub_storage_refused"),
    "cut in an upload": (Fault("PUT", UPLOAD, after_bytes=1000), "hub_unreachable"),
    "cut before the commit": (Fault("POST", COMMIT), "hub_unreachable"),
    "cut after the commit": (Fault("POST", COMMIT, is_done_first=True), "hub_unreachable"),
    "cut after the creation": (Fault("POST", "/repos/create", is_done_first=True), "hub_unreachable"),
    "another commit": (Fault("POST", COMMIT, status=412), "branch_changed"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_push_that_breaks_is_done_by_the_next_attempt(sqlite_jobs: PublishedJobs, hub: HubServer, name: str) -> None:
    fault, code = BREAKS[name]
    hub.faults.append(fault)
    job_id = sqlite_jobs.succeed()
    publisher = sqlite_jobs.publisher()
    row = sqlite_jobs.turn(publisher)
    assert (row.state, row.error and row.error["code"]) == ("pending", code)
    waits = (row.not_before - row.created_at).total_seconds()
    assert waits >= (1200 if name.startswith("429") else 10)
    sqlite_jobs.turn(publisher)
    sqlite_jobs.assert_pushed_once()
    assert sqlite_jobs.harness.job(job_id).status == "succeeded"


def test_what_was_uploaded_is_not_uploaded_again(sqlite_jobs: PublishedJobs, hub: HubServer) -> None:
    hub.faults.append(Fault("POST", COMMIT, status=503))
    sqlite_jobs.succeed()
    publisher = sqlite_jobs.publisher()
    sqlite_jobs.turn(publisher)
    assert hub.uploads() == 2
    sqlite_jobs.turn(publisher)
    assert hub.uploads() == 2
    sqlite_jobs.assert_pushed_once()


def test_large_files_go_in_parts(sqlite_jobs: PublishedJobs, hub: HubServer) -> None:
    hub.part_bytes = 500_000
    hub.faults.append(Fault("PUT", "/objects/.*/3$", after_bytes=1000))
    sqlite_jobs.succeed()
    publisher = sqlite_jobs.publisher()
    assert sqlite_jobs.turn(publisher).state == "pending"
    sqlite_jobs.turn(publisher)
    sqlite_jobs.assert_pushed_once()
    assert len(hub.parts) == 5


@pytest.mark.parametrize("path", [UPLOAD, COMMIT])
def test_a_process_that_is_killed_leaves_the_push_to_the_next(
    sqlite_jobs: PublishedJobs, hub: HubServer, path: str
) -> None:
    def kill_client() -> None:
        for process in pushing_processes():
            os.kill(process, signal.SIGKILL)

    hub.faults.append(Fault("PUT" if path == UPLOAD else "POST", path, call=kill_client))
    sqlite_jobs.succeed()
    publisher = sqlite_jobs.publisher()
    row = sqlite_jobs.turn(publisher)
    assert (row.state, row.error and row.error["code"]) == ("pending", "push_ended")
    sqlite_jobs.turn(publisher)
    sqlite_jobs.assert_pushed_once()


def test_a_scheduler_that_ends_leaves_the_push_to_another(sqlite_jobs: PublishedJobs, hub: HubServer) -> None:
    first, second = sqlite_jobs.publisher(), sqlite_jobs.publisher()
    arrived, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        arrived.set()
        goes_on.wait(100)

    hub.faults.append(Fault("PUT", UPLOAD, call=hold))
    sqlite_jobs.succeed()
    turn = threading.Thread(target=first.turn)
    turn.start()
    arrived.wait(100)
    assert not second.turn()  # The first one has the lease.
    first.close()
    turn.join(100)
    goes_on.set()
    row = sqlite_jobs.row()
    assert (row.state, row.attempts, row.error) == ("pending", 0, None)
    sqlite_jobs.turn(second)
    sqlite_jobs.assert_pushed_once()


def test_a_push_that_hangs_is_ended_and_tried_again(sqlite_jobs: PublishedJobs, hub: HubServer) -> None:
    goes_on = threading.Event()
    hub.faults.append(Fault("PUT", UPLOAD, call=lambda: goes_on.wait(100)))
    sqlite_jobs.succeed()
    clock = iter([0.0, 0.0, 0.0, *[1e6] * 1000])
    hanging = sqlite_jobs.publisher(sqlite_jobs.process(clock=lambda: next(clock)))
    row = sqlite_jobs.turn(hanging)
    goes_on.set()
    assert row.error is not None
    assert row.error["code"] == "push_timed_out"
    hub.faults.clear()
    sqlite_jobs.turn(sqlite_jobs.publisher())
    sqlite_jobs.assert_pushed_once()


def test_the_branch_loses_what_the_student_does_not_have(sqlite_jobs: PublishedJobs, hub: HubServer) -> None:
    hub.create(REPO, files={"adapter_config.json": b"{}", "old/pytorch_model.bin": b"x", "config.json": b"{}"})
    sqlite_jobs.succeed()
    sqlite_jobs.turn(sqlite_jobs.publisher())
    sqlite_jobs.assert_pushed_once()


def test_a_branch_of_its_own_is_made_and_main_stays(sqlite_jobs: PublishedJobs, hub: HubServer) -> None:
    hub.create(REPO)
    sqlite_jobs.succeed(branch="kd/v1")
    row = sqlite_jobs.turn(sqlite_jobs.publisher())
    sqlite_jobs.assert_pushed_once("kd/v1")
    assert hub.repositories[REPO].commits_after_creation() == 0
    assert row.url == f"{hub.endpoint}/{REPO}/tree/kd/v1"


def test_files_that_the_branch_ignores_come_with_the_next_attempt(sqlite_jobs: PublishedJobs, hub: HubServer) -> None:
    hub.create(REPO, files={".gitignore": b"config.json\n"})
    sqlite_jobs.succeed()
    publisher = sqlite_jobs.publisher()
    row = sqlite_jobs.turn(publisher)
    assert (row.state, row.error and row.error["code"]) == ("pending", "hub_lacks_files")
    sqlite_jobs.turn(publisher)
    assert sqlite_jobs.row().state == "published"
    assert hub.repositories[REPO].files() == sqlite_jobs.expected()


def test_what_no_attempt_can_change_ends_the_publication_and_not_the_job(
    sqlite_jobs: PublishedJobs, hub: HubServer
) -> None:
    job_id = sqlite_jobs.succeed()
    final = {
        "hub_token_refused": sqlite_jobs.publisher(sqlite_jobs.process(token="hf_another-token")),
        "hub_write_refused": sqlite_jobs.publisher(),
        "hub_repository_is_public": sqlite_jobs.publisher(),
        "hub_owner_not_allowed": sqlite_jobs.publisher(owners=("other",)),
    }
    for code, publisher in final.items():
        hub.owners = set() if code == "hub_write_refused" else {"acme"}
        hub.repositories.clear()
        if code == "hub_repository_is_public":
            hub.create(REPO, private=False)
        row = sqlite_jobs.turn(publisher)
        assert (row.state, row.error and row.error["code"]) == ("failed", code)
        event = sqlite_jobs.harness.events(job_id)[-1]
        assert (event.type, event.data["error"]["code"]) == ("publication_failed", code)
        again(sqlite_jobs, job_id)
    assert all(repository.commits_after_creation() == 0 for repository in hub.repositories.values())
    assert sqlite_jobs.harness.job(job_id).status == "succeeded"


def again(jobs: PublishedJobs, job_id: str) -> None:
    """Ask for another try."""
    with jobs.harness.database.transaction(write=True) as session:
        assert retry_publication(session, PROJECT, job_id).changed


def test_damaged_files_are_not_pushed(sqlite_jobs: PublishedJobs, hub: HubServer) -> None:
    sqlite_jobs.succeed()
    stored = sqlite_jobs.harness.store.locate(str(sqlite_jobs.row().store_key), "config.json")
    content = stored.read_bytes()
    stored.unlink()  # It may share its blocks with the source.
    stored.write_bytes(content[:-1] + b" ")
    row = sqlite_jobs.turn(sqlite_jobs.publisher())
    assert (row.state, row.error and row.error["code"]) == ("failed", "checkpoint_damaged")
    assert hub.repositories == {}


def test_the_token_is_nowhere_but_in_its_header(
    sqlite_jobs: PublishedJobs, hub: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.faults += [Fault("PUT", UPLOAD, status=503), Fault("POST", COMMIT, status=400)]
    environments: list[str] = []

    def look() -> None:
        environments.extend(process_text(process) for process in pushing_processes())

    hub.faults.append(Fault("POST", "/preupload/", status=503, call=look))
    sqlite_jobs.succeed()
    publisher = sqlite_jobs.publisher()
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            sqlite_jobs.turn(publisher)
    assert sqlite_jobs.row().state == "failed"
    assert len(logs) >= 3
    output = "".join(capfd.readouterr())
    assert len(environments) == 1
    for text in (repr(logs), repr(dump_tables(sqlite_jobs.harness.database)), output, *environments):
        assert TOKEN not in text
        assert "a-signature" not in text
    assert {header for path, header in hub.authorizations if "/objects/" in path and "info" not in path} == {None}


def pushing_processes() -> list[int]:
    """The ids of this process's children that push."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            is_ours = read_stat(entry.name, PARENT) == os.getpid()
            if is_ours and b"worker.publications" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def process_text(process: int) -> str:
    """What another process of this user sees of one."""
    text = Path(f"/proc/{process}/cmdline").read_bytes()
    with suppress(PermissionError):
        text += Path(f"/proc/{process}/environ").read_bytes()
    return text.decode(errors="replace")


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], token=sys.argv[2])
torch.save(model.state_dict(), sys.argv[3])
"""


def test_the_repository_loads_with_from_pretrained(sqlite_jobs: PublishedJobs, hub: HubServer, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    student = LlamaForCausalLM(config)
    student.save_pretrained(tmp_path / "student")
    files = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    assert "model.safetensors" in files
    sqlite_jobs.succeed(files)
    sqlite_jobs.turn(sqlite_jobs.publisher())
    sqlite_jobs.assert_pushed_once()
    environ = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    loaded = tmp_path / "loaded.pt"
    subprocess.run([sys.executable, "-c", LOAD, REPO, TOKEN, loaded], env=environ, check=True, capture_output=True)
    weights = torch.load(loaded)
    assert weights.keys() == student.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in student.state_dict().items())


def test_files_of_a_bucket_are_fetched_pushed_and_removed(
    published_jobs: Callable[..., PublishedJobs], sqlite_template: Path, tmp_path: Path, bucket_address: str
) -> None:
    shutil.copyfile(sqlite_template, tmp_path / "test.db")
    jobs = published_jobs(f"sqlite:///{tmp_path / 'test.db'}", artifact_store=bucket_address)
    jobs.succeed()
    publisher = jobs.publisher()
    assert publisher.scratch is not None
    jobs.turn(publisher)
    jobs.assert_pushed_once()
    assert list(publisher.scratch.path.iterdir()) == []


class FakePush(PushProcess):
    """A process that says what it is told to."""

    def __init__(self, *answers: Pushed | CannotPush) -> None:
        super().__init__("a-token", timeout_seconds=1, environ={})
        self.answers = list(answers)
        self.pushes: list[Push] = []

    def push(self, request: Push, is_broken_off: Callable[[], bool] = lambda: False) -> Pushed:
        assert not is_broken_off()
        self.pushes.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, CannotPush):
            raise answer
        return answer


def test_waits_grow_are_bounded_and_heed_the_hub(published: PublishedJobs) -> None:
    busy = CannotPush("hub_busy", "The Hub answered 503.")
    patient = CannotPush("hub_busy", "The Hub answered 429.", retry_after=1e9)
    published.succeed()
    publisher = published.publisher(FakePush(*[busy] * 12, patient))
    waits = []
    for _ in range(13):
        row = published.turn(publisher)
        with published.harness.database.transaction(write=False) as session:
            now = session.scalars(sa.select(sa.func.max(Job.updated_at))).one()
        waits.append(round((row.not_before - now).total_seconds()))
    assert waits[:4] == [15, 30, 60, 120]
    assert waits[11] == 1800
    assert waits[12] == 4 * 3600
    assert row.attempts == 13


def test_the_files_are_those_of_the_checkpoint(published: PublishedJobs) -> None:
    job_id = published.succeed()
    process = FakePush(Pushed("0" * 40, "https://hub.example/acme/student"))
    published.turn(published.publisher(process))
    (push,) = process.pushes
    assert {file.path for file in push.files} == {*FILES, "manifest.json"}
    assert (push.repo, push.branch, push.private, push.title) == (REPO, "main", True, f"Student of {job_id}")
