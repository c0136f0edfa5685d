"""Which lifecycle may still give orders, for every participant."""

from __future__ import annotations

import pytest

from bulkhead.model.epoch import EpochGuard
from bulkhead.model.refusal import TypedRefusal
from services.domains.core.reasons import DomainsError
from services.storage.core.reasons import StorageRefusal


@pytest.mark.parametrize("refusal", [DomainsError, StorageRefusal])
def test_epochs_never_go_back(refusal: type[TypedRefusal]) -> None:
    guard = EpochGuard("domains", refusal)
    with pytest.raises(refusal) as caught:
        guard.admit(7)
    assert (caught.value.reason, caught.value.code) == ("EPOCH_UNKNOWN", "UNAVAILABLE")
    guard.learn(5)
    guard.admit(5)
    guard.admit(6)
    with pytest.raises(refusal) as caught:
        guard.admit(5)
    assert (caught.value.reason, caught.value.code) == ("STALE_EPOCH", "ABORTED")
    guard.learn(4)
    assert guard.current == 6
