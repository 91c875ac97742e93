"""Sampling of tokens with temperature and nucleus, whose randomness belongs to a sample and not to its batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_FIXED_POINT = 2.0**52
"""Probabilities times this are summed as integers where sums must not depend on their order."""


@dataclass(frozen=True)
class Sampler:
    """Draws the tokens of answers from the model's distributions."""

    temperature: float
    """Logits are divided by it; it is above 0."""
    top_p: float
    """Tokens are drawn from the fewest most likely ones whose probabilities sum to at least this (nucleus sampling,
    Holtzman et al. 2020); 1 draws from all."""
    seed: int

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be above 0, and top_p above 0 and at most 1")

    def uniforms(self, keys: Sequence[str], tokens: int) -> torch.Tensor:
        """Random numbers in [0, 1), one for each token of each key, `[keys, tokens]` float64 on the CPU.

        The numbers of a key follow from it and the seed alone.
        """
        return torch.stack([torch.rand(tokens, dtype=torch.float64, generator=self._generator(key)) for key in keys])

    def choose(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """Draw a token for each row by inverse transform sampling: `[B, V]` and `[B]` -> `[B]` int64.

        Computed in float64, so that the borders between tokens lie where the logits put them.
        """
        probabilities = torch.softmax(logits.double() / self.temperature, dim=-1)
        if self.top_p == 1:
            return _invert(probabilities, uniforms)
        sorted_, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        before = torch.nn.functional.pad(_cumulative(sorted_)[:, :-1], (1, 0))
        nucleus = sorted_.masked_fill(before >= self.top_p, 0.0)
        return tokens.gather(1, _invert(nucleus, uniforms).unsqueeze(1)).squeeze(1)

    def seed_of(self, key: str) -> int:
        """The seed of a key's own generator, of at most 63 bits."""
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1

    def _generator(self, key: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed_of(key))


def _invert(masses: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative mass exceeds the uniform's share of the total; its own mass is never zero."""
    cumulative = _cumulative(masses)
    total = cumulative[:, -1:]
    # Rounding may lift a share to the total, beyond which there is no index.
    share = torch.minimum(uniforms.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    indices = torch.searchsorted(cumulative, share, right=True).squeeze(1)
    return indices.clamp(max=masses.shape[-1] - 1)


def _cumulative(masses: torch.Tensor) -> torch.Tensor:
    """Cumulative sums of probabilities in float64, `[B, V]`."""
    if not torch.are_deterministic_algorithms_enabled():
        return masses.cumsum(dim=-1)
    # PyTorch has no deterministic sum of this kind for floats on a GPU; sums of integers are exact in any order.
    return (masses * _FIXED_POINT).long().cumsum(dim=-1).double() / _FIXED_POINT
