"""A directory that `from_pretrained` loads: weights, configs, tokenizer and chat template."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pocl.export.compatibility import write_config, write_tokenizer_config
from pocl.export.generation import ExportedGeneration, exported_generation
from pocl.inspect.chat_templates import DEFAULT_TEMPLATE, TOOL_TEMPLATE
from pocl.models.heads import has_tied_embeddings

SAVED_TEMPLATES: Final = (DEFAULT_TEMPLATE, TOOL_TEMPLATE)
"""The names of templates that transformers finds by itself: the second for conversations with tools."""


@dataclass(frozen=True)
class SavedModel:
    """What was written."""

    requirement: str
    """The versions of transformers that read it, e.g. `transformers>=4.57`."""
    generation: ExportedGeneration


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    end_ids: Sequence[int] = (),
    stop_text: str = "",
    chat_templates: Mapping[str, str] | None = None,
) -> SavedModel:
    """Write what `from_pretrained` loads: config, safetensors, generation config, tokenizer and chat template.

    Equal models give equal bytes, and nothing in them says where the model was read from. Neither `model` nor
    `tokenizer` is changed.

    Args:
        end_ids: The tokens that end an answer in the template that the model was taught with; those of the model and
            its tokenizer end one too.
        stop_text: The plain text that ends one where no token does.
        chat_templates: The templates that the model was taught with, in Jinja, by name: `default`, and perhaps
            `tool_use`. None keeps the tokenizer's own, as far as transformers would find one by itself.
    """
    generation = exported_generation(model, tokenizer, end_ids=end_ids, stop_text=stop_text)
    templates = own_chat_templates(tokenizer) if chat_templates is None else dict(chat_templates)
    with _generation_config(model, generation.config):
        # One shard: a manifest lists it, and a student that can be trained here fits into one file.
        model.save_pretrained(directory, max_shard_size="1TB")
    with _chat_templates(tokenizer, templates):
        tokenizer.save_pretrained(directory)
    write_tokenizer_config(
        directory, chat_templates=templates, pad_token=_special_token(tokenizer, generation.pad_token_id)
    )
    changes: dict[str, Any] = {"tie_word_embeddings": has_tied_embeddings(model)}
    if generation.config.eos_token_id is not None:
        changes["eos_token_id"] = generation.config.eos_token_id
    requirement = write_config(directory, changes)
    # safetensors writes files that only their owner may read; the others follow the process's umask.
    mode = (directory / "config.json").stat().st_mode
    for weights in directory.glob("*.safetensors"):
        weights.chmod(mode)
    return SavedModel(requirement, generation)


def own_chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat templates of a tokenizer that are of use without naming one; of one without a default, none are."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return {DEFAULT_TEMPLATE: templates} if templates else {}
    return {name: templates[name] for name in SAVED_TEMPLATES if name in templates and DEFAULT_TEMPLATE in templates}


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Have `model` hold `config` within the block: its own may hold settings that transformers refuses to save."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _chat_templates(tokenizer: PreTrainedTokenizerBase, templates: Mapping[str, str]) -> Iterator[None]:
    """Have `tokenizer` hold `templates` within the block."""
    own = tokenizer.chat_template
    only_default = templates.keys() <= {DEFAULT_TEMPLATE}
    tokenizer.chat_template = templates.get(DEFAULT_TEMPLATE) if only_default else dict(templates)
    try:
        yield
    finally:
        tokenizer.chat_template = own


def _special_token(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str | None:
    """The text of a token that is special already: to name another one would make it special, and its ids others."""
    added = tokenizer.added_tokens_decoder.get(token_id) if token_id is not None else None
    return str(added.content) if added is not None and added.special else None
