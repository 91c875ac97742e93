"""Weights in the format in which they leave a run: those that were trained, each rounded once."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pocl.layout import WEIGHTS_FILE

_DTYPES: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CONFIG_FILE: Final = "config.json"
_DTYPE_FIELDS: Final = ("dtype", "torch_dtype")


def choose_export_dtype(wanted: Literal["fp32", "bf16", "fp16", "as_loaded"], stored: torch.dtype) -> torch.dtype:
    """The format that `export.dtype` asks for, of a student that was `stored` in another one."""
    if wanted == "as_loaded":
        return stored if stored in _DTYPES.values() else torch.float32
    return _DTYPES[wanted]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a format as a config has it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def tensors_kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> tuple[str, ...]:
    """The parts of names of tensors that `from_pretrained` reads in fp32 although a directory is in `dtype`."""
    kept: set[str] = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return tuple(sorted(kept))


def write_rounded(source: Path, target: Path, dtype: torch.dtype, *, kept: Iterable[str] = ()) -> bool:
    """Write weights and config of the exported directory `source` into `target`, the weights in `dtype`.

    Args:
        kept: As of :func:`tensors_kept_in_fp32`.

    Returns:
        Whether they were written: not where a weight has no value in `dtype`, since it is too large.
    """
    keeps = [re.compile(rf"(^|\\.){part}(\\.|$)") for part in kept]
    rounded: dict[str, Tensor] = {}
    with safe_open(source / WEIGHTS_FILE, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 # It is no mapping.
            tensor = stored.get_tensor(name)
            is_kept = not tensor.is_floating_point() or any(keep.search(name) for keep in keeps)
            rounded[name] = tensor if is_kept else tensor.to(dtype)
            # What was trained is finite.
            if not is_kept and not rounded[name].isfinite().all():
                return False
    save_file(rounded, target / WEIGHTS_FILE, {"format": "pt"})
    config = json.loads((source / _CONFIG_FILE).read_bytes())
    config |= {field: dtype_name(dtype) for field in _DTYPE_FIELDS if field in config}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (target / _CONFIG_FILE).write_text(text, encoding="utf-8")
    # safetensors writes files that only their owner may read.
    (target / WEIGHTS_FILE).chmod((target / _CONFIG_FILE).stat().st_mode)
    return True
