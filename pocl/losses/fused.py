"""The training objective from hidden states: both output heads and the loss in one, without logits of the batch.

Chunk by chunk of tokens, both heads are applied, the student's logits become the gradient of the loss with regard to
themselves, in place and in closed form, and two more products carry it to hidden states and head: four products, none
of them computed again, and memory for the logits of one chunk. :mod:`pocl.losses.dense` is the reference that this
equals in value and gradient.

Products are in the autocast format where autocast is on, else in that of each head's weight; softmax and divergence are
in float32, or in float64 where a product is.
"""

import math

import torch
from torch import Tensor

from pocl.losses.backprojection import finish
from pocl.losses.both_heads import BothHeads
from pocl.losses.buffers import (
    LossExecution,
    Workspace,
    gradient_buffers,
    loss_dtype,
    pair_buffers,
    plan_sizes,
    product_hidden_states,
)
from pocl.losses.compiled_tile import Formats, HeadShape, compiled_tile
from pocl.losses.objective import ObjectiveTerms
from pocl.losses.registry import divergence_of
from pocl.losses.sums import ObjectiveSum, join_graph, mix
from pocl.losses.tile import GradientFactors, TileTerms
from pocl.models.output_head import HeadInputs


def fused_objective_sum(
    student: HeadInputs,
    teacher: HeadInputs,
    labels: Tensor,
    terms: ObjectiveTerms,
    *,
    scale: float = 1.0,
    accumulate_into_grad: bool = False,
    execution: LossExecution | None = None,
) -> ObjectiveSum:
    """The objective of :mod:`pocl.losses.objective`, summed over the tokens.

    Gradients go to the student's hidden states, weight and bias, each if it requires one. They are computed here, and
    backward only passes them on, once.

    Args:
        student: Hidden states `[tokens, width]` and the head to be trained.
        teacher: Hidden states `[tokens, its width]` and a head; neither receives a gradient.
        labels: `[tokens]`, already shifted: the token that each hidden state predicts. Every token counts.
        terms: What the objective is made of.
        scale: Multiplies loss and gradient, not the other sums. With the step's normaliser here, backward starts
            from 1 and need not touch the gradients again.
        accumulate_into_grad: Add the weight's gradient to `weight.grad` here rather than in backward, which saves a
            buffer of its size. Forward and backward then come in pairs, backward starts from 1, and nothing may wait
            for this gradient: no hook, no reduction over several processes. Nothing is added where gradients are off.
        execution: How the pass is run.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    if not math.isfinite(scale):
        raise ValueError("scale must be finite")
    execution = execution or LossExecution()
    in_place = accumulate_into_grad and torch.is_grad_enabled()
    terms.check()
    tau_factor = terms.tau_factor()
    shared_width = terms.shared_width(len(student.head.weight), len(teacher.head.weight))
    tile_terms = TileTerms(divergence_of(terms.method), terms.temperature, shared_width)
    factors = GradientFactors(
        cross_entropy=scale * student.head.scale * (1 - terms.kd_weight),
        divergence=scale * student.head.scale * terms.kd_weight * tau_factor,
    )
    hidden = product_hidden_states(student, labels)
    with torch.no_grad():
        teacher_hidden = product_hidden_states(teacher, labels)
        heads, dtype = (student.head, teacher.head), loss_dtype(hidden, teacher_hidden)
        gradients = gradient_buffers(hidden, student.head, dtype, in_place=in_place)
        compiled = None
        if execution.backend is not None:
            shapes, formats = map(HeadShape.of, heads), Formats(dtype, hidden.dtype)
            compiled = compiled_tile(terms.method, shared_width, *shapes, formats, execution.backend)
        sizes = plan_sizes(hidden, heads, dtype, execution.chunk_tokens, in_tiles=compiled is None)
        buffers = pair_buffers(*heads, sizes, shared_width, execution.workspace or Workspace(), with_gradient=True)
        both = BothHeads(HeadInputs(hidden, student.head), HeadInputs(teacher_hidden, teacher.head), labels, tile_terms)
        cross_entropies, divergences = both.token_losses_and_gradients(sizes, buffers, factors, gradients, compiled)
        finish(gradients)
        cross_entropy, divergence = cross_entropies.sum(), divergences.sum()
        loss = mix(cross_entropy, tau_factor * divergence, terms.kd_weight) * scale
    return ObjectiveSum(join_graph(loss, gradients, hidden, student.head), cross_entropy, divergence)


@torch.no_grad()
def fused_token_losses(
    student: HeadInputs,
    teacher: HeadInputs,
    labels: Tensor,
    terms: ObjectiveTerms,
    *,
    execution: LossExecution | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence of each token without gradient; arguments, errors: :func:`fused_objective_sum`.

    Returns:
        Nats at temperature 1, `[tokens]`, and the divergence at the temperature of `terms` without tau squared,
        `[tokens]`.
    """
    execution = execution or LossExecution()
    terms.check()
    shared_width = terms.shared_width(len(student.head.weight), len(teacher.head.weight))
    tile_terms = TileTerms(divergence_of(terms.method), terms.temperature, shared_width)
    hidden, teacher_hidden = product_hidden_states(student, labels), product_hidden_states(teacher, labels)
    heads = (student.head, teacher.head)
    sizes = plan_sizes(hidden, heads, loss_dtype(hidden, teacher_hidden), execution.chunk_tokens)
    buffers = pair_buffers(*heads, sizes, shared_width, execution.workspace or Workspace())
    both = BothHeads(HeadInputs(hidden, student.head), HeadInputs(teacher_hidden, teacher.head), labels, tile_terms)
    return both.token_losses(sizes, buffers)
