"""Samples of random tokens that are as long as Dolly's under the paper's template.

`python -m bench.lengths DATA.jsonl TOKENIZER_DIRECTORY` prints the pairs of `data/dolly_lengths.json`.
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
"""The limits of the paper's experiments, in tokens."""
_FILE = Path(__file__).with_name("data") / "dolly_lengths.json"
_SPECIAL = 3
"""The number of special ids, which are never drawn: pad, begin, end."""

Lengths = tuple[int, int]
"""(prompt tokens, response tokens with the end token)."""


@cache
def dolly_lengths() -> tuple[Lengths, ...]:
    """The lengths of 500 samples of Dolly, truncated as in the paper, by ascending total length."""
    pairs = [_truncated(prompt, response) for prompt, response in json.loads(_FILE.read_text())["pairs"]]
    return tuple(sorted(pairs, key=lambda pair: (sum(pair), pair)))


def representative_lengths(count: int) -> list[Lengths]:
    """`count` lengths that stand for Dolly's: the one nearest to the mean of each of as many equal strata.

    All there are are taken as often as `count` exceeds them, and the rest stands for Dolly's.

    Raises:
        ValueError: for fewer than one.
    """
    if count < 1:
        raise ValueError("count must be at least 1")
    pairs = dolly_lengths()
    times, rest = divmod(count, len(pairs))
    edges = [len(pairs) * i // rest for i in range(rest + 1)] if rest else []
    return [*pairs * times, *(_nearest_to_mean(pairs[low:high]) for low, high in pairwise(edges))]


def random_samples(lengths: Sequence[Lengths], vocabulary: int, seed: int = 0) -> list[EncodedSample]:
    """A sample of random ids for each pair of lengths, in an order drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    samples = []
    for index in order:
        prompt, response = lengths[index]
        ids = torch.randint(_SPECIAL, vocabulary, (prompt + response,), generator=generator).tolist()
        samples.append(EncodedSample(digest=f"{index:064x}", input_ids=tuple(ids), prompt_length=prompt))
    return samples


def _truncated(prompt: int, response: int) -> Lengths:
    prompt = min(prompt, MAX_PROMPT_LENGTH)
    return prompt, min(response, MAX_LENGTH - prompt)


def _nearest_to_mean(pairs: Sequence[Lengths]) -> Lengths:
    prompt, response = (fmean(pair[side] for pair in pairs) for side in (0, 1))
    return min(pairs, key=lambda pair: abs(pair[0] - prompt) + abs(pair[1] - response))


def _measure(data: Path, tokenizer_directory: str) -> list[Lengths]:
    # These are needed only to make the file.
    from pocl.prompting.alpaca import alpaca_turns
    from pocl.prompting.tokenizer_files import read_tokenizer
    from pocl.samples.reading import read_samples

    tokenizer = read_tokenizer(Path(tokenizer_directory))
    lengths = []
    for sample in read_samples(data)[: len(dolly_lengths())]:
        (turn,) = alpaca_turns(sample)
        prompt, whole = (len(tokenizer.encode(text).ids) for text in (turn.prompt, f"{turn.prompt}{turn.answer}"))
        lengths.append((prompt, whole - prompt + 1))
    return lengths


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2])))
