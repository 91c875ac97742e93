"""The output head as arithmetic, for a loss that applies it itself, chunk by chunk."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.models.heads import apply_head, output_head

_PROBED_ROWS = 4
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Head:
    """logits = cap(scale (h W^T + b)), where cap(z) = c tanh(z / c) for a soft-cap c, else z."""

    weight: Tensor
    """`[V, width]`: the model's own parameter, which may be tied to the embeddings."""
    bias: Tensor | None = None
    """`[V]`."""
    scale: float = 1.0
    """`logit_scale` of Cohere, 1 / `logits_scaling` of Granite."""
    softcap: float | None = None
    """`final_logit_softcapping` of Gemma 2."""

    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, width]` to `[T, V]`."""
        return self.finish(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def finish(self, raw: Tensor) -> Tensor:
        """Scale and soft-cap of what the linear layer gave."""
        scaled = raw if self.scale == 1 else raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def head_of(model: PreTrainedModel) -> Head | None:
    """The head of `model`, or None where it is not of this form.

    It is read off the model's config and then tried on random rows against the model itself, so that a family with
    a head that nobody has foreseen gets None and not a wrong loss.

    Raises:
        ModelUnsupported: the model has no output head, or its layers cannot be told from it.
    """
    layer = output_head(model)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    config = model.config.get_text_config()
    divided = getattr(config, "logits_scaling", None)
    head = Head(
        weight=weight,
        bias=getattr(layer, "bias", None),
        scale=1 / divided if divided else getattr(config, "logit_scale", None) or 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    return head if _agrees(head, model) else None


@torch.no_grad()
def _agrees(head: Head, model: PreTrainedModel) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBED_ROWS, head.weight.shape[1], generator=generator)
    rows = rows.to(head.weight.device, head.weight.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        wanted, given = apply_head(model, rows).float(), head.logits(rows).float()
    if wanted.shape != given.shape:
        return False
    return bool((wanted - given).abs().max() <= _TOLERANCE * wanted.abs().max().clamp(min=1))
