"""A GGUF file of a tiny Llama with a byte-level tokenizer, as llama.cpp's converter lays one out."""

from pathlib import Path

import gguf
import numpy as np

from pocl.inspect.random import SPECIAL_TOKENS, byte_level_vocabulary

HIDDEN, LAYERS, INNER, POSITIONS = 32, 2, 64, 128
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


def write_gguf(
    path: Path, *, pre: str | None = "smollm", quantised: bool = False, parts: int = 1, control: str = "<|im_end|>"
) -> Path:
    """`pre` is `tokenizer.ggml.pre`; `control` is a further special token.

    `10` is one token of the vocabulary, which only some rules can produce.
    """
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    tokens = [*byte_level_vocabulary(), control, "10", "[PAD261]"]
    kinds = [_CONTROL if token in {*SPECIAL_TOKENS, control} else _NORMAL for token in tokens[:-1]] + [_UNUSED]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["1 0"])
    writer.add_bos_token_id(SPECIAL_TOKENS["<|bos|>"])
    writer.add_eos_token_id(SPECIAL_TOKENS["<|eos|>"])
    writer.add_pad_token_id(SPECIAL_TOKENS["<|eos|>"])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, shape in _shapes(len(tokens)).items():
        values = generator.normal(0, 0.2, shape).astype(np.float32)
        if quantised and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HIDDEN, HIDDEN),
        "attn_k.weight": (HIDDEN // 2, HIDDEN),
        "attn_v.weight": (HIDDEN // 2, HIDDEN),
        "attn_output.weight": (HIDDEN, HIDDEN),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_gate.weight": (INNER, HIDDEN),
        "ffn_up.weight": (INNER, HIDDEN),
        "ffn_down.weight": (HIDDEN, INNER),
    }
    layers = {f"blk.{index}.{name}": shape for index in range(LAYERS) for name, shape in layer.items()}
    return {"token_embd.weight": (vocabulary, HIDDEN), **layers, "output_norm.weight": (HIDDEN,)}
