"""The outcome of a run, in a form in which two runs can be compared to the bit."""

import hashlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pocl.errors import CheckpointCorrupt
from pocl.export.model_card import CARD_FILE
from pocl.layout import BEST_DIR, CACHE_DIR, EVENTS_FILE, FINAL_DIR, RANKING_FILE, RESULT_FILE, WEIGHTS_FILE
from pocl.storage import manifest
from pocl.storage.shared_cache import HOLDERS
from pocl.teacher.shards import ShardRows

_TIMES = ("tokens_per_second", "eta_seconds", "eta_low_seconds", "eta_high_seconds")


@dataclass(frozen=True)
class RunOutcome:
    """What a run left in its directory, without times."""

    final: str
    """SHA-256 of the final weights."""
    best: str
    """SHA-256 of the weights of the best stage."""
    card: str
    """The model card of the final student."""
    ranking: str
    """SHA-256 of the ranking."""
    result: str
    """The content of `result.json`: stages, tokens seen, all scores."""
    steps: dict[int, dict[str, Any]]
    """The last event of each optimiser step, without its times."""
    cached: dict[str, str]
    """SHA-256 of what the shared cache has for other runs: of hidden states by sample, of other files by path."""
    best_event: dict[str, Any]
    """The last event that names the weights of the best stage."""

    @classmethod
    def read(cls, workdir: Path) -> "RunOutcome":
        """Read the outcome of a finished run."""
        events = read_events(workdir)
        steps = {event["step"]: event for event in events if event["type"] == "step"}
        best = [event for event in events if event["type"] == "checkpoint" and event["kind"] == "best"]
        return cls(
            final=manifest.sha256_of(workdir / FINAL_DIR / WEIGHTS_FILE),
            best=manifest.sha256_of(workdir / BEST_DIR / WEIGHTS_FILE),
            card=(workdir / FINAL_DIR / CARD_FILE).read_text(encoding="utf-8"),
            ranking=manifest.sha256_of(workdir / RANKING_FILE),
            result=(workdir / RESULT_FILE).read_text(encoding="utf-8"),
            steps={step: {k: v for k, v in event.items() if k not in _TIMES} for step, event in steps.items()},
            cached=_cached(workdir / CACHE_DIR),
            best_event=best[-1],
        )

    def differences(self, other: "RunOutcome") -> list[str]:
        """Names of the fields that are not equal."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]


def _cached(cache: Path) -> dict[str, str]:
    files = [path for path in cache.glob("*/*/*") if path.is_file() and path.parts[-3] != HOLDERS]
    shards = {path.parent for path in files if path.parts[-3].startswith("teacher-")}
    # An interruption may divide samples into other shards, and changes no bit of their states.
    states = {
        f"{shard.parent.name} {content}": hashlib.sha256(hidden.view(torch.uint8).numpy().tobytes()).hexdigest()
        for shard in shards
        if (rows := ShardRows.read(shard)) is not None
        for content, hidden in rows.map_states(shard)
    }
    others = [path for path in files if path.parent not in shards]
    return states | {path.relative_to(cache).as_posix(): manifest.sha256_of(path) for path in others}


def read_events(workdir: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The events in the complete lines of `events.jsonl` from a byte offset on."""
    path = workdir / EVENTS_FILE
    content = path.read_bytes()[offset:] if path.exists() else b""
    return [json.loads(line)["event"] for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def scratch_paths(workdir: Path) -> set[str]:
    """Half-written files and directories below `workdir`."""
    # Unlike a glob, a walk survives that a directory is removed meanwhile.
    return {name for _, directories, files in os.walk(workdir) for name in (*directories, *files) if _is_scratch(name)}


def manifest_errors(workdir: Path) -> list[str]:
    """One message for each directory below `workdir` whose files do not match its manifest."""
    errors = []
    for path in sorted(workdir.rglob(manifest.MANIFEST)):
        try:
            manifest.verify(path.parent)
        except CheckpointCorrupt as error:
            errors.append(str(error))
    return errors


def _is_scratch(name: str) -> bool:
    return name.startswith(manifest.SCRATCH_PREFIX)
