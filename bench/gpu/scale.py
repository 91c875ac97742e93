"""How much of each figure is measured: the work of the targets on a GPU, less on a CPU, hardly any to try it out."""

from dataclasses import dataclass
from typing import Any

import torch

from bench.sizes import SIZES, Size, llama_shape


@dataclass(frozen=True)
class Job:
    """A whole run from ranking to the last evaluation, at the settings of the paper but for these."""

    size: Size
    rows: int
    validation_rows: int
    epochs: int
    """Epochs of each stage."""
    new_tokens: int
    """The most tokens of an answer. A random model ends none before."""
    batch_size: int = 64
    """Samples of an optimiser step."""


@dataclass(frozen=True)
class Scale:
    """The sizes of every figure."""

    name: str
    has_targets: bool
    """Whether its figures are those that the targets are for."""
    pairs: tuple[Size, ...]
    """Student and teacher of the steps; the student of the first also answers and scores."""
    rows: int
    """Samples of an optimiser step."""
    rows_at_once: int
    """Samples of a micro-batch of the rivals."""
    rounds: int
    prompts: int
    """Rows in flight of generation."""
    new_tokens: int
    scored_rows: int
    filled: Size
    """The pair whose teacher fills a cache."""
    filled_rows: int
    job: Job
    """The whole job."""
    part: Job
    """The part of it that is run, and from which the whole is extrapolated."""
    matrix_side: int | None = None
    """Rows and columns of the matrices of the peak; None for as many as reach it."""


def _gpt2_shape(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"layers": layers, "width": width, "heads": heads}


LLAMAS = SIZES["lab"]
GPT2S = Size("GPT-2 base/XL", _gpt2_shape(12, 768, 12), _gpt2_shape(48, 1600, 25), 50257, "gpt2")
QWENS = Size("0.5B/1.5B", llama_shape(24, 896, 14, 2, 4864), llama_shape(28, 1536, 12, 2, 8960), 151936, "qwen2")
"""The shapes of Qwen2.5."""

WHOLE = Scale(
    name="whole",
    has_targets=True,
    pairs=(LLAMAS, GPT2S, QWENS),
    rows=64,
    rows_at_once=16,
    rounds=5,
    prompts=256,
    new_tokens=128,
    scored_rows=2000,
    filled=GPT2S,
    filled_rows=2000,
    job=Job(GPT2S, rows=11400, validation_rows=500, epochs=8, new_tokens=256),
    part=Job(GPT2S, rows=1140, validation_rows=50, epochs=1, new_tokens=256),
)
"""What the targets are for."""

_SMALL_GPT2S = Size("small GPT-2", _gpt2_shape(4, 384, 6), _gpt2_shape(8, 768, 12), 16384, "gpt2")
SMALL = Scale(
    name="small",
    has_targets=False,
    pairs=(
        SIZES["ci"],
        _SMALL_GPT2S,
        Size("small Qwen2", llama_shape(4, 256, 4, 2, 768), llama_shape(6, 384, 6, 2, 1024), 49152, "qwen2"),
    ),
    rows=8,
    rows_at_once=4,
    rounds=3,
    prompts=16,
    new_tokens=32,
    scored_rows=32,
    filled=_SMALL_GPT2S,
    filled_rows=32,
    job=Job(_SMALL_GPT2S, rows=192, validation_rows=16, epochs=2, new_tokens=32, batch_size=8),
    part=Job(_SMALL_GPT2S, rows=48, validation_rows=8, epochs=1, new_tokens=32, batch_size=8),
)
"""What two cores do in minutes."""

_TOY_GPT2S = Size("toy GPT-2", _gpt2_shape(2, 32, 2), _gpt2_shape(2, 64, 2), 512, "gpt2")
TOY = Scale(
    name="toy",
    has_targets=False,
    pairs=(
        SIZES["tiny"],
        _TOY_GPT2S,
        Size("toy Qwen2", llama_shape(2, 32, 2, 1, 64), llama_shape(2, 64, 2, 1, 128), 512, "qwen2"),
    ),
    rows=2,
    rows_at_once=1,
    rounds=1,
    prompts=2,
    new_tokens=3,
    scored_rows=2,
    filled=_TOY_GPT2S,
    filled_rows=2,
    job=Job(_TOY_GPT2S, rows=16, validation_rows=4, epochs=2, new_tokens=4, batch_size=4),
    part=Job(_TOY_GPT2S, rows=8, validation_rows=2, epochs=1, new_tokens=4, batch_size=4),
    matrix_side=64,
)
"""It shows that the benchmark runs, and its figures mean nothing."""


SCALES = {scale.name: scale for scale in (WHOLE, SMALL, TOY)}


def choose_scale(device: torch.device, *, quick: bool) -> Scale:
    if quick:
        return TOY
    return WHOLE if device.type == "cuda" else SMALL
