"""Whether two ways to compute the same logits differ by rounding alone."""

from torch import Tensor

_TOLERANCE = {"fp32": 1e-4, "half": 0.2}
"""Largest Euclidean norm of a difference, relative to the logits: half precision changes those of random weights by up
to a tenth, whichever way they are computed, and tokens that see what they must not change them by about one."""


def difference_beyond_rounding(actual: Tensor, expected: Tensor, *, is_exact: bool, growth: float = 1) -> float | None:
    """The relative difference where it is more than rounding, else None; also where it is no number.

    Args:
        is_exact: Weights and products are in fp32, and not in half precision.
        growth: How many times as much fp32 rounds here as in a forward pass.
    """
    difference = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
    tolerance = growth * _TOLERANCE["fp32"] if is_exact else _TOLERANCE["half"]
    return None if difference <= tolerance else difference
