"""On each device answers are those of transformers, also with CUDA graphs; decoding does not wait for the GPU."""

import pytest
import torch

from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate
from pocl.evaluation.sampling import Sampler
from pocl.models.inference_weights import inference_weights
from pocl.models.precision import Precision
from pocl.models.slot_cache import BUCKET, decode_attention
from pocl.models.slot_decoder import SlotDecoder, can_decode_in_slots
from tests.pocl.evaluation.test_generate import prompts_of, reference
from tests.pocl.tiny_models import PAD, tiny
from tests.support.device_parameters import ON_EACH_DEVICE, on

PROMPTS = prompts_of([5, 17, 9, 1, 12, 5, 3])


def answers(device: str, name: str, *, graphs: bool = False, sampler: Sampler | None = None) -> list[list[int]]:
    decoding = Decoding(40, 4, {7}, PAD, sampler=sampler, graphs=graphs)
    return generate(on(device, tiny(name)), PROMPTS, decoding)


@ON_EACH_DEVICE
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_greedy_answers_equal_those_of_transformers(name: str, device: str) -> None:
    assert answers(device, name) == reference(tiny(name), PROMPTS, {7}, 40)


@pytest.mark.cuda
@pytest.mark.parametrize("sampler", [None, Sampler(1.0, 0.9, seed=10)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_replaying_graphs_changes_no_answer(name: str, sampler: Sampler | None) -> None:
    assert answers("cuda", name, graphs=True, sampler=sampler) == answers("cuda", name, sampler=sampler)


@ON_EACH_DEVICE
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen2"])
def test_families_decode_in_slots_in_bf16(name: str, device: str) -> None:
    model = on(device, tiny(name))
    with inference_weights(model, Precision("bf16", torch.device(device)), rows=4):
        assert can_decode_in_slots(model)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decode_step_does_not_wait_for_the_gpu(name: str) -> None:
    model = on("cuda", tiny(name))
    with torch.no_grad(), inference_weights(model, Precision("bf16", torch.device("cuda")), rows=2):
        decoder = SlotDecoder(model, 2, 60)
        slots = torch.arange(2, device="cuda")
        decoder.read(PROMPTS[:2], slots)
        positions = torch.tensor([5, 17], device="cuda")
        with decode_attention(model):
            decoder.step(slots + 4, positions, BUCKET)
            torch.cuda.set_sync_debug_mode("error")
            try:
                decoder.step(slots + 5, positions + 1, BUCKET)
            finally:
                torch.cuda.set_sync_debug_mode("default")
