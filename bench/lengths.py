"""Rows as long as real ones: token counts of Dolly under the paper's template, with random tokens in them.

`python -m bench.lengths ROWS.jsonl TOKENIZER_DIRECTORY` prints the pairs that `data/dolly_lengths.json` holds.
"""

import json
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch

from pocl.data.batches import EncodedSample

MAX_LENGTH = 512
MAX_PROMPT_LENGTH = 256
"""Of the paper's experiments."""
_FILE = Path(__file__).with_name("data") / "dolly_lengths.json"
_SPECIAL = 3
"""Ids below are never drawn: pad, begin, end."""

Lengths = tuple[int, int]
"""(prompt tokens, response tokens with the end token)."""


@cache
def dolly_lengths() -> tuple[Lengths, ...]:
    """500 rows of Dolly, cut as in the paper, in rising order of total length."""
    pairs = [_cut(prompt, response) for prompt, response in json.loads(_FILE.read_text())["pairs"]]
    return tuple(sorted(pairs, key=lambda pair: (sum(pair), pair)))


def representative_lengths(rows: int) -> list[Lengths]:
    """`rows` lengths that stand for the dolly_lengths: of each of as many equal slices the row nearest to its mean.

    Raises:
        ValueError: for more rows than the dolly_lengths has.
    """
    pairs = dolly_lengths()
    if not 1 <= rows <= len(pairs):
        raise ValueError(f"rows must lie between 1 and {len(pairs)}")
    edges = [len(pairs) * i // rows for i in range(rows + 1)]
    return [_nearest_to_mean(pairs[low:high]) for low, high in pairwise(edges)]


def random_samples(lengths: Sequence[Lengths], vocabulary: int, seed: int = 0) -> list[EncodedSample]:
    """A row of random ids for each pair of lengths, in an order drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    rows = []
    for at in order:
        prompt, response = lengths[at]
        ids = torch.randint(_SPECIAL, vocabulary, (prompt + response,), generator=generator).tolist()
        rows.append(EncodedSample(digest=f"{at:064x}", input_ids=tuple(ids), prompt_length=prompt))
    return rows


def _cut(prompt: int, response: int) -> Lengths:
    kept = min(prompt, MAX_PROMPT_LENGTH)
    return kept, min(response, MAX_LENGTH - kept)


def _nearest_to_mean(pairs: Sequence[Lengths]) -> Lengths:
    prompt, response = (fmean(pair[side] for pair in pairs) for side in (0, 1))
    return min(pairs, key=lambda pair: abs(pair[0] - prompt) + abs(pair[1] - response))


def _measure(rows: Path, tokenizer_directory: str) -> list[Lengths]:
    # Needed for making the file alone.
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from pocl.data.prompting import Prompting, assistant_turns, token_ids
    from pocl.data.samples import read_samples

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer_directory)
    lengths = []
    for sample in read_samples(rows)[: len(dolly_lengths())]:
        (turn,) = assistant_turns(sample, tokenizer, Prompting.ALPACA, 0)
        prompt, whole = (len(token_ids(tokenizer, text)) for text in (turn.prompt, turn.prompt + turn.answer))
        lengths.append((prompt, whole - prompt + 1))
    return lengths


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2])))
