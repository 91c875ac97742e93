"""Whether the rivals computed the same: a fast answer to another question is no rival."""

from collections.abc import Mapping

import torch
from torch import Tensor


def difference(ours: Tensor | float, theirs: Tensor | float) -> float:
    """Largest difference, over the largest value of theirs."""
    a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (ours, theirs))
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def require_agreement(limit: float | None, checks: Mapping[str, float]) -> None:
    """
    Raises:
        SystemExit: a difference is not below `limit`.
    """
    if limit is None:
        return
    apart = [f"{name} {value:.2g}" for name, value in checks.items() if not value <= limit]
    if apart:
        raise SystemExit(f"not the same result within {limit:g}: {'; '.join(apart)}")
