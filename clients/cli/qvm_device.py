"""qvm-device, qvm-block, qvm-pci, qvm-usb: devices, to whom they are attached and assigned.

Owns the client's half of device arguments and serialisations. Must not know device classes,
except that a PCI device can only be assigned as required. Invariant: a device is named
BACKEND:PORT[:DEVICE] to people and BACKEND+PORT+DEVICE to the daemon.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from clients.admin import AdminClient
from clients.cli import tool
from clients.cli.qvm_clone import device_argument

ANY = "*"
LIST_CLASSES = "--list-device-classes"
MODES = ("auto-attach", "ask-to-attach", "required")


@dataclass(frozen=True, slots=True)
class Device:
    """A device or an assignment: ident "PORT:DEVICE" below its backend, and its fields."""

    backend: str
    port: str
    device: str
    fields: Mapping[str, str]

    @property
    def ident(self) -> str:
        """BACKEND+PORT:DEVICE, as lists have it."""
        return f"{self.backend}+{self.port}:{self.device}"

    @property
    def shown(self) -> str:
        """BACKEND:PORT, with the device where the port may be any."""
        return f"{self.backend}:{self.port}" + (f":{self.device}" if self.port == ANY else "")

    @property
    def description(self) -> str:
        """What it is, for people."""
        fields = self.fields
        maker = fields.get("manufacturer") or fields.get("vendor") or ""
        words = [maker, fields.get("product") or fields.get("name") or "", fields.get("serial", "")]
        return " ".join(word for word in words if word) or "?"


def fields_of(text: str) -> dict[str, str]:
    """The pairs key='value' of a serialisation; quotes are escaped, nothing else is."""
    found: dict[str, str] = {}
    key, mark, rest = text.strip().partition("='")
    while mark:
        value, mark, after = rest.partition("='")
        if mark:
            value, _, following = value.rpartition("' ")
        else:
            value, following = value[:-1], ""
        found[key.strip()] = value.replace("\\'", "'")
        key, rest = following, after
    return found


def written(fields: Mapping[str, str]) -> bytes:
    """A serialisation of pairs."""
    words = []
    for key, value in fields.items():
        escaped = value.replace("'", "\\'")
        words.append(f"{key}='{escaped}'")
    return " ".join(words).encode()


def argument(ident: str) -> str:
    """BACKEND+PORT:DEVICE as the argument of a call."""
    return device_argument(ident)


def assignment(device: Device, mode: str, options: Mapping[str, str]) -> bytes:
    """The payload of Attach and Assign."""
    fields = {
        "device_id": device.device,
        "port_id": device.port,
        "devclass": device.fields.get("devclass", ""),
        "backend_domain": device.backend,
        "mode": mode,
        **{f"_{key}": value for key, value in options.items()},
    }
    return written({key: value for key, value in fields.items() if value})


def parse_available(backend: str, lines: Iterable[str]) -> Iterator[Device]:
    """Lines "PORT:DEVICE fields"."""
    for line in lines:
        head, _, rest = line.partition(" ")
        port, _, device = head.partition(":")
        yield Device(backend, port, device, fields_of(rest))


def parse_assignments(lines: Iterable[str]) -> Iterator[Device]:
    """Lines "BACKEND+PORT:DEVICE fields"."""
    for line in lines:
        head, _, rest = line.partition(" ")
        backend, _, place = head.partition("+")
        port, _, device = place.partition(":")
        yield Device(backend, port, device, fields_of(rest))


def place_of(text: str) -> tuple[str, str, str]:
    """BACKEND:PORT[:DEVICE] in three, device "" where it is not said. UsageError."""
    backend, colon, rest = text.partition(":")
    port, _, device = rest.partition(":")
    if not colon or not backend or not port:
        raise tool.UsageError(f"{text}: say BACKEND:PORT, or BACKEND:PORT:DEVICE")
    return backend, port, device


def available(api: AdminClient, devclass: str, backend: str, port: str = "") -> list[Device]:
    """What a backend offers now."""
    lines = api.lines(f"admin.vm.device.{devclass}.Available", backend, port)
    return list(parse_available(backend, lines))


def assigned(api: AdminClient, devclass: str, qube: str) -> list[Device]:
    """What is assigned to a qube."""
    return list(parse_assignments(api.lines(f"admin.vm.device.{devclass}.Assigned", qube)))


def attached(api: AdminClient, devclass: str, qube: str) -> list[Device]:
    """What is attached to a qube now."""
    return list(parse_assignments(api.lines(f"admin.vm.device.{devclass}.Attached", qube)))


def find(api: AdminClient, devclass: str, text: str) -> Device:
    """The device at BACKEND:PORT that is there now. ToolError without one."""
    backend, port, device = place_of(text)
    for found in available(api, devclass, backend, port):
        if found.port == port and device in ("", ANY, found.device):
            return Device(backend, port, found.device, {"devclass": devclass, **found.fields})
    raise tool.ToolError(f"{backend} has no {devclass} device at {port} now")


# ---- listing


def list_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Devices, and who uses them."""
    known = [line.name for line in api.qubes() if line.klass != "RemoteVM"]
    if args.names and (args.all or args.exclude):
        raise tool.UsageError("name qubes, or say --all, not both")
    for name in [*args.names, *args.exclude]:
        if name not in known:
            raise tool.ToolError(f"there is no qube {name}")
    found: dict[tuple[str, str], Device] = {}
    users: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for qube in known:
        uses = [(device, "attached") for device in attached(api, args.devclass, qube)]
        if args.assignments:
            uses += [
                (d, d.fields.get("mode", "assigned")) for d in assigned(api, args.devclass, qube)
            ]
        for device, how in uses:
            users.setdefault((device.backend, device.port), []).append((qube, how))
            found.setdefault((device.backend, device.port), device)
    for qube in known:
        # Its backend describes it better than an assignment does.
        for device in available(api, args.devclass, qube):
            found[device.backend, device.port] = device
    rows = []
    for key, device in sorted(found.items()):
        used = users.get(key, [])
        concerned = {key[0], *(qube for qube, _ in used)}
        if args.names and not concerned & set(args.names):
            continue
        if concerned <= set(args.exclude):
            continue
        shown = ", ".join(f"{qube} ({how})" for qube, how in used)
        rows.append((device.shown, device.description, shown))
    tool.show(args, ("BACKEND:DEVID", "DESCRIPTION", "USED BY"), rows)
    return 0


def info_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Everything about one device."""
    device = find(api, args.devclass, args.device)
    if args.json:
        tool.as_json(dict(device.fields))
    else:
        tool.table(device.fields.items())
    return 0


# ---- attaching and assigning


def _options(args: argparse.Namespace) -> dict[str, str]:
    options = dict(tool.pair("--option", text) for text in args.option)
    if args.read_only:
        options["read-only"] = "yes"
    return options


def attach_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Attach a device until the qube stops."""
    device = find(api, args.devclass, args.device)
    api.call(
        f"admin.vm.device.{args.devclass}.Attach",
        args.qube,
        argument(device.ident),
        assignment(device, "manual", _options(args)),
    )
    return 0


def detach_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Detach a device, or all."""
    return _take(args, api, "Detach", attached(api, args.devclass, args.qube), "attached")


def assign_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Assign a device for every start to come."""
    if args.port and args.only_device:
        raise tool.UsageError("--port and --device exclude each other")
    mode = "required" if args.required or args.devclass == "pci" else MODES[0]
    if args.ask:
        mode = "ask-to-attach"
    backend, port, identity = place_of(args.device)
    if args.port or identity == ANY:
        device = Device(backend, port, ANY, {"devclass": args.devclass})
    else:
        device = find(api, args.devclass, args.device)
        if args.only_device:
            device = Device(backend, ANY, device.device, device.fields)
    if (previous := _same(api, args, device)) is not None and previous != mode:
        method = f"admin.vm.device.{args.devclass}.Set.assignment"
        api.call(method, args.qube, argument(device.ident), mode.encode())
        return 0
    api.call(
        f"admin.vm.device.{args.devclass}.Assign",
        args.qube,
        argument(device.ident),
        assignment(device, mode, _options(args)),
    )
    return 0


def _same(api: AdminClient, args: argparse.Namespace, device: Device) -> str | None:
    """The mode of the very same assignment, None without it."""
    for other in assigned(api, args.devclass, args.qube):
        if other.ident == device.ident:
            return other.fields.get("mode", "")
    return None


def unassign_work(args: argparse.Namespace, api: AdminClient) -> int:
    """Take assignments back; what is attached stays so."""
    return _take(args, api, "Unassign", assigned(api, args.devclass, args.qube), "assigned")


def _take(
    args: argparse.Namespace, api: AdminClient, verb: str, held: Sequence[Device], word: str
) -> int:
    if args.device:
        backend, port, identity = place_of(args.device)
        held = [
            device
            for device in held
            if device.backend == backend
            and device.port == port
            and (not identity or device.device == identity)
        ]
        if not held:
            raise tool.ToolError(f"{args.device} is not {word} to {args.qube}")
    for device in held:
        method = f"admin.vm.device.{args.devclass}.{verb}"
        api.call(method, args.qube, argument(device.ident))
    return 0


# ---- the tools


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """The subcommand's part."""
    status: int = args.work(args, api)
    return status


def classes_work(_args: argparse.Namespace, api: AdminClient) -> int:
    """The classes of devices."""
    print("\n".join(api.lines("admin.deviceclass.List")))
    return 0


def _parser(name: str, devclass: str) -> argparse.ArgumentParser:
    made = tool.parser(name, "Look at devices, attach and assign them.")
    made.set_defaults(work=list_work, names=[], all=False, exclude=[], assignments=False)
    tool.json_option(made)
    if devclass:
        made.set_defaults(devclass=devclass)
    else:
        made.add_argument("devclass", metavar="DEVICE_CLASS", help="block, pci, usb ...")
    command = tool.commands(made)

    verb = command("list", "list devices", aliases=("ls", "l"))
    verb.set_defaults(work=list_work)
    verb.add_argument("names", nargs="*", metavar="VMNAME", help="that these offer or use")
    verb.add_argument("--all", action="store_true", help="every qube, the default")
    verb.add_argument(
        "--exclude", action="append", default=[], metavar="VMNAME", help="but not of this one"
    )
    verb.add_argument("--assignments", "-s", action="store_true", help="also who is assigned them")
    tool.json_option(verb, again=True)

    verb = command("info", "show one device")
    verb.set_defaults(work=info_work)
    verb.add_argument("device", metavar="BACKEND:PORT")
    tool.json_option(verb, again=True)

    verb = _verb(command, "attach", "attach a device until the qube stops", attach_work, "at", "a")
    _give(verb)
    verb = _verb(command, "assign", "give a device at every start", assign_work, "s")
    _give(verb)
    mode = verb.add_mutually_exclusive_group()
    mode.add_argument("--required", "-r", action="store_true", help="no start without it")
    mode.add_argument(
        "--ask", "--ask-to-attach", "-a", action="store_true", help="ask when it appears"
    )
    verb.add_argument("--port", action="store_true", help="whatever is at that port")
    verb.add_argument(
        "--device", dest="only_device", action="store_true", help="that device at any port"
    )
    verb = _verb(command, "detach", "detach a device", detach_work, "dt", "d")
    verb.add_argument("device", nargs="?", metavar="BACKEND:PORT", help="default: all")
    verb = _verb(command, "unassign", "take an assignment back", unassign_work, "u")
    verb.add_argument("device", nargs="?", metavar="BACKEND:PORT", help="default: all")
    return made


def _verb(
    command: tool.Command, name: str, about: str, act: tool.Work, *aliases: str
) -> argparse.ArgumentParser:
    verb = command(name, about, aliases=aliases)
    verb.set_defaults(work=act)
    verb.add_argument("qube", metavar="VMNAME")
    return verb


def _give(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("device", metavar="BACKEND:PORT[:DEVICE]")
    verb.add_argument("--option", "-o", action="append", default=[], metavar="NAME=VALUE")
    verb.add_argument("--ro", dest="read_only", action="store_true", help="read only")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-device."""
    words = sys.argv[1:] if argv is None else argv
    if LIST_CLASSES in words:
        # The only form without the operand DEVICE_CLASS.
        made = tool.parser("qvm-device", "List the classes of devices.")
        made.add_argument(LIST_CLASSES, action="store_true", required=True)
        return tool.run(made, classes_work, words)
    made = _parser("qvm-device", "")
    made.add_argument(LIST_CLASSES, action="store_true", help="list the classes")
    return tool.run(made, work, words)


def block(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-block."""
    return tool.run(_parser("qvm-block", "block"), work, argv)


def pci(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-pci."""
    return tool.run(_parser("qvm-pci", "pci"), work, argv)


def usb(argv: Sequence[str] | None = None) -> int:
    """Entry point of qvm-usb."""
    return tool.run(_parser("qvm-usb", "usb"), work, argv)
