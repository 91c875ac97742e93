"""The output head as its parameters rather than as a module, where it is a scaled and capped linear map.

A loss that has these parameters needs no logits of a whole batch: see :mod:`pocl.losses.fused`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pocl.errors import ModelUnsupported
from pocl.models.heads import apply_head, output_head


@dataclass(frozen=True, eq=False)
class Head:
    """logits = cap(scale (W h + b)), cap(z) = c tanh(z / c) where there is a softcap c."""

    weight: Tensor
    """W, `[V, d]`: the model's own parameter, which is the embedding where the two are tied."""
    bias: Tensor | None = None
    """b, `[V]`: the model's own parameter."""
    scale: float = 1.0
    """Cohere's `logit_scale`, Falcon-H1's `lm_head_multiplier`, Granite's 1 / `logits_scaling`."""
    softcap: float | None = None
    """Gemma 2's `final_logit_softcapping`, RecurrentGemma's `logits_soft_cap`."""
    product_weight: Tensor | None = None
    """W in the format of the products, kept by :class:`~pocl.models.product_weights.ProductWeights`; None where each
    pass rounds W itself. Gradients go to `weight`."""
    product_bias: Tensor | None = None
    """b, likewise."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states, `[T, d]` -> `[T, V]`, differentiable."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """What an output head is applied to, with the head: logits that have not been computed."""

    hidden: Tensor
    """Hidden states, `[tokens, width of the head]`."""
    head: Head


def extract_head(model: PreTrainedModel) -> Head | None:
    """The output head of `model`, with the model's own parameters; None where it has another form.

    The config is verified: a few random hidden states go through the model's own head and through the result.

    Raises:
        ModelUnsupported: the model has no output head.
    """
    module = output_head(model)
    # An adapter or a quantised layer has a weight too, but computes more than the product with it.
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        return None
    # Entries of the config may mean something else in a family: MiniCPM3 scales hidden states and not logits.
    candidates = [_head_in_config(model, module), Head(module.weight, module.bias)]
    return next((head for head in candidates if head is not None and _matches_model(model, head)), None)


def _head_in_config(model: PreTrainedModel, module: nn.Linear) -> Head | None:
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    # Some families have the name of a rule here.
    if not all(isinstance(number, int | float) for number in (scale, divisor, softcap or 1.0)):
        return None
    return Head(module.weight, module.bias, scale / divisor, softcap)


@torch.no_grad()
def _matches_model(model: PreTrainedModel, head: Head) -> bool:
    hidden = _probe_hidden_states(head)
    try:
        expected = apply_head(model, hidden).double()
    except ModelUnsupported:
        return False
    logits = head.logits(hidden).double()
    if logits.shape != expected.shape:
        return False
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 3e-2
    size = expected.abs().amax(dim=-1, keepdim=True)
    return bool(((logits - expected).abs() <= tolerance * size).all())


def _probe_hidden_states(head: Head) -> Tensor:
    """Random hidden states `[8, d]`, from a generator of their own.

    Their largest logits before scale and cap go from 1 to 1000, since a cap bends only logits as large as itself.
    """
    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, weight.shape[1], generator=generator).to(weight.device, torch.float32)
    largest = F.linear(hidden, weight.float()).abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
    target = torch.logspace(0, 3, 8, device=weight.device).unsqueeze(-1)
    return (hidden * target / largest).to(weight.dtype)
