"""The student as it leaves a run, whatever its progress: saved with its training state, best or final."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.export.generation import exported_generation
from pocl.export.model_card import CARD_FILE, CardFacts, ExportedModel, Progress, model_card
from pocl.export.model_directory import own_chat_templates, save_model
from pocl.models.heads import has_tied_embeddings


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

    def write(self, model: PreTrainedModel, directory: Path, progress: Progress) -> str:
        """Write the directory of `model` with its card.

        Returns:
            The versions of transformers that read it, e.g. `transformers>=4.57`.
        """
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
        return saved.requirement

    def card(self, model: PreTrainedModel, progress: Progress, requirement: str) -> str | None:
        """The card of weights that are read by `requirement`; None where nothing is known of the run."""
        if self.facts is None:
            return None
        generation = exported_generation(model, self.tokenizer, end_ids=self.end_ids, stop_text=self.stop_text)
        ends = self.tokenizer.convert_ids_to_tokens(list(generation.eos_token_ids))
        own = own_chat_templates(self.tokenizer)
        exported = ExportedModel(
            requirement=requirement,
            dtype=str(model.dtype).removeprefix("torch."),
            tied_embeddings=has_tied_embeddings(model),
            eos_tokens=[str(token) for token in ends],
            stop_text=self.stop_text,
            settings_left_out=generation.left_out,
            has_chat_template=bool(own if self.chat_templates is None else self.chat_templates),
            needs_generic_tokenizer=self.needs_generic_tokenizer,
        )
        return model_card(self.facts, exported, progress)
