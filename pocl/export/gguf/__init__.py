"""A model directory as GGUF files, which llama.cpp, Ollama and LM Studio read, and an Ollama Modelfile.

Everything that those need stands in the files: weights, tokenizer, chat template, and the tokens that end an answer.
What GGUF or llama.cpp cannot say of a model is refused before anything is written, and never left out in silence.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.export.gguf.architectures import Architecture, architecture_of
from pocl.export.gguf.modelfile import MODELFILE, write_modelfile
from pocl.export.gguf.tensors import name_tensors, stored_tensors
from pocl.export.gguf.vocabulary import Vocabulary, vocabulary_of
from pocl.export.gguf.writing import write_file
from pocl.spec import GGUF_FORMATS, GgufFormat

__all__ = ["MODELFILE", "ExportedGguf", "GgufSource", "check_model", "file_name"]


@dataclass(frozen=True)
class ExportedGguf:
    """What was written."""

    files: tuple[str, ...]
    """The names of the files, the Modelfile last."""
    notes: tuple[str, ...]
    """Sentences on what differs from the model directory."""


@dataclass(frozen=True)
class GgufSource:
    """A model directory that can be written as GGUF."""

    directory: Path
    architecture: Architecture
    vocabulary: Vocabulary

    @classmethod
    def open(cls, directory: Path) -> "GgufSource":
        """Find out whether the model of a directory can be written; of its weights none is read.

        Args:
            directory: what `from_pretrained` loads.

        Raises:
            GgufUnsupported: naming what of the model GGUF or llama.cpp lacks.
            ModelUnsupported: a file is missing or wrong.
        """
        architecture = architecture_of(directory)
        return cls(directory, architecture, vocabulary_of(directory, architecture.vocabulary_size))

    def write(self, target: Path, formats: Sequence[GgufFormat]) -> ExportedGguf:
        """Write a file for each format, and a Modelfile for the smallest of them, into an existing directory.

        Equal models give equal bytes.

        Args:
            formats: of the matrices; vectors, such as the weights of norms, are in fp32 always.

        Raises:
            GgufUnsupported: a weight has no name in GGUF, or no value in fp16.
            OSError: a file cannot be written.
        """
        ordered = [each for each in GGUF_FORMATS if each in formats]
        tensors = stored_tensors(self.directory, self.architecture)
        for each in ordered:
            write_file(target / file_name(each), self.architecture, self.vocabulary, tensors, each)
        template_note = write_modelfile(
            target, self.directory, self.vocabulary, file_name(ordered[-1]), self.architecture
        )
        notes = (*self.architecture.notes, *self.vocabulary.notes, *template_note)
        return ExportedGguf((*map(file_name, ordered), MODELFILE), notes)


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that could not be written once it is saved. Nothing is left on the disk.

    Raises:
        GgufUnsupported: naming what of the model GGUF or llama.cpp lacks.
    """
    with tempfile.TemporaryDirectory(prefix="pocl-gguf-") as name:
        directory = Path(name)
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        source = GgufSource.open(directory)
    stored = {each for each, _ in model.named_parameters()}
    name_tensors(sorted(stored), source.architecture)


def file_name(format_: GgufFormat) -> str:
    """The name of the file with matrices in a format."""
    return f"model-{format_}.gguf"
