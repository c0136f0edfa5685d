"""The per-start secret of an instance whose services share one user.

Owns where the secret is and how a process gets it. Must not know sockets. Invariant: it
is made anew by each start of an instance, its file is 0600, and it is worth nothing
where services have users of their own.

The launcher makes it (make_secret), passes a descriptor open on it to every service and
names the descriptor in BULKHEAD_SECRET_FD. A process of the same user without that
variable, as the `bulkhead` command, reads run/bulkhead/secret.
"""

from __future__ import annotations

import os
import secrets

from bulkhead.config import Settings, SettingsError
from bulkhead.durable import write_file

ENVIRONMENT = "BULKHEAD_SECRET_FD"
_BYTES = 32


def make_secret(settings: Settings) -> bytes:
    """Make and write the secret of a new start; hex text as bytes."""
    secret = secrets.token_hex(_BYTES).encode()
    write_file(settings.bus_dir / "secret", secret, 0o600)
    return secret


def _read(fd: int) -> bytes:
    try:
        # Services may share one open file: its position is not ours to move.
        return os.pread(fd, 4096, 0)
    except OSError:  # a pipe
        return os.read(fd, 4096)


def read_secret(settings: Settings) -> bytes:
    """The secret of this start, b"" with isolation. SettingsError when there is none.

    An inherited descriptor is read once, closed, and forgotten.
    """
    if settings.isolated:
        return b""
    number = os.environ.pop(ENVIRONMENT, "")
    if number:
        try:
            fd = int(number)
            try:
                secret = _read(fd).strip()
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise SettingsError(f"{ENVIRONMENT}={number} is no readable descriptor") from error
    else:
        path = settings.bus_dir / "secret"
        try:
            secret = path.read_bytes().strip()
        except OSError as error:
            raise SettingsError(
                f"{path} cannot be read ({error.strerror}): the instance was not started by "
                "bulkhead run, or by another user"
            ) from error
    if len(secret) < _BYTES:
        raise SettingsError("the per-start secret is too short; start the instance again")
    return secret
