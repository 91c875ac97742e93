"""Specifications of small runs with all that a large one has: dropout, stages, a teacher, validation, checkpoints."""

import json
import random
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

CHECKPOINT_EVERY = 2
_RANDOM = {"family": "gpt2", "layers": 2, "hidden_size": 16, "heads": 2, "max_positions": 64, "seed": 3}
_BASE: dict[str, Any] = {
    "preset": "quick",
    "teacher": {"random": _RANDOM},
    "student": {"from_teacher": {"layers": [1]}},
    "data": {"max_length": 56, "max_prompt_length": 40},
    "method": "forward_kl",
    "curriculum": {"stages": 3, "epochs_per_stage": 1, "ranking": {"max_new_tokens": 3}},
    "training": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "dropout": 0.1, "precision": "fp32"},
    "evaluation": {"max_new_tokens": 3, "batch_size": 4},
    "checkpoints": {"every_steps": CHECKPOINT_EVERY, "keep": 2},
    "resources": {"device": "cpu", "threads": 1},
    "seed": 11,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "restart": {},
    "carry": {
        "teacher": {"random": {**_RANDOM, "family": "llama"}},
        "method": "js",
        "curriculum": {"optimizer_at_stage": "carry"},
        "checkpoints": {"keep": 1},
    },
    "convergence": {
        "curriculum": {"stages": 2, "epochs_per_stage": 3, "advance": {"by": "convergence", "min_delta": 100}},
    },
}
"""The fields in which each variant departs from the common ones."""


def write_variant(directory: Path, name: str, **changes: Any) -> Path:
    """Write the samples and the specification of a variant into `directory`; the path of the specification.

    `changes` are merged into the variant, section by section.
    """
    directory.mkdir(parents=True, exist_ok=True)
    spec, *parts = spec_and_samples(name, **changes)
    for part, samples in zip(("train", "validation"), parts, strict=True):
        path = directory / f"{part}.jsonl"
        path.write_text(samples, encoding="utf-8")
        spec["data"][part] = {"path": str(path)}
    path = directory / f"{name}.yaml"
    # JSON is a subset of YAML.
    path.write_text(json.dumps(spec, indent=1), encoding="utf-8")
    return path


def spec_and_samples(name: str, **changes: Any) -> tuple[dict[str, Any], str, str]:
    """The specification of a variant, which names no data yet, and its training and validation samples as JSONL."""
    rng = random.Random(0)
    train, validation = ("".join(json.dumps(_sample(rng)) + "\n" for _ in range(count)) for count in (18, 6))
    return _merged(_merged(_BASE, VARIANTS[name]), changes), train, validation


def _sample(rng: random.Random) -> dict[str, str]:
    words = ["red", "blue", "one", "two", "cat", "dog", "sun", "sea"]
    chosen = rng.choices(words, k=rng.randint(1, 4))
    return {"instruction": f"Say {' '.join(chosen)}.", "output": " ".join(chosen)}


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        # A model reference has exactly one form: it is replaced, not merged.
        merged[key] = _merged(merged[key], value) if both and key not in ("teacher", "student") else value
    return merged
