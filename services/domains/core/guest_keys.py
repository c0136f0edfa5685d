"""Guest keys: grammar, limits, and what one write makes of the present keys.

Owns the limits of spec'd guest databases (63-byte keys, 3072-byte values). Must not
know where keys are kept. Invariant: what apply() returns is within every limit.
Keys read back may have been written by the guest and stay untrusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .reasons import DomainsError

KEY_BYTES = 63
VALUE_BYTES = 3072
STORE_KEYS = 16384
_KEY = re.compile(r"/[a-zA-Z0-9_.:/-]*")


@dataclass(frozen=True, slots=True)
class KeysOf:
    """Keys below a path ("/x/") whose value has one of the lines, and the key that is
    written where any went."""

    below: str
    lines: frozenset[str]
    news: tuple[str, str]

    def found(self, untrusted_keys: Mapping[str, str]) -> dict[str, str]:
        """Those among the keys, each with the lines that it was found by and nothing else."""
        found = {}
        for path, untrusted_value in untrusted_keys.items():
            if within(path, self.below):
                own = [line for line in untrusted_value.split("\n") if line in self.lines]
                if own:
                    found[path] = "\n".join(own)
        return found


def check_keys_of(untrusted: KeysOf) -> KeysOf:
    """A subtree and a key that may be written."""
    if not untrusted.below.endswith("/"):
        raise DomainsError(
            "INVALID_GUEST_KEY",
            f"{ascii(untrusted.below)[:100]} is no subtree: it must end with '/'.",
            key=ascii(untrusted.below)[:100],
        )
    check_subtree(untrusted.below)
    check_value(check_key(untrusted.news[0]), untrusted.news[1])
    return untrusted


def check_key(untrusted_path: str) -> str:
    """A key to write: begins with "/", does not end with it, at most 63 bytes."""
    if (
        _KEY.fullmatch(untrusted_path) is None
        or untrusted_path.endswith("/")
        or len(untrusted_path) > KEY_BYTES
    ):
        raise DomainsError(
            "INVALID_GUEST_KEY",
            f"The guest key {ascii(untrusted_path)[:100]} must begin with '/', not end with it, "
            f"have at most {KEY_BYTES} bytes and only letters, digits and _ . : / -",
            key=ascii(untrusted_path)[:100],
        )
    return untrusted_path


def check_subtree(untrusted_path: str) -> str:
    """A key to remove or list; a trailing "/" means the subtree. "" is refused."""
    stem = untrusted_path.rstrip("/") if untrusted_path.endswith("/") else untrusted_path
    if untrusted_path == "/":
        return untrusted_path
    check_key(stem)
    return untrusted_path


def check_value(untrusted_path: str, untrusted_value: str) -> str:
    """A value to write: at most 3072 bytes of UTF-8 without NUL."""
    size = len(untrusted_value.encode("utf-8", "surrogatepass"))
    if size > VALUE_BYTES or "\0" in untrusted_value:
        raise DomainsError(
            "INVALID_GUEST_KEY",
            f"The value of guest key {untrusted_path} has {size} bytes; it may have at most "
            f"{VALUE_BYTES} and no NUL.",
            key=untrusted_path,
            size=str(size),
        )
    return untrusted_value


def within(path: str, prefix: str) -> bool:
    """path is prefix itself, or below it when prefix ends with "/"."""
    return path.startswith(prefix) if prefix.endswith("/") else path == prefix


def apply(
    present: Mapping[str, str],
    written: Iterable[tuple[str, str]],
    removed: Iterable[str],
    replace_all: bool,
    removed_of: KeysOf | None = None,
) -> dict[str, str]:
    """The keys after one write: removals first, then values. DomainsError on a limit."""
    untrusted_written = list(written)
    untrusted_removed = list(removed)
    for path, value in untrusted_written:
        check_key(path)
        check_value(path, value)
    for prefix in untrusted_removed:
        check_subtree(prefix)
    result = {} if replace_all else dict(present)
    for prefix in untrusted_removed:
        if prefix.endswith("/"):
            result = {path: value for path, value in result.items() if not within(path, prefix)}
        else:
            result.pop(prefix, None)
    gone = set(check_keys_of(removed_of).found(result)) if removed_of is not None else set()
    gone -= {path for path, _ in untrusted_written}
    result = {path: value for path, value in result.items() if path not in gone}
    result.update(untrusted_written)
    if removed_of is not None and gone:
        result.update([removed_of.news])
    if len(result) > STORE_KEYS:
        raise DomainsError(
            "GUEST_KEYS_FULL",
            f"The guest would have {len(result)} keys; at most {STORE_KEYS} are kept.",
            count=str(len(result)),
        )
    return result


def select(untrusted_keys: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The keys at or below prefix ("" = all), sorted by path."""
    return {
        path: value
        for path, value in sorted(untrusted_keys.items())
        if not prefix or within(path, prefix)
    }
