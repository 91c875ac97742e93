"""Errors of the engine. Each has a stable code, says whose fault it is and whether a retry can help.

PoclError
|-- SpecInvalid            the specification is wrong; carries one FieldError for each wrong field
|-- DatasetInvalid         a data file is empty or has bad rows
|-- ModelNotFound          a model reference points at nothing
|-- ModelUnsupported       the files are there but cannot be used safely
|-- GgufUnsupported        the model cannot be written as GGUF
|-- VocabularyMismatch     teacher and student token ids disagree
|-- RunStopped             asked to stop; the state is saved, run again to continue
|-- WorkdirInUse           another process works in this directory
|-- WorkdirMismatch        the directory holds a run of another specification
|-- InputsChanged          samples, a model or a tokenizer are not those with which the run began
|-- CheckpointCorrupt      no whole checkpoint is left
|-- LossDiverged           the loss is not finite
|-- OutOfMemory            the smallest piece of the work does not fit
|-- DeviceUnavailable      the GPU that the run is for cannot be opened
|-- HubCacheFull           files of the Hub do not fit within the bound of their cache
|-- DiskFull               no space to write
`-- EngineFailure          anything that was not foreseen
"""

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

Fault = Literal["user", "capacity", "system"]


@dataclass(frozen=True)
class FieldError:
    """One thing wrong with an input: where (RFC 6901 pointer), a stable code and a sentence."""

    pointer: str
    code: str
    detail: str


class PoclError(Exception):
    """The engine could not do what was asked."""

    code: ClassVar[str] = "engine_error"
    fault: ClassVar[Fault] = "system"
    retryable: ClassVar[bool] = False
    hint: ClassVar[str] = "See the log of the run."

    def __init__(self, message: str | None = None, *, field_errors: Sequence[FieldError] = ()) -> None:
        super().__init__(message or self.__doc__)
        self.field_errors = tuple(field_errors)
        """What is wrong with which field of the input, as far as fields can be named."""

    @property
    def message(self) -> str:
        """One sentence for whoever runs the engine."""
        return str(self.args[0])

    @property
    def summary(self) -> str:
        """The sentence for a caller that is shown `field_errors` too."""
        return self.message


class SpecInvalid(PoclError):
    """The specification is not valid."""

    code = "spec_invalid"
    fault = "user"
    hint = "Correct the named fields and submit again."

    def __init__(self, field_errors: Sequence[FieldError]) -> None:
        message = "; ".join(f"{error.pointer or '/'}: {error.detail}" for error in field_errors[:5])
        super().__init__(message, field_errors=field_errors)

    @property
    def summary(self) -> str:
        return "The specification is not valid: correct the named fields and submit again."


class DatasetInvalid(PoclError):
    """The data file holds no usable row, or some that cannot be used."""

    code = "dataset_invalid"
    fault = "user"
    hint = "Correct the rows that the message names and upload the file again."


class ModelNotFound(PoclError):
    """The model could not be found."""

    code = "model_not_found"
    fault = "user"
    hint = "Check the path, or the name and revision on the Hub."


class ModelUnsupported(PoclError):
    """The model cannot be loaded: it must be safetensors or GGUF, of a causal language model, without remote code."""

    code = "model_unsupported"
    fault = "user"
    hint = "Convert the weights to safetensors and use an architecture that transformers ships."


class GgufUnsupported(PoclError):
    """GGUF or llama.cpp lacks something that the model needs."""

    code = "gguf_unsupported"
    fault = "user"
    hint = "Take the safetensors, or a model of a family and with a tokenizer that docs/gguf.md names."


class VocabularyMismatch(PoclError):
    """Teacher and student give different ids to the same tokens."""

    code = "vocabulary_mismatch"
    fault = "user"
    hint = "Use a student with the teacher's tokenizer, or cut the student out of the teacher."


class RunStopped(PoclError):
    """The run was asked to stop; its state is saved."""

    code = "stopped"
    fault = "system"
    retryable = True
    hint = "Run again with the same directory to continue."


class WorkdirInUse(PoclError):
    """Another process works in this directory."""

    code = "workdir_in_use"
    fault = "user"
    retryable = True
    hint = "Wait for the other process to end, or choose another directory."


class WorkdirMismatch(PoclError):
    """The directory holds a run of a different specification."""

    code = "workdir_mismatch"
    fault = "user"
    hint = "Choose an empty directory, or give the specification that the directory was started with."


class InputsChanged(PoclError):
    """Samples, a model or a tokenizer are not those with which the run began."""

    code = "inputs_changed"
    fault = "user"
    hint = "Put back what the message names to continue the run, or start a new one, in a directory of its own."


class CheckpointCorrupt(PoclError):
    """No whole checkpoint is left to continue from."""

    code = "checkpoint_corrupt"
    fault = "system"
    hint = "Start again in an empty directory; check the disk."


class LossDiverged(PoclError):
    """The loss is not a finite number."""

    code = "loss_diverged"
    fault = "user"
    hint = "Lower training.learning_rate, or use fp32."


class OutOfMemory(PoclError):
    """The smallest piece of the work does not fit into memory."""

    code = "out_of_memory"
    fault = "capacity"
    hint = "Use smaller models, a shorter data.max_length or shorter answers, or a device with more memory."


class DeviceUnavailable(PoclError):
    """The run is for a GPU, and torch can open none here: nothing was trained on a CPU in its place."""

    code = "device_unavailable"
    fault = "system"
    retryable = True
    hint = "Check the driver and CUDA_VISIBLE_DEVICES of the worker, or run with resources.device set to cpu."


class HubCacheFull(PoclError):
    """Files of the Hub do not fit within the bound of their cache."""

    code = "hub_cache_full"
    fault = "capacity"
    retryable = True
    hint = "Raise POCL_WORKER_MAX_HUB_CACHE_BYTES, or wait until the jobs that use the rest of the cache have ended."


class DiskFull(PoclError):
    """There is no space left to write."""

    code = "disk_full"
    fault = "capacity"
    retryable = True
    hint = "Free disk space; the last checkpoint is whole, so the run continues from it."


class EngineFailure(PoclError):
    """The engine failed in a way that was not foreseen."""

    code = "engine_failure"
    fault = "system"
    retryable = True
    hint = "See the log of the run."


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that there is no space to write, on the disk or within a quota."""
    return _errno_of(error) in (errno.ENOSPC, errno.EDQUOT)


def _errno_of(error: BaseException) -> int | None:
    """The `errno` of an error of the file system; None for any other error."""
    if isinstance(error, OSError):
        return error.errno
    # safetensors and tokenizers are written in Rust and raise no OSError, but their message ends with its number.
    number = re.search(r"\(os error (\d+)\)$", str(error))
    return None if number is None else int(number[1])
