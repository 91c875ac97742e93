"""The places of packed samples are right for any lengths, and rows are grouped where attention is cheapest."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocl.data.packing import LENGTH_MULTIPLE, MAX_GROUPS, Packing, group_by_length
from pocl.data.transfer import to_device

LENGTHS = st.lists(st.integers(0, 130), min_size=1, max_size=9).filter(any)


@given(LENGTHS)
def test_every_token_has_one_place_and_a_row_repeats_its_last_token(lengths: list[int]) -> None:
    packing = Packing.of(lengths)
    tokens = sum(lengths)
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    assert packing.position_ids.tolist() == [[position for length in lengths for position in range(length)]]
    assert packing.padded_to_packed[packing.packed_to_padded].tolist() == list(range(tokens))
    assert not packing.is_padding[packing.packed_to_padded].any()
    assert len(packing.is_padding) - int(packing.is_padding.sum()) == tokens
    sample_of_token = np.repeat(np.arange(len(lengths)), lengths)
    for group in packing.groups:
        rows = packing.padded_to_packed[group.start : group.start + group.size].view(group.rows, group.length)
        for row in rows.numpy():
            (sample,) = set(sample_of_token[row].tolist())
            first = sum(lengths[:sample])
            assert row.tolist() == [first + min(place, lengths[sample] - 1) for place in range(group.length)]


@given(LENGTHS, st.integers(1, 3))
def test_places_of_heads_are_those_of_their_tokens(lengths: list[int], kv_heads: int) -> None:
    packing = Packing.of(lengths)
    index = packing.head_index(kv_heads)
    rows = torch.arange(sum(lengths) * kv_heads)
    assert torch.equal(index.padded_to_packed[index.packed_to_padded], rows)
    token, head = index.padded_to_packed // kv_heads, index.padded_to_packed % kv_heads
    for group in packing.groups:
        part = slice(group.start * kv_heads, (group.start + group.size) * kv_heads)
        shape = (group.rows, kv_heads, group.length)
        expected = packing.padded_to_packed[group.start : group.start + group.size].view(group.rows, 1, group.length)
        assert torch.equal(token[part].view(shape), expected.expand(shape))
        assert torch.equal(head[part].view(shape), torch.arange(kv_heads)[:, None].expand(shape))
        padding = packing.is_padding[group.start : group.start + group.size].view(group.rows, 1, group.length)
        assert torch.equal(index.is_padding[part, 0].view(shape), padding.expand(shape))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8).map(sorted))
def test_rows_are_grouped_where_their_scores_are_fewest(lengths: list[int]) -> None:
    def scores(groups: list[tuple[int, int]]) -> int:
        return sum((stop - first) * math.ceil(lengths[stop - 1] / LENGTH_MULTIPLE) ** 2 for first, stop in groups)

    groups = group_by_length(np.array(lengths))
    assert [first for first, _ in groups] == [0, *(stop for _, stop in groups[:-1])]
    assert groups[-1][1] == len(lengths)
    assert len(groups) <= MAX_GROUPS
    cuts = (
        list(pairwise([0, *inner, len(lengths)]))
        for count in range(MAX_GROUPS)
        for inner in combinations(range(1, len(lengths)), count)
    )
    assert scores(groups) == min(map(scores, cuts))


@given(st.integers(1, 40).map(lambda units: units * LENGTH_MULTIPLE))
def test_blocks_of_queries_divide_a_row(length: int) -> None:
    packing = Packing.of([length])
    (group,) = packing.groups
    edges = [edge for block in group.query_blocks for edge in block]
    assert edges[0] == 0
    assert edges[-1] == length
    assert edges[1:-1:2] == edges[2::2]
    assert all(start < stop for start, stop in group.query_blocks)


def test_the_mask_hides_later_keys_from_every_head() -> None:
    mask = Packing.of([64]).causal_mask((32, 64), 3, torch.float32)
    assert mask.shape == (1, 96, 64)
    for row in range(96):
        assert mask[0, row].isfinite().tolist() == [key <= 32 + row // 3 for key in range(64)]


@pytest.mark.parametrize("device", [None, "cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_arrays_keep_their_shapes_and_formats_on_any_device(device: str | None) -> None:
    arrays = {
        "flags": np.array([[True, False, True]]),
        "long": np.arange(6).reshape(2, 3),
        "none": np.zeros((0,), dtype=np.int64),
        "short": np.arange(5, dtype=np.int32),
    }
    tensors = to_device(arrays, device)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: array.shape for name, array in arrays.items()
    }
    assert [tensor.dtype for tensor in tensors.values()] == [torch.bool, torch.int64, torch.int64, torch.int32]
    assert len({tensor.untyped_storage()._cdata for tensor in tensors.values()}) == 1
    if device != "meta":
        for name, array in arrays.items():
            assert np.array_equal(tensors[name].cpu().numpy(), array)


def test_an_array_of_another_format_is_refused() -> None:
    with pytest.raises(KeyError):
        to_device({"half": np.zeros(3, dtype=np.float16)}, None)
