"""Tokenizers of transformers out of text tokenizers, and the other way round: both give the same ids."""

from collections.abc import Iterable
from copy import deepcopy

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pocl.errors import ModelUnsupported
from pocl.inspect.chat_templates import DEFAULT_TEMPLATE
from pocl.prompting.text_tokenizer import TextTokenizer

_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")


def transformers_tokenizer(text: TextTokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer of transformers around the same backend, which is saved as it is.

    The class is the generic one: others build a backend of their own.
    """
    backend = deepcopy(text.backend)
    if text.post_processor is not None:
        backend.post_processor = text.post_processor
    templates = dict(text.templates)
    only = templates.get(DEFAULT_TEMPLATE) if len(templates) == 1 else None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=only or templates or None,
        **text.special_tokens,
        **text.settings,
    )


def text_tokenizer(tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int] = ()) -> TextTokenizer:
    """The text tokenizer of a tokenizer of transformers; `end_ids` are those of the model's generation config.

    Raises:
        ModelUnsupported: it has no backend of the tokenizers library.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelUnsupported(
            f"The tokenizer {type(tokenizer).__name__[:80]} has no tokenizer.json, and transformers cannot make one; "
            "use a model with a tokenizer.json."
        )
    template = tokenizer.chat_template
    templates = template if isinstance(template, dict) else {} if template is None else {DEFAULT_TEMPLATE: template}
    return TextTokenizer.from_backend(
        deepcopy(tokenizer.backend_tokenizer),
        tokenizer.special_tokens_map,
        templates={name: text for name, text in templates.items() if text.strip()},
        configured_end_ids=end_ids,
        settings={name: getattr(tokenizer, name) for name in _SETTINGS},
    )
