"""Cross-entropy of the reference responses: ours, and full logits of padded batches."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from bench import ours
from bench.agreement import difference
from bench.gpu.memory import peak_increase
from bench.gpu.rounds import Contender, time_contenders
from bench.gpu.section import Section, Setting
from bench.gpu.targets import SCORED
from bench.lengths import random_samples, representative_lengths
from bench.machine import synchronize
from bench.protocol import OURS, Rival, Work
from bench.report import Figure
from bench.rivals import IGNORED
from bench.rivals.published import Padded
from bench.sizes import build_model, set_mode
from pocl.data.batches import EncodedSample
from pocl.models.precision import Precision

LOGITS = "full logits of 16 samples"
_ROWS = 16
_GIB = 1 << 30


def measure_scoring(setting: Setting) -> Section:
    """Prompt and response tokens a second."""
    scale, device, precision = setting.scale, setting.device, setting.precision
    size = scale.pairs[0]
    student = set_mode(build_model(size.student_config, device=device), train=False)
    samples = random_samples(representative_lengths(scale.scored_rows), size.vocabulary)
    tokens = sum(len(sample.input_ids) for sample in samples)
    scores: dict[str, float] = {}
    works = {
        OURS: partial(ours.cross_entropy, student, samples, precision),
        LOGITS: partial(_cross_entropy, student, samples, precision),
    }

    def prepare(name: str) -> Work:
        def work() -> None:
            scores[name] = works[name]()
            synchronize(device)

        return work

    contenders = time_contenders([Rival(name, partial(prepare, name)) for name in works], max(1, scale.rounds - 2))
    rows: list[dict[str, Figure]] = []
    for contender in contenders:
        seconds = None if contender.timing is None else contender.timing.median
        peak = contender.attempt(partial(_peak, contender, device))
        rows.append(
            {
                "name": contender.name,
                "median_s": seconds,
                "tokens_per_s": None if seconds is None else tokens / seconds,
                "peak_increase_GiB": None if peak is None else peak / _GIB,
                "outcome": contender.failure or "measured",
            }
        )
    rate = rows[0]["tokens_per_s"]
    return Section(
        f"scoring {len(samples)} samples, {tokens} tokens, by {size.name}'s student, {precision.name}",
        rows,
        {SCORED: rate} if isinstance(rate, float) else {},
        {"mean cross-entropy differs by": difference(*scores.values())} if len(scores) == len(works) else {},
    )


def _peak(contender: Contender, device: torch.device) -> int:
    return peak_increase(contender.timed_work, device)


@torch.no_grad()
def _cross_entropy(model: PreTrainedModel, samples: Sequence[EncodedSample], precision: Precision) -> float:
    """The mean over all response tokens, of samples in order of their lengths, padded to the longest of `_ROWS`."""
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    total = torch.zeros((), device=model.device)
    for start in range(0, len(ordered), _ROWS):
        batch = Padded.collate(ordered[start : start + _ROWS], length=None, device=model.device)
        with precision.autocast():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        total += F.cross_entropy(
            logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return total.item() / sum(sample.predicted_tokens for sample in samples)
