"""Names, kinds, revisions, epochs and places, without any file."""

from __future__ import annotations

import errno
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model.records import REVISIONS_LIMIT, Pool, Volume
from services.storage.core.names import Role, classify, file_name
from services.storage.core.places import containing
from services.storage.core.present import Present, gather, require_committed, require_quiet
from services.storage.core.reasons import REASONS, StorageRefusal, from_os_error
from services.storage.core.revisions import Revision, next_revision, surplus, to_revert_to
from services.storage.core.volumes import (
    Kind,
    Vid,
    ephemeral,
    kind_of,
    parse_bool,
    parse_revisions,
    parse_vid,
)

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
TIMES = st.integers(min_value=0, max_value=4_000_000_000)


def valid(name: str) -> bool:
    try:
        parse_vid(f"appvms/x/{name}")
    except StorageRefusal:
        return False
    return True


@given(NAMES.filter(valid), st.sampled_from([r for r in Role if r is not Role.REVISION]))
def test_names_come_apart_as_they_were_made(volume: str, role: Role) -> None:
    found = classify(file_name(volume, role))
    assert found is not None
    assert (found.volume, found.role, found.temporary) == (volume, role, False)
    left = classify(file_name(volume, role) + "~0123456789ab")
    assert left is not None
    assert (left.volume, left.role, left.temporary) == (volume, role, True)


@given(NAMES.filter(valid), st.integers(min_value=1, max_value=10**9), TIMES)
def test_revision_names_come_apart(volume: str, number: int, time: int) -> None:
    revision = Revision(number, time)
    found = classify(file_name(volume, Role.REVISION, revision))
    assert found is not None
    assert (found.volume, found.role, found.revision) == (volume, Role.REVISION, revision)


@given(
    NAMES.filter(valid),
    NAMES.filter(valid),
    st.sampled_from([r for r in Role if r is not Role.REVISION]),
    st.sampled_from([r for r in Role if r is not Role.REVISION]),
)
def test_no_two_volumes_share_a_file(one: str, two: str, first: Role, second: Role) -> None:
    if one != two:
        assert file_name(one, first) != file_name(two, second)


def test_revision_name_as_in_4_4() -> None:
    name = "root.img.12@2024-03-09T16:00:01Z"
    found = classify(name)
    assert found is not None
    assert found.revision == Revision(12, 1710000001)
    assert file_name("root", Role.REVISION, found.revision) == name


@pytest.mark.parametrize(
    "name",
    [
        "root",
        ".img",
        "root.img.0@2024-03-09T16:00:01Z",
        "root.img.1@2024-13-09T16:00:01Z",
        "root.img.1",
        "root.imgx",
        "firewall.xml",
        ".bulkhead-probe~12",
    ],
)
def test_other_files_are_nobodys(name: str) -> None:
    assert classify(name) is None


def test_4_4_stores_are_known() -> None:
    for name in ("root-cow.img", "root-cow.img.old"):
        found = classify(name)
        assert found is not None
        assert found.role is Role.LEGACY


@given(st.sets(st.integers(min_value=1, max_value=50)), st.integers(min_value=-1, max_value=8))
def test_the_newest_survive(numbers: set[int], keep: int) -> None:
    revisions = [Revision(n, 1000 - n) for n in numbers]  # time says nothing about age
    gone = {r.number for r in surplus(revisions, keep)}
    left = sorted(numbers - gone)
    if keep < 0:
        assert gone == set()
    else:
        assert left == sorted(numbers)[max(0, len(numbers) - keep) :]
        assert len(left) == min(keep, len(numbers))


def test_revisions_count_on() -> None:
    assert next_revision([], 5.9) == Revision(1, 5)
    assert next_revision([Revision(9, 0), Revision(10, 0)], 1.0).number == 11


def volume(**flags: object) -> Volume:
    return Volume("v", "p", "appvms/q/v", **flags)  # type: ignore[arg-type]


def test_kinds() -> None:
    assert kind_of(volume()) is Kind.VOLATILE
    assert kind_of(volume(save_on_stop=True)) is Kind.ORIGIN
    assert kind_of(volume(snap_on_start=True, source="appvms/t/v")) is Kind.SNAPSHOT
    for flags, reason in (
        ({"save_on_stop": True, "snap_on_start": True, "source": "s"}, "VOLUME_REFUSED"),
        ({"snap_on_start": True}, "INVALID_VOLUME"),
        ({"source": "appvms/t/v"}, "INVALID_VOLUME"),
    ):
        with pytest.raises(StorageRefusal) as caught:
            kind_of(volume(**flags))
        assert caught.value.reason == reason


@given(st.text(max_size=40))
def test_a_checked_id_cannot_leave_the_pool(text: str) -> None:
    try:
        vid = parse_vid(text)
    except StorageRefusal as refusal:
        assert refusal.reason == "INVALID_VOLUME"
    else:
        parts = PurePath(str(vid)).parts
        assert len(parts) == 3
        assert ".." not in parts
        assert "\0" not in str(vid)


def test_ephemeral_follows_the_pool_live() -> None:
    off, on = Pool("p", "file", {}), Pool("p", "file", {"ephemeral_volatile": "True"})
    writable = volume(rw=True)
    assert not ephemeral(writable, off)
    assert ephemeral(writable, on)
    assert not ephemeral(volume(rw=False), on)
    assert not ephemeral(volume(rw=True, save_on_stop=True), on)
    assert not ephemeral(volume(rw=True, ephemeral=False), on)
    assert ephemeral(volume(rw=True, ephemeral=True), off)
    for flags in ({"rw": False}, {"rw": True, "save_on_stop": True}):
        with pytest.raises(StorageRefusal):
            ephemeral(volume(ephemeral=True, **flags), off)


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("1", True), ("on", True), ("False", False), ("", False)]
)
def test_booleans_of_pools(text: str, value: bool) -> None:
    assert parse_bool(Pool("p", "file", {"x": text}), "x", not value) is value


def test_bad_pool_options() -> None:
    with pytest.raises(StorageRefusal):
        parse_bool(Pool("p", "file", {"x": "maybe"}), "x", False)
    for text in ("-2", "1.5", "", "x", str(REVISIONS_LIMIT + 1), "9999999999"):
        with pytest.raises(StorageRefusal):
            parse_revisions(Pool("p", "file", {"revisions_to_keep": text}))
    # Every number that Set takes.
    for number in (-1, 0, REVISIONS_LIMIT):
        assert parse_revisions(Pool("p", "file", {"revisions_to_keep": str(number)})) == number


def test_containing_pool() -> None:
    places = {
        "var": PurePath("/var/lib/qubes"),
        "kernels": PurePath("/var/lib/qubes/vm-kernels"),
        "lvm": None,
        "near": PurePath("/var/lib/qubes2"),
    }
    assert containing("kernels", places) == "var"
    assert containing("var", places) == ""
    assert containing("near", places) == ""
    assert containing("lvm", places) == ""


def test_errors_of_the_system_have_reasons() -> None:
    cases = {
        errno.ENOSPC: "NO_SPACE",
        errno.EDQUOT: "NO_SPACE",
        errno.EIO: "POOL_UNUSABLE",
        errno.EROFS: "POOL_UNUSABLE",
        errno.EACCES: "STORAGE_FAILED",
    }
    for number, reason in cases.items():
        refusal = from_os_error(OSError(number, "text"), "start of volume x")
        assert refusal.reason == reason
        assert "start of volume x" in refusal.message
    with pytest.raises(KeyError):
        StorageRefusal("NO_SUCH_REASON", "text")
    assert all(name == row.name for name, row in REASONS.items())


# ---- what a set of files means

REVISION_1 = "private.img.1@2024-01-02T03:04:05Z"
REVISION_2 = "private.img.2@2024-01-02T03:04:06Z"
OF_PRIVATE = [
    "private.img~0123456789ab",
    "private-cow.img",
    REVISION_1,
    REVISION_2,
    "private-precache.img",
    "private-import.img",
    "private-base.img",
    "private-dirty.qcow2",
    "private-dirty.img",
    "private.img",
]


def of_private(*names: str) -> Present:
    return gather(Vid("appvms", "work", "private"), Path("/pool/appvms/work"), names)


def test_a_removal_takes_every_file_of_the_volume_and_the_current_data_last() -> None:
    others = ["root.img", "private2.img", "firewall.xml", "private.img.x"]
    present = of_private(*reversed(OF_PRIVATE), *others)
    assert [path.name for path in present.everything] == OF_PRIVATE
    present.forget()
    assert present.everything == []


@pytest.mark.parametrize(
    ("names", "kind", "shown"),
    [
        (OF_PRIVATE, "committed", "private.img"),
        (OF_PRIVATE[:-1], "running", "private-dirty.qcow2"),
        ([*OF_PRIVATE[:7], "private-dirty.img"], "running", "private-dirty.img"),
        (OF_PRIVATE[:7], "import", "private-import.img"),
        (OF_PRIVATE[:5], "revisions", REVISION_2),
        (OF_PRIVATE[:2], "temporary", "private.img~0123456789ab"),
        (["private-base.img"], "temporary", "private-base.img"),
    ],
)
def test_what_is_left_of_a_volume(names: list[str], kind: str, shown: str) -> None:
    assert of_private(*names).state == (kind, Path("/pool/appvms/work", shown))


def test_nothing_is_left_of_a_volume() -> None:
    assert of_private("root.img").state is None


def test_whose_tag_counts_first() -> None:
    """Beside running data the current state may be a second name of the source's."""
    telling = [path.name for path in of_private(*OF_PRIVATE).telling]
    assert telling == [
        "private-dirty.qcow2",
        "private-dirty.img",
        "private.img",
        "private-import.img",
        "private-precache.img",
        REVISION_2,
        REVISION_1,
    ]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["private.img", "private-dirty.img"], "VOLUME_DIRTY"),
        (["private.img", "private-dirty.qcow2", "private-import.img"], "VOLUME_DIRTY"),
        (["private.img", "private-import.img"], "VOLUME_IMPORTING"),
    ],
)
def test_a_volume_that_is_not_at_rest_is_left_alone(names: list[str], reason: str) -> None:
    volume = Volume("private", "p", "appvms/work/private", 0, 1, True, True)
    require_quiet(of_private("private.img", "private-precache.img", REVISION_1), volume, "revert")
    with pytest.raises(StorageRefusal) as refused:
        require_quiet(of_private(*names), volume, "revert")
    assert refused.value.reason == reason


def test_why_there_is_no_current_state() -> None:
    volume = Volume("private", "p", "appvms/work/private", 0, 1, True, True)
    found = require_committed(of_private("private.img", "private-dirty.img"), volume, "p")
    assert found.name == "private.img"
    for names, reason in (
        (["private-dirty.img"], "SOURCE_RUNNING"),
        ([REVISION_1], "VOLUME_NOT_FOUND"),
    ):
        with pytest.raises(StorageRefusal) as refused:
            require_committed(of_private(*names), volume, "p")
        assert refused.value.reason == reason


def test_a_revert_without_a_name_passes_over_the_current_state() -> None:
    one, two, ten = (Revision(n, 0) for n in (1, 2, 10))
    existing = [two, ten, one]
    assert to_revert_to(existing, "", lambda _: False) == ten
    assert to_revert_to(existing, "", lambda r: r == ten) == two
    assert to_revert_to(existing, "", lambda _: True) is None
    assert to_revert_to(existing, "10", lambda _: True) == ten
    assert to_revert_to(existing, "3", lambda _: False) is None
    assert to_revert_to([], "", lambda _: False) is None
