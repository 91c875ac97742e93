"""The heads of student and teacher over all tokens of a micro-batch, chunk by chunk and tile by tile."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pocl.losses.backprojection import add_chunk, uncap_gradient
from pocl.losses.buffers import GradientBuffers, PairBuffers, Sizes
from pocl.losses.compiled_tile import CompiledTile, Numbers
from pocl.losses.projection import Projection
from pocl.losses.tile import GradientFactors, TileTerms, token_losses_, token_losses_and_grad_
from pocl.models.output_head import HeadInputs


@dataclass(frozen=True, eq=False)
class BothHeads:
    """What both output heads are applied to; hidden states are in the format of the products."""

    student: HeadInputs
    teacher: HeadInputs
    labels: Tensor
    """`[tokens]`: the token that each hidden state predicts."""
    terms: TileTerms

    def token_losses(self, sizes: Sizes, buffers: PairBuffers) -> tuple[Tensor, Tensor]:
        """Cross-entropy and divergence of each token, `[tokens]` each; call it without gradients."""
        student, teacher, labels = self.student, self.teacher, self.labels
        cross_entropies = torch.empty(len(labels), dtype=sizes.dtype, device=labels.device)
        divergences = torch.empty_like(cross_entropies)
        student_head = Projection(student.head, student.hidden.dtype, buffers.student)
        teacher_head = Projection(teacher.head, teacher.hidden.dtype, buffers.teacher)
        # The format of every product is settled by now.
        with torch.autocast(labels.device.type, enabled=False):
            for chunk, tiles in sizes.chunks:
                linear = student_head.linear(student.hidden[chunk])
                teacher_linear = teacher_head.linear(teacher.hidden[chunk])
                for tokens, tile in tiles:
                    logits = student_head.logits(linear[tile])
                    teacher_logits = teacher_head.logits(teacher_linear[tile])
                    cross_entropies[tokens], divergences[tokens] = token_losses_(
                        logits, teacher_logits, labels[tokens], self.terms, buffers.tile
                    )
        return cross_entropies, divergences

    def token_losses_and_gradients(
        self,
        sizes: Sizes,
        buffers: PairBuffers,
        factors: GradientFactors,
        gradients: GradientBuffers,
        compiled: CompiledTile | None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`token_losses`; the gradients of the objective are added to `gradients`.

        Args:
            compiled: What takes a whole chunk at a time; None where chunks are cut into tiles.
        """
        student, teacher, labels = self.student, self.teacher, self.labels
        cross_entropies = torch.empty(len(labels), dtype=sizes.dtype, device=labels.device)
        divergences = torch.empty_like(cross_entropies)
        student_head = Projection(student.head, student.hidden.dtype, buffers.student)
        teacher_head = Projection(teacher.head, teacher.hidden.dtype, buffers.teacher)
        with torch.autocast(labels.device.type, enabled=False):
            for chunk, tiles in sizes.chunks:
                hidden = student.hidden[chunk]
                linear, teacher_linear = student_head.linear(hidden), teacher_head.linear(teacher.hidden[chunk])
                if compiled is not None:
                    numbers = Numbers.of(self.terms, factors, sizes.dtype, labels.device)
                    cross_entropies[chunk], divergences[chunk], gradient = compiled(
                        linear, teacher_linear, labels[chunk], numbers
                    )
                else:
                    gradient = linear if linear.dtype == hidden.dtype else torch.empty_like(linear, dtype=hidden.dtype)
                for tokens, tile in tiles:
                    logits = student_head.logits(linear[tile])
                    cap_derivative = student_head.cap_derivative(logits)
                    teacher_logits = teacher_head.logits(teacher_linear[tile])
                    cross_entropies[tokens], divergences[tokens] = token_losses_and_grad_(
                        logits, teacher_logits, labels[tokens], self.terms, factors, buffers.tile
                    )
                    uncap_gradient(logits, cap_derivative, out=gradient[tile])
                add_chunk(gradients, gradient, hidden, student_head.weight, chunk)
        return cross_entropies, divergences
