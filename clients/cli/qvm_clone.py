"""qvm-clone: make a copy of a qube.

Owns the order of calls that copies a qube where the daemon cannot do it in one operation.
Must not know what single properties mean. Invariant: a clone that could not be finished is
removed again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from clients.admin import AdminClient, exceptions
from clients.cli import tool

# What a clone has of its own: never copied.
OWN = ("name", "qid", "uuid", "dispid", "label", "template", "installed_by_rpm")
_FRONTEND = re.compile(r" frontend_domain='[^']*'")


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """Make the copy."""
    clone(
        api,
        args.source,
        args.name,
        klass=args.klass,
        pools=pool_words(args.pool),
        ignore_errors=args.ignore_errors,
        devices=not args.ignore_devices,
        quiet=args.quiet,
    )
    return 0


def clone(
    api: AdminClient,
    source: str,
    name: str,
    *,
    klass: str,
    pools: Sequence[str],
    ignore_errors: bool,
    quiet: bool,
    devices: bool = True,
) -> None:
    """One operation of the daemon where it has it, else call by call.

    klass "" = the source's; pools: words of pool_words(); devices: its assignments, too.
    """
    if source == name:
        raise tool.UsageError("the clone needs another name")
    copy = Copy(api, source, name, ignore_errors=ignore_errors, devices=devices)
    if not devices:
        # The operation takes everything.
        copy.run(klass, pools)
        return
    words = [f"name={name}", *([f"class={klass}"] if klass else []), *pools]
    try:
        with tool.progress(api, f"cloning {source}", kind="CLONE", qube=source, quiet=quiet):
            api.call("bulkhead.vm.Clone", source, payload=" ".join(words).encode())
    except tool.UNKNOWN_CALL:
        # Refused for another reason, the first of these calls is refused for it too.
        copy.run(klass, pools)
    except exceptions.QubesValueError:
        # Not every change of class is one operation.
        if not klass or klass == _class_of(api, source):
            raise
        copy.run(klass, pools)


def _class_of(api: AdminClient, name: str) -> str:
    for line in api.qubes():
        if line.name == name:
            return line.klass
    raise tool.ToolError(f"there is no qube {name}")


def pool_words(texts: Sequence[str]) -> list[str]:
    """--pool options as words of the payload: POOL, or VOLUME=POOL (also VOLUME:POOL)."""
    words = []
    for text in texts:
        volume, sign, pool = text.replace(":", "=", 1).partition("=")
        words.append(f"pool:{volume}={pool}" if sign else f"pool={text}")
    if len([word for word in words if word.startswith("pool=")]) > 1 or (
        len(words) > 1 and any(word.startswith("pool=") for word in words)
    ):
        raise tool.UsageError("say one pool for all volumes, or VOLUME=POOL for each")
    return words


class Copy:
    """A clone made of the calls that release 4.4 has."""

    def __init__(
        self, api: AdminClient, source: str, name: str, *, ignore_errors: bool, devices: bool
    ) -> None:
        self._api = api
        self._source = source
        self._name = name
        self._ignore = ignore_errors
        self._with_devices = devices

    def run(self, klass: str, pools: Sequence[str]) -> None:
        """Create, copy, and remove again what could not be completed."""
        api = self._api
        self._create(klass or _class_of(api, self._source), pools)
        try:
            for copy in (
                self._properties,
                self._tags,
                self._features,
                self._notes,
                self._firewall,
                self._volumes,
                *([self._devices] if self._with_devices else []),
            ):
                copy()
        except BaseException:
            api.call("admin.vm.Remove", self._name)
            raise

    def _create(self, klass: str, pools: Sequence[str]) -> None:
        api = self._api
        template = ""
        if klass in ("AppVM", "DispVM"):
            template = self._template()
            if not template:
                raise tool.ToolError(f"{self._source} has no template, a {klass} needs one")
        label = api.get(self._source, "label").value
        words = [f"name={self._name}", f"label={label}", *pools]
        method = "admin.vm.CreateInPool" if pools else "admin.vm.Create"
        api.call(f"{method}.{klass}", arg=template, payload=" ".join(words).encode())

    def _template(self) -> str:
        """The source's template, "" for a class without."""
        try:
            return self._api.get(self._source, "template").value
        except exceptions.QubesNoSuchPropertyError:
            return ""

    def _put(self, what: str, method: str, arg: str = "", payload: bytes = b"") -> None:
        try:
            self._api.call(method, self._name, arg, payload)
        except tool.FAILURES as error:
            if not self._ignore:
                raise
            tool.complain(f"{what} was not copied: {tool.sentence(error)}")

    def _properties(self) -> None:
        for name, value in self._api.get_all(self._source).items():
            if name not in OWN and not value.is_default:
                payload = value.value.encode()
                self._put(f"property {name}", "admin.vm.property.Set", name, payload)

    def _tags(self) -> None:
        for tag in self._api.lines("admin.vm.tag.List", self._source):
            if not tag.startswith("created-by-"):
                self._put(f"tag {tag}", "admin.vm.tag.Set", tag)

    def _features(self) -> None:
        for feature in self._api.lines("admin.vm.feature.List", self._source):
            value = self._api.call("admin.vm.feature.Get", self._source, feature)
            self._put(f"feature {feature}", "admin.vm.feature.Set", feature, value)

    def _notes(self) -> None:
        notes = self._api.call("admin.vm.notes.Get", self._source)
        if notes:
            self._put("the notes", "admin.vm.notes.Set", payload=notes)

    def _firewall(self) -> None:
        rules = self._api.call("admin.vm.firewall.Get", self._source)
        if rules:
            self._put("the firewall", "admin.vm.firewall.Set", payload=rules)

    def _volumes(self) -> None:
        api = self._api
        there = api.lines("admin.vm.volume.List", self._source)
        for volume in api.lines("admin.vm.volume.List", self._name):
            info = api.info("admin.vm.volume.Info", self._name, volume)
            if volume not in there or info.get("save_on_stop") != "True":
                continue
            # What the source takes from its template at each start is to be had there.
            origin = self._source
            info = api.info("admin.vm.volume.Info", origin, volume)
            if info.get("snap_on_start") == "True" and info.get("save_on_stop") != "True":
                origin = self._template()
            token = api.call("admin.vm.volume.CloneFrom", origin, volume)
            api.call("admin.vm.volume.CloneTo", self._name, volume, token)

    def _devices(self) -> None:
        api = self._api
        for devclass in api.lines("admin.deviceclass.List"):
            try:
                lines = api.lines(f"admin.vm.device.{devclass}.Assigned", self._source)
            except exceptions.QubesException as error:
                if not self._ignore:
                    raise
                tool.complain(f"{devclass} devices were not copied: {tool.sentence(error)}")
                continue
            for line in lines:
                head, _, assignment = line.partition(" ")
                self._put(
                    f"{devclass} device {head}",
                    f"admin.vm.device.{devclass}.Assign",
                    device_argument(head),
                    _FRONTEND.sub("", f" {assignment}").strip().encode(),
                )


def device_argument(ident: str) -> str:
    """BACKEND+PORT:DEVICE as the argument of a call: no ":" and no "*" may stand there."""
    return ident.replace(":", "+").replace("?******", "_______").replace("*", "_")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-clone", "Make a copy of a qube.")
    made.add_argument("source", metavar="SRC_VMNAME")
    made.add_argument("name", metavar="NEW_VMNAME")
    made.add_argument("--class", "-C", dest="klass", default="", metavar="CLASS")
    made.add_argument(
        "--pool",
        "-P",
        "-p",
        action="append",
        default=[],
        metavar="POOL|VOLUME=POOL",
        help="where its volumes go",
    )
    made.add_argument(
        "--ignore-errors", action="store_true", help="go on when something cannot be copied"
    )
    made.add_argument("--ignore-devices", action="store_true", help="leave device assignments out")
    return tool.run(made, work, argv)
