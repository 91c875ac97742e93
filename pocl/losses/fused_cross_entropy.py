"""Cross-entropy alone from hidden states, without a teacher: :mod:`pocl.losses.fused` with one head and one term."""

import math

import torch
from torch import Tensor

from pocl.losses.backprojection import add_chunk, finish, uncap_gradient
from pocl.losses.buffers import (
    LossExecution,
    Workspace,
    gradient_buffers,
    head_buffers,
    loss_dtype,
    plan_sizes,
    product_hidden_states,
)
from pocl.losses.projection import Projection
from pocl.losses.sums import ObjectiveSum, join_graph
from pocl.losses.tile import cross_entropy_, cross_entropy_and_grad_
from pocl.models.output_head import HeadInputs


def fused_cross_entropy_sum(
    student: HeadInputs,
    labels: Tensor,
    *,
    scale: float = 1.0,
    accumulate_into_grad: bool = False,
    execution: LossExecution | None = None,
) -> ObjectiveSum:
    """Cross-entropy summed over the tokens, with its gradient.

    Arguments and errors are those of :func:`pocl.losses.fused.fused_objective_sum`.
    """
    if not math.isfinite(scale):
        raise ValueError("scale must be finite")
    execution = execution or LossExecution()
    workspace = execution.workspace or Workspace()
    in_place = accumulate_into_grad and torch.is_grad_enabled()
    factor = scale * student.head.scale
    hidden = product_hidden_states(student, labels)
    with torch.no_grad():
        dtype = loss_dtype(hidden)
        gradients = gradient_buffers(hidden, student.head, dtype, in_place=in_place)
        sizes = plan_sizes(hidden, (student.head,), dtype, execution.chunk_tokens)
        memory = head_buffers(student.head, sizes, workspace, "student", with_gradient=True)
        cross_entropies = torch.empty(len(labels), dtype=dtype, device=labels.device)
        head = Projection(student.head, hidden.dtype, memory)
        # The format of every product is settled by now.
        with torch.autocast(labels.device.type, enabled=False):
            for chunk, tiles in sizes.chunks:
                linear = head.linear(hidden[chunk])
                gradient = linear if linear.dtype == hidden.dtype else torch.empty_like(linear, dtype=hidden.dtype)
                for tokens, tile in tiles:
                    logits = head.logits(linear[tile])
                    cap_derivative = head.cap_derivative(logits)
                    cross_entropies[tokens] = cross_entropy_and_grad_(logits, labels[tokens], factor)
                    uncap_gradient(logits, cap_derivative, out=gradient[tile])
                add_chunk(gradients, gradient, hidden[chunk], head.weight, chunk)
        finish(gradients)
        cross_entropy = cross_entropies.sum()
    loss = join_graph(cross_entropy * scale, gradients, hidden, student.head)
    return ObjectiveSum(loss, cross_entropy, None)


@torch.no_grad()
def fused_token_cross_entropy(student: HeadInputs, labels: Tensor, *, execution: LossExecution | None = None) -> Tensor:
    """Cross-entropy of each token in nats, `[tokens]`, without gradient."""
    execution = execution or LossExecution()
    hidden = product_hidden_states(student, labels)
    dtype = loss_dtype(hidden)
    sizes = plan_sizes(hidden, (student.head,), dtype, execution.chunk_tokens)
    memory = head_buffers(student.head, sizes, execution.workspace or Workspace(), "student")
    cross_entropies = torch.empty(len(hidden), dtype=dtype, device=labels.device)
    head = Projection(student.head, hidden.dtype, memory)
    with torch.autocast(labels.device.type, enabled=False):
        for chunk, tiles in sizes.chunks:
            linear = head.linear(hidden[chunk])
            for tokens, tile in tiles:
                cross_entropies[tokens] = cross_entropy_(head.logits(linear[tile]), labels[tokens])
    return cross_entropies
