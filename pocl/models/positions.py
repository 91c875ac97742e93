"""Position ids that follow from the attention mask, so that padding on either side changes nothing."""

from collections.abc import Callable
from functools import cache
from inspect import signature

import torch
from transformers import PreTrainedModel


def position_arguments(model: PreTrainedModel, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` `[B, L]` as a keyword for `model`, or nothing where the model takes none (ALiBi).

    The first token of a sample has position 0; padding repeats the position of a neighbour, which no token attends to.
    """
    if "position_ids" not in _parameters(type(model).forward):
        return {}
    return {"position_ids": (attention_mask.long().cumsum(dim=1) - 1).clamp_(min=0)}


def cache_argument(model: PreTrainedModel) -> str | None:
    """The keyword under which `model` takes a cache of transformers; None where it takes none."""
    names = ("past_key_values", "cache_params")
    return next((name for name in names if name in _parameters(type(model).forward)), None)


@cache
def _parameters(forward: Callable[..., object]) -> frozenset[str]:
    # Called at every step of a generation, so the signature is read once.
    return frozenset(signature(forward).parameters)
