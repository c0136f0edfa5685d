"""A registry with a full table of stored replies starts again, confined as it is."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing

import pytest

from tests.instance import Instance

pytestmark = pytest.mark.integration

ROWS = 30_000


def test_a_full_reply_table_keeps_no_registry_down() -> None:
    """Sorting so many rows needs more than SQLite keeps in its cache, and the confined
    registry may write no temporary file."""
    instance = Instance()
    try:
        instance.start()
        instance.ok("admin.label.Create", arg="kept", payload=b"0x123456")
        assert instance.stop() == 0
        with closing(sqlite3.connect(instance.settings.journal_file)) as journal, journal:
            journal.executemany(
                "INSERT INTO reply(caller, request_id, time, body) VALUES ('adminapi', ?, ?, ?)",
                ((os.urandom(16), time.time(), os.urandom(500)) for _ in range(ROWS)),
            )
        instance.start()
        assert instance.ok("admin.label.Get", arg="kept") == "0x123456"
        old = instance.kill("registry")
        instance.wait_restarted("registry", old)
        instance.ok("admin.label.Remove", arg="kept")
    finally:
        instance.close()
