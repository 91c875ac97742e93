"""Greedy answers of unequal lengths to prompts of unequal lengths, as Dolly's have.

A random model would never end an answer, so its head is biased by a countdown: a token's id modulo `PERIOD` is the
number of tokens still to come, the next token must be one whose number is one lower, and after 0 comes the end. Which
of these tokens it is, the model chooses, so that wrong attention, positions or caches would change the answers.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.lengths import representative_lengths
from bench.machine import Machine
from bench.protocol import OURS, Rival, Work, add_timing_arguments, precision_of, time_interleaved
from bench.report import Figure, Report, timing_rows
from bench.sizes import SIZES, build_model, llama, set_mode
from pocl.evaluation.generate import generate
from pocl.models.heads import output_head
from pocl.models.precision import Precision

TRANSFORMERS = "transformers generate"
MAX_NEW_TOKENS = 256
PERIOD = 260
"""Above every length of an answer, and so far below the vocabulary that the model has a choice."""
PAD, END = 0, 2
_SPECIAL = 3
_FORBIDDEN = -1e4

Prompts = Sequence[Sequence[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser, rounds=5, memory=False)
    parser.add_argument("--size", choices=SIZES, default="ci", help="model pair whose student answers (default ci)")
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts (default 16)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes (default 1 4 16)")


def run(args: argparse.Namespace) -> Report:
    machine = Machine.measure()
    precision, size = precision_of(args), SIZES[args.size]
    model = set_mode(build_model(llama(size.student, size.vocabulary)), train=False)
    prompts, tokens = countdown_prompts(args.prompts, size.vocabulary)
    results: list[dict[str, Figure]] = []
    differ = 0
    with counting_down(model):
        for batch_size in args.batches:
            answers: dict[str, list[list[int]]] = {}
            timings = time_interleaved(_rivals(model, prompts, batch_size, precision, answers), args.rounds)
            differ += sum(a != b for a, b in zip(answers[OURS], answers[TRANSFORMERS], strict=True))
            for row in timing_rows(timings):
                seconds = row["median_s"]
                assert isinstance(seconds, float)  # timing_rows puts a float there.
                results.append({"batch": batch_size, **row, "tokens_per_s": tokens / seconds})
    return Report(
        "generate",
        {
            "student": args.size,
            "prompts": args.prompts,
            "new tokens": tokens,
            "dtype": precision.name,
            "rounds": args.rounds,
        },
        results,
        machine,
        {"answers that differ": differ},
    )


def countdown_prompts(count: int, vocabulary: int) -> tuple[Prompts, int]:
    """Prompts as long as Dolly's, whose last token sets the length of the answer; and the tokens of all answers."""
    generator = torch.Generator().manual_seed(0)
    prompts, total = [], 0
    lengths = representative_lengths(count)
    for at in torch.randperm(count, generator=generator).tolist():
        prompt, response = lengths[at]
        # The response length includes the end token.
        answer = min(response - 1, MAX_NEW_TOKENS - 1)
        ids = torch.randint(_SPECIAL, vocabulary, (prompt,), generator=generator).tolist()
        prompts.append([*ids[:-1], PERIOD + answer])
        total += answer
    return prompts, total


@contextmanager
def counting_down(model: PreTrainedModel) -> Iterator[None]:
    """Bias the head of `model` by the countdown while the block runs."""
    head = output_head(model)
    vocabulary = head.get_parameter("weight").shape[0]
    bias = _bias(vocabulary)
    last: list[Tensor] = []

    def remember(_embedding: nn.Module, args: tuple[Tensor, ...]) -> None:
        last[:] = [args[0][:, -1] % PERIOD]

    def add_bias(_head: nn.Module, _args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        logits[:, -1] += bias[last[0]].to(logits.dtype)
        return logits

    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(remember),
        head.register_forward_hook(add_bias),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ours(model: PreTrainedModel, prompts: Prompts, batch_size: int, precision: Precision) -> list[list[int]]:
    return generate(
        model,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        eos_token_ids={END},
        pad_id=PAD,
        precision=precision,
    )


@torch.no_grad()
def theirs(model: PreTrainedModel, prompts: Prompts, batch_size: int, precision: Precision) -> list[list[int]]:
    """Answers of `transformers`: prompts in their given order, padded on the left to the longest of their batch."""
    answers: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = left_padded(prompts[start : start + batch_size])
        with precision.autocast():
            batch = greedy(model, ids, mask, MAX_NEW_TOKENS, end_id=END, pad_id=PAD)
        answers += [_up_to_end(row) for row in batch.tolist()]
    return answers


def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int, *, end_id: int, pad_id: int) -> Tensor:
    """Greedy answers of `transformers` to a batch `[B, L]`: `[B, tokens]`, padded after the end."""
    # torch types every attribute of a module as a tensor or a module.
    generate_: Any = model.generate
    answers: Tensor = generate_(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    return answers[:, ids.shape[1] :]


def left_padded(prompts: Prompts, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts, `[B, width]`; by default as wide as the longest prompt."""
    columns = width or max(map(len, prompts))
    ids = [[PAD] * (columns - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _rivals(
    model: PreTrainedModel,
    prompts: Prompts,
    batch_size: int,
    precision: Precision,
    answers: dict[str, list[list[int]]],
) -> list[Rival]:
    def prepare(name: str) -> Work:
        generate_answers = ours if name == OURS else theirs
        return lambda: answers.update({name: generate_answers(model, prompts, batch_size, precision)})

    return [Rival(name, partial(prepare, name)) for name in (OURS, TRANSFORMERS)]


def _bias(vocabulary: int) -> Tensor:
    """The bias for each number of tokens to come, `[PERIOD, V]`: 0 for tokens that may follow, else prohibitive."""
    bias = torch.full((PERIOD, vocabulary), _FORBIDDEN)
    bias[0, END] = 0
    ids = torch.arange(_SPECIAL, vocabulary)
    predecessor = ids % PERIOD + 1
    has_predecessor = predecessor < PERIOD
    bias[predecessor[has_predecessor], ids[has_predecessor]] = 0
    return bias


def _up_to_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids
