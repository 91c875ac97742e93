"""The output head at the positions that enter the loss.

Of a batch, only the positions that predict a response token enter the loss. The head is the largest product of a small
model, so a forward pre-hook restricts it to those positions. The rest of the model's own forward runs as it is:
whatever an architecture does after the head (bias, soft-capping, logit scale) still happens.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pocl.data.packing import Packing
from pocl.errors import ModelUnsupported
from pocl.models.packed import packed_attention
from pocl.models.positions import position_arguments

HiddenStateMap = Callable[[torch.Tensor], torch.Tensor]
"""From the hidden states that reach the output head to those that it is applied to."""


def response_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, predicting: torch.Tensor
) -> torch.Tensor:
    """Logits at the positions `predicting`.

    Args:
        model: In train or eval mode, which stays as it is.
        input_ids: Token ids, `[B, L]`.
        attention_mask: 1 where `input_ids` holds a token, 0 at padding on either side, `[B, L]`.
        predicting: The positions whose next token belongs to a response, `[T]` int64, ascending, as indices into the
            B x L positions in row-major order.

    Returns:
        `[T, V]`: the rows `predicting` of the logits of the whole batch as `[B x L, V]`.

    Raises:
        ModelUnsupported: the model has no output head.
        IndexError: a position lies outside the batch.
    """

    def gather(hidden: torch.Tensor) -> torch.Tensor:
        return _rows_at(hidden, predicting).unsqueeze(0)

    return _forward(model, input_ids, attention_mask, gather).squeeze(0)


def response_hidden_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    predicting: torch.Tensor,
    packing: Packing | None = None,
) -> torch.Tensor:
    """The input of the output head at the positions `predicting`, `[T, width]`.

    Arguments and errors as :func:`response_logits`; `packing` is that of packed samples, for a model that
    :func:`~pocl.models.packed.can_pack` accepts. :func:`apply_head` turns the result into logits.
    """
    captured: list[torch.Tensor] = []

    def capture(hidden: torch.Tensor) -> torch.Tensor:
        captured.append(_rows_at(hidden, predicting))
        return hidden[:, :0]

    if packing is None:
        _forward(model, input_ids, attention_mask, capture)
        return captured[0]
    with restrict_head(model, capture), packed_attention(model, packing):
        model(input_ids=input_ids, position_ids=packing.position_ids, use_cache=False)
    return captured[0]


def apply_head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The head and all that follows it, without the layers before it: `[T, width]` -> `[T, V]`.

    `hidden` is what the head itself is applied to, as :func:`response_hidden_states` gives it: what a family does
    between its layers and the head, such as MiniCPM3's scale, has been done.

    Raises:
        ModelUnsupported: the model has no output head, or its layers cannot be told from it.
    """
    output_head(model)
    batch = hidden.unsqueeze(0)
    head_only = _with_body(model, _ConstantBody(batch, decoder_part(model)))
    input_ids = batch.new_zeros(batch.shape[:2], dtype=torch.long)
    with restrict_head(model, lambda _: batch):
        logits: torch.Tensor = head_only(input_ids=input_ids, use_cache=False).logits
    return logits.squeeze(0)


def without_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A model without layers that shares head and embeddings with `model`; only :func:`apply_head` can use it.

    Raises:
        ModelUnsupported: the model has no output head, or its layers cannot be told from it.
    """
    output_head(model)
    hollow = _shallow_copy(decoder_part(model))
    embeddings = {name: child for name, child in hollow._modules.items() if isinstance(child, nn.Embedding)}
    hollow.__dict__["_modules"] = embeddings
    return _with_body(model, hollow)


def output_head(model: PreTrainedModel) -> nn.Module:
    """The module that maps hidden states to logits.

    Raises:
        ModelUnsupported: there is none.
    """
    # The method carries no annotations in transformers.
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise ModelUnsupported(f"{type(model).__name__} has no output head, so it is not a causal language model.")
    return head


def head_vocabulary_size(model: PreTrainedModel) -> int:
    """The number of ids that the output head scores.

    Raises:
        ModelUnsupported: there is no output head.
    """
    return int(output_head(model).get_parameter("weight").shape[0])


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    """Whether the input embeddings and the output head are one tensor, whatever the config says."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [getattr(module, "weight", None) for module in (head, embeddings)]
    return weights[0] is not None and weights[0] is weights[1]


def restrict_head(model: PreTrainedModel, select: HiddenStateMap) -> torch.utils.hooks.RemovableHandle:
    """Apply the head to `select(hidden states)` until the handle, a context manager, is closed."""

    def before(_head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (select(args[0]), *args[1:])

    return output_head(model).register_forward_pre_hook(before)


def _forward(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, select: HiddenStateMap
) -> torch.Tensor:
    with restrict_head(model, select):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **position_arguments(model, attention_mask),
        )
    return cast(torch.Tensor, output.logits)


def _rows_at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`[B, L, width]` -> `[T, width]`: the states at these of the B x L positions, each at most once."""
    # The method is typed as returning anything.
    return cast(torch.Tensor, _RowsAt.apply(hidden.flatten(0, 1), positions))  # type: ignore[no-untyped-call] # torch does not type it.


class _RowsAt(torch.autograd.Function):
    """Rows of a matrix, each at most once: so the gradient is put in place, where that of any index is summed."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.height = len(matrix)
        return matrix.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.height, gradient.shape[1]).index_put_((rows,), gradient), None


class _ConstantBody(nn.Module):
    """Replaces the layers of a model, and returns hidden states that are given."""

    def __init__(self, hidden: torch.Tensor, replaced: nn.Module) -> None:
        super().__init__()
        self._hidden = hidden
        # Some families scale their logits by a number that lies here (Falcon-H1).
        numbers = {name: value for name, value in vars(replaced).items() if isinstance(value, int | float)}
        self.__dict__.update({name: value for name, value in numbers.items() if not name.startswith("_")})

    def forward(self, *_args: object, **_kwargs: object) -> "_HiddenOnly":
        return _HiddenOnly(self._hidden)


class _HiddenOnly:
    """The output of a body: fields that families read beside the hidden states (caches, router logits) are None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _with_body(model: PreTrainedModel, body: nn.Module) -> PreTrainedModel:
    """A shallow copy of `model`, sharing its head, whose layers are `body`; the model itself is not touched."""
    decoder = decoder_part(model)
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    if not path:
        raise ModelUnsupported(f"The layers of {type(model).__name__} cannot be told from its output head.")
    *parents, last = path.split(".")
    copied = owner = _shallow_copy(model)
    for name in parents:
        child = _shallow_copy(owner.get_submodule(name))
        owner._modules[name] = child
        owner = child
    owner._modules[last] = body
    return cast(PreTrainedModel, copied)


def decoder_part(model: PreTrainedModel) -> nn.Module:
    """The layers of `model` with its embeddings and final norm; `model` itself where they cannot be told from it."""
    # The method carries no annotations in transformers.
    decoder: nn.Module = model.get_decoder()
    # Some families name their layers otherwise than their class says (Llama 4).
    return model._modules.get("model") or decoder if decoder is model else decoder


def _shallow_copy(module: nn.Module) -> nn.Module:
    duplicate = copy(module)
    # The copy shares its table of children with the original until it has one of its own.
    duplicate.__dict__["_modules"] = dict(module._modules)
    return duplicate
