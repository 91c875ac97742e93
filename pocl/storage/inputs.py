"""What a run was given besides its specification: digests of samples, models and tokenizer, and commits on the Hub.

They stand in the directory of the run and in each training state. A run that is continued compares them: rows that were
appended, or a teacher that was replaced, would go on to other weights under the same name.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from pocl.errors import InputsChanged, WorkdirMismatch
from pocl.layout import INPUTS_FILE
from pocl.storage.manifest import replace_file

_MAX_NAMED: Final = 6


class RunInput(BaseModel):
    """One input as the run read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    """SHA-256, hexadecimal."""
    size: str = ""
    """How much it is, for people: `32 rows`."""
    reference: str = ""
    """What the specification names it by, as a digest. A run that is continued with another specification may have
    another input under another reference; empty where none may change.
    """
    computed_by: str = ""
    """The version that the digest depends on; digests of two versions cannot be compared."""


class RunInputs(BaseModel):
    """All inputs of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: dict[str, RunInput] = {}
    """By what the input is, for instance `training samples`."""
    commits: dict[str, str] = {}
    """The commits of models and data sets on the Hub, by repository and revision: `owner/name@main`,
    `datasets/owner/name@main`."""

    def joined(self, other: "RunInputs") -> "RunInputs":
        """These inputs and those of `other`."""
        return RunInputs(inputs=self.inputs | other.inputs, commits=self.commits | other.commits)

    def differences(self, now: "RunInputs") -> list[str]:
        """A phrase for each input that is another one `now`, under the same reference."""
        return [
            _difference(name, then, after)
            for name, then in self.inputs.items()
            if (after := now.inputs.get(name)) is not None and _has_changed(then, after)
        ]

    def refuse_changes(self, now: "RunInputs") -> None:
        """Check that the inputs are still those with which the run began.

        Raises:
            InputsChanged: naming those that are not.
        """
        if changed := self.differences(now):
            more = f" and {len(changed) - _MAX_NAMED} more" if len(changed) > _MAX_NAMED else ""
            raise InputsChanged(f"Since the run began these changed: {'; '.join(changed[:_MAX_NAMED])}{more}.")

    def incomparable(self, now: "RunInputs") -> list[str]:
        """The inputs whose digests were computed by another version, so that a change would not be seen."""
        return [
            name
            for name, then in self.inputs.items()
            if (after := now.inputs.get(name)) is not None and then.computed_by != after.computed_by
        ]


def order_free_digest(digests: Iterable[str]) -> str:
    """SHA-256 over digests, whatever their order; repeats count."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def pinned_inputs(workdir: Path) -> RunInputs | None:
    """The inputs with which the directory's run began; None where it has not come that far.

    Raises:
        WorkdirMismatch: another version of the engine wrote them.
    """
    try:
        return RunInputs.model_validate_json((workdir / INPUTS_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise WorkdirMismatch(f"{INPUTS_FILE} of the directory cannot be read by this version") from error


def pin_inputs(workdir: Path, inputs: RunInputs) -> None:
    """Pin the inputs in the directory of the run.

    Raises:
        DiskFull: when there is no space.
    """
    replace_file(workdir / INPUTS_FILE, inputs.model_dump_json(indent=1) + "\n")


def _has_changed(then: RunInput, now: RunInput) -> bool:
    is_same_reference = then.reference == now.reference and then.computed_by == now.computed_by
    return is_same_reference and then.digest != now.digest


def _difference(name: str, then: RunInput, now: RunInput) -> str:
    if then.size == now.size:
        return f"the {name} ({then.digest[:12]} then, {now.digest[:12]} now)"
    return f"the {name} ({then.size} then, {now.size} now)"
