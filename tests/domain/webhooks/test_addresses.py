"""Which addresses messages may be sent to: no form of a private address passes."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.webhooks.addresses import WebhookUrlInvalid, parse_url, refuse_address

NONE: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.8.9.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "198.18.0.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0x7f.1",
        "127.1",
        "127.0.0.1.",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::7f00:1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::808:808]",
        "[2002:7f00:1::]",
        "[2001:0:a00:1::]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[fe80::1]",
        "[fe80::1%25eth0]",
        "[fec0::1]",
        "[ff02::1]",
        "localhost",
        "LOCALHOST.",
        "x.localhost",
    ],
)
def test_no_form_of_an_address_that_is_not_public_is_taken(host: str) -> None:
    with pytest.raises(WebhookUrlInvalid) as raised:
        parse_url(f"https://{host}/hook", NONE)
    assert [error.pointer for error in raised.value.field_errors] == ["/url"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/", "https"),
        ("ftp://example.com/", "https"),
        ("example.com/hook", "https"),
        ("https:///hook", "https"),
        ("https://", "https"),
        ("https://user:password@example.com/", "user"),
        ("https://example.com/#here", "fragment"),
        ("https://example.com\\@10.0.0.1/", "user"),
        ("https://example.com/\\a", "backslash"),
        ("https://example.com/a b", "space"),
        ("https://example.com/a\r\nx: y", "space"),
        ("https://example.com/\u00fc", "ASCII"),
        ("https://example.com:0/", "port"),
        ("https://example.com:99999/", "well-formed"),
        ("https://[::1/", "well-formed"),
        ("https://a..b/", "name"),
        ("https://-a.example/", "name"),
        ("https://" + "a" * 64 + ".example/", "name"),
        ("https://example.com/" + "a" * 2048, "2048"),
    ],
)
def test_url_that_cannot_be_sent_to_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(WebhookUrlInvalid, match=reason):
        parse_url(url, NONE)


def test_public_hosts_are_taken_apart() -> None:
    target = parse_url("HTTPS://Hooks.Example.COM.:8443/a%20b?c=d&e", NONE)
    assert (target.host, target.port, target.path) == ("hooks.example.com", 8443, "/a%20b?c=d&e")
    assert target.authority == "hooks.example.com:8443"
    assert parse_url("https://b\u00fccher.example", NONE).authority == "xn--bcher-kva.example"
    assert parse_url("https://[2606:4700::1]/", NONE).authority == "[2606:4700::1]"
    assert parse_url("https://[64:ff9b::808:808]/", NONE).host == "64:ff9b::808:808"


def test_operator_may_name_internal_hosts_and_no_others_are_reached() -> None:
    hosts = frozenset({"hooks.internal", "127.0.0.1", "fd00::1"})
    assert parse_url("http://hooks.internal/", hosts).internal
    assert parse_url("http://127.0.0.1:8080/", hosts).port == 8080
    assert parse_url("https://[fd00::1]/", hosts).internal
    for url in ("http://other.internal/", "https://127.0.0.2/", "https://x.hooks.internal.localhost/"):
        with pytest.raises(WebhookUrlInvalid):
            parse_url(url, hosts)


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "fe80::1", "168.63.129.16", "::ffff:169.254.169.254", "0.0.0.0"]
)
def test_metadata_of_clouds_is_never_reached(address: str) -> None:
    assert refuse_address(ipaddress.ip_address(address), internal=True) is not None


@given(st.integers(0, 2**32 - 1))
def test_address_is_judged_alike_in_each_form_that_stands_for_it(number: int) -> None:
    plain = ipaddress.IPv4Address(number)
    refused = refuse_address(plain, internal=False) is not None
    # An independent list: what Python's registry of IANA does not call global is refused.
    assert refused or plain.is_global
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        inside = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | number)
        assert (refuse_address(inside, internal=False) is not None) == refused
