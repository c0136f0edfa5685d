"""qvm-ls: list qubes.

Owns the columns and the filters. Must not know how values come about. Invariant: a value is
asked for only when a column, a filter or the order needs it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from clients.admin import AdminClient, QubeLine, exceptions
from clients.cli import tool

FORMATS: Mapping[str, tuple[str, ...]] = {
    "simple": ("NAME", "STATE", "CLASS", "LABEL", "TEMPLATE", "NETVM"),
    "minimal": ("NAME",),
    "network": ("NAME", "STATE", "NETVM", "IP", "IPBACK", "GATEWAY"),
    "kernel": ("NAME", "STATE", "CLASS", "TEMPLATE", "KERNEL", "KERNELOPTS"),
    "full": ("NAME", "STATE", "CLASS", "LABEL", "QID", "XID", "UUID"),
    "prefs": ("NAME", "LABEL", "TEMPLATE", "NETVM", "VCPUS", "INITIALMEM", "MAXMEM", "VIRT_MODE"),
    "disk": (
        "NAME",
        "STATE",
        "DISK",
        "PRIV-CURR",
        "PRIV-MAX",
        "PRIV-USED",
        "ROOT-CURR",
        "ROOT-MAX",
        "ROOT-USED",
    ),
}
# Column -> property, where the names differ. Any other property is a column of its name.
PROPERTIES: Mapping[str, str] = {"INITIALMEM": "memory"}
# Sizes are in MiB, -USED is a share.
VOLUMES: Mapping[str, tuple[str, str]] = {
    "PRIV-CURR": ("private", "usage"),
    "PRIV-MAX": ("private", "size"),
    "ROOT-CURR": ("root", "usage"),
    "ROOT-MAX": ("root", "size"),
}
SHARES: Mapping[str, str] = {"PRIV-USED": "private", "ROOT-USED": "root"}
SPECIAL: Mapping[str, str] = {
    "NAME": "name",
    "STATE": "power state",
    "CLASS": "class",
    "UUID": "uuid",
    "MEMORY": "memory in use, MiB",
    "DISK": "disk space of root and private, MiB",
    "IPBACK": "address of the network qube",
    "INITIALMEM": "memory at the start, MiB",
    "PRIV-CURR": "disk space of private, MiB",
    "PRIV-MAX": "size of private, MiB",
    "PRIV-USED": "share of private that is used",
    "ROOT-CURR": "disk space of root, MiB",
    "ROOT-MAX": "size of root, MiB",
    "ROOT-USED": "share of root that is used",
}
STATES: Mapping[str, str] = {
    "running": "Running",
    "halted": "Halted",
    "paused": "Paused",
    "transient": "Transient",
}
NOTHING = "-"
# Options that ask for more than a line of the list has.
_NEED_VALUES = (
    "label", "template_source", "netvm_is", "default_dispvm_is", "management_dispvm_is", "tags",
    "features", "prefs", "internal", "servicevm", "pending_update", "updateable", "tree",
)  # fmt: skip


class Row:
    """One qube; values are asked for when they are needed."""

    def __init__(
        self,
        table: Table,
        line: QubeLine,
        properties: Mapping[str, str] | None = None,
        features: Mapping[str, str] | None = None,
        tags: Iterable[str] | None = None,
    ) -> None:
        self.line = line
        self._table = table
        self._api = table.api
        self._properties = properties
        self._features = features
        self._tags = tags
        self._volumes: dict[str, Mapping[str, str]] = {}

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
        if column in SHARES:
            size = self._volume(SHARES[column], "size")
            return f"{self._volume(SHARES[column], 'usage') / size:.0%}" if size else NOTHING
        if column == "MEMORY":
            return self._memory()
        if column == "IPBACK":
            netvm = self.property("netvm")
            back = self._table.rows.get(netvm)
            return back.cell("IP") if back is not None else NOTHING
        return self.property(PROPERTIES.get(column, column.lower())) or NOTHING

    def property(self, name: str) -> str:
        """A property's text, "" without one."""
        if self._properties is None:
            try:
                values = self._api.get_all(self.line.name)
            except tool.FAILURES:
                values = {}
            self._properties = {key: value.value for key, value in values.items()}
        return self._properties.get(name, "")

    def tags(self) -> set[str]:
        """The qube's tags."""
        if self._tags is not None:
            return set(self._tags)
        return set(self._api.lines("admin.vm.tag.List", self.line.name))

    def feature(self, name: str) -> str | None:
        """A feature's value, None without it."""
        if self._features is not None:
            return self._features.get(name)
        try:
            return self._api.text("admin.vm.feature.Get", self.line.name, name)
        except exceptions.QubesFeatureNotFoundError:
            return None

    def _memory(self) -> str:
        words = self._api.text("admin.vm.CurrentState", self.line.name).split()
        found = dict(word.partition("=")[::2] for word in words)
        return str(int(found.get("mem") or 0) >> 10)

    def _volume(self, name: str, key: str) -> int:
        if name not in self._volumes:
            try:
                self._volumes[name] = self._api.info("admin.vm.volume.Info", self.line.name, name)
            except tool.FAILURES:
                self._volumes[name] = {}
        return int(self._volumes[name].get(key) or 0)


class Table:
    """All qubes of the system, in the daemon's order."""

    def __init__(self, api: AdminClient, *, properties: bool) -> None:
        self.api = api
        self.rows: dict[str, Row] = {}
        if properties:
            try:
                self._all_at_once(api.lines("bulkhead.vm.GetAll"))
                return
            except tool.UNKNOWN_CALL:
                pass  # 4.4: qube by qube
        for line in api.qubes():
            self.rows[line.name] = Row(self, line)

    def _all_at_once(self, lines: Iterable[str]) -> None:
        for text in lines:
            record = json.loads(text)
            line = QubeLine(record["name"], record["class"], record["state"], record["uuid"])
            values = {name: str(entry["value"]) for name, entry in record["properties"].items()}
            features = {name: str(value) for name, value in record["features"].items()}
            self.rows[line.name] = Row(self, line, values, features, record["tags"])


# ---- which, and in which order


def _chosen(args: argparse.Namespace, table: Table) -> list[Row]:
    """The rows that the options select."""
    names = args.names
    if names and not args.all:
        lines = [row.line for row in table.rows.values()]
        picked = argparse.Namespace(names=names, all=False, exclude=[])
        wanted = tool.selected(picked, lines)
        unknown = [name for name in wanted if name not in table.rows]
        if unknown:
            raise tool.ToolError(f"there is no qube {', '.join(unknown)}")
        rows = [row for name, row in table.rows.items() if name in set(wanted)]
    else:
        rows = list(table.rows.values())
    checks = _checks(args)
    return [row for row in rows if all(check(row) for check in checks)]


def _checks(args: argparse.Namespace) -> list[Callable[[Row], bool]]:
    checks: list[Callable[[Row], bool]] = []
    if args.exclude:
        checks.append(lambda row: row.line.name not in args.exclude)
    states = {state for option, state in STATES.items() if getattr(args, option)}
    if states:
        checks.append(lambda row: row.line.state in states)
    for values, column in (
        (args.klass, "CLASS"),
        (args.label, "LABEL"),
        (args.template_source, "TEMPLATE"),
        (args.netvm_is, "NETVM"),
        (args.default_dispvm_is, "DEFAULT_DISPVM"),
        (args.management_dispvm_is, "MANAGEMENT_DISPVM"),
    ):
        if values:
            checks.append(_one_of(column, values.split(",")))
    if args.tags:
        checks.append(lambda row: set(args.tags) <= row.tags())
    for answer, name in (
        (args.internal, "internal"),
        (args.servicevm, "servicevm"),
        (args.pending_update, "updates-available"),
    ):
        if answer:
            checks.append(_switched(name, answer == "y"))
    if args.updateable:
        checks.append(_has_property("updateable", str(args.updateable == "y")))
    for text in args.features or ():
        name, _, value = text.partition("=")
        checks.append(_has_feature(name, value if "=" in text else None))
    for text in args.prefs or ():
        name, value = tool.pair("--prefs", text)
        checks.append(_has_property(name, value))
    return checks


def _one_of(column: str, values: Sequence[str]) -> Callable[[Row], bool]:
    return lambda row: row.cell(column) in values


def _has_feature(name: str, value: str | None) -> Callable[[Row], bool]:
    return lambda row: (
        (row.feature(name) is not None) if value is None else (row.feature(name) == value)
    )


def _switched(name: str, on: bool) -> Callable[[Row], bool]:
    return lambda row: bool(row.feature(name)) == on


def _has_property(name: str, value: str) -> Callable[[Row], bool]:
    return lambda row: row.property(name).lower() == value.lower()


def _sorted(args: argparse.Namespace, rows: list[Row]) -> list[Row]:
    if args.sort:
        column = args.sort.upper()
        rows.sort(key=lambda row: _sort_key(row.cell(column)))
    if args.reverse:
        rows.reverse()
    return rows


def _sort_key(text: str) -> tuple[int, int, str]:
    """Numbers by value and before texts."""
    return (0, int(text), "") if text.isdigit() else (1, 0, text.lower())


def _as_tree(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Rows below their network qube, each with its name indented."""
    shown = {row.line.name for row in rows}
    below: dict[str, list[Row]] = {}
    for row in rows:
        netvm = row.property("netvm")
        below.setdefault(netvm if netvm in shown else "", []).append(row)
    found: list[tuple[Row, str]] = []

    def descend(name: str, depth: int) -> None:
        for row in below.get(name, ()):
            found.append((row, "  " * depth + row.line.name))
            descend(row.line.name, depth + 1)

    descend("", 0)
    return found


# ---- the tool


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Print the list."""
    if args.help_formats:
        tool.table((name, " ".join(columns)) for name, columns in FORMATS.items())
        return 0
    if args.help_columns:
        one_of_each = {line.klass: line.name for line in api.qubes()}
        names = {
            name.upper()
            for qube in one_of_each.values()
            for name in api.lines("admin.vm.property.List", qube)
        }
        tool.table([*SPECIAL.items(), *((n, "property") for n in sorted(names - set(SPECIAL)))])
        return 0
    columns = _columns(args)
    shown = () if args.raw_list else columns
    needs = {*shown, args.sort.upper()} - {"NAME", "STATE", "CLASS", "UUID", ""}
    filters = any(getattr(args, name) for name in _NEED_VALUES)
    table = Table(api, properties=filters or bool(needs))
    rows = _sorted(args, _chosen(args, table))
    if args.raw_list:
        for row in rows:
            print(row.line.name)
        return 0
    named = _as_tree(rows) if args.tree else [(row, row.line.name) for row in rows]
    cells = [
        tuple(name if column == "NAME" else row.cell(column) for column in columns)
        for row, name in named
    ]
    if args.raw_data:
        for line in cells:
            print("|".join(line))
    else:
        tool.show(args, columns, cells)
    return 0


def _columns(args: argparse.Namespace) -> tuple[str, ...]:
    if not args.fields:
        return FORMATS[args.format]
    columns = tuple(field.strip().upper() for field in args.fields.split(","))
    if not all(columns):
        raise tool.UsageError("--fields has an empty column")
    return columns


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-ls", "List qubes.")
    made.add_argument("names", nargs="*", metavar="VMNAME", help="only these; * and ? match")
    made.add_argument("--all", action="store_true", help="every qube, the default")
    made.add_argument("--exclude", action="append", default=[], metavar="VMNAME")

    what = made.add_argument_group("columns")
    form = what.add_mutually_exclusive_group()
    form.add_argument("--format", "-o", choices=sorted(FORMATS), default="simple")
    form.add_argument("--fields", "-O", metavar="FIELD,...", help="columns, or any properties")
    for letter, name in (("n", "network"), ("k", "kernel"), ("d", "disk")):
        form.add_argument(
            f"-{letter}",
            f"--{name}",
            dest="format",
            action="store_const",
            const=name,
            help=f"the same as --format {name}",
        )
    what.add_argument("--raw-data", action="store_true", help="columns separated by |, no header")
    what.add_argument("--raw-list", action="store_true", help="names only")
    tool.json_option(made)
    what.add_argument("--tree", "-t", action="store_true", help="below their network qube")
    what.add_argument("--sort", default="", metavar="FIELD", help="by this column")
    what.add_argument(
        "--reverse", "--reverse-sort", "-r", action="store_true", help="the other way round"
    )
    what.add_argument("--help-formats", action="store_true", help="list the formats")
    what.add_argument("--help-columns", action="store_true", help="list the columns")

    which = made.add_argument_group("filters; all of them must hold")
    for option, state in STATES.items():
        which.add_argument(f"--{option}", action="store_true", help=f"state {state}")
    which.add_argument("--class", dest="klass", metavar="CLASS,...")
    which.add_argument("--label", metavar="LABEL,...")
    which.add_argument("--template-source", metavar="VMNAME,...", help="its template")
    which.add_argument("--netvm-is", metavar="VMNAME,...", help="its network qube")
    which.add_argument("--default-dispvm-is", metavar="VMNAME,...", help="for its disposables")
    which.add_argument("--management-dispvm-is", metavar="VMNAME,...", help="that manages it")
    for name, text in (
        ("internal", "hidden from menus (feature internal)"),
        ("servicevm", "a service qube (feature servicevm)"),
        ("pending-update", "with updates (feature updates-available)"),
        ("updateable", "that can be updated"),
    ):
        which.add_argument(f"--{name}", choices=("y", "n"), help=text)
    which.add_argument("--tags", nargs="+", metavar="TAG", help="that have all of these")
    which.add_argument("--features", nargs="+", metavar="FEATURE[=VALUE]")
    which.add_argument("--prefs", nargs="+", metavar="PROPERTY=VALUE")
    # The list needs no time to speak of, and never minds case.
    for options in (("--spinner",), ("--no-spinner",), ("--ignore-case", "-i")):
        made.add_argument(*options, action="store_true", help=argparse.SUPPRESS)
    return tool.run(made, work, argv)
