"""Where the teacher's hidden states are kept, and in which batches they are computed.

A shard is an entry of the shared cache: the states of some samples at the positions that predict a response token,
one sample behind the other, in a file that is memory-mapped; `rows.json` names the samples by their content. Shards of
equal states have one kind, a digest of all that the bits of a state depend on besides its own sample.

The bits of a state depend on the shapes of the products. So the shape of a batch follows from the padded length alone,
`[batch tokens / length, length]`: the last batch is filled up with dummy samples. Then the states of a sample do not
depend on which samples share its batch, and any shard may be computed at any time, by any job, in any order.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl.data.batches import Batch, EncodedSample, collate
from pocl.models.heads import output_head
from pocl.models.precision import Precision, machine_fingerprint
from pocl.storage.shared_cache import ENTRY_OVERHEAD_BYTES

LAYOUT = 2
"""Part of every kind; to be raised when the states or the files of a shard change for equal inputs."""
PAD_MULTIPLE = 64
"""Padded lengths are multiples of this many tokens."""
CPU_BATCH_TOKENS = 512
"""Tokens of a batch of the teacher on a CPU, padding and dummy samples included: enough for fast products. Of
64 samples with 11,429 tokens a teacher runs on 14,144; with batches of 4,096 it ran on 32,128."""
MIN_GPU_BATCH_TOKENS = 4096
MAX_BATCH_TOKENS = 65536
TOKENS_PER_GIB = 512
"""Tokens of a batch for each GiB of a GPU's memory: 32,768 at 80 GiB."""
SHARD_TOKENS = 16384
"""Response tokens after which a shard ends: what an interruption costs at most."""
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest difference of stored states to the live teacher's by the format of products, relative to the largest state.
Products of equal shape differ by nothing on most machines; the states of another teacher differ by about 1."""
SHARD_OVERHEAD_BYTES = ENTRY_OVERHEAD_BYTES + 1024
"""At most so many bytes does a shard take besides its states and rows."""
ROW_OVERHEAD_BYTES = 100
"""At most so many bytes does a sample take besides its states: its digest and its number of tokens."""
_STATES, _ROWS = "hidden.safetensors", "rows.json"
_DUMMY = EncodedSample(digest="", input_ids=(0,), prompt_length=1)


def batch_tokens_for(total_memory: int | None) -> int:
    """Tokens of a batch of the teacher: a power of two that follows from a GPU's total memory; None on a CPU.

    Args:
        total_memory: Bytes, whether free or not: what else is on the card must not change the bits of a state.
    """
    if total_memory is None:
        return CPU_BATCH_TOKENS
    tokens = max(1, (total_memory >> 30) * TOKENS_PER_GIB)
    return min(MAX_BATCH_TOKENS, max(MIN_GPU_BATCH_TOKENS, 1 << (tokens.bit_length() - 1)))


def choose_batch_tokens(device: torch.device) -> int:
    """Tokens of a batch of the teacher on `device`."""
    is_gpu = device.type == "cuda"
    return batch_tokens_for(torch.cuda.get_device_properties(device).total_memory if is_gpu else None)


def shard_kind(digest: str, model: PreTrainedModel, precision: Precision, batch_tokens: int) -> str:
    """The kind of all shards whose states would be equal: those of one teacher, computed alike.

    Args:
        digest: Digest of the teacher's weights and config.
        model: The teacher, with or without its weights.
    """
    parts = {
        "layout": LAYOUT,
        "weights": digest,
        "precision": precision.name,
        "attention": model.config._attn_implementation,
        "pad_multiple": PAD_MULTIPLE,
        "batch_tokens": batch_tokens,
        # The threads of the host divide no product of a GPU.
        "machine": machine_fingerprint(precision.device, with_threads=precision.device.type == "cpu"),
    }
    return f"teacher-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"


@dataclass(frozen=True)
class TeacherBatch:
    """Samples that the teacher runs on together, padded to `[rows, length]`."""

    samples: tuple[EncodedSample, ...]
    """At most `rows`; dummy samples fill the rest."""
    rows: int
    length: int

    @property
    def predicted_tokens(self) -> int:
        """Response tokens that the batch has states of."""
        return sum(sample.predicted_tokens for sample in self.samples)

    def collate(self, device: torch.device) -> Batch:
        """The batch as tensors, whose attention mask hides nothing.

        No token attends to what stands behind it, so padding on the right needs no mask, and attention takes one kernel
        whether there is padding or not.
        """
        dummies = [_DUMMY] * (self.rows - len(self.samples))
        batch = collate([*self.samples, *dummies], device=device, length=self.length)
        batch.attention_mask.fill_(1)
        return batch


def padded_length(sample: EncodedSample, max_positions: int | None) -> int:
    """The length that a sample is padded to; `max_positions` is the teacher's longest input, None for no limit."""
    multiple = -(-len(sample.input_ids) // PAD_MULTIPLE) * PAD_MULTIPLE
    return multiple if max_positions is None else max(len(sample.input_ids), min(multiple, max_positions))


def plan_batches(
    samples: Sequence[EncodedSample], batch_tokens: int, max_positions: int | None
) -> tuple[TeacherBatch, ...]:
    """Divide distinct samples into batches, short samples first."""
    by_length: dict[int, list[EncodedSample]] = {}
    for sample in sorted(samples, key=lambda sample: (padded_length(sample, max_positions), sample.content_digest)):
        by_length.setdefault(padded_length(sample, max_positions), []).append(sample)
    return tuple(
        TeacherBatch(tuple(alike[start : start + rows]), rows, length)
        for length, alike in by_length.items()
        for rows in [max(1, batch_tokens // length)]
        for start in range(0, len(alike), rows)
    )


def max_positions_of(model: PreTrainedModel) -> int | None:
    """The longest input of a model in tokens; None for no limit."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    return positions


def stored_format(model: PreTrainedModel, precision: Precision) -> torch.dtype | None:
    """The dtype that states are kept in; None where they are kept as they are.

    A linear head under autocast rounds its input to bf16, so that nothing is lost where that is done before.
    """
    return torch.bfloat16 if precision.name == "bf16" and type(output_head(model)) is nn.Linear else None


@dataclass(frozen=True)
class ShardRows:
    """The samples of a shard, in the order of its file."""

    head: str
    """Digest of the head that the states are the input of."""
    rows: dict[str, int]
    """Response tokens with a state, by the content digest of the sample."""

    @property
    def key(self) -> str:
        """The key of the shard in the cache: it follows from the samples."""
        return hashlib.sha256("".join(sorted(self.rows)).encode()).hexdigest()

    @classmethod
    def read(cls, shard: Path) -> "ShardRows | None":
        """Read the rows of a shard; None where it was evicted meanwhile, or is damaged."""
        try:
            content = json.loads((shard / _ROWS).read_bytes())
            return cls(str(content["head"]), {str(name): int(tokens) for name, tokens in content["rows"].items()})
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, shard: Path, states: Tensor) -> None:
        """Write the files of a shard; `states` are `[tokens of all rows, width]`."""
        content = json.dumps({"head": self.head, "rows": self.rows})
        (shard / _ROWS).write_text(content, encoding="utf-8")
        save_file({"hidden": states}, shard / _STATES)

    def map_states(self, shard: Path) -> Iterator[tuple[str, Tensor]]:
        """Content digest and states of each sample, as views into the memory-mapped file."""
        states = load_file(shard / _STATES)["hidden"]
        yield from zip(self.rows, torch.split(states, list(self.rows.values())), strict=True)
