"""The operators of an optimiser step do not grow with the rows of its batch, and stay under recorded numbers."""

from copy import deepcopy

import pytest
import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from pocl.data.batches import EncodedSample
from pocl.models.precision import Precision
from pocl.spec import ForwardKL
from pocl.teacher.distillation_loss import DistillationLoss
from pocl.teacher.signal import LiveTeacher
from pocl.train.accumulation import GradientAccumulator
from tests.pocl.tiny_models import BOS, EOS, VOCABULARY
from tests.support.operator_count import count_operators

CPU = torch.device("cpu")
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=6, bos_token_id=BOS, eos_token_id=EOS),
}
LENGTHS = (20, 50, 90, 120)
"""Of the samples in turns: as many rows of each as it takes, so that they fall into four groups."""


RESPONSE_TOKENS = 64
"""Of the whole batch: the loss works in tiles of response tokens."""


def sample(row: int, length: int, response: int) -> EncodedSample:
    generator = torch.Generator().manual_seed(row)
    ids = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
    return EncodedSample(f"{row:03}", tuple(ids), length - response)


def made(name: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), dtype=torch.float32)
    return model


def operators(name: str, rows: int, precision: Precision) -> int:
    """Of one optimiser step over this many rows in one micro-batch, with a live teacher of two layers."""
    student, teacher = made(name), made(name)
    teacher.train(False)
    loss = DistillationLoss(
        student, LiveTeacher(teacher, precision), ForwardKL(), shared_vocabulary=None, precision=precision
    )
    accumulator = GradientAccumulator(
        model=student,
        training_loss=loss,
        max_grad_norm=1.0,
        packed=True,
        micro_batch_size=1000,
        on_halved=lambda _size: None,
        micro_batch_tokens=100_000,
    )
    optimizer = AdamW(student.parameters(), fused=True)
    samples = [sample(row, LENGTHS[row % len(LENGTHS)], RESPONSE_TOKENS // rows) for row in range(rows)]

    def step() -> None:
        accumulator.step(samples, temperature=1.0, kd_weight=0.7)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # The first step also tries the teacher and makes the optimiser's state.
    step()
    return count_operators(step)


@pytest.mark.parametrize(
    ("name", "precision", "recorded"),
    [
        ("llama", "bf16", 1800),
        ("llama", "fp32", 1600),
        ("gpt2", "bf16", 1550),
        ("gpt2", "fp32", 1400),
    ],
)
def test_operators_of_a_step_do_not_grow_with_its_rows(name: str, precision: str, recorded: int) -> None:
    counts = {rows: operators(name, rows, Precision(precision, CPU)) for rows in (8, 64)}  # type: ignore[arg-type] # A literal out of a list.
    assert counts[64] == counts[8]
    assert counts[8] <= recorded
