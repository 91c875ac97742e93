"""The student as it leaves a run, whatever its progress: saved with its training state, best or final."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.export.generation import exported_generation
from pocl.export.gguf import GgufSource
from pocl.export.model_card import CARD_FILE, CardFacts, ExportedModel, Progress, model_card
from pocl.export.model_directory import own_chat_templates, save_model
from pocl.export.weight_format import dtype_name, tensors_kept_in_fp32, write_rounded
from pocl.models.heads import has_tied_embeddings
from pocl.spec import GgufFormat
from pocl.storage.manifest import link_files, new_directory, read_manifest


@dataclass(frozen=True)
class StudentExport:
    """What is written beside the weights of a student."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...] = ()
    """The tokens that end an answer in the template that the student is taught with."""
    chat_templates: Mapping[str, str] | None = None
    """That template, in Jinja, by name as of :func:`~pocl.export.model_directory.save_model`; None leaves the
    tokenizer's own.
    """
    facts: CardFacts | None = None
    """What the card says of the run; None writes no card."""
    stop_text: str = ""
    """The plain text that ends an answer; empty where a token does, so that `generate` stops by itself."""
    needs_generic_tokenizer: bool = False
    """`AutoTokenizer` reads the tokenizer by other rules than it is written with."""
    dtype: torch.dtype = torch.float32
    """The format of the weights that :meth:`link` leaves."""

    def write(self, model: PreTrainedModel, directory: Path, progress: Progress) -> ExportedModel:
        """Write the directory of `model` with its card, and say what was written."""
        saved = save_model(
            model,
            self.tokenizer,
            directory,
            end_ids=self.end_ids,
            stop_text=self.stop_text,
            chat_templates=self.chat_templates,
        )
        card = self.card(model, progress, saved.requirement)
        if card is not None:
            (directory / CARD_FILE).write_text(card, encoding="utf-8")
        return self.describe(model, saved.requirement)

    def link(
        self, model: PreTrainedModel, source: Path, target: Path, progress: Progress, gguf: Sequence[GgufFormat] = ()
    ) -> ExportedModel:
        """Make `target` the weights of `source`, which :meth:`write` made, in the format in which they leave the run.

        Files that do not differ are hard links where the file system has them. A weight that is too large for the
        format leaves all of them as they are.

        Args:
            gguf: the formats in which `target` has the weights of `source` as GGUF too.

        Raises:
            GgufUnsupported: they cannot be written so.
            DiskFull: when there is no space; nothing named `target` exists then, or what was there before.
        """
        linked = read_manifest(source)
        exported = self.describe(model, linked.requires)
        with new_directory(target) as scratch:
            if self.dtype != torch.float32:
                kept = tensors_kept_in_fp32(model, self.dtype)
                if write_rounded(source, scratch, self.dtype, kept=kept):
                    exported = replace(exported, dtype=dtype_name(self.dtype))
            if self.facts is not None:
                card = model_card(self.facts, exported, progress)
                (scratch / CARD_FILE).write_text(card, encoding="utf-8")
            if gguf:
                written = GgufSource.open(source).write(scratch, gguf)
                exported = replace(exported, gguf_notes=written.notes)
            link_files(source, scratch, linked, weights=exported.weights)
        return exported

    def card(self, model: PreTrainedModel, progress: Progress, requirement: str | None) -> str | None:
        """The card of weights that are read by `requirement`; None where nothing is known of the run."""
        return None if self.facts is None else model_card(self.facts, self.describe(model, requirement), progress)

    def describe(self, model: PreTrainedModel, requirement: str | None) -> ExportedModel:
        """What is to be said of the files that :meth:`write` makes of `model`, which `requirement` reads."""
        generation = exported_generation(model, self.tokenizer, end_ids=self.end_ids, stop_text=self.stop_text)
        ends = self.tokenizer.convert_ids_to_tokens(list(generation.eos_token_ids))
        own = own_chat_templates(self.tokenizer)
        return ExportedModel(
            requires=requirement,
            dtype=dtype_name(model.dtype),
            tied_embeddings=has_tied_embeddings(model),
            eos_tokens=[str(token) for token in ends],
            stop_text=self.stop_text,
            settings_left_out=generation.left_out,
            has_chat_template=bool(own if self.chat_templates is None else self.chat_templates),
            needs_generic_tokenizer=self.needs_generic_tokenizer,
        )
