"""Who is let in as whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.bus.identity import Identities, peer_uid

USERS = {"registry": 901, "lifecycle": 902, "hostd": 0}


def isolated() -> Identities:
    return Identities(isolated=True, users=USERS, secret=b"", own_uid=901)


def shared() -> Identities:
    return Identities(isolated=False, users={}, secret=b"s" * 64, own_uid=1000)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("localhost:902:902:17", "lifecycle"),
        ("localhost:901:0:1", "registry"),
        ("localhost:0:0:1", "operator"),
        ("localhost:65534:65534:5", None),
        ("localhost:902:902", None),
        ("127.0.0.1:902:902:17", None),
        ("localhost:-902:902:17", None),
        ("", None),
    ],
)
def test_with_isolation_the_uid_decides(address: str, name: str | None) -> None:
    assert isolated().of_peer(address) == name
    assert isolated().admit(address, "NULL", []) == name


def test_with_isolation_no_password_helps() -> None:
    assert isolated().admit("localhost:902:902:1", "PLAIN", [b"lifecycle", b""]) is None


@pytest.mark.parametrize(
    ("address", "mechanism", "credentials", "name"),
    [
        ("localhost:1000:1000:5", "PLAIN", [b"lifecycle", b"s" * 64], "lifecycle"),
        ("localhost:0:0:5", "PLAIN", [b"operator", b"s" * 64], "operator"),
        ("localhost:1001:1000:5", "PLAIN", [b"lifecycle", b"s" * 64], None),
        ("localhost:1000:1000:5", "PLAIN", [b"lifecycle", b"t" * 64], None),
        ("localhost:1000:1000:5", "PLAIN", [b"lifecycle", b""], None),
        ("localhost:1000:1000:5", "PLAIN", [b"nobody", b"s" * 64], None),
        ("localhost:1000:1000:5", "PLAIN", [b"lifecycle"], None),
        ("localhost:1000:1000:5", "NULL", [], None),
    ],
)
def test_without_isolation_the_secret_decides(
    address: str, mechanism: str, credentials: list[bytes], name: str | None
) -> None:
    assert shared().admit(address, mechanism, credentials) == name


@given(st.text(max_size=40), st.lists(st.binary(max_size=80), max_size=4))
def test_nothing_but_the_secret_lets_in(address: str, credentials: list[bytes]) -> None:
    assert shared().admit(address, "PLAIN", credentials) is None
    assert isolated().of_peer(address) is None
    uid = peer_uid(address)
    assert uid is None or address.startswith(f"localhost:{uid}:") or ":0" in address


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="share a uid"):
        Identities(isolated=True, users={"a": 5, "b": 5}, secret=b"", own_uid=0)
    with pytest.raises(ValueError, match="secret"):
        Identities(isolated=False, users={}, secret=b"", own_uid=0)


def test_the_memory_of_addresses_is_bounded() -> None:
    identities = isolated()
    for pid in range(5000):
        assert identities.of_peer(f"localhost:902:902:{pid}") == "lifecycle"
    assert len(identities._known) <= 4096
