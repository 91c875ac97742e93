"""The main job, from nothing to a distilled model, over HTTP: `make demo`.

Gets a model, starts the service, uploads rows, posts a job, follows it, downloads the checkpoint, checks it against
its manifest, loads it in a fresh process, and prints what the student learned. Exit code 0 means that it did learn:
the thresholds are at the end.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from client import ENDED, Client, Refused
from prepare_model import prepare

from worker.processes import spawn, terminate

ROOT = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("POCL_HOME", ROOT / ".pocl")).resolve()
MODEL = "smollm2-135m-instruct"
ROWS = ROOT / "examples" / "dolly-short"
OUT = ROOT / "runs" / "demo"
SERVICE_LOG = ROOT / "runs" / "demo-service.log"
LABEL = "dolly-short"
QUESTIONS = ("What is the capital of Australia?", "Name a fruit that is yellow.")
STOP_SECONDS = 60
NAMES = {"teacher": "teacher", "initial": "untrained student", "final": "final student"}

MIN_CE_GAIN = 0.5
"""Nats by which held-out cross-entropy must fall."""
MIN_ROUGE_GAIN = 3.0
"""Points by which held-out ROUGE-L must rise."""
MIN_ROWS = 64

SPEC: dict[str, Any] = {
    "preset": "quick",
    "teacher": {"path": MODEL},
    # Layers 6 to 19 are left out: of the contiguous blocks of 14 layers, this one raised the cross-entropy on
    # selection.jsonl least.
    "student": {"from_teacher": {"layers": [*range(6), *range(20, 30)]}},
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
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with timed("set-up"):
            prepare(HOME / "models" / MODEL)
        with service() as url:
            print(f"service   {url}", flush=True)
            client = Client(url)
            # What a killed demo left in the queue would be run before this one.
            cancel_unfinished(client)
            try:
                return distil(client)
            except KeyboardInterrupt:
                cancel_unfinished(client)
                raise
    except Refused as error:
        print(f"refused: {error}")
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running")
    return 1


def distil(client: Client) -> int:
    started = time.monotonic()
    train, validation = (client.upload(ROWS / f"{name}.jsonl") for name in ("train", "validation"))
    spec = {**SPEC, "data": {"train": {"dataset": train}, "validation": {"dataset": validation}}}
    job = client.submit(spec, name="demo", labels={"example": LABEL})
    print(f"job       {job['id']}   ({job['progress']['total_steps']} steps in {job['progress']['stages']} stages)")
    job = follow(client, job["id"])
    if job["status"] != "succeeded":
        reason = job["end_reason"] or {}
        print(f"the job {job['status']}: {reason.get('code')}: {reason.get('message')} {reason.get('hint')}")
        return 1
    distilled = fetch(client, job["id"])
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nanswers of the distilled model, loaded from {distilled.relative_to(ROOT)} in a fresh process:", flush=True
    )
    subprocess.run([sys.executable, ROOT / "examples" / "answer.py", distilled, *QUESTIONS], check=True)
    print_phases(client, job["id"])
    print(f"from submit to result: {minutes:.1f} minutes; report: {(OUT / 'report.html').relative_to(ROOT)}")
    return verdict(client.get(f"/v1/jobs/{job['id']}/result")["evaluations"])


def follow(client: Client, job_id: str) -> dict[str, Any]:
    """Poll until the job ends, on one line that is written over."""
    told = ""
    while True:
        job = client.get(f"/v1/jobs/{job_id}")
        line = progress_line(job)
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{line}", end="", flush=True)
        elif line != told:
            print(line, flush=True)
        told = line
        if job["status"] in ENDED:
            print()
            return job
        time.sleep(1)


def cancel_unfinished(client: Client) -> None:
    for job in client.pages("/v1/jobs", label=f"example={LABEL}"):
        if job["status"] not in ENDED:
            client.cancel(job["id"])


def fetch(client: Client, job_id: str) -> Path:
    """Download the final checkpoint and the report."""
    shutil.rmtree(OUT, ignore_errors=True)
    (final,) = [each for each in client.pages(f"/v1/jobs/{job_id}/checkpoints") if each["kind"] == "final"]
    directory = client.checkpoint(final["id"], OUT / "model")
    client.file(f"/v1/jobs/{job_id}/report", OUT / "report.html")
    print(f"downloaded {final['size_bytes'] / 1e6:.0f} MB, every file as its SHA-256 in the manifest says")
    return directory


# --- What is printed ------------------------------------------------------------------------------------


def progress_line(job: dict[str, Any]) -> str:
    phase, progress = job["phase"], job["progress"]
    if job["status"] in ENDED or phase is None:
        return str(job["status"])
    if phase["name"] != "training":
        done = f" {phase['done']}/{phase['total']} {phase['unit']}" if phase["total"] else ""
        return f"{phase['name']}{done}"
    metrics = job["latest"]
    parts = [
        f"{progress['percent']:3.0f} %",
        f"step {progress['step']}/{progress['total_steps']}",
        f"stage {(progress['stage'] or 0) + 1}/{progress['stages']}",
    ]
    if metrics:
        parts += [f"temperature {metrics['temperature']:.2f}", f"loss {metrics['loss']:.3f}"]
    if progress["tokens_per_second"]:
        parts.append(f"{progress['tokens_per_second']:.0f} tokens/s")
    if job["eta"]:
        parts.append(f"{job['eta']['seconds']:.0f} s left")
    return "  ".join(parts)


def print_phases(client: Client, job_id: str) -> None:
    """Where the time went."""
    seconds: dict[str, float] = {}
    phase, since = "queued", None
    for event in client.pages(f"/v1/jobs/{job_id}/events"):
        at = datetime.fromisoformat(event["at"])
        if since is not None:
            seconds[phase] = seconds.get(phase, 0) + (at - since).total_seconds()
        since = at
        if event["type"] == "phase":
            phase = event["data"]["phase"]
    print("time      " + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))


def verdict(evaluations: list[dict[str, Any]]) -> int:
    """Print the table, and 0 if the student learned."""
    print(f"\n{'model':<20}{'ROUGE-L':>9}{'held-out CE':>13}")
    for each in evaluations:
        name = f"after stage {each['stage'] + 1}" if each["subject"] == "stage" else NAMES[each["subject"]]
        print(f"{name:<20}{each['rouge_l']:>9.2f}{each['cross_entropy']:>13.3f}")
    scores = {each["subject"]: each for each in evaluations}
    ce_gain = scores["initial"]["cross_entropy"] - scores["final"]["cross_entropy"]
    rouge_gain = scores["final"]["rouge_l"] - scores["initial"]["rouge_l"]
    rows = scores["final"]["rows"]
    learned = ce_gain >= MIN_CE_GAIN and rouge_gain >= MIN_ROUGE_GAIN and rows >= MIN_ROWS
    print(
        f"\n{rows} held-out rows, gains: CE {ce_gain:+.2f} nat (at least +{MIN_CE_GAIN} wanted), "
        f"ROUGE-L {rouge_gain:+.2f} points (at least +{MIN_ROUGE_GAIN} wanted): "
        + ("learned" if learned else "NOT learned")
    )
    return 0 if learned else 1


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
    raise Refused(f"the service did not start: {SERVICE_LOG.read_text(errors='replace')[-500:]}")


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what:<9} {time.monotonic() - start:.0f} s", flush=True)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
