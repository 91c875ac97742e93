"""Weights in the format of the products, made once for many forward passes without gradients.

Under autocast each product casts its weight anew. Where the same weights serve thousands of forward passes (decoding),
one copy of them in bf16 is made beforehand; on a CPU the matrices of linear layers are moreover laid out as oneDNN's
kernels read them (prepacked), which they otherwise do at each product of few rows.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pocl.models.precision import Precision


@contextmanager
def inference_weights(model: PreTrainedModel, precision: Precision, rows: int) -> Iterator[None]:
    """While the context lasts, the parameters of `model` are copies in the format of `precision`, without gradients.

    The model's own parameters and buffers are not touched, and come back at the end. No autocast is needed: the
    embeddings are in that format too, so that all activations are.

    Args:
        rows: Rows of the most frequent products, for which their layout is chosen.
    """
    with ExitStack() as stack, torch.autocast(model.device.type, enabled=False):
        if precision.name == "bf16":
            stack.enter_context(_cast_parameters(model, torch.bfloat16))
        if model.device.type == "cpu" and _can_prepack():
            stack.enter_context(_prepacked(model, rows))
        yield


@contextmanager
def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    copies: dict[int, nn.Parameter] = {}
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point() or parameter.dtype == dtype:
                continue
            # Tied weights share a copy too.
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            originals.append((module, name, parameter))
    try:
        for module, name, parameter in originals:
            module._parameters[name] = copies[id(parameter)]
        yield
    finally:
        for module, name, parameter in originals:
            module._parameters[name] = parameter


def _can_prepack() -> bool:
    """Whether this build of torch has the two operators, which its own compiler uses for frozen weights."""
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return torch.backends.mkldnn.is_available() and has_operators


@contextmanager
def _prepacked(model: PreTrainedModel, rows: int) -> Iterator[None]:
    replaced: list[nn.Module] = []
    try:
        for module in model.modules():
            matrix = _matrix(module)
            # A module whose forward is an attribute of its own belongs to somebody who has replaced it already.
            if matrix is None or "forward" in module.__dict__:
                continue
            packed = torch.ops.mkldnn._reorder_linear_weight(matrix, rows)
            module.__dict__["forward"] = _packed_forward(packed, module._parameters["bias"])
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight of a linear layer, `[outputs, inputs]`; None for other modules."""
    if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
        return module.weight.detach()
    if type(module) is Conv1D and module.weight.dtype == torch.bfloat16:
        return module.weight.detach().t().contiguous()
    return None


def _packed_forward(packed: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
        return outputs

    return forward
