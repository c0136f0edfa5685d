"""Makes a new store: python -m services.registry.initialise --root DIR.

Owns the first content of the state directory and its folders. Must not start services.
Invariant: an existing store is never overwritten; a kill at any line leaves either no
store, so that the call can be repeated, or a whole one.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from bulkhead.durable import fsync_directory
from bulkhead.failpoints import hit
from bulkhead.model import xmlstore
from bulkhead.model.defaults import new_store
from bulkhead.model.view import View
from bulkhead.reflink import can_share_blocks
from services.registry import failpoint_table as _rows  # noqa: F401  (declares the names)
from services.registry.adapters.checkpoint import StoreFile
from services.registry.adapters.journal import Journal, NewStore, sha256
from services.registry.adapters.statelock import AlreadyLocked, StateLock

# Folders below the state directory: of storage, of firewall, of the registry itself.
FOLDERS = ("appvms", "vm-templates", "vm-kernels", "firewall", "notes")
_EXIT_REFUSED = 78


class StoreExists(RuntimeError):
    """There is a store already; the message says where."""


def initialise(state_dir: Path, pool_dir: Path, *, reflink: bool) -> str:
    """Make the store of a new installation; returns its id.

    pool_dir: folder of the first pool; reflink: its files can be cloned by reference.
    StoreExists, AlreadyLocked, OSError.
    """
    hit("registry.init.before_folders")
    state_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    lock = StateLock.take(state_dir)
    try:
        file = StoreFile(state_dir / "qubes.xml")
        journal_path = state_dir / "journal.sqlite"
        for path in (file.path, journal_path):
            # A journal of size 0 is what an interrupted call leaves.
            if path.exists() and path.stat().st_size:
                raise StoreExists(
                    f"{path} exists: this is a store already; move {state_dir} away to begin anew"
                )
        file.drop_temporaries()
        for name in FOLDERS:
            (state_dir / name).mkdir(mode=0o710, exist_ok=True)
        fsync_directory(state_dir)
        hit("registry.init.before_store")
        pool_dir.mkdir(mode=0o710, parents=True, exist_ok=True)
        view = View()
        view.apply_all(new_store(str(pool_dir), reflink))
        store_id = str(uuid.uuid4())
        document = xmlstore.document_of(view, store_id, 0)
        file.replace(document, sha256(document), "")
        hit("registry.init.after_store")
        # Killed before this: qubes.xml alone is a store, the registry makes the journal.
        Journal.create(journal_path, NewStore(store_id, 0, 0, document)).close()
        return store_id
    finally:
        lock.release()


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit status 0, or 78 with a sentence on standard error."""
    parser = argparse.ArgumentParser(prog="initialise", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="directory of the instance")
    parser.add_argument(
        "--pool-dir",
        type=Path,
        help="folder of the first pool; by default the state directory, as in Qubes",
    )
    parser.add_argument(
        "--reflink",
        choices=("yes", "no", "probe"),
        default="probe",
        help="whether the pool's file system clones files; the registry's own user may not be "
        "able to probe a folder that is storage's",
    )
    parsed = parser.parse_args(arguments)
    state_dir: Path = parsed.root.absolute() / "var/lib/qubes"
    pool_dir: Path = (parsed.pool_dir or state_dir).absolute()
    try:
        reflink = (
            can_share_blocks(pool_dir) if parsed.reflink == "probe" else parsed.reflink == "yes"
        )
        store_id = initialise(state_dir, pool_dir, reflink=reflink)
    except (StoreExists, AlreadyLocked, OSError) as error:
        print(f"initialise: {error}", file=sys.stderr)
        sys.exit(_EXIT_REFUSED)
    print(f"new store {store_id} in {state_dir}")


if __name__ == "__main__":
    main()
