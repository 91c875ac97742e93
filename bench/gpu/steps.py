"""One optimiser step of a pair of models, by ours and by each rival, in turns over the same samples."""

import torch
from transformers import PreTrainedModel

from bench.gpu.activity import profile
from bench.gpu.memory import held_bytes, peak_increase
from bench.gpu.rounds import Contender, time_contenders
from bench.gpu.section import Section, Setting
from bench.gpu.targets import BUSY, step_ratio
from bench.lengths import random_samples, representative_lengths
from bench.protocol import OURS
from bench.report import Figure
from bench.rivals import DISTILLATION, PUBLISHED
from bench.sizes import ModelPair, Size
from bench.step import StepFixture, agreement, compiled_steps, step_rivals
from pocl.models.heads import output_head

_GIB = 1 << 30


def measure_steps(setting: Setting, size: Size) -> Section:
    """Seconds, memory and activity of a step, and the ratios of the rivals' seconds to ours."""
    fixture = _fixture(setting, size)
    _create_optimizer_state(fixture)
    on_request = compiled_steps(fixture) if setting.device.type == "cuda" else []
    contenders = time_contenders([*step_rivals(fixture), *on_request], setting.scale.rounds)
    ours_first = contenders[0]
    rows = [_row(contender, ours_first, fixture, setting) for contender in contenders]
    checks = agreement(fixture) if OURS in fixture.last_results else {}
    measured: dict[str, float] = {}
    for rival in (PUBLISHED, DISTILLATION):
        ratio = next(row["times_ours"] for row in rows if row["name"] == rival)
        if isinstance(ratio, float):
            measured[step_ratio(size.name, rival)] = ratio
    busy = rows[0]["gpu_busy_%"]
    if isinstance(busy, float) and size == setting.scale.pairs[0]:
        measured[BUSY] = busy
    tokens = sum(len(sample.input_ids) for sample in fixture.samples)
    return Section(
        f"one step of {size.name}, V {size.vocabulary}: {len(fixture.samples)} samples, {tokens} tokens, "
        f"{setting.precision.name}, rivals in micro-batches of {setting.scale.rows_at_once} samples",
        rows,
        measured,
        checks,
    )


def _fixture(setting: Setting, size: Size) -> StepFixture:
    scale, precision = setting.scale, setting.precision
    return StepFixture(
        ModelPair(size, precision.weights, setting.device),
        precision,
        random_samples(representative_lengths(scale.rows), size.vocabulary),
        rows_at_once=scale.rows_at_once,
    )


def _create_optimizer_state(fixture: StepFixture) -> None:
    """Make the moments that all rivals share, so that none of them is charged for their memory."""
    for parameter in fixture.pair.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fixture.optimizer.step()
    fixture.optimizer.zero_grad(set_to_none=True)


def _row(contender: Contender, ours_first: Contender, fixture: StepFixture, setting: Setting) -> dict[str, Figure]:
    setting.say(f"  activity and memory of {contender.name}")
    activity = contender.attempt(lambda: profile(contender.timed_work, setting.device))
    peak = contender.attempt(lambda: _peak_bytes(contender, fixture, setting.device))
    timing, our_timing = contender.timing, ours_first.timing
    seconds = None if timing is None else timing.median
    return {
        "name": contender.name,
        "median_ms": None if seconds is None else 1000 * seconds,
        "iqr_ms": None if timing is None else 1000 * timing.iqr,
        "times_ours": None if seconds is None or our_timing is None else seconds / our_timing.median,
        "peak_GiB": None if peak is None else peak / _GIB,
        "gpu_busy_%": None if activity is None or not seconds else 100 * activity.busy_seconds / seconds,
        "launches": None if activity is None else activity.launches,
        "synchronisations": None if activity is None else activity.synchronisations,
        "outcome": contender.failure or "measured",
    }


def _peak_bytes(contender: Contender, fixture: StepFixture, device: torch.device) -> int:
    """The most memory of a step by a rival that is alone on the device.

    That is the models that it needs there, AdamW's moments, what it keeps from step to step, and what a step takes.
    """
    contender.work = None
    before = held_bytes(device)
    work = contender.rival.prepare()
    work()
    kept = max(0, held_bytes(device) - before) if device.type == "cuda" else 0
    increase = peak_increase(work, device)
    student = fixture.pair.student
    moments = sum(
        moment.nbytes
        for state in fixture.optimizer.state.values()
        for moment in state.values()
        if isinstance(moment, torch.Tensor)
    )
    # Ours reads the teacher's states from files, and needs its head alone.
    teacher = output_head(fixture.pair.teacher) if contender.name.startswith(OURS) else fixture.pair.teacher
    return _weight_bytes(student) + _weight_bytes(teacher) + moments + kept + increase


def _weight_bytes(module: torch.nn.Module | PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
