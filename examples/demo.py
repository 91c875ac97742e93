"""The main job, from nothing to a distilled model, over HTTP: `make demo`.

Gets a model, starts the service, uploads samples, posts a job, follows it, downloads the student, checks it against
its manifest, and prints the scores on held-out samples beside answers of the teacher, of the student as it started and
of the student as it ended. Exit code 0 means that the held-out scores rose by the thresholds below. It does not mean
that the student's answers are right.
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

from prepare_model import HOME, NAME, ROOT, model_directory, prepare

from pocl_client import Client, ClientError
from pocl_client.models import Job
from worker.processes import spawn, terminate

SAMPLES = ROOT / "examples" / "dolly-short"
OUT = ROOT / "runs" / "demo"
SERVICE_LOG = ROOT / "runs" / "demo-service.log"
LABEL = "dolly-short"
QUESTIONS = ("What is the capital of Australia?", "Name a fruit that is yellow.")
STOP_SECONDS = 60
TERMINAL_STATES = {"succeeded", "failed", "cancelled"}
SUBJECTS = {"teacher": "teacher", "initial": "untrained student", "final": "final student"}

MIN_CE_GAIN = 0.5
"""Nats by which held-out cross-entropy must fall."""
MIN_ROUGE_GAIN = 3.0
"""Points by which held-out ROUGE-L must rise."""
MIN_SAMPLES = 64

STUDENT_LAYERS = (*range(6), *range(20, 30))
"""Of the teacher's. Layers 6 to 19 are left out: of the contiguous blocks of 14 layers, this one raised the
cross-entropy on selection.jsonl least."""

SPEC: dict[str, Any] = {
    "preset": "quick",
    "teacher": {"path": NAME},
    "student": {"from_teacher": {"layers": STUDENT_LAYERS}},
    "method": "forward_kl",
    "curriculum": {
        "stages": 4,
        "epochs_per_stage": 1,
        "temperature": {"start": 1.0, "end": 2.0},
        "ranking": {"max_new_tokens": 16},
    },
    "training": {"batch_size": 8, "learning_rate": 5e-4, "min_learning_rate": 5e-5},
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
                    return distil(client)
                except KeyboardInterrupt:
                    cancel_unfinished(client)
                    raise
    except ClientError as error:
        print(f"refused: {error}")
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running")
    return 1


def distil(client: Client) -> int:
    started = time.monotonic()
    train, validation = (client.datasets.upload(SAMPLES / f"{name}.jsonl") for name in ("train", "validation"))
    spec = {**SPEC, "data": {"train": {"dataset": train.id}, "validation": {"dataset": validation.id}}}
    job = client.jobs.create(spec, name="demo", labels={"example": LABEL})
    print(f"job       {job.id}   ({job.progress.total_steps} steps in {job.progress.stages} stages)")
    job = follow(client, job.id)
    if job.status != "succeeded":
        reason = job.end_reason
        print(f"the job {job.status}" + (f": {reason.code}: {reason.message} {reason.hint}" if reason else ""))
        return 1
    fetch_student(client, job.id)
    minutes = (time.monotonic() - started) / 60
    print_phases(client, job.id)
    print(f"from submit to result: {minutes:.1f} minutes; report: {(OUT / 'report.html').relative_to(ROOT)}")
    result = client.jobs.result(job.id)
    print_scores(result["evaluations"], result["best_stage"])
    print_answers()
    name_best(client, job.id, result["best_stage"])
    return check_gains(result["evaluations"])


def read_key() -> str:
    """The key of the service: `POCL_API_KEY`, else the one that its first start wrote below `HOME`."""
    return os.environ.get("POCL_API_KEY") or (HOME / "api-key").read_text().strip()


def follow(client: Client, job_id: str) -> Job:
    """Wait until the job ends, and show on one line that is written over how far it is."""
    printed = ""

    def show(job: Job) -> None:
        nonlocal printed
        line = progress_line(job)
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{line}", end="", flush=True)
        elif line != printed:
            print(line, flush=True)
        printed = line

    job = client.jobs.wait(job_id, on_change=show)
    print()
    return job


def cancel_unfinished(client: Client) -> None:
    for job in client.jobs.list(labels={"example": LABEL}):
        if job.status not in TERMINAL_STATES:
            client.jobs.cancel(job.id)


def fetch_student(client: Client, job_id: str) -> None:
    """Download the final checkpoint and the report."""
    shutil.rmtree(OUT, ignore_errors=True)
    final = client.checkpoints.newest(job_id, "final")
    assert final is not None
    client.checkpoints.download(final.id, OUT / "model")
    client.jobs.download(job_id, "report", OUT / "report.html")
    print(f"downloaded {final.size_bytes / 1e6:.0f} MB, every file as its SHA-256 in the manifest says")


def cut_untrained_student(directory: Path) -> Path:
    """Write the student as it was before training: layers of the teacher, as the engine cuts them out."""
    # Imported late: torch takes seconds to load.
    import torch
    from transformers import logging

    from pocl.export.model_directory import save_model
    from pocl.models.loading import load_student, load_teacher
    from pocl.spec import LayersOfTeacher, ModelRef, StudentRef

    logging.disable_progress_bar()
    cpu = torch.device("cpu")
    teacher = load_teacher(ModelRef(path=str(model_directory())), device=cpu, dtype=torch.float32)
    student = load_student(StudentRef(from_teacher=LayersOfTeacher(layers=STUDENT_LAYERS)), teacher, device=cpu)
    save_model(student.model, student.tokenizer, directory)
    return directory


# --- What is printed ------------------------------------------------------------------------------------


def progress_line(job: Job) -> str:
    phase, progress = job.phase, job.progress
    if job.status in TERMINAL_STATES or phase is None:
        return job.status
    if phase.name != "training":
        done = f" {phase.done}/{phase.total} {phase.unit}" if phase.total else ""
        return f"{phase.name}{done}"
    parts = [
        f"{progress.percent:3.0f} %",
        f"step {progress.step}/{progress.total_steps}",
        f"stage {(progress.stage or 0) + 1}/{progress.stages}",
    ]
    if job.latest:
        parts += [f"temperature {job.latest['temperature']:.2f}", f"loss {job.latest['loss']:.3f}"]
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if job.eta:
        parts.append(f"{job.eta.seconds:.0f} s left")
    return "  ".join(parts)


def print_phases(client: Client, job_id: str) -> None:
    """Where the time went."""
    seconds: dict[str, float] = {}
    phase, since = "queued", None
    for event in client.jobs.events(job_id):
        if since is not None:
            seconds[phase] = seconds.get(phase, 0) + (event.at - since).total_seconds()
        since = event.at
        if event.type == "phase":
            phase = event.data["phase"]
    print("time      " + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))


def print_scores(evaluations: list[dict[str, Any]], best_stage: int | None) -> None:
    """The held-out scores of every model that was evaluated, with a mark at the best stage."""
    print(f"\n{'model':<20}{'ROUGE-L':>9}{'held-out CE':>13}")
    for scores in evaluations:
        is_stage = scores["subject"] == "stage"
        name = f"after stage {scores['stage'] + 1}" if is_stage else SUBJECTS[scores["subject"]]
        mark = "  best by ROUGE-L" if is_stage and scores["stage"] == best_stage else ""
        print(f"{name:<20}{scores['rouge_l']:>9.2f}{scores['cross_entropy']:>13.3f}{mark}")


def print_answers() -> None:
    """What three models answer, each loaded in a fresh process that knows nothing of this project."""
    models = {
        "teacher": model_directory(),
        "untrained student": cut_untrained_student(OUT / "untrained"),
        "final student": OUT / "model",
    }
    for name, directory in models.items():
        print(f"\nanswers of the {name}:", flush=True)
        subprocess.run([sys.executable, ROOT / "examples" / "answer.py", directory, *QUESTIONS], check=True)


def name_best(client: Client, job_id: str, best_stage: int | None) -> None:
    """Say which checkpoint scored best: `final` holds the weights of the last stage, whatever they score."""
    if best_stage is None:
        return
    best = client.checkpoints.newest(job_id, "best")
    assert best is not None
    print(f"\nbest checkpoint: {best.id}, after stage {best_stage + 1}; the last stage is always `final`")


def check_gains(evaluations: list[dict[str, Any]]) -> int:
    """Compare the student before and after training on the held-out samples; 0 if both gains reach their threshold."""
    scores = {each["subject"]: each for each in evaluations}
    before, after = scores["initial"], scores["final"]
    ce_gain = before["cross_entropy"] - after["cross_entropy"]
    rouge_gain = after["rouge_l"] - before["rouge_l"]
    samples = after["rows"]
    passed = ce_gain >= MIN_CE_GAIN and rouge_gain >= MIN_ROUGE_GAIN and samples >= MIN_SAMPLES
    print(
        f"untrained to final student on {samples} held-out samples: CE {-ce_gain:+.2f} nat (needed: -{MIN_CE_GAIN}), "
        f"ROUGE-L {rouge_gain:+.2f} points (needed: +{MIN_ROUGE_GAIN}): {'passed' if passed else 'FAILED'}"
    )
    print("This measures likeness to the held-out answers, and not whether an answer is right.")
    return 0 if passed else 1


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
