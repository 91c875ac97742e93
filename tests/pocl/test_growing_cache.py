"""The growing cache shows a model what the dynamic cache of transformers would."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from pocl.models.growing_cache import growing_cache
from tests.pocl.tiny_models import CONFIGS

moves = st.lists(st.one_of(st.integers(1, 40), st.lists(st.booleans(), min_size=8, max_size=8)), max_size=12)


@given(st.sampled_from(["llama", "gemma2"]), moves, st.sampled_from([1, 100, 1000]))
def test_any_order_of_tokens_and_selections(family: str, moves: list[int | list[bool]], longest: int) -> None:
    ours, theirs = growing_cache(CONFIGS[family], longest), DynamicCache(config=CONFIGS[family])
    rows = 8
    generator = torch.Generator().manual_seed(0)
    for move in [3, *moves]:
        if isinstance(move, int):
            keys, values = torch.rand(2, rows, 2, move, 4, generator=generator)
            for layer in range(4):
                seen, expected = ours.update(keys, values, layer), theirs.update(keys, values, layer)
                assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))
        elif any(move[:rows]):
            kept = torch.tensor(move[:rows]).nonzero()[:, 0]
            rows = len(kept)
            ours.batch_select_indices(kept)
            theirs.batch_select_indices(kept)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 1) == theirs.get_mask_sizes(1, 1)
