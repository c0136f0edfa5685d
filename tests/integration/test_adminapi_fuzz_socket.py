"""A sample of the fuzzer: what it finds in a few thousand frames of a fixed seed."""

from __future__ import annotations

import pytest

from tests.instance import running
from tests.system.fuzz_admin import Frame, fuzz, well_formed

FRAMES = 5_000


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_five_thousand_frames_break_nothing() -> None:
    with running() as instance:
        findings = fuzz(instance, FRAMES, seed=20260)
    assert not findings.problems, "\n".join(findings.problems)
    assert findings.sent == FRAMES
    # The frames went to every socket and met every fate: the checks had something to look at.
    assert min(findings.sockets[name] for name in ("admin", "internal", "misc")) > 100
    assert min(findings.kinds[kind] for kind in ("ok", "refused", "silence", "stream")) > 0
    assert len(findings.done) > 40, sorted(findings.done)


def test_which_frames_deserve_an_answer() -> None:
    for data in (b"m+ dom0 name x\0", b"m dom0 keyword adminvm\0", b"m dom0 name a b\0x\0"):
        assert well_formed(data)
    for data in (
        b"", b"m+ dom0 name x", b"m+ dom0 name\0", b"m+ dom0 keyword default\0",
        b"m\xff dom0 name x\0", b"m+ dom0 name x\0" + b"x" * 65536,
    ):  # fmt: skip
        assert not well_formed(data)


def test_what_the_fuzzer_calls_a_problem() -> None:
    from tests.system.fuzz_admin import Findings, judge

    bad = {
        b"": "silence",
        b"x": "neither",
        b"2\0KeyError\0\0x\0": "class",
        b"2\0QubesException\0Traceback\0x\0": "inside",
        b"2\0QubesException\0\0failed by an internal error\0": "inside",
        b"2\0QubesException\0\0\0": "without a reason",
        b"2\0QubesException\0\0x": "laid out",
    }
    for reply, word in bad.items():
        findings = Findings()
        judge(Frame("admin", b"m+ dom0 name x\0"), reply, findings, stream=False, hung=False)
        assert len(findings.problems) == 1
        assert word in findings.problems[0]
    findings = Findings()
    judge(
        Frame("admin", b"m+ dom0 name x\0", quiet=True), b"0\0", findings, stream=False, hung=False
    )
    assert "accepted" in findings.problems[0]
