"""AdamW: which parameters its weight decay applies to, and its state before the first step."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW
from transformers import PreTrainedModel

from pocl.spec import Training


def make_optimizer(model: PreTrainedModel, training: Training) -> AdamW:
    """AdamW over all trained parameters; the loop sets the learning rate of each step."""
    decayed, undecayed = decay_groups(model, training)
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=training.adam_betas,
        fused=True,
    )


def decay_groups(model: PreTrainedModel, training: Training) -> tuple[list[Parameter], list[Parameter]]:
    """The trained parameters that the weight decay applies to, and those that it spares: biases and norms.

    A parameter is spared where it is a vector, where its name ends in `bias` (experts stack theirs to a matrix), or
    where the class of its module is a norm (one with a weight for each head has a matrix).
    """
    decayed: list[Parameter] = []
    spared: list[Parameter] = []
    seen: set[Parameter] = set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            # A tied weight belongs to several modules.
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            is_spared = parameter.ndim < 2 or name.endswith("bias") or is_norm
            if is_spared and training.decayed_parameters == "matrices":
                spared.append(parameter)
            else:
                decayed.append(parameter)
    return decayed, spared


def allocate_moments(optimizer: AdamW, zeros_like: Callable[[Tensor], Tensor] = torch.zeros_like) -> None:
    """Give every parameter that has no state yet the one with which AdamW begins: step 0 and moments of zero.

    AdamW does so itself in its first step, where running out of memory would leave a part of it behind.

    Raises:
        torch.OutOfMemoryError: a parameter has its whole state or none; the next call goes on.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": zeros_like(parameter),
                    "exp_avg_sq": zeros_like(parameter),
                }
