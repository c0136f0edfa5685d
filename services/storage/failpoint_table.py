"""The failpoints of storage: both sides of every durable step.

Owns the names. Must not know more. Invariant: a name here is hit somewhere in
services/storage, and every hit there is named here (a test compares the two).
"""

from __future__ import annotations

from bulkhead import failpoints

_RENAME = {
    "before_rename": "the new file is durable under its temporary name",
    "after_rename": "the new file is durable under its final name",
}
_COMMIT = {
    "before_revision": "the old commit is not yet a revision",
    "after_revision": "the old commit is also a revision",
    "after_prune": "surplus revisions are gone",
    "before_rename": "the new state is durable, the old one still current",
    "after_rename": "the new state is current",
    "after_precache": "the copy for the next start exists",
}
_STEPS: dict[str, dict[str, str]] = {
    "ensure": {**_RENAME, "after_directory": "the qube's directory exists"},
    "clone": _RENAME,
    "precache": _RENAME,
    "start": {
        **_RENAME,
        "before_base": "the overlay's base has no name yet",
        "after_base": "the overlay's base has its second name",
        "before_tag": "kept running data bears the old boot id",
        "after_tag": "kept running data bears the new boot id",
        "before_prune": "the guest will work in place, revisions still exist",
        "after_prune": "revisions are gone",
    },
    "detach": _RENAME,
    "stop": {
        **_COMMIT,
        "before_tag": "running data lacks the tags of a commit",
        "after_tag": "running data bears the tags of a commit",
        "before_discard": "running data still exists",
        "after_discard": "running data is gone",
    },
    "import_end": {
        **_COMMIT,
        "before_tag": "the import lacks the tags of a commit",
        "after_tag": "the import bears the tags of a commit",
        "before_discard": "the import's target exists",
        "after_discard": "the import's target is gone",
    },
    "replace": _COMMIT,
    "revert": {
        **_COMMIT,
        "before_tag": "the revision does not yet bear the operation",
        "after_tag": "the revision bears the operation",
    },
    "resize": {
        **_RENAME,
        "before_truncate": "the running image has its old size",
        "after_truncate": "the running image has its new size",
        "after_precache": "the copy for the next start exists",
    },
    "import_begin": _RENAME,
    "import_arrived": {
        "before_tag": "every byte is durable, the import is not marked whole",
        "after_tag": "the import is marked whole",
    },
    "remove": {
        "before_unlink": "a file of the volume still exists",
        "after_unlink": "a file of the volume is gone",
        "before_rmdir": "the qube's directory is empty",
        "after_rmdir": "the qube's directory is gone",
    },
    "quarantine": {
        "before_move": "a file of the volume is still in place",
        "after_move": "a file of the volume was moved aside",
    },
    "pool_setup": {
        "before_mkdir": "a directory of the pool is missing",
        "after_mkdir": "a directory of the pool exists",
    },
    "kernel_add": _RENAME,
    "kernel_remove": {
        "before_rename": "the kernel is installed",
        "after_rename": "the kernel is out of sight, its files still exist",
        "after_delete": "the kernel's files are gone",
    },
}

failpoints.register(
    "storage",
    {f"storage.{op}.{step}": text for op, steps in _STEPS.items() for step, text in steps.items()},
)
