"""Filling the cache of a teacher, beside the time that its products take at the measured peak."""

import statistics
import time

from torch import Tensor, nn
from transformers import PreTrainedModel

from bench import ours
from bench.gpu.memory import peak_increase
from bench.gpu.section import Section, Setting
from bench.gpu.targets import FILLED
from bench.lengths import random_samples, representative_lengths
from bench.machine import synchronize
from bench.sizes import build_model, set_mode

_GIB = 1 << 30


def measure_filling(setting: Setting) -> Section:
    """Seconds of filling an empty cache, median of the rounds after a warm-up."""
    scale, device, precision = setting.scale, setting.device, setting.precision
    size = scale.filled
    teacher = set_mode(build_model(size.teacher_config, device=device, dtype=precision.weights), train=False)
    teacher.requires_grad_(False)
    samples = random_samples(representative_lengths(scale.filled_rows), size.vocabulary)
    tokens = sum(len(sample.input_ids) for sample in samples)

    def fill() -> None:
        with ours.filled_teacher(teacher, samples, precision):
            synchronize(device)

    peak = peak_increase(fill, device)
    seconds = []
    for _ in range(max(1, scale.rounds - 2)):
        start = time.perf_counter()
        fill()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    products = _product_weights(teacher)
    at_peak = None if setting.peak_gflops is None else 2 * products * tokens / 1e9 / setting.peak_gflops
    return Section(
        f"filling the cache of {size.name}'s teacher with {len(samples)} samples, {tokens} tokens, {precision.name}",
        [
            {
                "median_s": median,
                "tokens_per_s": tokens / median,
                "at_peak_s": at_peak,
                "times_peak": None if at_peak is None else median / at_peak,
                "peak_increase_GiB": peak / _GIB,
            }
        ],
        {} if at_peak is None else {FILLED: median / at_peak},
        notes=("At the peak: the products of the layers over the samples' tokens, padding and attention left out.",),
    )


def _product_weights(teacher: PreTrainedModel) -> int:
    """Weights of the layers that multiply each token: all matrices but the embeddings and the head."""
    modules = [module for module in teacher.base_model.modules() if not isinstance(module, nn.Embedding)]
    weights = [getattr(module, "weight", None) for module in modules]
    return sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2)
