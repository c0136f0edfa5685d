"""qvm-ls: list qubes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence

from clients.admin import AdminClient, QubeLine, exceptions
from clients.cli import tool

FORMATS: Mapping[str, tuple[str, ...]] = {
    "simple": ("NAME", "STATE", "CLASS", "LABEL", "TEMPLATE", "NETVM"),
    "network": ("NAME", "STATE", "NETVM", "IP", "IPBACK", "GATEWAY"),
    "kernel": ("NAME", "STATE", "CLASS", "TEMPLATE", "KERNEL", "KERNELOPTS"),
    "full": ("NAME", "STATE", "CLASS", "LABEL", "QID", "XID", "UUID"),
    "prefs": ("NAME", "LABEL", "TEMPLATE", "NETVM", "VCPUS", "INITIALMEM", "MAXMEM", "VIRT_MODE"),
    "disk": ("NAME", "STATE", "DISK", "PRIV-CURR", "PRIV-MAX", "ROOT-CURR", "ROOT-MAX"),
}
# Column -> property, where the names differ.
PROPERTIES: Mapping[str, str] = {"INITIALMEM": "memory", "IPBACK": "netvm", "GATEWAY": "gateway"}
VOLUMES: Mapping[str, tuple[str, str]] = {
    "PRIV-CURR": ("private", "usage"),
    "PRIV-MAX": ("private", "size"),
    "ROOT-CURR": ("root", "usage"),
    "ROOT-MAX": ("root", "size"),
}


class Row:
    """One qube; values are asked for when a column needs them."""

    def __init__(self, api: AdminClient, line: QubeLine) -> None:
        self.api = api
        self.line = line
        self._properties: dict[str, str] | None = None

    def cell(self, column: str) -> str:
        """The text of one column; "-" for what the qube does not have."""
        direct: Mapping[str, str] = {
            "NAME": self.line.name,
            "STATE": self.line.state,
            "CLASS": self.line.klass,
            "UUID": self.line.uuid,
        }
        if column in direct:
            return direct[column]
        if column == "DISK":
            return str(sum(self._volume(v, "usage") for v in ("root", "private")) >> 20)
        if column in VOLUMES:
            return str(self._volume(*VOLUMES[column]) >> 20)
        if column == "IPBACK":
            return self._netvm_address()
        value = self.property(PROPERTIES.get(column, column.lower()))
        return value or "-"

    def property(self, name: str) -> str:
        """A property's text, "" without one."""
        if self._properties is None:
            values = self.api.get_all(self.line.name)
            self._properties = {key: value.value for key, value in values.items()}
        return self._properties.get(name, "")

    def _netvm_address(self) -> str:
        netvm = self.property("netvm")
        return self.api.get(netvm, "ip").value if netvm else "-"

    def _volume(self, name: str, key: str) -> int:
        try:
            info = self.api.info("admin.vm.volume.Info", self.line.name, name)
        except (exceptions.QubesException, exceptions.PermissionDenied):
            return 0
        return int(info.get(key) or 0)


def _chosen(args: argparse.Namespace, lines: list[QubeLine], api: AdminClient) -> list[QubeLine]:
    """The qubes that the options select."""
    if args.names:
        known = {line.name for line in lines}
        unknown = [name for name in args.names if name not in known]
        if unknown:
            raise tool.ToolError(f"no such qube: {', '.join(unknown)}")
        lines = [line for line in lines if line.name in args.names]
    keep: list[Callable[[QubeLine], bool]] = []
    wanted = {state for option, state in STATES.items() if getattr(args, option)}
    if wanted:
        keep.append(lambda line: line.state in wanted)
    if args.klass:
        classes = set(args.klass.split(","))
        keep.append(lambda line: line.klass in classes)
    if args.tags:
        tags = set(args.tags)
        keep.append(lambda line: tags <= set(api.lines("admin.vm.tag.List", line.name)))
    return [line for line in lines if all(check(line) for check in keep)]


STATES: Mapping[str, str] = {
    "running": "Running",
    "halted": "Halted",
    "paused": "Paused",
    "transient": "Transient",
}


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Print the list."""
    lines = _chosen(args, api.qubes(), api)
    if args.raw_list:
        for line in lines:
            print(line.name)
        return 0
    columns = FORMATS[args.format]
    if args.fields:
        columns = tuple(field.strip().upper() for field in args.fields.split(","))
        if columns[0] != "NAME" and "NAME" not in columns and not args.raw_data:
            columns = ("NAME", *columns)
    rows = [tuple(Row(api, line).cell(column) for column in columns) for line in lines]
    if args.json:
        keys = [column.lower() for column in columns]
        print(json.dumps([dict(zip(keys, row)) for row in rows], indent=1))
    elif args.raw_data:
        for row in rows:
            print("|".join(row))
    else:
        tool.table([columns, *rows])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-ls", "List qubes.")
    made.add_argument("names", nargs="*", metavar="VMNAME", help="only these")
    made.add_argument("--format", "-o", choices=sorted(FORMATS), default="simple")
    made.add_argument("--fields", "-O", help="comma separated columns")
    made.add_argument("--raw-data", action="store_true", help="columns separated by |, no header")
    made.add_argument("--raw-list", action="store_true", help="names only")
    made.add_argument("--json", action="store_true", help="a JSON list")
    made.add_argument("--class", dest="klass", metavar="CLASS", help="comma separated classes")
    made.add_argument("--tags", nargs="+", metavar="TAG", help="qubes that have all of these tags")
    for option, state in STATES.items():
        made.add_argument(f"--{option}", action="store_true", help=f"state {state}")
    return tool.run(made, work, argv)
