"""The facts of a freshly initialised model, computed before it is made."""

from types import MappingProxyType

from pocl.inspect.facts import ModelFacts
from pocl.spec import RandomModel

SPECIAL_TOKENS = {"<|pad|>": 256, "<|bos|>": 257, "<|eos|>": 258}
TIED_FAMILIES = frozenset({"gpt2", "opt", "qwen2"})
# The position embeddings of OPT begin with two rows that no position uses.
_OPT_POSITION_OFFSET = 2


def random_facts(ref: RandomModel) -> ModelFacts:
    """The facts of the model that :func:`pocl.models.random.random_model` will make of `ref`."""
    tokens = byte_level_vocabulary()
    embeddings = len(tokens) * ref.hidden_size
    tied = ref.family in TIED_FAMILIES
    layer = _layer_parameters(ref)
    outside = embeddings * (1 if tied else 2) + _position_parameters(ref) + _norm_parameters(ref)
    parameters = outside + ref.layers * layer
    return ModelFacts(
        family=ref.family,
        vocabulary_size=len(tokens),
        layers=ref.layers,
        hidden_size=ref.hidden_size,
        parameters=parameters,
        layer_parameters=(layer,) * ref.layers,
        size_bytes=4 * parameters,
        max_positions=ref.max_positions,
        has_chat_template=True,
        tied_embeddings=tied,
        dtype="F32",
        tokens=MappingProxyType(tokens),
    )


def intermediate_size(ref: RandomModel) -> int:
    """Width of the feed-forward block: 4 times hidden, or 8/3 where it is gated (Shazeer 2020, section 3)."""
    return 4 * ref.hidden_size if ref.family in ("gpt2", "opt") else 8 * -(-ref.hidden_size // 3)


def byte_level_vocabulary() -> dict[str, int]:
    """One token for each byte, whose id is the byte, then the special tokens.

    Bytes are spelled as byte-level BPE spells them: printable Latin-1 stands for itself, and the others
    take the code points from 256 on, in order (Radford et al. 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    spelled = {chr(byte if byte in printable else next(spare)): byte for byte in range(0x100)}
    return {**spelled, **SPECIAL_TOKENS}


def _layer_parameters(ref: RandomModel) -> int:
    hidden, inner = ref.hidden_size, intermediate_size(ref)
    attention = 4 * hidden * hidden
    if ref.family in ("gpt2", "opt"):
        biases = 4 * hidden + inner + hidden
        return attention + 2 * hidden * inner + biases + 2 * _norm_parameters(ref)
    biases = 3 * hidden if ref.family == "qwen2" else 0
    return attention + 3 * hidden * inner + biases + 2 * _norm_parameters(ref)


def _position_parameters(ref: RandomModel) -> int:
    if ref.family == "gpt2":
        return ref.max_positions * ref.hidden_size
    if ref.family == "opt":
        return (ref.max_positions + _OPT_POSITION_OFFSET) * ref.hidden_size
    return 0


def _norm_parameters(ref: RandomModel) -> int:
    # LayerNorm has a weight and a bias, RMSNorm a weight.
    return ref.hidden_size * (2 if ref.family in ("gpt2", "opt") else 1)
