"""The operations that are killed: how to bring one about, do it, and take it away again.

Owns the scenarios. Must not know where or when something dies. Invariant: every kind of
operation is in at least one of them, and clean() leaves nothing of a scenario behind,
whatever was done of it.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bulkhead.model.records import OperationState
from clients.admin import exceptions
from clients.cli.instance import kernels
from services.domains.simhv.client import SimControl
from tests.instance import Instance, Reply

# A network qube that runs all the time: no recovery may end its boot.
NETVM = "net"
# A pool that comes and goes, and its directory in the first one.
SECOND = "second"


@dataclass(frozen=True)
class Scenario:
    """One operation: how to bring its start state about, do it, and take it away again.

    done(instance) tells from outside whether the operation's effect is there. brief: in a
    sample it is killed only where no scenario before it was, and at two points of every one.
    """

    name: str
    prepare: Callable[[Instance], object]
    act: Callable[[Instance], Reply]
    done: Callable[[Instance], bool]
    clean: Callable[[Instance], object]
    brief: bool = False


def exists(instance: Instance, qube: str) -> bool:
    """The qube is listed."""
    lines = instance.ok("admin.vm.List").splitlines()
    return any(line.split(" ", 1)[0] == qube for line in lines)


def running(instance: Instance, qube: str) -> bool:
    """The qube is listed and not halted."""
    return exists(instance, qube) and instance.state(qube) != "Halted"


def _remove(instance: Instance, *qubes: str) -> None:
    for qube in qubes:
        _remove_one(instance, qube)


def _remove_one(instance: Instance, qube: str) -> None:
    def gone() -> bool:
        # Refused while another removal, of a disposable of it, is under way.
        return not exists(instance, qube) or instance.call("admin.vm.Remove", qube).kind == "ok"

    if exists(instance, qube) and running(instance, qube):
        instance.call("admin.vm.Kill", qube)
        instance.until(lambda: not running(instance, qube), 10.0, f"{qube} is halted")
    instance.until(gone, 10.0, f"{qube} is removed")


def _create(instance: Instance, qube: str) -> Reply:
    return instance.call(
        "admin.vm.Create.AppVM", arg="tmpl", payload=f"name={qube} label=red".encode()
    )


def _made(instance: Instance, qube: str) -> None:
    if not exists(instance, qube):
        reply = _create(instance, qube)
        assert reply.kind == "ok", f"{reply.message}\n{instance.logs()}"


def _networked(instance: Instance, qube: str) -> None:
    """A qube behind the network qube, so that its start plans rules."""
    _made(instance, qube)
    instance.ok("admin.vm.property.Set", qube, "netvm", NETVM.encode())


_ADDRESSES = itertools.count(1)


def _at_an_address_of_its_own(instance: Instance, qube: str) -> None:
    """Networked, where no qube was before: keys that say the same as those that are there
    are not written again."""
    _networked(instance, qube)
    high, low = divmod(next(_ADDRESSES), 250)
    instance.ok("admin.vm.property.Set", qube, "ip", f"10.200.{high}.{low + 1}".encode())


def _started(instance: Instance, qube: str) -> None:
    _networked(instance, qube)
    reply = instance.call("admin.vm.Start", qube)
    assert reply.kind == "ok", reply.message


def _started_then(instance: Instance, call: str) -> None:
    _started(instance, "worker")
    instance.ok(call, "worker")


def _disposables(instance: Instance) -> list[str]:
    return [
        line.split(" ", 1)[0]
        for line in instance.ok("admin.vm.List").splitlines()
        if " class=DispVM " in line
    ]


def _prepare_disposable(instance: Instance) -> None:
    _made(instance, "dvm")
    instance.ok("admin.vm.property.Set", "dvm", "template_for_dispvms", b"True")


def _run_disposable(instance: Instance) -> Reply:
    """Create, start and kill a disposable, as a client does; the first failure ends it.

    One whose client never learned its name is nobody's: the next client takes it away.
    """
    _remove(instance, *_disposables(instance))
    reply = instance.call("admin.vm.CreateDisposable", "dvm")
    if reply.kind != "ok":
        return reply
    started = instance.call("admin.vm.Start", reply.text)
    if started.kind != "ok":
        return started
    return instance.call("admin.vm.Kill", reply.text)


def _uuid(instance: Instance, qube: str) -> str:
    return instance.ok("admin.vm.property.Get", qube, "uuid").rpartition(" ")[2]


def _start_in_vain(instance: Instance) -> Reply:
    """A start that the hypervisor refuses, and all of it undone: told so is ok here."""
    with SimControl.of(instance.root) as control:
        fault = control.fail(_uuid(instance, "worker"), "create_paused")
        try:
            try:
                reply = instance.call("admin.vm.Start", "worker")
            except OSError as error:
                reply = Reply("none", message=str(error))
            if reply.kind == "none":
                # The start goes on without a caller, and is to fail all the same.
                instance.until(lambda: _ended(instance, "START"), 60.0, "the start has ended")
                return reply
        finally:
            control.clear(fault)
    return Reply("ok") if reply.kind == "exc" else Reply("exc", message=f"told {reply.kind}")


def _ended(instance: Instance, kind: str) -> bool:
    """No operation of the kind is under way; False while nobody can be asked."""
    try:
        listed = instance.call("bulkhead.op.List")
    except OSError:
        return False
    rows = [json.loads(line) for line in listed.body.splitlines()] if listed.kind == "ok" else None
    return rows is not None and all(
        OperationState(row["state"]).terminal for row in rows if row["kind"] == kind
    )


def _with_agent(instance: Instance) -> None:
    """A running qube whose guest answers, so that a resize reaches its file system."""
    _started(instance, "worker")
    with SimControl.of(instance.root) as control:
        control.agent(_uuid(instance, "worker"), True)


def _unconnected(instance: Instance) -> None:
    """A running qube without a netvm."""
    _made(instance, "worker")
    instance.ok("admin.vm.Start", "worker")


def _stopped(instance: Instance, qube: str) -> None:
    """A qube that has run, hence has a revision to go back to."""
    _started(instance, qube)
    instance.ok("admin.vm.Shutdown", qube, "wait")


def _revert(instance: Instance) -> Reply:
    revisions = instance.ok("admin.vm.volume.ListSnapshots", "worker", "private").split()
    return instance.call("admin.vm.volume.Revert", "worker", "private", revisions[-1].encode())


def _attribute(instance: Instance, call: str, arg: str, name: str) -> str:
    lines = instance.ok(call, "worker", arg).splitlines()
    return dict(line.split("=", 1) for line in lines)[name]


def _call(instance: Instance, socket: str, method: str, payload: bytes = b"") -> Reply:
    """A call about worker's private volume; "none" where its connection breaks."""
    path = instance.settings.admin_sockets()[socket]
    try:
        return instance.call(method, "worker", "private", payload, socket_path=path)
    except OSError as error:
        return Reply("none", message=str(error))


def _image(instance: Instance, qube: str) -> Path:
    """The file with the committed data of a qube's private volume."""
    info = instance.ok("admin.vm.volume.Info", qube, "private").splitlines()
    path = next(line for line in info if line.startswith("path=")).removeprefix("path=")
    return Path(path.replace("-dirty.img", ".img"))


def _marked(instance: Instance, qube: str) -> bool:
    """The qube's private volume begins with the mark."""
    with _image(instance, qube).open("rb") as file:
        return file.read(len(MARK)) == MARK


def _mark(instance: Instance, qube: str) -> None:
    _made(instance, qube)
    with _image(instance, qube).open("r+b") as file:
        file.write(MARK)


def _import(instance: Instance, verdict: bytes) -> Reply:
    """What the executable of admin.vm.volume.Import does: an import that it cannot go on
    with is ended as failed."""
    begun = _call(instance, "internal", "internal.vm.volume.ImportBegin", b"4096")
    if begun.kind != "ok":
        _call(instance, "internal", "internal.vm.volume.ImportEnd", b"fail\nnot begun")
        return begun
    with Path(begun.text.split(" ", 1)[1]).open("r+b") as target:
        target.write(MARK.ljust(4096, b"\0"))
    return _call(instance, "internal", "internal.vm.volume.ImportEnd", verdict)


def _import_in_vain(instance: Instance) -> Reply:
    """An import whose data are found wanting: told so is ok here."""
    reply = _import(instance, b"fail\nshort")
    if reply.kind == "exc" and "short" in reply.message:
        return Reply("ok")
    return reply if reply.kind != "ok" else Reply("exc", message="a failed import was kept")


def _clone_volume(instance: Instance) -> Reply:
    token = instance.call("admin.vm.volume.CloneFrom", "origin", "private")
    if token.kind != "ok":
        return token
    return instance.call("admin.vm.volume.CloneTo", "worker", "private", token.body)


def _worker_and_origin(instance: Instance) -> None:
    _made(instance, "worker")
    _mark(instance, "origin")


# A disk that the host offers.
DISK = {
    "devclass": "block",
    "port": "sdy",
    "device_id": "1234:abcd:b123456",
    "interfaces": "b000000",
    "fields": {"vendor": "v", "product": "p", "serial": "s"},
    "data": {"size": "4096", "device_node": "/dev/sdy", "mode": "w"},
}


def _with_disk(instance: Instance) -> None:
    with SimControl.of(instance.root) as control:
        control.devices(ADMINVM_UUID, DISK)
    instance.until(
        lambda: "sdy" in instance.ok("admin.vm.device.block.Available", "dom0"),
        10.0,
        "the disk is offered",
    )
    _unconnected(instance)


def _attach(instance: Instance) -> Reply:
    return instance.call("admin.vm.device.block.Attach", "worker", "dom0+sdy")


def _attached(instance: Instance) -> bool:
    return "sdy" in instance.ok("admin.vm.device.block.Attached", "worker")


def _with_disk_attached(instance: Instance) -> None:
    _with_disk(instance)
    reply = _attach(instance)
    assert reply.kind == "ok", reply.message


def _no_disk(instance: Instance) -> None:
    _remove(instance, "worker")
    with SimControl.of(instance.root) as control:
        control.devices(ADMINVM_UUID)


def _place(instance: Instance) -> Path:
    """Where the second pool is."""
    info = instance.ok("admin.pool.Info", arg="varlibqubes").splitlines()
    return Path(dict(line.split("=", 1) for line in info)["dir_path"]) / SECOND


def _add_pool(instance: Instance) -> Reply:
    payload = f"name={SECOND}\ndir_path={_place(instance)}\n".encode()
    return instance.call("admin.pool.Add", arg="file-reflink", payload=payload)


def _pools(instance: Instance) -> list[str]:
    return instance.ok("admin.pool.List").splitlines()


def _pool_added(instance: Instance) -> None:
    reply = _add_pool(instance)
    assert reply.kind == "ok", reply.message


def _no_pool(instance: Instance) -> None:
    if SECOND in _pools(instance):
        instance.ok("admin.pool.Remove", arg=SECOND)
    shutil.rmtree(_place(instance), ignore_errors=True)


def _add_kernel(instance: Instance) -> Reply:
    files = {name: instance.root / f"new-{name}" for name in ("vmlinuz", "initramfs", "modules")}
    for file in files.values():
        file.write_bytes(b"\1" * 4096)
    return _told(lambda: kernels.add(instance.settings, "new", **files))


def _remove_kernel(instance: Instance) -> Reply:
    return _told(lambda: kernels.remove(instance.settings, "new"))


def _told(work: Callable[[], object]) -> Reply:
    """What a client of the Admin API library is told, as a reply."""
    try:
        work()
    except exceptions.QubesDaemonCommunicationError as error:
        return Reply("none", message=str(error))
    except exceptions.QubesException as error:
        return Reply("exc", exception=type(error).__name__, message=str(error))
    return Reply("ok")


def _kernels(instance: Instance) -> list[str]:
    return [json.loads(line)["name"] for line in kernels.listing(instance.settings)]


def _kernel_added(instance: Instance) -> None:
    reply = _add_kernel(instance)
    assert reply.kind == "ok", reply.message
    instance.until(lambda: "new" in _kernels(instance), 10.0, "the kernel is listed")


def _no_kernel(instance: Instance) -> None:
    if "new" in _kernels(instance):
        reply = _remove_kernel(instance)
        assert reply.kind == "ok", reply.message
    instance.until(lambda: "new" not in _kernels(instance), 10.0, "the kernel is gone")


# ---- preloaded disposables


def _feature(instance: Instance, qube: str, name: str) -> str | None:
    reply = instance.call("admin.vm.feature.Get", qube, name)
    return reply.text if reply.kind == "ok" else None


def _preloaded(instance: Instance) -> list[str]:
    """Those that wait to be handed out, ready or not."""
    return (_feature(instance, "dvm", "preload-dispvm") or "").split()


def _ready(instance: Instance) -> bool:
    """One is on the list, it is ready, and every disposable is on the list."""
    listed = _preloaded(instance)
    return (
        len(listed) == 1
        and _disposables(instance) == listed
        and _feature(instance, listed[0], "preload-dispvm-in-progress") == ""
        and instance.state(listed[0]) == "Paused"
    )


def _preloading(instance: Instance) -> None:
    """A disposable template whose guests tell when they are ready; nothing is preloaded."""
    if not exists(instance, "agented"):
        instance.ok("admin.vm.Create.TemplateVM", payload=b"name=agented label=black")
    services = ("qubes.WaitForRunningSystem", "qubes.WaitForSession")
    for feature in ("qrexec", *(f"supported-rpc.{service}" for service in services)):
        instance.ok("admin.vm.feature.Set", "agented", feature, b"1")
    with SimControl.of(instance.root) as control:
        control.nature("*", agent="connect")
    if not exists(instance, "dvm"):
        instance.ok("admin.vm.Create.AppVM", arg="agented", payload=b"name=dvm label=red")
    instance.ok("admin.vm.property.Set", "dvm", "template_for_dispvms", b"True")
    instance.ok("admin.vm.feature.Set", "dvm", "preload-dispvm-delay", b"0")


def _set_preloaded(instance: Instance, number: int) -> Reply:
    return instance.call("admin.vm.feature.Set", "dvm", "preload-dispvm-max", str(number).encode())


def _settled(instance: Instance, condition: Callable[[Instance], bool]) -> Reply:
    """Ok as soon as it holds: a service of the system, not the client, is at work."""
    deadline = time.monotonic() + PRELOAD_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if condition(instance):
                return Reply("ok")
        except (AssertionError, OSError):
            pass  # one that was listed is gone, or adminapi is
        time.sleep(0.05)
    return Reply("exc", message=f"preloading has not settled: {_preloaded(instance)}")


def _fill(instance: Instance) -> Reply:
    reply = _set_preloaded(instance, 1)
    return _settled(instance, _ready) if reply.kind == "ok" else reply


def _filled(instance: Instance) -> None:
    _preloading(instance)
    reply = _fill(instance)
    assert reply.kind == "ok", f"{reply.message}\n{instance.logs()}"


def _hand_out(instance: Instance) -> Reply:
    """One is handed out, used and killed, and the list fills again.

    One whose client never learned its name is nobody's: the next client takes it away.
    """
    _remove(instance, *(set(_disposables(instance)) - set(_preloaded(instance))))
    reply = instance.call("admin.vm.CreateDisposable", "dvm")
    if reply.kind != "ok":
        return reply
    # Where none waits it gets a new one, which the client starts.
    started = instance.call("admin.vm.Start", reply.text)
    if started.kind != "ok":
        return started
    killed = instance.call("admin.vm.Kill", reply.text)
    return _settled(instance, _ready) if killed.kind == "ok" else killed


def _drain(instance: Instance) -> Reply:
    reply = _set_preloaded(instance, 0)
    return _settled(instance, lambda i: not _disposables(i)) if reply.kind == "ok" else reply


def _no_preloading(instance: Instance) -> None:
    reply = _drain(instance)
    if reply.kind != "ok":
        _remove(instance, *_disposables(instance))
    _remove(instance, "dvm", "agented")


PRELOAD_TIMEOUT_S = 20.0
ADMINVM_UUID = "00000000-0000-0000-0000-000000000000"
MARK = b"marked"
LARGER = str(3 << 30)
RULES = "action=drop dst4=1.2.3.4/32\naction=accept\n"


def _brief(
    name: str,
    prepare: Callable[[Instance], object],
    act: Callable[[Instance], Reply],
    done: Callable[[Instance], bool],
) -> Scenario:
    return Scenario(name, prepare, act, done, lambda i: _remove(i, "worker"), brief=True)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "create",
        prepare=lambda i: None,
        act=lambda i: _create(i, "fresh"),
        done=lambda i: exists(i, "fresh"),
        clean=lambda i: _remove(i, "fresh"),
    ),
    Scenario(
        "clone",
        prepare=lambda i: _made(i, "origin"),
        act=lambda i: i.call("bulkhead.vm.Clone", "origin", payload=b"name=copy"),
        done=lambda i: exists(i, "copy"),
        clean=lambda i: _remove(i, "copy", "origin"),
    ),
    Scenario(
        "remove",
        prepare=lambda i: _made(i, "doomed"),
        act=lambda i: i.call("admin.vm.Remove", "doomed"),
        done=lambda i: not exists(i, "doomed"),
        clean=lambda i: _remove(i, "doomed"),
    ),
    Scenario(
        "start",
        prepare=lambda i: _networked(i, "worker"),
        act=lambda i: i.call("admin.vm.Start", "worker"),
        done=lambda i: running(i, "worker"),
        clean=lambda i: _remove(i, "worker"),
    ),
    Scenario(
        "shutdown",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.Shutdown", "worker", "wait"),
        done=lambda i: not running(i, "worker"),
        clean=lambda i: _remove(i, "worker"),
    ),
    Scenario(
        "kill",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.Kill", "worker"),
        done=lambda i: not running(i, "worker"),
        clean=lambda i: _remove(i, "worker"),
    ),
    Scenario(
        "disposable",
        prepare=_prepare_disposable,
        act=_run_disposable,
        done=lambda i: not _disposables(i),
        clean=lambda i: _remove(i, *_disposables(i), "dvm"),
    ),
    _brief(
        "failed-start",
        prepare=lambda i: _at_an_address_of_its_own(i, "worker"),
        act=_start_in_vain,
        done=lambda i: not running(i, "worker"),
    ),
    _brief(
        "pause",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.Pause", "worker"),
        done=lambda i: i.state("worker") == "Paused",
    ),
    _brief(
        "leave-netvm",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.property.Set", "worker", "netvm", b""),
        done=lambda i: NETVM not in i.ok("admin.vm.property.Get", "worker", "netvm"),
    ),
    _brief(
        "join-netvm",
        prepare=_unconnected,
        act=lambda i: i.call("admin.vm.property.Set", "worker", "netvm", NETVM.encode()),
        done=lambda i: NETVM in i.ok("admin.vm.property.Get", "worker", "netvm"),
    ),
    _brief(
        "rules",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.firewall.Set", "worker", payload=RULES.encode()),
        done=lambda i: i.ok("admin.vm.firewall.Get", "worker") == RULES,
    ),
    _brief(
        "resize",
        prepare=_with_agent,
        act=lambda i: i.call("admin.vm.volume.Resize", "worker", "private", LARGER.encode()),
        done=lambda i: _attribute(i, "admin.vm.volume.Info", "private", "size") == LARGER,
    ),
    _brief(
        "revert",
        prepare=lambda i: _stopped(i, "worker"),
        act=_revert,
        # Reverting again is harmless, and nothing of it can be seen from outside.
        done=lambda i: exists(i, "worker"),
    ),
    _brief(
        "unpause",
        prepare=lambda i: _started_then(i, "admin.vm.Pause"),
        act=lambda i: i.call("admin.vm.Unpause", "worker"),
        done=lambda i: i.state("worker") == "Running",
    ),
    _brief(
        "suspend",
        prepare=lambda i: _started(i, "worker"),
        act=lambda i: i.call("admin.vm.Suspend", "worker"),
        done=lambda i: i.state("worker") == "Suspended",
    ),
    _brief(
        "resume",
        prepare=lambda i: _started_then(i, "admin.vm.Suspend"),
        act=lambda i: i.call("admin.vm.Resume", "worker"),
        done=lambda i: i.state("worker") == "Running",
    ),
    _brief(
        "resize-halted",
        prepare=lambda i: _made(i, "worker"),
        act=lambda i: i.call("admin.vm.volume.Resize", "worker", "private", LARGER.encode()),
        done=lambda i: _attribute(i, "admin.vm.volume.Info", "private", "size") == LARGER,
    ),
    _brief(
        "import",
        prepare=lambda i: _made(i, "worker"),
        act=lambda i: _import(i, b"ok"),
        done=lambda i: _marked(i, "worker"),
    ),
    _brief(
        "failed-import",
        prepare=lambda i: _made(i, "worker"),
        act=_import_in_vain,
        done=lambda i: not _marked(i, "worker"),
    ),
    Scenario(
        "clone-volume",
        prepare=_worker_and_origin,
        act=_clone_volume,
        done=lambda i: _marked(i, "worker"),
        clean=lambda i: _remove(i, "worker", "origin"),
        brief=True,
    ),
    _brief(
        "clear",
        prepare=lambda i: _mark(i, "worker"),
        act=lambda i: i.call("admin.vm.volume.Clear", "worker", "private"),
        done=lambda i: not _marked(i, "worker"),
    ),
    Scenario(
        "attach",
        prepare=_with_disk,
        act=_attach,
        done=_attached,
        clean=_no_disk,
        brief=True,
    ),
    Scenario(
        "detach",
        prepare=_with_disk_attached,
        act=lambda i: i.call("admin.vm.device.block.Detach", "worker", "dom0+sdy"),
        done=lambda i: not _attached(i),
        clean=_no_disk,
        brief=True,
    ),
    Scenario(
        "add-pool",
        prepare=lambda i: None,
        act=_add_pool,
        done=lambda i: SECOND in _pools(i),
        clean=_no_pool,
        brief=True,
    ),
    Scenario(
        "remove-pool",
        prepare=_pool_added,
        act=lambda i: i.call("admin.pool.Remove", arg=SECOND),
        done=lambda i: SECOND not in _pools(i),
        clean=_no_pool,
        brief=True,
    ),
    Scenario(
        "add-kernel",
        prepare=lambda i: None,
        act=_add_kernel,
        done=lambda i: "new" in _kernels(i),
        clean=_no_kernel,
        brief=True,
    ),
    Scenario(
        "remove-kernel",
        prepare=_kernel_added,
        act=_remove_kernel,
        done=lambda i: "new" not in _kernels(i),
        clean=_no_kernel,
        brief=True,
    ),
    Scenario(
        "preload-fill",
        prepare=_preloading,
        act=_fill,
        done=_ready,
        clean=_no_preloading,
        brief=True,
    ),
    Scenario(
        "preload-hand-out",
        prepare=_filled,
        act=_hand_out,
        done=_ready,
        clean=_no_preloading,
        brief=True,
    ),
    Scenario(
        "preload-drain",
        prepare=_filled,
        act=_drain,
        done=lambda i: not _disposables(i),
        clean=_no_preloading,
        brief=True,
    ),
)
