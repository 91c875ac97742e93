"""The tokenizer of freshly initialised models: one token for each byte."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pocl.inspect.random import SPECIAL_TOKENS, byte_level_vocabulary
from pocl.prompting.text_tokenizer import TextTokenizer

PAD, BOS, EOS = SPECIAL_TOKENS
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_level_text_tokenizer(max_positions: int) -> TextTokenizer:
    """One token for each byte, and pad, begin and end of sequence."""
    backend = Tokenizer(models.BPE(vocab=byte_level_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)])
    return TextTokenizer.from_backend(
        backend,
        {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
        templates={"default": CHAT_TEMPLATE},
        configured_end_ids={SPECIAL_TOKENS[EOS]},
        settings={"model_max_length": max_positions},
    )
