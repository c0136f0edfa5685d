"""Replays recorded Admin API exchanges and compares the answers.

Owns the recordings' format and the normalisation of what differs between two runs
(uuids, times, paths, sizes in use). Must not know what answers: give it a function from
request bytes to reply bytes, or the path of a socket.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

RECORDED = Path(__file__).parents[1] / "golden" / "admin_api" / "recorded.json"
# Replies whose order of lines carries no meaning.
_UNORDERED = frozenset(
    {
        "admin.vmclass.List", "admin.deviceclass.List", "admin.pool.List",
        "admin.pool.ListDrivers", "admin.vm.feature.List", "admin.vm.volume.List",
        "admin.pool.volume.List", "admin.label.List", "admin.vm.property.List",
        "admin.property.List", "admin.vm.property.GetAll", "admin.property.GetAll",
        "admin.vm.device.denied.List",
    }
)  # fmt: skip
_ZERO_UUID = "00000000-0000-0000-0000-000000000000"
_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_RULES: tuple[tuple[re.Pattern[str], re.Pattern[str], str], ...] = (
    (re.compile(r"\.Help$"), re.compile(r"(?s).*\S.*"), "<TEXT>"),
    (
        re.compile(r"pool\.(Info|UsageDetails)$"),
        re.compile(r"(?m)^((?:data_|metadata_)?(?:size|usage))=\d+$"),
        r"\1=<NUM>",
    ),
    (re.compile(r"volume\.Info$"), re.compile(r"(?m)^usage=(?!0$)\d+$"), "usage=<NUM>"),
    (re.compile(r"volume\.Info$"), re.compile(r"(?m)^path=.+$"), "path=<PATH>"),
    (re.compile(r"CurrentState$"), re.compile(r"\b(mem|cputime)=(?!0\b)\d+"), r"\1=<NUM>"),
)

Exchange = Callable[[bytes, bool], bytes | None]
"""Request bytes and whether the write side is closed -> reply bytes, None = time-out."""


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded exchange; reply is "ok", "exc", "none" or "timeout". method "" =
    the frame itself was the subject, and the reply is compared as it is."""

    id: str
    method: str
    frame: bytes
    half_close: bool
    reply: str
    exception: str
    body: str


def steps(section: str = "") -> Iterator[Step]:
    """The recorded exchanges in order; section "" = all."""
    for row in json.loads(RECORDED.read_text())["steps"]:
        if section and not row["id"].startswith(section + "/"):
            continue
        frame = row["frame"].encode("latin-1")
        if "fill" in row:
            frame += row["fill"][0].encode() * row["fill"][1]
        yield Step(
            row["id"], row["method"], frame, row.get("half_close", True),
            row["reply"], row.get("class", ""), row.get("body", ""),
        )  # fmt: skip


def normalise(method: str, text: str, directory: str = "") -> str:
    """A reply's text without what differs from run to run."""
    if directory:
        text = text.replace(directory, "<DIR>").replace(directory.replace("/", "_"), "<DIR_>")
    text = _UUID.sub(lambda m: m[0] if m[0] == _ZERO_UUID else "<UUID>", text)
    for methods, pattern, replacement in _RULES:
        if methods.search(method):
            text = pattern.sub(replacement, text)
    if method in _UNORDERED:
        text = "".join(sorted(text.splitlines(keepends=True)))
    if method.endswith("ListDrivers"):
        words = (line.split() for line in text.splitlines())
        text = "".join(" ".join([w[0], *sorted(w[1:])]) + "\n" for w in words)
    return text


def verdict(step: Step, reply: bytes | None, directory: str = "") -> str:
    """ "same", "cleaner" (refused where the recording broke off), "class" or "differ"."""
    if reply is None:
        kind, exception, body = "timeout", "", ""
    elif reply == b"":
        kind, exception, body = "none", "", ""
    elif reply[:2] == b"0\0":
        text = reply[2:].decode("utf-8")
        kind, exception, body = "ok", "", normalise(step.method, text, directory)
    elif reply[:2] == b"2\0":
        fields = reply[2:].split(b"\0")
        if len(fields) != 4 or fields[3]:
            return "differ"
        kind, exception, body = "exc", fields[0].decode(), ""
    else:
        return "differ"
    if (kind, exception, body) == (step.reply, step.exception, step.body):
        return "same"
    if step.reply == "none" and kind == "exc":
        return "cleaner"
    return "class" if step.reply == kind == "exc" else "differ"


def over_socket(path: str, timeout: float = 60.0) -> Exchange:
    """An exchange over a unix socket; time-out 1 s where the write side stays open."""

    def exchange(frame: bytes, half_close: bool) -> bytes | None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(timeout if half_close else 1.0)
            peer.connect(path)
            try:
                peer.sendall(frame)
                if half_close:
                    peer.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass
            received = b""
            try:
                while chunk := peer.recv(65536):
                    received += chunk
            except ConnectionResetError:
                pass
            except TimeoutError:
                return None
            return received

    return exchange
