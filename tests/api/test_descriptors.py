"""Limits on connections and followers fit the number of files that the process may open."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.descriptors import TooFewDescriptors, fit_to_descriptors
from domain.settings import Settings


@given(st.integers(576, 200_000), st.integers(64, 100_000), st.integers(2, 100_000))
def test_limits_fit_and_are_never_raised(available: int, connections: int, followers: int) -> None:
    settings = Settings(home=Path("/nowhere"), max_connections=connections, max_followers=followers)
    fitted = fit_to_descriptors(settings, available)
    assert fitted.max_connections <= connections
    assert fitted.max_followers <= followers
    assert fitted.max_connections + fitted.max_transfers < available
    # Short requests find connections however many follow.
    assert fitted.max_followers < fitted.max_connections


def test_limits_that_fit_are_kept() -> None:
    settings = Settings(home=Path("/nowhere"))
    assert fit_to_descriptors(settings, 1 << 20) == settings


def test_too_few_descriptors_are_refused_with_what_to_do() -> None:
    with pytest.raises(TooFewDescriptors, match=r"may open 256 files and needs 576 .* raise its limit"):
        fit_to_descriptors(Settings(home=Path("/nowhere")), 256)
