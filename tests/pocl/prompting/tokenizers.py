"""Tokenizers that know the control tokens of every family of :mod:`tests.pocl.prompting.chat_templates`."""

# Full-width bars are in the tokens as they are published.
# ruff: noqa: RUF001

import json
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pocl.prompting.text_tokenizer import TextTokenizer

SPECIAL = (
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
    "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
    "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "[|endofturn|]", "<|end_of_turn|>", "[gMASK]", "<sop>",
    "<|call|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "]~!b[", "]~b]", "[e~[",
    "<seed:bos>", "<seed:eos>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]",
    "<|hy_User|>", "<|hy_Assistant|>", "<|hy_eos|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>",
    "<|END_RESPONSE|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|system_start|>", "<|system_end|>",
    "<|developer_start|>", "<|developer_end|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>",
    "<|assistant_end|>", "<|inner_prefix|>", "<|inner_suffix|>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>",
    "<|bom|>", "<|eom|>",
)  # fmt: skip
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<seed:think>", "</seed:think>")
_SENTENCES = (
    "Why? Because. Really? Yes. Be brief. User: Assistant: system user assistant\n\n### Response:\n",
    "The quick brown fox jumps over the lazy dog 0123456789. What is the answer? The answer is a word.",
)


@lru_cache
def byte_level_backend() -> str:
    """A byte-level BPE, as JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=550,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_SENTENCES * 20, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    return backend.to_str()


@lru_cache
def word_sign_backend() -> str:
    """A BPE with the word sign of SentencePiece before each text, and byte fallback, as JSON."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=950,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=sorted(set("".join(_SENTENCES)) - {" "} | {"▁"} | set("[]/#:|<>INSTSY")),
        show_progress=False,
    )
    backend.train_from_iterator(_SENTENCES * 20, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    # The tokens of bytes are entries of the vocabulary, not added tokens.
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(content)


def text_tokenizer(
    templates: dict[str, str] | str | None = None, *, eos: str | None = "</s>", backend: str | None = None
) -> TextTokenizer:
    """A tokenizer with these chat templates."""
    named = {"default": templates} if isinstance(templates, str) else templates or {}
    special = {"bos_token": "<s>"} | ({} if eos is None else {"eos_token": eos})
    return TextTokenizer.from_backend(Tokenizer.from_str(backend or byte_level_backend()), special, templates=named)
