"""A refused call changes nothing: not qubes.xml, the dump, pools, rules, notes or domains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes import loopfs
from tests.instance import Instance, running
from tests.integration.adminapi_world import add_kernel

pytestmark = pytest.mark.integration

MIB = 1 << 20


@dataclass(frozen=True)
class Refused:
    """One call that must be refused."""

    call: str
    dest: str = "dom0"
    arg: str = ""
    payload: bytes = b""
    source: str = "dom0"

    def __str__(self) -> str:
        return f"{self.call}+{self.arg[:24]} on {self.dest} ({self.payload[:24]!r})"


R = Refused
TABLE: tuple[Refused, ...] = (
    # creating
    R("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=work label=red"),
    R("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=fresh label=nosuch"),
    R("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=-bad label=red"),
    R("admin.vm.Create.AppVM", arg="tmpl", payload=b"name=fresh"),
    R("admin.vm.Create.AppVM", arg="nosuch", payload=b"name=fresh label=red"),
    R("admin.vm.Create.AppVM", arg="work", payload=b"name=fresh label=red"),
    R("admin.vm.Create.NoSuchVM", payload=b"name=fresh label=red"),
    R("admin.vm.Create.AdminVM", payload=b"name=fresh label=red"),
    R("admin.vm.CreateInPool.AppVM", arg="tmpl", payload=b"name=fresh label=red pool=nosuch"),
    R("admin.vm.CreateDisposable", "work"),
    R("bulkhead.vm.Clone", "work", payload=b"name=work"),
    R("bulkhead.vm.Clone", "run", payload=b"name=Domain-0"),
    # removing
    R("admin.vm.Remove", "run"),
    R("admin.vm.Remove", "tmpl"),
    R("admin.vm.Remove", "net"),
    R("admin.vm.Remove", "dom0"),
    R("admin.vm.Remove", "nosuch"),
    # power
    R("admin.vm.Start", "dom0"),
    R("admin.vm.Start", "nosuch"),
    R("admin.vm.Start", "needy"),
    R("admin.vm.Shutdown", "work"),
    R("admin.vm.Shutdown", "run", "now"),
    R("admin.vm.Shutdown", "net"),
    R("admin.vm.Kill", "work"),
    R("admin.vm.Pause", "work"),
    R("admin.vm.Unpause", "run"),
    R("admin.vm.Suspend", "work"),
    R("admin.vm.Resume", "work"),
    # properties
    R("admin.vm.property.Set", "work", "nosuch", b"1"),
    R("admin.vm.property.Set", "work", "klass", b"TemplateVM"),
    R("admin.vm.property.Set", "work", "memory", b"-1"),
    R("admin.vm.property.Set", "work", "vcpus", b"0"),
    R("admin.vm.property.Set", "work", "label", b"nosuch"),
    R("admin.vm.property.Set", "work", "template", b"work"),
    R("admin.vm.property.Set", "run", "template", b"tmpl2"),
    R("admin.vm.property.Set", "work", "netvm", b"nosuch"),
    R("admin.vm.property.Set", "work", "netvm", b"tmpl"),
    R("admin.vm.property.Set", "net", "netvm", b"net"),
    R("admin.vm.property.Set", "net", "provides_network", b"False"),
    R("admin.vm.property.Set", "run", "netvm", b"net2"),
    R("admin.vm.property.Set", "work", "qrexec_timeout", b"much"),
    R("admin.vm.property.Set", "work", "kernel", b"no/such"),
    R("admin.vm.property.Set", "work", "ip", b"300.1.1.1"),
    R("admin.property.Set", arg="default_template", payload=b"work"),
    R("admin.property.Set", arg="default_netvm", payload=b"work"),
    R("admin.property.Set", arg="default_kernel", payload=b"nosuch"),
    R("admin.property.Set", arg="nosuch", payload=b"1"),
    # features, tags, labels, notes
    R("admin.vm.feature.Set", "work", "a b", b"1"),
    R("admin.vm.feature.Set", "work", "f", b"\n"),
    R("admin.vm.feature.Remove", "work", "nosuch"),
    R("admin.vm.tag.Set", "work", "a.b"),
    R("admin.vm.tag.Remove", "work", "nosuch"),
    R("admin.label.Create", arg="red", payload=b"0x000000"),
    R("admin.label.Create", arg="new", payload=b"red"),
    R("admin.label.Remove", arg="red"),
    R("admin.vm.notes.Set", "work", payload=b"\xff"),
    # volumes and pools
    R("admin.vm.volume.Resize", "work", "private", b"01"),
    R("admin.vm.volume.Resize", "work", "nosuch", b"4294967296"),
    R("admin.vm.volume.Revert", "work", "private", b"nosuch"),
    R("admin.vm.volume.CloneTo", "work", "private", b"0" * 32),
    R("admin.vm.volume.Clear", "run", "private"),
    R("admin.vm.volume.Set.rw", "run", "private", b"False"),
    R("admin.vm.volume.Set.rw", "work", "private", b"maybe"),
    R("admin.vm.volume.Set.revisions_to_keep", "work", "private", b"-2"),
    R("admin.pool.Add", arg="nosuch", payload=b"name=p\n"),
    R("admin.pool.Add", arg="file-reflink", payload=b"name=p\ndir_path=relative\n"),
    R("admin.pool.Add", arg="file-reflink", payload=b"name=varlibqubes\ndir_path=/tmp\n"),
    R("admin.pool.Remove", arg="varlibqubes"),
    R("admin.pool.Remove", arg="nosuch"),
    # firewall and devices
    R("admin.vm.firewall.Set", "work", payload=b"nonsense\n"),
    R("admin.vm.firewall.Set", "run", payload=b"action=accept dst4=999.0.0.1/8\n"),
    R("admin.vm.firewall.Set", "run", payload=b"action=accept proto=tcp dstports=0-70000\n"),
    R("admin.vm.device.block.Assign", "work", "nosuch+sda", b"mode='required'"),
    R("admin.vm.device.block.Assign", "work", "dom0+sda", b"mode='nosuch'"),
    R("admin.vm.device.block.Attach", "work", "dom0+sda"),
    R("admin.vm.device.block.Unassign", "work", "dom0+sda"),
    R("admin.vm.device.denied.Add", "work", payload=b"b"),
    R("bulkhead.op.Cancel", arg="nosuch"),
    # no such source, no such call
    R("admin.vm.Start", "work", source="nosuch"),
    R("admin.vm.NoSuchCall", "work"),
)


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Instance, Path]]:
    """A running qube behind a running netvm, halted ones beside them."""
    with loopfs.mounted("xfs", 2048) as place:
        place.parent.chmod(0o755)
        pool = place / "pool"
        pool.mkdir(mode=0o755)
        with running(pool_dir=pool) as instance:
            add_kernel(instance)
            instance.until(
                lambda: "6.12.1-lab" in instance.ok("bulkhead.kernel.List"), 20.0, "the kernel"
            )
            prepare(instance)
            yield instance, pool


def prepare(instance: Instance) -> None:
    instance.ok("admin.property.Set", arg="default_kernel", payload=b"6.12.1-lab")
    for template in ("tmpl", "tmpl2"):
        instance.ok("admin.vm.Create.TemplateVM", payload=f"name={template} label=black".encode())
    instance.ok("admin.property.Set", arg="default_template", payload=b"tmpl")
    for name in ("net", "net2", "work", "run", "needy"):
        instance.ok("admin.vm.Create.AppVM", arg="tmpl", payload=f"name={name} label=red".encode())
    for name in ("net", "net2"):
        instance.ok("admin.vm.property.Set", name, "provides_network", b"True")
    instance.ok("admin.vm.property.Set", "run", "netvm", b"net")
    instance.ok("admin.vm.firewall.Set", "run", payload=b"action=accept dst4=1.2.3.4\n")
    instance.ok("admin.vm.notes.Set", "work", payload=b"a note\n")
    # A required device that nobody has: its qube can never start.
    instance.ok("admin.vm.device.block.Assign", "needy", "dom0+sdz", b"mode='required'")
    instance.ok("admin.vm.Start", "run")


def difference(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [
        f"{key}: {before.get(key)!r} became {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def test_every_refused_call_changes_nothing(world: tuple[Instance, Path]) -> None:
    """The records are compared after each call, files and hashes after all of them."""
    instance, pool = world
    before = instance.still(pool)
    dump = instance.dump()
    problems = []
    for refused in TABLE:
        reply = instance.call(
            refused.call, refused.dest, refused.arg, refused.payload, source=refused.source
        )
        # A frame that is not well formed, or not allowed, gets no bytes, as in 4.4.
        if reply.kind not in ("exc", "none"):
            problems.append(f"{refused} was answered {reply.kind} {reply.text[:60]}")
        now = instance.dump()
        if now != dump:
            problems.append(f"{refused} changed the records")
            dump = now
    assert not problems, "\n".join(problems)
    assert difference(before, instance.still(pool)) == []


def test_the_comparison_sees_changes(world: tuple[Instance, Path]) -> None:
    """What "nothing changed" compares does differ after a change of each kind."""
    instance, pool = world
    before = instance.still(pool)
    instance.ok("admin.vm.property.Set", "work", "memory", b"500")
    instance.ok("admin.vm.notes.Set", "work", payload=b"another\n")
    instance.ok("admin.vm.volume.Resize", "work", "private", str(3 << 30).encode())
    instance.ok("admin.vm.firewall.Set", "run", payload=b"action=drop\n")
    changed = "\n".join(difference(before, instance.still(pool)))
    for part in ("qubes.xml", "dump", "/notes/", "/firewall/", "appvms/work/private.img"):
        assert part in changed, part
