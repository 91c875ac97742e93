"""Greedy answers of unequal lengths to prompts of unequal lengths, as Dolly's have.

A random model would never end an answer, so its head is biased by a countdown: a token's id modulo `PERIOD` is the
number of tokens still to come, the next token must be one whose number is one lower, and after 0 comes the end. Which
of these tokens it is, the model chooses, so that wrong attention, positions or caches would change the answers.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.lengths import representative_lengths
from bench.machine import Machine
from bench.protocol import OURS, Rival, Work, add_timing_arguments, time_interleaved
from bench.report import Figure, Report, timing_rows
from bench.sizes import SIZES, build_model, llama, set_mode
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate
from pocl.events import Event
from pocl.models.heads import output_head
from pocl.models.precision import Precision, choose_device, choose_precision

TRANSFORMERS = "transformers generate"
BF16_WEIGHTS = "transformers generate, bf16 weights"
STATIC_COMPILED = "transformers generate, bf16 weights, static cache, compiled"
MAX_NEW_TOKENS = 256
PERIOD = 260
"""Above every length of an answer, and so far below the vocabulary that the model has a choice."""
PAD, END = 0, 2
_SPECIAL = 3
_FORBIDDEN = -1e4
_BASE = 16
"""A number below `PERIOD` is two digits to this base, which bf16 holds exactly."""

Prompts = Sequence[Sequence[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_timing_arguments(parser, rounds=5, memory=False)
    parser.add_argument("--size", choices=SIZES, default="ci", help="model pair whose student answers (default ci)")
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts (default 16)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes (default 1 4 16)")
    parser.add_argument("--new-tokens", type=int, default=MAX_NEW_TOKENS, help="most tokens of an answer (default 256)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model is (default cpu)")
    parser.add_argument("--graphs", action="store_true", help="let ours replay CUDA graphs")


def run(args: argparse.Namespace) -> Report:
    machine = Machine.measure()
    size, device = SIZES[args.size], choose_device(args.device)
    precision = choose_precision(args.dtype, device)
    model = set_mode(build_model(llama(size.student, size.vocabulary)), train=False)
    # Not `model.to`: transformers wraps it so that no argument but a model has the right type.
    nn.Module.to(model, device)
    prompts, tokens = countdown_prompts(args.prompts, size.vocabulary, args.new_tokens)
    results: list[dict[str, Figure]] = []
    differ = 0
    for batch_size in args.batches:
        answers: dict[str, list[list[int]]] = {}
        contest = _Contest(model, prompts, batch_size, args.new_tokens, precision, args.graphs)
        timings = time_interleaved(contest.rivals(answers), args.rounds)
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


def countdown_prompts(count: int, vocabulary: int, new_tokens: int = MAX_NEW_TOKENS) -> tuple[Prompts, int]:
    """Prompts as long as Dolly's, whose last token sets the length of the answer, below `new_tokens`; and the tokens of
    all answers.
    """
    generator = torch.Generator().manual_seed(0)
    prompts, total = [], 0
    lengths = representative_lengths(count)
    for at in torch.randperm(count, generator=generator).tolist():
        prompt, response = lengths[at]
        # The response length includes the end token.
        answer = min(response - 1, new_tokens - 1)
        ids = torch.randint(_SPECIAL, vocabulary, (prompt,), generator=generator).tolist()
        prompts.append([*ids[:-1], PERIOD + answer])
        total += answer
    return prompts, total


@contextmanager
def counting_down(model: PreTrainedModel) -> Iterator[None]:
    """Bias the head of `model` by the countdown while the block runs."""
    head = output_head(model)
    vocabulary = head.get_parameter("weight").shape[0]
    bias = _bias(vocabulary).to(model.device)
    read: list[Tensor] = []

    def remember(_embedding: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[:] = [args[0] % PERIOD]

    def mark(_head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Whoever answers picks the states that it needs, so each says itself which token it belongs to.
        hidden = args[0].clone()
        number = read[0][:, -hidden.shape[1] :]
        hidden[..., 0], hidden[..., 1] = number // _BASE, number % _BASE
        return (hidden,)

    def add_bias(_head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        number = args[0][..., 0].long() * _BASE + args[0][..., 1].long()
        return logits + bias[number].to(logits.dtype)

    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(remember),
        head.register_forward_pre_hook(mark),
        head.register_forward_hook(add_bias),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ours(
    model: PreTrainedModel,
    prompts: Prompts,
    batch_size: int,
    precision: Precision,
    *,
    new_tokens: int = MAX_NEW_TOKENS,
    graphs: bool = False,
) -> list[list[int]]:
    with counting_down(model):
        return generate(
            model,
            prompts,
            Decoding(new_tokens, batch_size, {END}, PAD, precision, graphs=graphs),
            sink=_refuse,
        )


def _refuse(event: Event) -> None:
    """Fail where the model is answered in another way than the one that is timed."""
    raise RuntimeError(str(event))


@torch.no_grad()
def theirs(
    model: PreTrainedModel,
    prompts: Prompts,
    batch_size: int,
    precision: Precision | None,
    *,
    new_tokens: int = MAX_NEW_TOKENS,
    static: bool = False,
) -> list[list[int]]:
    """Answers of `transformers`: prompts in their given order, padded on the left to the longest of their batch.

    Without `precision`, products are in the format of the weights. With `static`, all batches are padded to the longest
    prompt, so that the static cache has one shape and is compiled once.
    """
    answers: list[list[int]] = []
    width = max(map(len, prompts)) if static else None
    with counting_down(model), nullcontext() if precision is None else precision.autocast():
        for start in range(0, len(prompts), batch_size):
            ids, mask = (each.to(model.device) for each in left_padded(prompts[start : start + batch_size], width))
            options = {"cache_implementation": "static"} if static else {}
            batch = greedy(model, ids, mask, new_tokens, end_id=END, pad_id=PAD, **options)
            answers += [_up_to_end(row) for row in batch.tolist()]
    return answers


def greedy(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, new_tokens: int, *, end_id: int, pad_id: int, **options: str
) -> Tensor:
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
        **options,
    )
    return answers[:, ids.shape[1] :]


def left_padded(prompts: Prompts, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts, `[B, width]`; by default as wide as the longest prompt."""
    columns = width or max(map(len, prompts))
    ids = [[PAD] * (columns - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


@dataclass(frozen=True)
class _Contest:
    """One model, the same prompts and as many of them at a time for all rivals."""

    model: PreTrainedModel
    prompts: Prompts
    batch_size: int
    new_tokens: int
    precision: Precision
    graphs: bool

    def rivals(self, answers: dict[str, list[list[int]]]) -> list[Rival]:
        """Ours and those of transformers; each leaves its answers in `answers`."""
        works: dict[str, Callable[[], list[list[int]]]] = {
            OURS: partial(
                ours, self.model, self.prompts, self.batch_size, self.precision, new_tokens=self.new_tokens,
                graphs=self.graphs,
            ),
            TRANSFORMERS: partial(self._theirs, self.model, self.precision),
        }  # fmt: skip
        if self.precision.name == "bf16":
            rounded = _rounded(self.model)
            works[BF16_WEIGHTS] = partial(self._theirs, rounded, None)
            if self.model.device.type == "cuda":
                # It compiles its forward by itself for a static cache.
                works[STATIC_COMPILED] = partial(self._theirs, rounded, None, static=True)

        def prepare(name: str) -> Work:
            return lambda: answers.update({name: works[name]()})

        return [Rival(name, partial(prepare, name)) for name in works]

    def _theirs(self, model: PreTrainedModel, precision: Precision | None, *, static: bool = False) -> list[list[int]]:
        return theirs(model, self.prompts, self.batch_size, precision, new_tokens=self.new_tokens, static=static)


def _rounded(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with weights in bf16, as it is loaded for use; its buffers stay as they are."""
    rounded = deepcopy(model)
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16()
    return rounded


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
