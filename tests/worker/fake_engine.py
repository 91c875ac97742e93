"""A fake engine that trains nothing, with the directory, events, signals and exit codes of the real one.

    fake_engine.py [options] SPEC --workdir DIR

It pins an entry of the cache, reports one step at a time, saves a training state every two steps, and continues from
the newest one. `--hold STEP` makes it wait at a step until the file `--gate` exists, so that a test can act at a known
moment.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from pocl.errors import DiskFull
from pocl.events import (
    ArtifactWritten,
    CheckpointSaved,
    Event,
    PhaseChanged,
    RunEnded,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    StepLogged,
    to_line,
)
from pocl.layout import (
    CHECKPOINTS_DIR,
    EVENTS_FILE,
    FINAL_DIR,
    PARTIAL_RANKING_FILE,
    RANKING_FILE,
    RANKING_INPUTS_FILE,
    RESULT_FILE,
    TRAINING_DIR,
    WEIGHTS_FILE,
    ExitCode,
    checkpoint_dir,
    checkpoints_in,
    step_of,
)
from pocl.storage.manifest import new_directory, read_manifest, write_manifest
from pocl.storage.shared_cache import SharedCache

STAGES, STEPS_PER_STAGE = 2, 5
STEPS = STAGES * STEPS_PER_STAGE


class Stopped(Exception):
    pass


class Engine:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.workdir: Path = options.workdir
        self.stopping = False
        (self.workdir / CHECKPOINTS_DIR).mkdir(exist_ok=True)
        self.out = (self.workdir / EVENTS_FILE).open("a", buffering=1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_sigterm else self.stop)
        self.pausing = False
        signal.signal(signal.SIGUSR1, self.pause)

    def stop(self, *_: object) -> None:
        self.stopping = True

    def pause(self, *_: object) -> None:
        self.pausing = True

    def emit(self, event: Event) -> None:
        self.out.write(to_line(event, datetime.now(UTC)) + "\n")

    def run(self) -> int:
        sys.stderr.write(f"workdir {self.workdir}, environment {json.dumps(sorted(os.environ))}\n")
        for name in self.options.echo:
            sys.stderr.write(f"{name}={os.environ.get(name)}\n")
        if self.options.run:
            exec(self.options.run, {"workdir": self.workdir})  # The code of a test.
        if self.options.child:
            subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        saved = checkpoints_in(self.workdir / CHECKPOINTS_DIR)
        start = step_of(saved[-1]) if saved else 0
        self.emit(RunStarted(resumed_from_step=start or None, total_steps=STEPS, stages=STAGES))
        if self.options.cache is not None:
            cache = SharedCache(self.options.cache, self.options.cache_bytes, self.options.keep_for)
            with cache.add("teacher", "t", size_bytes=0):
                pass
        self.emit(PhaseChanged(phase="ranking"))
        ranking, partial = self.workdir / RANKING_FILE, self.workdir / PARTIAL_RANKING_FILE
        if not ranking.exists():
            with partial.open("a") as out:
                out.write(f'{{"rank": 1, "by": {os.getpid()}}}\n')
            if self.options.hold_ranking:
                return self.stop_in_ranking()
            partial.rename(ranking)
            (self.workdir / RANKING_INPUTS_FILE).write_text("{}\n")
        self.emit(ArtifactWritten(kind="ranking", path=RANKING_FILE))
        step = start
        try:
            for step in range(start + 1, STEPS + 1):
                self.step(step)
        except Stopped:
            self.save(step, "training")
            self.end("stopped", step)
            return ExitCode.STOPPED
        except DiskFull as error:
            self.emit(
                RunEnded(
                    code=error.code,
                    message=error.message,
                    fault=error.fault,
                    retryable=error.retryable,
                    hint=error.hint,
                    step=step,
                )
            )
            return ExitCode.FAILED
        return self.finish()

    def stop_in_ranking(self) -> int:
        while not self.stopping:
            time.sleep(0.01)
        self.end("stopped", 0)
        return ExitCode.STOPPED

    def step(self, step: int) -> None:
        stage = (step - 1) // STEPS_PER_STAGE
        if (step - 1) % STEPS_PER_STAGE == 0:
            self.emit(StageStarted(stage=stage, samples=1, temperature=1, kd_weight=1, steps=5, first_step=step - 1))
        self.emit(
            StepLogged(
                step=step,
                total_steps=STEPS,
                stage=stage,
                loss=1 / step,
                cross_entropy=1,
                divergence=1,
                learning_rate=1,
                grad_norm=1,
                temperature=1,
                kd_weight=1,
                tokens=1,
                tokens_seen=step,
                tokens_per_second=1,
                eta_seconds=1,
            )
        )
        if step % 2 == 0:
            self.save(step, "training")
        self.apply_options(step)
        if step % STEPS_PER_STAGE == 0:
            self.save(step, "stage")
            self.emit(StageFinished(stage=stage, step=step, epochs=1))
            if self.pausing and step < STEPS:
                raise Stopped

    def apply_options(self, step: int) -> None:
        """Fail, die or wait where the options say so for this step."""
        options = self.options
        if step == options.fail:
            raise SystemExit(self.end(options.code, step))
        if step == options.die:
            os.kill(os.getpid(), options.signal)
        while step == options.hold and not options.gate.exists() and not self.stopping:
            time.sleep(0.01)
        while step == options.hold_until_pause and not self.pausing and not self.stopping:
            time.sleep(0.01)
        if self.stopping:
            raise Stopped

    def save(self, step: int, kind: str) -> None:
        target = self.workdir / checkpoint_dir(step)
        if not target.exists():
            with new_directory(target) as scratch:
                (scratch / WEIGHTS_FILE).write_bytes(b"weights of step %d" % step)
                (scratch / TRAINING_DIR).mkdir()
                (scratch / TRAINING_DIR / "state.json").write_text(json.dumps({"step": step}))
                write_manifest(scratch / TRAINING_DIR)
        self.emit_checkpoint(kind, target, step, (step - 1) // STEPS_PER_STAGE)

    def emit_checkpoint(self, kind: str, target: Path, step: int, stage: int = 0) -> None:
        path = target.relative_to(self.workdir).as_posix()
        size = read_manifest(target).size_bytes
        self.emit(
            CheckpointSaved.model_validate(
                {"kind": kind, "path": path, "step": step, "stage": stage, "size_bytes": size}
            )
        )

    def finish(self) -> int:
        with new_directory(self.workdir / FINAL_DIR) as scratch:
            (scratch / WEIGHTS_FILE).write_bytes(b"weights of the student")
        if not self.options.no_student:
            self.emit_checkpoint("final", self.workdir / FINAL_DIR, STEPS)
        (self.workdir / RESULT_FILE).write_text('{"steps": 10}')
        self.emit(ArtifactWritten(kind="result", path=RESULT_FILE))
        self.emit(RunFinished(step=STEPS))
        return ExitCode.DONE

    def end(self, code: str, step: int) -> int:
        options = self.options
        self.emit(
            RunEnded(
                code=code,
                message="It ended.",
                fault=options.fault,
                retryable=options.retryable,
                hint="Read this.",
                step=step,
            )
        )
        return ExitCode.FAILED


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--cache-bytes", type=int)
    parser.add_argument("--keep-for")
    parser.add_argument("--posted-spec")
    parser.add_argument("--hub-cache-bytes", type=int)
    parser.add_argument("--hub-allow", action="append")
    parser.add_argument("--echo", metavar="VARIABLE", action="append", default=[], help="log a variable's value")
    parser.add_argument("--run", metavar="CODE", help="Python code that is run first")
    parser.add_argument("--hold", type=int, default=0)
    parser.add_argument("--hold-until-pause", type=int, default=0)
    parser.add_argument("--hold-ranking", action="store_true", help="rank one sample and wait to be stopped")
    parser.add_argument("--gate", type=Path, default=Path("/nonexistent"))
    parser.add_argument("--fail", type=int, default=0)
    parser.add_argument("--code", default="loss_diverged")
    parser.add_argument("--fault", default="user", help="whose fault it is when it fails")
    parser.add_argument("--retryable", action="store_true", help="say that another attempt may end otherwise")
    parser.add_argument("--die", type=int, default=0)
    parser.add_argument("--signal", type=int, default=9)
    parser.add_argument("--ignore-sigterm", action="store_true", help="run on after SIGTERM")
    parser.add_argument("--child", action="store_true", help="start a child process that never exits")
    parser.add_argument("--no-student", action="store_true", help="do not report the finished student")
    options = parser.parse_args()
    json.loads(options.spec.read_text())
    return Engine(options).run()


if __name__ == "__main__":
    sys.exit(main())
