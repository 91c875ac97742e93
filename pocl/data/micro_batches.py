"""From the samples of one optimiser step to what is in memory at once."""

from collections.abc import Sequence

from pocl.data.batches import EncodedSample


def micro_batches(
    samples: Sequence[EncodedSample], *, max_samples: int, max_tokens: int, packed: bool
) -> list[list[EncodedSample]]:
    """Sort samples by length and split them, so that no micro-batch has more samples or tokens than is allowed.

    Tokens include padding unless `packed`. The composition of the optimiser batch is not touched: the sum over its
    samples is the same however they are split. A sample longer than `max_tokens` is alone in its micro-batch. The
    result depends on the set of samples, not on their order.
    """
    pieces: list[list[EncodedSample]] = []
    tokens = 0
    for sample in sorted(samples, key=lambda sample: (len(sample.input_ids), sample.digest)):
        length = len(sample.input_ids)
        # The samples before are not longer, and padded would be as long.
        grown = tokens + length if packed or not pieces else (len(pieces[-1]) + 1) * length
        if not pieces or len(pieces[-1]) >= max_samples or grown > max_tokens:
            pieces.append([])
            grown = length
        pieces[-1].append(sample)
        tokens = grown
    return pieces
