"""Rotary embeddings of kind `longrope`, whose frequencies follow from the length of each sample.

They have two sets of factors: one for texts of up to `original_max_position_embeddings` tokens, one for longer texts.
transformers takes one set for a whole batch, by its highest position, so a short sample would be read otherwise beside
a long one than by itself. Here every sample is read as if it were alone, in padded, packed and decoding batches.

The other kind that depends on length, `dynamic`, leaves texts of up to `max_position_embeddings` tokens as they are,
and no sample or answer of a run is longer.
"""

from typing import Any

import torch
from torch import Tensor, nn

_ORIGINAL_LENGTH = "original_max_position_embeddings"


class _ScaledPerSample(nn.Module):
    """Goes before the class of a rotary embedding of transformers, and calls it once for each set of factors."""

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines, `[B, L, width]` each; `x` gives device and format, `position_ids` is `[B, L]`."""
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        # The class that follows is one of transformers, which this package knows by its attributes alone.
        rotary: Any = super()
        switch = _switch_lengths(self).get(layer_type)
        if switch is None or position_ids.dim() != 2:
            cos, sin = rotary.forward(x, position_ids, **arguments)
            return cos, sin
        flat = position_ids.reshape(1, -1)
        short = rotary.forward(x, flat.clamp(max=switch - 1), **arguments)
        # One position beyond the switch makes transformers take the factors of long texts.
        long = rotary.forward(x, torch.cat([flat, flat.new_full((1, 1), switch)], dim=1), **arguments)
        is_long = (sample_lengths(position_ids) > switch).unsqueeze(-1)
        cos, sin = (
            torch.where(is_long, beyond[:, :-1].view(*position_ids.shape, -1), within.view(*position_ids.shape, -1))
            for within, beyond in zip(short, long, strict=True)
        )
        return cos, sin


def scale_rope_per_sample(model: nn.Module) -> None:
    """Let every `longrope` embedding of `model` follow from the length of each sample; others stay as they are."""
    for module in model.modules():
        if _switch_lengths(module) and not isinstance(module, _ScaledPerSample):
            module.__class__ = type(type(module).__name__, (_ScaledPerSample, type(module)), {})


def rope_switch_length(model: nn.Module) -> int | None:
    """The length in tokens beyond which texts are read with other factors; None where all lengths are read alike.

    A cache that was filled before that length cannot be gone on with after it.
    """
    return min((length for module in model.modules() for length in _switch_lengths(module).values()), default=None)


def sample_lengths(position_ids: Tensor) -> Tensor:
    """For each token the length of its sample as far as it is there, `[B, L]` -> `[B, L]`.

    A sample is a run of positions that rise by one; padding, whose positions do not, is a sample of its own.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    sample = begins.cumsum(dim=1) - 1
    highest = torch.zeros_like(position_ids).scatter_reduce(1, sample, position_ids, "amax")
    return highest.gather(1, sample) + 1


def _switch_lengths(module: nn.Module) -> dict[str | None, int]:
    """The lengths beyond which a `longrope` embedding takes other factors, by type of layer; empty for all others."""
    kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    if isinstance(kinds, str):
        kinds = {None: kinds}
    if not isinstance(kinds, dict):
        return {}
    parameters = getattr(config, "rope_parameters", {})
    return {
        layer_type: int((parameters if layer_type is None else parameters[layer_type])[_ORIGINAL_LENGTH])
        for layer_type, kind in kinds.items()
        if kind == "longrope"
    }
