"""Attention of packed samples is that of each by itself: by the varlen kernel, and by batched products."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocl.data.packing import Packing
from pocl.models.batched_attention import LONGEST_EXPLICIT, batched_attention
from pocl.models.packed import VarlenKernel, packed_attention
from tests.pocl.tiny_models import tiny
from tests.pocl.varlen_functions import varlen_attn_2_11, varlen_attn_2_12

Attention = Callable[[Tensor, Tensor, Tensor, Packing, float], Tensor]


def attend_in_batches(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    return batched_attention(query, key, value, packing, scale=scale, dropout=0.0)


def attend_by_kernel_2_11(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    return VarlenKernel(varlen_attn_2_11)(query, key, value, packing, scale=scale)


def attend_by_kernel_2_12(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    return VarlenKernel(varlen_attn_2_12)(query, key, value, packing, scale=scale)


def sample_by_sample(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """softmax(scale Q K^T + mask) V of each sample and head by itself."""
    outputs = []
    times = query.shape[1] // key.shape[1]
    for q, k, v in zip(*(states.split(lengths) for states in (query, key, value)), strict=True):
        heads = []
        for head in range(q.shape[1]):
            scores = scale * q[:, head] @ k[:, head // times].T
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[:, head // times])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


def states(
    tokens: int, heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width)]
    return [torch.randn(tokens, *shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def output_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], *rest: object) -> list[Tensor]:
    output = attend(*inputs, *rest)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, inputs, weights)]


@pytest.mark.parametrize("attend", [attend_in_batches, attend_by_kernel_2_11, attend_by_kernel_2_12])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width"),
    [(2, 2, 8, 8), (6, 2, 16, 16), (3, 1, 7, 7), (4, 4, 20, 12), (4, 2, 9, 16)],
    ids=["plain", "shared heads", "odd width, one head of keys", "narrow values", "wide values"],
)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_packed_attention_is_that_of_each_sample(
    attend: Attention, heads: int, kv_heads: int, width: int, value_width: int, lengths: list[int]
) -> None:
    inputs = states(sum(lengths), heads, kv_heads, width, value_width)
    scale = 0.37
    expected = output_and_gradients(sample_by_sample, inputs, lengths, scale)
    found = output_and_gradients(attend, inputs, Packing.of(lengths), scale)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[LONGEST_EXPLICIT, 3, 400], [LONGEST_EXPLICIT + 1, 5]], ids=["blocks", "long"])
def test_long_samples_attend_as_short_ones_do(lengths: list[int]) -> None:
    inputs = states(sum(lengths), 2, 1, 4, 4)
    expected = output_and_gradients(sample_by_sample, inputs, lengths, 0.5)
    found = output_and_gradients(attend_in_batches, inputs, Packing.of(lengths), 0.5)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_attention_in_bf16_is_as_near_to_the_exact_one_as_torch_is(spread: float) -> None:
    lengths = [40, 90, 200]
    exact = [(each * spread).detach() for each in states(sum(lengths), 6, 2, 32, 32)]
    halves = [each.bfloat16() for each in exact]
    inputs = [half.double().requires_grad_() for half in halves]

    def attend_by_torch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = zip(*(each.transpose(0, 1)[None].split(lengths, 2) for each in (query, key, value)), strict=True)
        attended = [
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            for q, k, v in parts
        ]
        return torch.cat(attended, 2)[0].transpose(0, 1)

    truth = output_and_gradients(sample_by_sample, inputs, lengths, 0.2)
    ours = output_and_gradients(
        attend_in_batches, [half.clone().requires_grad_() for half in halves], Packing.of(lengths), 0.2
    )
    theirs = output_and_gradients(attend_by_torch, [half.clone().requires_grad_() for half in halves], 0.2)
    for got, other, want in zip(ours, theirs, truth, strict=True):
        error, allowed = ((each.double() - want).norm() / want.norm() for each in (got, other))
        assert error <= 1.5 * allowed


@pytest.mark.parametrize("tokens", [60, LONGEST_EXPLICIT + 1])
def test_dropout_keeps_the_mean_and_its_gradient_follows_what_was_kept(tokens: int) -> None:
    query, key, value = states(tokens, 4, 2, 8, 8)
    packing = Packing.of([tokens])

    def attend(value: Tensor) -> Tensor:
        torch.manual_seed(3)
        return batched_attention(query, key, value, packing, scale=0.3, dropout=0.25)

    # The output is linear in the values, with the factors of the dropout in the gradient.
    direction = torch.randn_like(value)
    output = attend(value)
    weights = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, [value], weights)
    change = ((attend(value + direction) - output) * weights).sum()
    torch.testing.assert_close((gradient * direction).sum(), change)
    # A value of 1 is averaged to the sum of what was kept, which is 1 in the mean; the first query keeps all or none.
    sums = attend(torch.ones_like(value))[..., 0]
    assert abs(sums.mean().item() - 1) < 0.1
    assert {round(each, 6) for each in sums[0].tolist()} <= {0.0, round(1 / 0.75, 6)}
    # Queries: the derivative along a direction, by differences.
    step = 1e-6
    along = torch.randn_like(query)
    (of_query,) = torch.autograd.grad(attend(value), [query], weights)
    values = []
    for sign in (1, -1):
        torch.manual_seed(3)
        moved = batched_attention(query + sign * step * along, key, value, packing, scale=0.3, dropout=0.25)
        values.append((moved * weights).sum())
    torch.testing.assert_close((of_query * along).sum(), (values[0] - values[1]) / (2 * step), rtol=1e-4, atol=1e-6)


def test_the_kernel_applies_in_half_precision_without_dropout_on_its_device() -> None:
    kernel = VarlenKernel(varlen_attn_2_11, device_type="cpu")
    half, single = torch.zeros(1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 64)
    assert kernel.applies(half, half, 0.0)
    assert not kernel.applies(half, half, 0.1)
    assert not kernel.applies(single, single, 0.0)
    assert not kernel.applies(torch.zeros(1, 1, 264, dtype=torch.bfloat16), half, 0.0)
    assert not VarlenKernel(varlen_attn_2_11).applies(half, half, 0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_autocast_reaches_the_kernel_in_its_format(name: str) -> None:
    model, seen = tiny(name), []

    def function(query: Tensor, key: Tensor, value: Tensor, *rest: object, **options: object) -> Tensor:
        seen.append({query.dtype, key.dtype, value.dtype})
        return varlen_attn_2_11(query, key, value, *rest, **options)  # type: ignore[arg-type] # As they came.

    lengths = [9, 4, 7]
    packing = Packing.of(lengths)
    ids = torch.randint(3, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    logits = []
    for kernel in (VarlenKernel(function, device_type="cpu"), VarlenKernel(function)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), packed_attention(model, packing, kernel):
            logits.append(model(input_ids=ids, position_ids=packing.position_ids, use_cache=False).logits.float())
    assert seen == [{torch.bfloat16}] * model.config.num_hidden_layers
    assert (logits[0] - logits[1]).norm() <= 0.1 * logits[1].norm()


def test_a_compiled_layer_has_no_graph_break_and_gives_the_same() -> None:
    model = tiny("llama").bfloat16()
    kernel = VarlenKernel(varlen_attn_2_12, device_type="cpu")
    layer = model.get_submodule("model.layers.0")
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    for seed, lengths in enumerate([[5, 9, 2], [4, 4, 8], [1, 7, 8]]):
        packing = Packing.of(lengths)
        # What a batch of fixed shape holds fixed.
        packing = Packing(**{**vars(packing), "max_length": 16})
        hidden = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(seed)).bfloat16()
        positions = model.get_submodule("model.rotary_emb")(hidden, position_ids=packing.position_ids)
        with torch.no_grad(), packed_attention(model, packing, kernel):
            expected, found = (each(hidden, position_embeddings=positions) for each in (layer, compiled))
        assert torch.equal(expected, found)
    assert len(graphs) == 1
