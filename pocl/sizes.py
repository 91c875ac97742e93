"""How much of its work a run does at once: chosen once, after the models are loaded, and pinned in `spec.json`.

Larger sizes keep a GPU busier and take more memory. They change the rounding of a run and nothing else, so a resumed
run keeps those that it began with. On a CPU they are constants. On a GPU they follow from the free memory and the
shapes of the models, in powers of two, so that a little more or less free memory changes nothing.

The estimates count what grows with a size, and are upper bounds for the families that tests measure:

    training state    12 bytes a parameter for gradient and AdamW's moments; with bf16 products 2 more, for the gradient
                      of the weights' copy
    micro-batch       what autograd keeps of a token: bytes in proportion to the inputs and outputs of all products
    loss chunk        buffers of a response token, each of one number a vocabulary entry
    generation        keys and values of prompt and answer, one layer's activations of the prompt, logits
    scoring           one layer's activations; without a fused head logits as well

What room is left after the training state, and the teacher where it is not loaded yet, is rounded down to a power of
two. The activations of a micro-batch may take half of it and the loss's buffers an eighth at the same time; generation
may take three quarters of it and scoring a quarter. The rest is for fragmentation. Where an estimate is wrong all the
same, memory runs out and the size is halved (:mod:`pocl.out_of_memory`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from transformers import PreTrainedModel

from pocl.errors import OutOfMemory
from pocl.losses.buffers import default_chunk_tokens
from pocl.models.precision import Precision
from pocl.out_of_memory import HalvedSize, release_memory
from pocl.spec import DistillationSpec
from pocl.train.accumulation import MICRO_BATCH_TOKENS

CPU_GENERATION_ROWS = 16
"""Rows in flight of generation on a CPU."""
CPU_SCORING_TOKENS = 4096
"""Tokens that a CPU scores at once, unless a head that is not fused would make more than `_CPU_LOGITS`."""
_CPU_LOGITS = 1 << 25
"""Tokens times vocabulary: 128 MiB in fp32."""

_SMALLEST, _LARGEST_BATCH = 64, 1 << 16
"""Tokens of a micro-batch and of a scoring batch on a GPU; beyond the larger, products gain nothing."""
_SMALLEST_CHUNK, _LARGEST_CHUNK = 16, 1 << 14
_LARGEST_ROWS = 512
_CHUNK_BUDGET = 4 << 30
"""Bytes that the buffers of a chunk may take at most."""
_CHUNK_BUFFERS = 9
"""fp32 buffers of a chunk's size, with those that a divergence makes for itself."""
_KEPT_BYTES = {2: 6, 4: 9}
"""Bytes that autograd keeps for each input and output of a product, by the bytes of a number in products: attention,
norms and activation functions included, which scale alike. The most that was measured is 5.6 and 8.8 (GPT-2)."""
_LOGIT_BYTES_TRAINED, _LOGIT_BYTES_SCORED = 32, 16
"""Bytes for each logit where the head is not fused: fp32 logits of student and teacher, their softmax and gradient."""
_LOGIT_BYTES_SAMPLED = 48
"""Bytes for each logit that a token is sampled from: fp32, and float64 probabilities, sorted and summed."""


@dataclass(frozen=True)
class RunSizes:
    """The sizes of a run."""

    micro_batch_tokens: int
    """The most prompt and response tokens of a micro-batch, padding included."""
    loss_chunk_tokens: int
    """The most response tokens whose logits are in memory at once."""
    generation_rows: int
    """Rows in flight of generation."""
    scoring_tokens: int
    """The most prompt and response tokens that are scored at once, padding included."""

    @classmethod
    def pinned_in(cls, spec: DistillationSpec) -> Self:
        """The sizes of a specification that names them all.

        Raises:
            ValueError: one of them is null.
        """
        training, evaluation = spec.training, spec.evaluation
        sizes = (
            training.micro_batch_tokens,
            training.loss_chunk_tokens,
            evaluation.batch_size,
            evaluation.scoring_tokens,
        )
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            raise ValueError("a size is not pinned yet")
        return cls(*known)

    @property
    def choices(self) -> Mapping[str, Mapping[str, int]]:
        """The sizes as fields of a specification, by part."""
        return {
            "training": {
                "micro_batch_tokens": self.micro_batch_tokens,
                "loss_chunk_tokens": self.loss_chunk_tokens,
            },
            "evaluation": {"batch_size": self.generation_rows, "scoring_tokens": self.scoring_tokens},
        }

    def halved(self, size: HalvedSize) -> Self:
        """The sizes with `size` halved.

        Raises:
            OutOfMemory: it is 1 already.
        """
        value: int = getattr(self, size)
        if value == 1:
            raise OutOfMemory(f"Memory ran out with {_NAMES[size]} of 1.")
        return replace(self, **{size: value // 2})


_NAMES: Mapping[HalvedSize, str] = {
    "generation_rows": "evaluation.batch_size",
    "scoring_tokens": "evaluation.scoring_tokens",
}
"""The fields of the specification that hold the sizes."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that its use of memory follows from."""

    parameters: int
    layers: int
    products: int
    """Inputs and outputs of all products of a token with a weight; embeddings and output head aside."""
    cached: int
    """Numbers that the key-value cache holds for a token."""
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The shape of a model, read from its config and weights."""
        config = model.config.get_text_config()
        # A family without attention has no key-value cache; it is treated as if it had one of a single head.
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        head_width = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
        shared_heads = getattr(config, "num_key_value_heads", None) or heads
        experts_per_token = getattr(config, "num_experts_per_tok", None) or 1
        layers = int(config.num_hidden_layers)
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=layers,
            products=_products(model, int(experts_per_token)),
            cached=2 * layers * int(shared_heads) * int(head_width),
            vocabulary=int(config.vocab_size),
        )


@dataclass(frozen=True)
class Workload:
    """What a run does, as far as its use of memory depends on it."""

    student: ModelShape
    teacher: ModelShape | None
    number_bytes: int
    """Bytes of a number in products: 2 with bf16, 4 with fp32."""
    has_fused_head: bool
    """Whether head and loss are fused, so that logits exist chunk by chunk alone."""
    prompt_tokens: int
    """The most tokens of a prompt."""
    answer_tokens: int
    """The most tokens of a generated answer."""
    unloaded_parameters: int = 0
    """Parameters of the teacher that are not in memory yet, and will be if they are needed."""

    @classmethod
    def of(
        cls,
        spec: DistillationSpec,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        *,
        precision: Precision,
        has_fused_head: bool,
    ) -> Self:
        """The work of a run of `spec` with these models, of which the teacher may be on the meta device."""
        return cls(
            student=ModelShape.of(student),
            teacher=None if teacher is None else ModelShape.of(teacher),
            unloaded_parameters=0 if teacher is None else _unloaded_parameters(teacher),
            number_bytes=precision.weights.itemsize,
            has_fused_head=has_fused_head,
            prompt_tokens=spec.data.max_prompt_length,
            answer_tokens=max(spec.curriculum.ranking.max_new_tokens, spec.evaluation.max_new_tokens),
        )

    @property
    def training_state_bytes(self) -> int:
        """Gradients and the moments of AdamW, and the gradients of the weights' copy in the format of the products."""
        copy = self.number_bytes if self.number_bytes < 4 else 0
        return self.student.parameters * (12 + copy)

    @property
    def unloaded_bytes(self) -> int:
        """Weights of the teacher that are not in memory yet."""
        return self.number_bytes * self.unloaded_parameters

    @property
    def micro_batch_token_bytes(self) -> int:
        """What a token of a micro-batch takes until its backward pass."""
        logits = 0 if self.has_fused_head else _LOGIT_BYTES_TRAINED * self.vocabulary
        return _KEPT_BYTES[self.number_bytes] * self.student.products + logits

    @property
    def chunk_token_bytes(self) -> int:
        """What a response token of a chunk of the fused loss takes."""
        return 4 * _CHUNK_BUFFERS * self.vocabulary

    @property
    def generation_row_bytes(self) -> int:
        """What a row in flight of generation takes, of the larger model."""
        cached = max(shape.cached for shape in self._shapes) * (self.prompt_tokens + self.answer_tokens)
        prefill = self.prompt_tokens * self._layer_bytes
        return self.number_bytes * cached + prefill + _LOGIT_BYTES_SAMPLED * self.vocabulary

    @property
    def scoring_token_bytes(self) -> int:
        """What a token that is scored takes, of the larger model."""
        logits = 0 if self.has_fused_head else _LOGIT_BYTES_SCORED * self.vocabulary
        return self._layer_bytes + logits

    @property
    def _shapes(self) -> tuple[ModelShape, ...]:
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @property
    def vocabulary(self) -> int:
        """Tokens of the larger head."""
        return max(shape.vocabulary for shape in self._shapes)

    @property
    def _layer_bytes(self) -> int:
        """A token's inputs and outputs of the products of one layer, each twice: without gradients no more is kept."""
        return max(2 * self.number_bytes * shape.products // shape.layers for shape in self._shapes)


def choose_sizes(workload: Workload, free_bytes: int | None) -> RunSizes:
    """The sizes for `workload` on a GPU with `free_bytes` of free memory once the models are loaded; None: on a CPU."""
    if free_bytes is None:
        scoring = CPU_SCORING_TOKENS
        if not workload.has_fused_head:
            scoring = max(1, min(scoring, _CPU_LOGITS // workload.student.vocabulary))
        chunk = default_chunk_tokens(workload.vocabulary, workload.number_bytes)
        return RunSizes(MICRO_BATCH_TOKENS, chunk, CPU_GENERATION_ROWS, scoring)
    room = _power_of_two_below(free_bytes - workload.training_state_bytes - workload.unloaded_bytes)
    return RunSizes(
        micro_batch_tokens=_fitting(room // 2, workload.micro_batch_token_bytes, _SMALLEST, _LARGEST_BATCH),
        loss_chunk_tokens=_fitting(
            min(_CHUNK_BUDGET, room // 8), workload.chunk_token_bytes, _SMALLEST_CHUNK, _LARGEST_CHUNK
        ),
        generation_rows=_fitting(room * 3 // 4, workload.generation_row_bytes, 1, _LARGEST_ROWS),
        scoring_tokens=_fitting(room // 4, workload.scoring_token_bytes, _SMALLEST, _LARGEST_BATCH),
    )


def measure_free_memory(device: torch.device) -> int | None:
    """The bytes of a GPU that nobody uses, those included that the allocator holds idle; None for a CPU."""
    if device.type != "cuda":
        return None
    # What loading has left behind is free, once it is collected.
    release_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _fitting(budget: int, bytes_each: int, smallest: int, largest: int) -> int:
    """The largest power of two within both bounds that fits into `budget` bytes, else `smallest`."""
    return max(smallest, min(largest, _power_of_two_below(budget // bytes_each)))


def _power_of_two_below(number: int) -> int:
    """The largest power of two that is not above `number`; 0 below 1."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0


def _unloaded_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.is_meta)


def _products(model: PreTrainedModel, experts_per_token: int) -> int:
    """Inputs and outputs of the products of a token, embeddings and output head aside.

    A weight of two dimensions is one product. One of three holds an expert in each entry of the first, of which a token
    passes `experts_per_token`.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    width = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or any(module is end for end in ends):
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() == 2:
                width += sum(weight.shape)
            elif weight.dim() == 3:
                width += sum(weight.shape[1:]) * min(weight.shape[0], experts_per_token)
    return width
