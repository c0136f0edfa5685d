"""Doctor opens images as QEMU does, also where the host has no user of that name."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.config import QEMU_UID, Settings
from clients.cli.instance import doctor
from clients.cli.instance.accounts import DISK_GROUP

GROUP = 64056
NOBODY = "bulkhead-no-such-user"


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that every user may enter, as roots of instances are."""
    path = Path(tempfile.mkdtemp(prefix="bhd", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def image(settings: Settings, qube: str, mode: int, gid: int) -> Path:
    folder = settings.state_dir / "appvms" / qube
    folder.mkdir(parents=True)
    path = folder / "root-dirty.img"
    path.write_bytes(b"")
    os.chown(path, 0, gid)
    path.chmod(mode)
    return path


def test_the_uid_of_qemu_does_not_depend_on_the_host() -> None:
    root = Path("/nonexistent")
    assert Settings(root).qemu_uid is None
    assert Settings(root, qemu_user="root").qemu_uid == 0
    with pytest.raises(KeyError):
        pwd.getpwnam(NOBODY)
    assert Settings(root, qemu_user=NOBODY).qemu_uid == QEMU_UID


@pytest.mark.skipif(os.getuid() != 0, reason="only root can look as another user")
def test_an_image_that_qemu_cannot_read_is_named_with_a_remedy(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "disk_gid", lambda: GROUP)
    settings = Settings(root, hypervisor="qemu:///system", isolated=True, qemu_user=NOBODY)
    assert list(doctor._images(settings)) == []
    image(settings, "fine", 0o660, GROUP)
    closed = image(settings, "closed", 0o660, 0)
    (finding,) = doctor._images(settings)
    assert finding.object == str(closed)
    assert f"chgrp {DISK_GROUP} {closed}" in finding.remedy
