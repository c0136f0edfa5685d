"""Who is calling: from the kernel's peer credentials to a service's name.

Owns the mapping uid -> service and the decision whom to let in. Must not know sockets or
files. Invariant: with isolation, nothing that a peer sends decides who it is; without it,
only who holds the per-start secret is anybody at all.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from bulkhead.bus.methods import CALLERS, OPERATOR


def peer_uid(peer_address: str) -> int | None:
    """The uid in ZeroMQ's Peer-Address "localhost:UID:GID:PID"; None when it has no such form."""
    parts = peer_address.split(":")
    if len(parts) != 4 or parts[0] != "localhost" or not all(p.isdigit() for p in parts[1:]):
        return None
    return int(parts[1])


class Identities:
    """Callers of one service.

    users: service -> uid, used when isolated. secret: the per-start secret, used
    otherwise; own_uid is then the only uid let in, besides root.
    """

    def __init__(
        self, *, isolated: bool, users: Mapping[str, int], secret: bytes, own_uid: int
    ) -> None:
        self.isolated = isolated
        self._secret = secret
        self._own_uid = own_uid
        # root is the operator even though hostd runs as root too: hostd calls nobody.
        self._names = {uid: name for name, uid in users.items() if uid != 0}
        if len(self._names) != sum(1 for uid in users.values() if uid != 0):
            raise ValueError("two services share a uid: they could not be told apart")
        if not isolated and not secret:
            raise ValueError("without isolation a per-start secret is needed")
        self._names[0] = OPERATOR
        self._known: dict[str, str | None] = {}

    def of_peer(self, peer_address: str) -> str | None:
        """With isolation: the caller behind a Peer-Address, None for a stranger."""
        try:
            return self._known[peer_address]
        except KeyError:
            pass
        uid = peer_uid(peer_address)
        name = self._names.get(uid) if uid is not None else None
        if len(self._known) >= 4096:
            self._known.clear()
        self._known[peer_address] = name
        return name

    def admit(
        self, peer_address: str, mechanism: str, untrusted_credentials: list[bytes]
    ) -> str | None:
        """The caller's name for a new connection, or None to refuse it (ZAP)."""
        if self.isolated:
            return self.of_peer(peer_address) if mechanism == "NULL" else None
        if peer_uid(peer_address) not in (self._own_uid, 0):
            return None
        if mechanism != "PLAIN" or len(untrusted_credentials) != 2:
            return None
        untrusted_name, untrusted_password = untrusted_credentials
        if not hmac.compare_digest(untrusted_password, self._secret):
            return None
        name = untrusted_name.decode("ascii", "replace")
        return name if name in CALLERS else None
