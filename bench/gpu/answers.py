"""Answers of one length to prompts as long as Dolly's, all in flight at once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from bench import ours
from bench.generate import left_padded
from bench.gpu.memory import peak_increase
from bench.gpu.rounds import Contender, time_contenders
from bench.gpu.section import Section, Setting
from bench.gpu.targets import GENERATED, OVER_TRANSFORMERS
from bench.lengths import random_samples, representative_lengths
from bench.machine import synchronize
from bench.protocol import OURS, Rival, Work
from bench.report import Figure
from bench.sizes import build_model, set_mode

DYNAMIC, STATIC = "transformers, dynamic cache", "transformers, static cache"
_GIB = 1 << 30
_PAD = 0

Answers = list[list[int]]


def measure_answers(setting: Setting) -> Section:
    """Tokens a second of ours and of `transformers`, whose weights are rounded to the format of the products."""
    scale, device = setting.scale, setting.device
    size = scale.pairs[0]
    student = set_mode(build_model(size.student_config, device=device), train=False)
    # Drawn in fp32, as the student, and rounded: drawn in bf16 it would be another model.
    rounded = set_mode(build_model(size.student_config, device=device), train=False)
    for weight in rounded.parameters():
        weight.data = weight.data.to(setting.precision.weights)
    samples = random_samples(representative_lengths(scale.prompts), size.vocabulary)
    prompts = [sample.prompt_ids for sample in samples]
    answers: dict[str, Answers] = {}

    def rival(name: str, answer: Callable[[], Answers]) -> Rival:
        def work() -> None:
            answers[name] = answer()
            synchronize(device)

        def prepare() -> Work:
            return work

        return Rival(name, prepare)

    our_answers = partial(ours.answers, student, prompts, setting.precision, new_tokens=scale.new_tokens)
    with_graphs = [rival(f"{OURS}, CUDA graphs", partial(our_answers, graphs=True))] if device.type == "cuda" else []
    # transformers compiles a static cache's forward pass by itself on a GPU.
    static = f"{STATIC}, compiled" if device.type == "cuda" else STATIC
    contenders = time_contenders(
        [
            rival(OURS, our_answers),
            *with_graphs,
            rival(DYNAMIC, partial(_transformers, rounded, prompts, scale.new_tokens)),
            rival(static, partial(_transformers, rounded, prompts, scale.new_tokens, cache_implementation="static")),
        ],
        max(1, scale.rounds - 2),
    )
    tokens = scale.new_tokens * len(prompts)
    rows = [_row(contender, contenders[0], answers, tokens, device) for contender in contenders]
    measured: dict[str, float] = {}
    rate, ratio = rows[0]["tokens_per_s"], rows[-1]["times_ours"]
    if isinstance(rate, float):
        measured[GENERATED] = rate
    if isinstance(ratio, float):
        measured[OVER_TRANSFORMERS] = ratio
    return Section(
        f"answers of {size.name}'s student: {len(prompts)} prompts in flight, {scale.new_tokens} tokens each, "
        f"{setting.precision.name}",
        rows,
        measured,
        notes=("In bf16 the answers of a random model soon part, since its best tokens are nearly as likely.",),
    )


@torch.no_grad()
def _transformers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any
) -> list[list[int]]:
    ids, mask = (part.to(model.device) for part in left_padded(prompts))
    # torch types every attribute of a module as a tensor or a module.
    generate: Any = model.generate
    answers = generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=_PAD,
        **options,
    )
    rows: list[list[int]] = answers[:, ids.shape[1] :].tolist()
    return rows


def _row(
    contender: Contender, ours_first: Contender, answers: dict[str, Answers], tokens: int, device: torch.device
) -> dict[str, Figure]:
    peak = contender.attempt(lambda: peak_increase(contender.timed_work, device))
    timing, our_timing = contender.timing, ours_first.timing
    seconds = None if timing is None else timing.median
    mine, first = answers.get(contender.name), answers.get(ours_first.name)
    return {
        "name": contender.name,
        "median_s": seconds,
        "tokens_per_s": None if seconds is None else tokens / seconds,
        "times_ours": None if seconds is None or our_timing is None else seconds / our_timing.median,
        "peak_increase_GiB": None if peak is None else peak / _GIB,
        "first_tokens_equal_%": None
        if not mine or not first
        else 100 * sum(a[:1] == b[:1] for a, b in zip(mine, first, strict=True)) / len(first),
        "outcome": contender.failure or "measured",
    }
