"""The main job and its control, from nothing to a distilled model, over HTTP: `make demo`.

Gets a model, starts the service, uploads samples, posts a job and another that trains for as many steps without the
curriculum, follows them, downloads the student, checks it against its manifest, and prints the scores on held-out
samples, answers of the teacher and of the student as it started and as it ended, and what the curriculum brought. Exit
code 0 means that the held-out scores rose by the thresholds of `demo_output.py`. It does not mean that the student's
answers are right.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo_output import check_gains, describe_comparison, print_answers, print_phases, print_scores
from prepare_model import HOME, NAME, ROOT, model_directory, prepare

from pocl_client import Client, ClientError
from pocl_client.cli.watching import watch_job
from pocl_client.models import Job
from worker.processes import spawn, terminate

SAMPLES = ROOT / "examples" / "dolly-short"
OUT = ROOT / "runs" / "demo"
SERVICE_LOG = ROOT / "runs" / "demo-service.log"
LABEL = "dolly-short"
QUESTIONS = ("What is the capital of Australia?", "What is the capital of France?")
"""The teacher answers both right, which a model of its size seldom does."""
STOP_SECONDS = 60
TERMINAL_STATES = {"succeeded", "failed", "cancelled"}

STUDENT_LAYERS = (*range(12), *range(18, 30))
"""Of the teacher's: six in the middle are left out, where a model misses its layers least."""

SPEC: dict[str, Any] = {
    "preset": "quick",
    "teacher": {"path": NAME},
    "student": {"from_teacher": {"layers": STUDENT_LAYERS}},
    "method": "forward_kl",
    "curriculum": {
        "stages": 3,
        "epochs_per_stage": 1,
        "temperature": {"start": 1.0, "end": 2.0},
        "ranking": {"max_new_tokens": 16},
    },
    "training": {"batch_size": 8, "learning_rate": 3e-4, "min_learning_rate": 5e-5},
    "evaluation": {"max_rows": 64, "max_new_tokens": 16, "batch_size": 32},
}


def main() -> int:
    signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        with timed("set-up"):
            prepare(model_directory())
        with service() as url:
            print(f"service   {url}", flush=True)
            with Client(url, read_key()) as client:
                # What a killed demo left in the queue would be run before this one.
                cancel_unfinished(client)
                try:
                    return distil(client, url)
                except KeyboardInterrupt:
                    cancel_unfinished(client)
                    raise
    except ClientError as error:
        print(f"refused: {error}")
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running")
    return 1


def distil(client: Client, url: str) -> int:
    started = time.monotonic()
    train, validation = (client.datasets.upload(SAMPLES / f"{name}.jsonl") for name in ("train", "validation"))
    data = {"train": {"dataset": train.id}, "validation": {"dataset": validation.id}}
    labels = {"example": LABEL}
    job = client.jobs.create({**SPEC, "data": data}, name="demo", labels=labels)
    print(f"job       {job.id}   ({job.progress.total_steps} steps in {job.progress.stages} stages)")
    print(f"watch it  {url}/ui/jobs/{job.id}   (log in with the key in {key_file()})", flush=True)
    job = watch_job(client, job.id)
    if job.status != "succeeded":
        return print_failure(job)
    # Of the teacher the first job has the scores.
    changes = {"evaluation": {**SPEC["evaluation"], "teacher": False}}
    curriculum = {**SPEC["curriculum"], "control": {"kind": "no_curriculum", "budget_of": job.id}}
    spec = {**SPEC, **changes, "curriculum": curriculum, "data": data}
    control = client.jobs.create(spec, name="demo-control", labels=labels)
    print(f"control   {control.id}   (as many steps on all samples at once)", flush=True)
    control = watch_job(client, control.id)
    if control.status != "succeeded":
        return print_failure(control)
    fetch_results(client, job.id, control.id)
    minutes = (time.monotonic() - started) / 60
    for each in (job, control):
        print_phases(list(client.jobs.events(each.id)))
    print(f"from submit to result: {minutes:.1f} minutes; report: {(OUT / 'report.html').relative_to(ROOT)}")
    result, of_control = client.jobs.result(job.id), client.jobs.result(control.id)
    print_scores(result["evaluations"], result["best_stage"], of_control["evaluations"])
    print_answers(result["answers"])
    print(f"\n{OUT.relative_to(ROOT)}/model, loaded by plain transformers:", flush=True)
    subprocess.run([sys.executable, ROOT / "examples" / "answer.py", OUT / "model", *QUESTIONS], check=True)
    name_best(client, job.id, result["best_stage"])
    print(describe_comparison(of_control["compared_with"]["differences"][0]))
    passed = check_gains(result["evaluations"])
    print(f"look at both: make serve, then http://127.0.0.1:8000/ui/compare?job={job.id}&job={control.id}")
    return passed


def key_file() -> Path:
    """Where the first start of the service wrote its key."""
    return HOME / "api-key"


def read_key() -> str:
    """The key of the service: `POCL_API_KEY`, else the one that its first start wrote."""
    return os.environ.get("POCL_API_KEY") or key_file().read_text().strip()


def print_failure(job: Job) -> int:
    """Say why a job did not succeed; the exit status."""
    reason = job.end_reason
    print(f"the job {job.status}" + (f": {reason.code}: {reason.message} {reason.hint}" if reason else ""))
    return 1


def cancel_unfinished(client: Client) -> None:
    for job in client.jobs.list(labels={"example": LABEL}):
        if job.status not in TERMINAL_STATES:
            client.jobs.cancel(job.id)


def fetch_results(client: Client, job_id: str, control_id: str) -> None:
    """Download the final checkpoint, and the reports of both jobs."""
    shutil.rmtree(OUT, ignore_errors=True)
    final = client.checkpoints.newest(job_id, "final")
    assert final is not None
    client.checkpoints.download(final.id, OUT / "model")
    client.jobs.download(job_id, "report", OUT / "report.html")
    client.jobs.download(control_id, "report", OUT / "control-report.html")
    print(f"downloaded {final.size_bytes / 1e6:.0f} MB, every file as its SHA-256 in the manifest says")


def name_best(client: Client, job_id: str, best_stage: int | None) -> None:
    """Say which checkpoint scored best: `final` holds the weights of the last stage, whatever they score."""
    if best_stage is None:
        return
    best = client.checkpoints.newest(job_id, "best")
    assert best is not None
    print(f"\nbest checkpoint: {best.id}, after stage {best_stage + 1}; the last stage is always `final`")


# --- The service ----------------------------------------------------------------------------------------


@contextmanager
def service() -> Iterator[str]:
    """The embedded set-up on a free port; everything that it starts is gone afterwards."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "worker", "serve", "--port", "0"]
    # In a session of its own, so that Ctrl-C reaches this process alone and it can stop things in order.
    with SERVICE_LOG.open("wb") as log:
        process = spawn(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            environment={**os.environ, "POCL_HOME": str(HOME)},
            directory=ROOT,
            death_signal=signal.SIGTERM,
        )
    try:
        yield _address(process)
    finally:
        terminate(process, STOP_SECONDS)


def _address(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        word, _, url = line.decode().strip().partition(" ")
        if word == "READY":
            return url
    raise ClientError(f"the service did not start: {SERVICE_LOG.read_text(errors='replace')[-500:]}")


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what:<9} {time.monotonic() - start:.0f} s", flush=True)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
