"""What an engine may read and write under Landlock, by processes that try."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from domain.jobs.states import JobStatus
from tests.support.harness import ServiceHarness
from worker.landlock import Landlock, landlock_version

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(landlock_version() < 2, reason="this kernel has no Landlock"),
]

# Prints what of the paths in its arguments it can read, append to, and make a file in.
TRIES = """
import json, os, sys
def tries(act, path):
    try:
        act(path)
        return True
    except PermissionError:
        return False
read = [p for p in sys.argv[1:] if os.path.isfile(p) and tries(lambda p: open(p).read(), p)]
write = [p for p in sys.argv[1:] if os.path.isfile(p) and tries(lambda p: open(p, "a").close(), p)]
make = [p for p in sys.argv[1:] if os.path.isdir(p) and tries(lambda p: open(p + "/new", "w").close(), p)]
print(json.dumps([read, write, make]))
"""


def test_hidden_files_are_not_read_and_others_not_written(tmp_path: Path) -> None:
    home, beside = tmp_path / "home", tmp_path / "beside"
    for directory in (home / "models", home / "work", beside):
        directory.mkdir(parents=True)
    database, model, own, other = home / "db.sqlite3", home / "models" / "m", home / "work" / "w", beside / "o"
    for file in (database, model, own, other):
        file.write_text("x")
    rules = Landlock(hidden=[home], readable=[home / "models"], writable=[home / "work", tmp_path / "missing"])
    paths = [str(path) for path in (database, model, own, other, home, home / "work", beside)]
    completed = subprocess.run(
        [sys.executable, "-c", TRIES, *paths],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=rules.restrict_self,
    )
    rules.close()
    read, write, make = json.loads(completed.stdout)
    assert read == [str(model), str(own), str(other)]
    assert write == [str(own)]
    assert make == [str(home / "work")]


def test_engine_cannot_read_the_home_of_the_service_its_secrets_nor_the_worker(
    harness: ServiceHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = harness.home / "secret"
    given = tmp_path / "given" / "metrics-token"
    beside = given.with_name("no-secret")
    given.parent.mkdir()
    job = harness.submit()
    for file in (secret, given, beside):
        file.write_text("a key")
    monkeypatch.setenv("POCL_METRICS_TOKEN_FILE", str(given))
    code = f"""
import os, sys
open({str(beside)!r}).read()
for path in ({str(secret)!r}, {str(given)!r}, f"/proc/{{os.getppid()}}/mem"):
    try:
        open(path, "rb").read(1)
        sys.stderr.write("was read\\n")
    except PermissionError:
        sys.stderr.write("was refused\\n")
(workdir / "moved").mkdir()
"""
    assert harness.supervisor("--run", code, sandbox="required").work_one() is JobStatus.SUCCEEDED
    tail = harness.log(job)
    assert tail.count("was refused") == 3
    assert "was read" not in tail
