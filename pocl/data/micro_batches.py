"""From the samples of one optimiser step to what is in memory at once."""

from collections.abc import Sequence

from pocl.data.batches import Encoded


def micro_batches(rows: Sequence[Encoded], *, max_rows: int, max_tokens: int, packed: bool) -> list[list[Encoded]]:
    """Sort by length and cut, so that none has more rows, or more tokens with its padding, than is allowed.

    The composition of the optimiser batch is not touched: the sum over its samples is the same however they are cut.
    A row that is longer than `max_tokens` is alone. The result depends on the set of rows, not on their order.
    """
    cut: list[list[Encoded]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (len(row.input_ids), row.digest)):
        length = len(row.input_ids)
        # The rows before are not longer, and padded would be as long.
        grown = tokens + length if packed or not cut else (len(cut[-1]) + 1) * length
        if not cut or len(cut[-1]) >= max_rows or grown > max_tokens:
            cut.append([])
            grown = length
        cut[-1].append(row)
        tokens = grown
    return cut
