"""From the samples of one optimiser step to what is in memory at once."""

from collections.abc import Sequence

from pocl.data.batches import EncodedSample

BUCKETS = 4
"""Sizes of micro-batches that are to have few shapes, up to the budget of tokens: torch.compile keeps eight at most."""


def micro_batches(
    samples: Sequence[EncodedSample], *, max_samples: int, max_tokens: int, packed: bool
) -> list[list[EncodedSample]]:
    """The samples of each batch of :func:`indices_by_length`."""
    batches = indices_by_length(samples, max_samples=max_samples, max_tokens=max_tokens, packed=packed)
    return [[samples[index] for index in batch] for batch in batches]


def indices_by_length(
    samples: Sequence[EncodedSample], *, max_samples: int, max_tokens: int, packed: bool
) -> list[list[int]]:
    """Sort samples by length and split them, so that no batch has more samples or tokens than is allowed.

    Tokens include padding unless `packed`. The composition of the optimiser batch is not touched: the sum over its
    samples is the same however they are split. A sample longer than `max_tokens` is alone in its batch. The result
    depends on the set of samples, not on their order.
    """
    pieces: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(samples)), key=lambda i: (len(samples[i].input_ids), samples[i].digest, i)):
        length = len(samples[index].input_ids)
        # The samples before are not longer, and padded would be as long.
        grown = tokens + length if packed or not pieces else (len(pieces[-1]) + 1) * length
        if not pieces or len(pieces[-1]) >= max_samples or grown > max_tokens:
            pieces.append([])
            grown = length
        pieces[-1].append(index)
        tokens = grown
    return pieces


def bucket_of(tokens: int, max_tokens: int) -> int:
    """The tokens that a micro-batch of `tokens` tokens is filled up to: a multiple of a fourth of its budget.

    Only a single sample that is longer than the budget has more than that.
    """
    part = -(-max_tokens // BUCKETS)
    return -(-tokens // part) * part
