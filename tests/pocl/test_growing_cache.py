"""The growing cache gives a model the keys and values of the dynamic cache of transformers."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from pocl.models.growing_cache import growing_cache
from tests.pocl.tiny_models import CONFIGS

operations = st.lists(st.one_of(st.integers(1, 40), st.lists(st.booleans(), min_size=8, max_size=8)), max_size=12)


@given(st.sampled_from(["llama", "gemma2"]), operations, st.sampled_from([1, 100, 1000]))
def test_growing_cache_equals_the_dynamic_cache_after_any_operations(
    family: str, operations: list[int | list[bool]], max_tokens: int
) -> None:
    growing, dynamic = growing_cache(CONFIGS[family], max_tokens), DynamicCache(config=CONFIGS[family])
    sequences = 8
    generator = torch.Generator().manual_seed(0)
    for operation in [3, *operations]:
        if isinstance(operation, int):
            keys, values = torch.rand(2, sequences, 2, operation, 4, generator=generator)
            for layer in range(4):
                actual, expected = growing.update(keys, values, layer), dynamic.update(keys, values, layer)
                assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
        elif any(operation[:sequences]):
            selected = torch.tensor(operation[:sequences]).nonzero()[:, 0]
            sequences = len(selected)
            growing.batch_select_indices(selected)
            dynamic.batch_select_indices(selected)
        assert growing.get_seq_length() == dynamic.get_seq_length()
        assert growing.get_mask_sizes(1, 1) == dynamic.get_mask_sizes(1, 1)
