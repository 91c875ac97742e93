"""Whether rivals computed the same result: a fast answer to another question is no rival."""

from collections.abc import Mapping

import torch
from torch import Tensor


def difference(ours: Tensor | float, theirs: Tensor | float) -> float:
    """The largest absolute difference, relative to the largest absolute value of `theirs`."""
    a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (ours, theirs))
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def require_agreement(limit: float | None, checks: Mapping[str, float]) -> None:
    """End the benchmark unless all differences are within `limit`; None checks nothing.

    Raises:
        SystemExit: naming the differences that are not within `limit`.
    """
    if limit is None:
        return
    violations = [f"{name} {value:.2g}" for name, value in checks.items() if not value <= limit]
    if violations:
        raise SystemExit(f"not the same result within {limit:g}: {'; '.join(violations)}")
