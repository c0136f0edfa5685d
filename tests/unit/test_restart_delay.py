"""How long the launcher waits before a child that keeps dying starts again."""

from __future__ import annotations

import pytest

from clients.cli.instance.supervisor import RESTART_DELAY_LIMIT, RESTART_DELAYS, restart_delay


def test_the_delay_grows_and_stays_at_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RESTART_DELAY_LIMIT, raising=False)
    assert tuple(restart_delay(n) for n in range(len(RESTART_DELAYS))) == RESTART_DELAYS
    assert restart_delay(100) == RESTART_DELAYS[-1]


def test_the_environment_lowers_the_longest_and_never_raises_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(RESTART_DELAY_LIMIT, "0.15")
    assert [restart_delay(n) for n in range(4)] == [0.02, 0.1, 0.15, 0.15]
    monkeypatch.setenv(RESTART_DELAY_LIMIT, "60")
    assert restart_delay(100) == RESTART_DELAYS[-1]
