"""`python -m pocl run SPEC --workdir DIR`: the engine from a shell. `python -m pocl export-gguf MODEL DIR`: a model as
GGUF.

Events go to standard output, one JSON object a line; what people read goes to standard error. Exit codes:
0 done, 75 stopped and saved (run the same command to continue), 1 failed, 2 the specification is wrong.
SIGTERM and SIGINT stop the run now, SIGUSR1 at the end of the stage.
"""

import pocl.search_path  # noqa: F401 # Before all imports that a file of the working directory could take.

# isort: split

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, assert_never

import yaml

from pocl.errors import FieldError, ModelNotFound, OutOfMemory, PoclError, RunStopped, SpecInvalid
from pocl.events import (
    CheckpointSaved,
    DataEncoded,
    Evaluated,
    Event,
    FileEvent,
    HistoryEvent,
    PhaseChanged,
    ProgressEvent,
    RunEnded,
    RunFinished,
    StageStarted,
    StepLogged,
    Warned,
    to_line,
)
from pocl.layout import ANSWERS_FILE, CACHE_DIR, COMPARED_DIR, RESULT_FILE, ExitCode
from pocl.reserved_stdout import reserve_stdout
from pocl.spec import GGUF_FORMATS, DistillationSpec, GgufFormat, resolve
from pocl.storage.shared_cache import SharedCache


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _run(options: argparse.Namespace) -> int:
    events = reserve_stdout()
    try:
        spec = read_spec(options.spec, options.set)
        posted_spec = spec if options.posted_spec is None else read_spec(options.posted_spec)
    except SpecInvalid as error:
        for field_error in error.field_errors:
            print(f"{options.spec}: {field_error.pointer or '/'}: {field_error.detail}", file=sys.stderr)
        return ExitCode.USAGE
    if options.compared_with is not None:
        try:
            _take_compared_run(options.compared_with, options.workdir)
        except OSError as error:
            print(f"--compared-with {options.compared_with}: {error.strerror}", file=sys.stderr)
            return ExitCode.USAGE
    stop, pause = _Flag(), _Flag()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop.set)
    signal.signal(signal.SIGUSR1, pause.set)
    # This must be set before torch is loaded. A waiting thread spins by default; where any other process wants a
    # core, that made products of two threads four times slower than those of one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch is loaded late, so that a wrong specification is refused at once.
    from pocl.models.hub import HubPolicy, hub_policy
    from pocl.run import DEFAULT_CACHE_BYTES, run

    size = DEFAULT_CACHE_BYTES if options.cache_bytes is None else options.cache_bytes
    cache = SharedCache(options.cache or options.workdir / CACHE_DIR, size, options.keep_for)

    def sink(event: Event) -> None:
        # The reader of the events may be gone; the run goes on, and its directory has them all.
        with contextlib.suppress(BrokenPipeError):
            print(to_line(event, datetime.now(UTC)), file=events, flush=True)
        _print_for_people(event)

    allowed = None if options.hub_allow is None else [pattern for pattern in options.hub_allow if pattern]
    policy = HubPolicy(allowed, options.hub_cache_bytes)
    try:
        with hub_policy(policy):
            run(spec, options.workdir, sink, stop.is_set, cache, pause.is_set, posted_spec)
    except RunStopped:
        return ExitCode.STOPPED
    except PoclError as error:
        # The cause is for the log; what callers should act on is the RunEnded event.
        if error.__cause__ is not None:
            sys.excepthook(type(error), error, error.__traceback__)
        return ExitCode.FAILED
    return ExitCode.DONE


def _take_compared_run(run: Path, workdir: Path) -> None:
    """Copy what a report shows of another run into the directory of this one.

    Raises:
        OSError: the run has not finished, or cannot be read.
    """
    directory = workdir / COMPARED_DIR
    directory.mkdir(parents=True, exist_ok=True)
    for name in (RESULT_FILE, ANSWERS_FILE):
        shutil.copyfile(run / name, directory / name)


def _export_gguf(options: argparse.Namespace) -> int:
    answer = reserve_stdout() if options.json else None
    if options.target.exists():
        print(f"{options.target} is there already: name a directory that is not", file=sys.stderr)
        return ExitCode.USAGE
    try:
        if not options.model.is_dir():
            raise ModelNotFound(f"There is no model directory {options.model.name!r}.")
        files, notes = _write_gguf(options.model, options.target, options.format or ["q8_0"])
    except PoclError as error:
        if answer is not None:
            refusal = {"code": error.code, "message": error.message, "fault": error.fault}
            print(json.dumps({"error": refusal}), file=answer, flush=True)
        print(f"{error.code}: {error.message}\n{error.hint}", file=sys.stderr)
        return ExitCode.USAGE if error.fault == "user" else ExitCode.FAILED
    if answer is not None:
        print(json.dumps({"files": files, "notes": notes}), file=answer, flush=True)
        return ExitCode.DONE
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for name in files:
        print(options.target / name)
    return ExitCode.DONE


def _write_gguf(model: Path, target: Path, formats: Sequence[GgufFormat]) -> tuple[Sequence[str], Sequence[str]]:
    """Make `target` the model of a directory as GGUF; the names of its files, and what differs from the model.

    Raises:
        PoclError: it cannot be written, or does not fit into memory or on the disk.
    """
    # They load torch.
    from pocl.export.gguf import GgufSource
    from pocl.out_of_memory import is_out_of_memory
    from pocl.storage.manifest import new_directory

    try:
        source = GgufSource.open(model)
        with new_directory(target) as scratch:
            written = source.write(scratch, formats)
    except PoclError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory("The largest weight of the model does not fit into memory.") from error
        raise
    return written.files, written.notes


def read_spec(path: Path, settings: Sequence[str] = ()) -> DistillationSpec:
    """Read a YAML or JSON file, apply `a.b=value` settings and resolve it.

    Raises:
        SpecInvalid: for an unreadable file as for a wrong field.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecInvalid(
            [_field_error("unreadable", f"cannot be read as YAML or JSON ({type(error).__name__})")]
        ) from error
    if not isinstance(raw, dict):
        raise SpecInvalid([_field_error("not_an_object", "must hold one object")])
    for setting in settings:
        _override(raw, setting)
    return resolve(raw)


class _Flag:
    """A flag that a signal handler sets; unlike a `threading.Event` it takes no lock."""

    def __init__(self) -> None:
        self._set = False

    def set(self, *_: object) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pocl", description="Distil a language model in stages.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="start a run, or continue what the directory holds")
    run.set_defaults(command=_run)
    run.add_argument("spec", type=Path, help="YAML or JSON file with the specification")
    run.add_argument("--workdir", type=Path, required=True, help="directory of the run")
    run.add_argument(
        "--cache",
        type=Path,
        help="cache that runs share (default: WORKDIR/cache)",
    )
    run.add_argument("--cache-bytes", type=int, help="size of the cache; the least recently used entries are evicted")
    run.add_argument(
        "--keep-for",
        type=_job_name,
        metavar="JOB",
        help="pin the cache entries in use until JOB has ended",
    )
    run.add_argument(
        "--hub-allow",
        action="append",
        metavar="PATTERN",
        help="read only repositories of the Hub that match, such as 'acme/*'; may be given again; '' allows none",
    )
    run.add_argument(
        "--hub-cache-bytes",
        type=int,
        help="size of the cache of the Hub; the least recently used revisions are evicted (default: no bound)",
    )
    run.add_argument(
        "--compared-with",
        type=Path,
        metavar="DIR",
        help="directory of a finished run, beside which the report of its control shows its own scores",
    )
    run.add_argument(
        "--posted-spec",
        type=Path,
        metavar="FILE",
        help="the specification before its names became paths of this machine (default: SPEC)",
    )
    run.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override a field; the value is read as YAML"
    )
    gguf = commands.add_parser("export-gguf", help="write a model directory as GGUF files with an Ollama Modelfile")
    gguf.set_defaults(command=_export_gguf)
    gguf.add_argument("model", type=Path, help="directory that from_pretrained loads, such as `final` of a run")
    gguf.add_argument("target", type=Path, help="directory to make")
    gguf.add_argument(
        "--format",
        action="append",
        choices=GGUF_FORMATS,
        help="of the matrices; may be given again (default: q8_0)",
    )
    gguf.add_argument("--json", action="store_true", help="say what was written, or why nothing was, as a JSON object")
    return parser


def _job_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise argparse.ArgumentTypeError("a job is named by letters, digits, _ and -")
    return name


def _override(raw: dict[str, Any], setting: str) -> None:
    """Set the field that a setting `A.B=VALUE` names."""
    dotted, separator, value = setting.partition("=")
    *parents, last = dotted.split(".")
    if not separator or not all((*parents, last)):
        raise SpecInvalid([_field_error("bad_setting", f"--set takes A.B=VALUE, not {setting!r}")])
    target = raw
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise SpecInvalid([_field_error("bad_setting", f"--set {dotted}: {parent} is not an object")])
        target = child
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecInvalid([_field_error("bad_setting", f"--set {dotted}: the value is not YAML")]) from error


def _field_error(code: str, detail: str) -> FieldError:
    return FieldError(pointer="", code=code, detail=detail)


def _print_for_people(event: Event) -> None:
    line = _line_for_people(event)
    if line is not None:
        print(line, file=sys.stderr, flush=True)


def _line_for_people(event: Event) -> str | None:
    match event:
        case PhaseChanged():
            return f"-- {event.phase}" + (f" (stage {event.stage + 1})" if event.stage is not None else "")
        case DataEncoded():
            counts = event.counts
            return f"{event.part}: {counts.rows} samples, {counts.tokens} tokens, {counts.rows_too_long} samples cut"
        case StageStarted():
            return (
                f"stage {event.stage + 1}: {event.samples} samples, temperature {event.temperature:.2f}, "
                f"KD weight {event.kd_weight:.2f}, {event.steps} steps"
            )
        case StepLogged():
            return (
                f"step {event.step}/{event.total_steps} loss {event.loss:.3f} CE {event.cross_entropy:.3f} "
                f"{event.tokens_per_second:.0f} tok/s, {event.eta_seconds:.0f} s left"
            )
        case Evaluated():
            scores = f"ROUGE-L {event.rouge_l:.2f}, CE {event.cross_entropy:.3f}"
            return f"{event.subject}: {scores} on {event.rows} {event.split} samples"
        case CheckpointSaved():
            return f"saved {event.path} ({event.size_bytes / 1e6:.0f} MB)"
        case Warned() | RunEnded():
            return f"{event.code}: {event.message}"
        case RunFinished():
            return f"done after {event.step} steps"
        case HistoryEvent() | ProgressEvent() | FileEvent():
            return None
        case _:
            assert_never(event)


if __name__ == "__main__":
    sys.exit(main())
