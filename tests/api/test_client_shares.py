"""Shares of clients: nobody takes all, and whoever comes next finds a slot."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.client_shares import ClientShareExceeded, ClientShares, client_of, network_of
from domain.errors import ApiError, Unavailable


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=120))
def test_a_newcomer_finds_a_slot_while_one_is_free(capacity: int, steps: list[tuple[bool, int]]) -> None:
    shares = ClientShares(capacity, Unavailable)
    held: list[str] = []
    for takes, client in steps:
        name = str(client)
        if takes:
            if len(held) == capacity:
                with pytest.raises(Unavailable):
                    shares.take(name)
            elif held.count(name) >= capacity - len(held):
                with pytest.raises(ClientShareExceeded):
                    shares.take(name)
            else:
                shares.take(name)
                held.append(name)
        elif name in held:
            shares.release(name)
            held.remove(name)
        assert shares.total == len(held) <= capacity
        if len(held) < capacity:
            with shares.hold("newcomer"):
                assert shares.total == len(held) + 1


@given(st.integers(1, 100))
def test_one_client_gets_half(capacity: int) -> None:
    shares = ClientShares(capacity, Unavailable)
    for _ in range((capacity + 1) // 2):
        shares.take("one")
    with pytest.raises(ApiError):
        shares.take("one")


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::FFFF:a00:2", "10.0.0.2"),
        ("testclient", "testclient"),
        ("a:b", "a:b"),
    ],
)
def test_a_network_counts_as_one_client(host: str, network: str) -> None:
    assert network_of(host) == network


def test_a_request_over_a_unix_socket_has_a_client_too() -> None:
    assert client_of({"type": "http", "client": None}) == "@"
