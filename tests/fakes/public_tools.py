"""The calls of release 4.4's tools, in the order in which those make them.

Owns the sequences of the documented table "calls per tool", with what each tool does about
a refusal. Must not know how anything is answered, nor use clients/. Invariant: a tool here
reads and writes through the strict client alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.fakes.strict_client import (
    AccessError,
    CurrentState,
    Listed,
    Property,
    Qube,
    QubesException,
    StrictClient,
    Value,
    current_state,
    device_argument,
    lines,
    pairs,
    pool_info,
    whole_number,
)

# What a clone does not take from its source.
_OWN = ("name", "qid", "template", "label", "uuid", "installed_by_rpm")
_SYSTEM_REFERENCES = (
    "default_dispvm", "default_netvm", "default_guivm", "default_audiovm", "default_template",
    "clockvm", "updatevm", "management_dispvm",
)  # fmt: skip
_REFERENCES = ("template", "netvm", "guivm", "audiovm", "default_dispvm", "management_dispvm")
_NONE_WORDS = ("default_dispvm", "netvm", "template", "guivm", "audiovm")


class ToolFailure(Exception):
    """The tool itself gives up, with a sentence."""


class Tools:
    """One person's tools. rpc: the directory that stands for /etc/qubes-rpc."""

    def __init__(self, api: StrictClient, rpc: Path, environment: Mapping[str, str]) -> None:
        self.api = api
        self._rpc = rpc
        self._environment = dict(environment)

    def _known(self, *names: str) -> dict[str, Listed]:
        """Nearly every tool begins with the list, to check its operands."""
        found = self.api.vm_list()
        for name in names:
            if name not in found:
                raise ToolFailure(f"no such qube: {name}")
        return found

    # ---- looking

    def ls(self) -> dict[str, tuple[Listed, dict[str, Property]]]:
        """qvm-ls."""
        return {name: (line, self.api.get_all(name)) for name, line in self._known().items()}

    def ls_disk(
        self, qube: str
    ) -> tuple[CurrentState, dict[str, Property], dict[str, dict[str, Value]]]:
        """qvm-ls NAME --fields ...disk."""
        self._known(qube)
        state = current_state(self.api.call("admin.vm.CurrentState", qube))
        values = self.api.get_all(qube)
        return state, values, {v: self.api.volume(qube, v) for v in self.api.volumes(qube)}

    def ls_network(self, qube: str) -> dict[str, Value]:
        """qvm-ls NAME --format network."""
        self._known(qube)
        state = current_state(self.api.call("admin.vm.CurrentState", qube))
        values = self.api.get_all(qube)
        netvm = values["netvm"].value
        back = self.api.get_all(str(netvm))["ip"].value if netvm else None
        return {
            "state": state.power_state,
            "netvm": netvm,
            "ip": values["ip"].value,
            "ipback": back,
            "gateway": values["gateway"].value,
        }

    def raw_list(self) -> list[str]:
        """qvm-ls --raw-list."""
        return list(self._known())

    def check(self, qube: str, *states: str, networked: bool = False) -> bool:
        """qvm-check [--running|--paused|--networked]."""
        if qube not in self._known():
            return False
        if networked:
            return bool(
                self.api.get(qube, "provides_network") or self.api.get(qube, "netvm") is not None
            )
        return not states or self.api.state(qube) in states

    # ---- properties, features, tags, notes

    def prefs(self, qube: str) -> dict[str, Value]:
        """qvm-prefs VM: "U" for what has no value. qube "": qubes-prefs, without the list."""
        if qube:
            self._known(qube)
        names = self.api.property_list(qube)
        values = self.api.get_all(qube)
        if set(names) != set(values):
            raise AssertionError(f"List and GetAll differ: {set(names) ^ set(values)}")
        shown: dict[str, Value] = {}
        for name in names:
            try:
                shown[name] = values[name].value
            except AttributeError:
                shown[name] = "U"
        return shown

    def pref(self, qube: str, name: str, value: str | None = None) -> Value:
        """qvm-prefs VM P [V]; the value afterwards."""
        if qube:
            self._known(qube)
        if value is not None:
            if value.lower() == "none" and name in _NONE_WORDS:
                value = ""
            self.api.set(qube, name, value)
        return self.api.get(qube, name)

    def pref_default(self, qube: str, name: str) -> None:
        """qvm-prefs --default VM P."""
        self._known(qube)
        self.api.reset(qube, name)

    def help_properties(self, qube: str) -> dict[str, str]:
        """qvm-prefs --help-properties VM."""
        self._known(qube)
        found = {}
        for name in self.api.property_list(qube):
            found[name] = self.api.call("admin.vm.property.Help", qube, name)
            if "\n" in found[name]:
                raise AssertionError(f"more than a paragraph: {found[name]!r}")
        return found

    def features(self, qube: str) -> dict[str, str]:
        """qvm-features VM."""
        self._known(qube)
        return self.api.features(qube)

    def feature(self, qube: str, name: str, value: str) -> str | None:
        """qvm-features VM F V."""
        self._known(qube)
        self.api.do("admin.vm.feature.Set", qube, name, value.encode())
        return self.api.feature(qube, name)

    def feature_unset(self, qube: str, name: str) -> None:
        """qvm-features --unset VM F."""
        self._known(qube)
        self.api.do("admin.vm.feature.Remove", qube, name)

    def service(self, qube: str, name: str, on: bool) -> None:
        """qvm-service VM S on|off."""
        self.feature(qube, f"service.{name}", "1" if on else "")

    def services(self, qube: str) -> dict[str, bool]:
        """qvm-service VM."""
        found = self.features(qube)
        return {
            name.removeprefix("service."): bool(value)
            for name, value in found.items()
            if name.startswith("service.")
        }

    def tag(self, qube: str, act: str, tag: str) -> None:
        """qvm-tags VM add|del TAG."""
        self._known(qube)
        self.api.do("admin.vm.tag.Set" if act == "add" else "admin.vm.tag.Remove", qube, tag)

    def notes(self, qube: str, text: str | None = None) -> str:
        """qvm-notes VM [--set]; what is stored afterwards."""
        self._known(qube)
        if text is not None:
            self.api.do("admin.vm.notes.Set", qube, payload=text.encode())
        return self.api.call("admin.vm.notes.Get", qube)

    # ---- power

    def start(self, qube: str) -> None:
        """qvm-start VM."""
        self._known(qube)
        if self.api.state(qube) != "Halted":
            raise ToolFailure("it is running already")
        self.api.do("admin.vm.Start", qube)

    def start_with(self, qube: str, backend: str, port: str, devtype: str) -> None:
        """qvm-start --drive VM."""
        self._known(qube, backend)
        if self.api.state(qube) != "Halted":
            raise ToolFailure("it is running already")
        device_id = self.api.available("block", backend, port)[port]["device_id"]
        head = f"{backend}+{port}:{device_id}"
        options = {"devtype": devtype, "read-only": "yes" if devtype == "cdrom" else "no"}
        self._give("Assign", "block", qube, head, "required", options)
        try:
            self.api.do("admin.vm.Start", qube)
        finally:
            self.api.do("admin.vm.device.block.Unassign", qube, device_argument(head))

    def shutdown(self, *qubes: str, wait: bool = False, force: bool = False) -> None:
        """qvm-shutdown [--wait] [--force] VM...: what is used waits for its users."""
        self._known(*qubes)
        arg = "+".join(word for word, on in (("force", force), ("wait", wait)) if on)
        left = list(qubes)
        for _ in range(len(left) + 1):
            again = []
            for qube in left:
                try:
                    self.api.do("admin.vm.Shutdown", qube, arg)
                except QubesException as error:
                    name = getattr(error, "wire_name", "")
                    if name == "QubesVMNotStartedError":
                        continue
                    if not wait or name not in (
                        "QubesVMInUseError", "QubesVMShutdownTimeoutError",
                    ):  # fmt: skip
                        raise
                    again.append(qube)
            left = again
            if not left:
                return
        for qube in left:
            self.api.do("admin.vm.Kill", qube)

    def power(self, verb: str, qube: str) -> None:
        """qvm-kill, qvm-pause, qvm-pause -S: verb Kill, Pause or Suspend."""
        self._known(qube)
        self.api.do(f"admin.vm.{verb}", qube)

    def unpause(self, qube: str) -> None:
        """qvm-unpause."""
        self._known(qube)
        asleep = self.api.state(qube) == "Suspended"
        self.api.do("admin.vm.Resume" if asleep else "admin.vm.Unpause", qube)

    # ---- making

    def create(
        self,
        name: str,
        klass: str = "AppVM",
        *,
        label: str = "red",
        template: str = "",
        pools: str = "",
        properties: Mapping[str, str] | None = None,
    ) -> None:
        """qvm-create; pools: " pool=P" or " pool:VOLUME=P ..."."""
        if label not in self.api.labels():
            raise ToolFailure(f"no such label: {label}")
        self._create(name, klass, label, template, pools)
        self._known(name)
        for key, value in (properties or {}).items():
            self.api.set(name, key, value)

    def _create(self, name: str, klass: str, label: str, template: str, pools: str) -> None:
        method = "admin.vm.CreateInPool" if pools else "admin.vm.Create"
        payload = f"name={name} label={label}{pools}".encode()
        self.api.do(f"{method}.{klass}", "dom0", template, payload)

    def create_standalone(self, name: str, template: str) -> None:
        """qvm-create -C StandaloneVM -t T: a clone without the private volume."""
        self.api.labels()
        self.clone(template, name, klass="StandaloneVM", leave=("private",))

    def create_from_file(self, name: str, klass: str, data: bytes) -> None:
        """qvm-create --root-copy-from."""
        self.create(name, klass)
        if "root" not in self.api.volumes(name):
            raise ToolFailure("no root volume")
        self.import_stream(name, "root", data)

    def clone(
        self,
        source: str,
        name: str,
        *,
        klass: str = "",
        pools: str = "",
        leave: Sequence[str] = (),
    ) -> None:
        """qvm-clone; what could not be finished is removed again."""
        api = self.api
        known = self._known(source)
        klass = klass or known[source].klass
        template = ""
        if hasattr(Qube(api, source), "template") and klass in ("AppVM", "DispVM"):
            template = str(api.get(source, "template"))
        self._create(name, klass, str(api.get(source, "label")), template, pools)
        try:
            self._known(name)
            self._copy_settings(source, name)
            self._copy_volumes(source, name, leave)
            self._copy_devices(source, name)
        except BaseException:
            api.do("admin.vm.Remove", name)
            raise

    def _copy_settings(self, source: str, name: str) -> None:
        api = self.api
        for prop in api.property_list(source):
            if prop in _OWN:
                continue
            got = api.get_property(source, prop)
            if not got.is_default:
                # What the copy's class has not is passed over, and so is what no answer comes
                # to: the client knows both by the same class.
                with contextlib.suppress(AttributeError):
                    api.set(name, prop, got.text)
        for tag in api.tags(source):
            if not tag.startswith("created-by-"):
                api.do("admin.vm.tag.Set", name, tag)
        for feature, value in api.features(source).items():
            api.do("admin.vm.feature.Set", name, feature, value.encode())
        if notes := api.call("admin.vm.notes.Get", source):
            api.do("admin.vm.notes.Set", name, payload=notes.encode())
        self.write_rules(name, api.rules(source))

    def _copy_volumes(self, source: str, name: str, leave: Sequence[str]) -> None:
        for volume in self.api.volumes(name):
            if volume in leave or self.api.volume(name, volume)["save_on_stop"] is not True:
                continue
            if volume in self.api.volumes(source):
                self._copy_volume(source, name, volume)

    def _copy_volume(self, source: str, name: str, volume: str) -> None:
        token = self.api.call("admin.vm.volume.CloneFrom", source, volume)
        if not (len(token) == 32 and token.isalnum()):
            raise AssertionError(f"not a token: {token!r}")
        self.api.do("admin.vm.volume.CloneTo", name, volume, token.encode())

    def _copy_devices(self, source: str, name: str) -> None:
        for devclass in lines(self.api.call("admin.deviceclass.List"), filled=True):
            for head, fields in self.api.held(devclass, "Assigned", source).items():
                options = {k[1:]: v for k, v in fields.items() if k.startswith("_")}
                self._give("Assign", devclass, name, head, fields["mode"], options)

    def remove(self, *qubes: str) -> list[str]:
        """qvm-remove -f: what could not go, and "HOLDER.PROPERTY" of whoever holds it."""
        self._known(*qubes)
        holders = []
        for qube in qubes:
            try:
                self.api.do("admin.vm.Remove", qube)
            except QubesException as error:
                if getattr(error, "wire_name", "") != "QubesVMInUseError":
                    raise
                holders += self._holders(qube)
        return holders

    def _holders(self, qube: str) -> list[str]:
        found = []
        for name in _SYSTEM_REFERENCES:
            if self.api.get("", name) == qube:
                found.append(f".{name}")
        for other in self.api.vm_list():
            if other == qube:
                continue
            holder = Qube(self.api, other)
            if getattr(holder, "is_preload", False):
                continue
            for name in _REFERENCES:
                if (
                    getattr(holder, name, None) == qube
                    and not self.api.get_property(other, name).is_default
                ):
                    found.append(f"{other}.{name}")
        return found

    # ---- running commands: everything but the command itself

    def run(self, qube: str) -> str:
        """qvm-run VM CMD up to qrexec-client; the user it would run as."""
        self._known(qube)
        getattr(Qube(self.api, qube), "guivm", None)
        self.api.feature(qube, "gui", "CheckWithTemplate")
        if not self.api.running(qube):
            self._start_for_service(qube)
        for feature in ("os", "vmexec", "supported-rpc.qubes.VMRootExec"):
            self.api.feature(qube, feature, "CheckWithTemplate")
        return str(self.api.get(qube, "default_user"))

    def _start_for_service(self, qube: str) -> None:
        try:
            self.api.do("admin.vm.Start", qube)
        except QubesException as error:
            if getattr(error, "wire_name", "") != "QubesVMNotHaltedError":
                raise

    def run_disposable(self, template: str) -> str:
        """qvm-run --dispvm=T CMD, until the command would run; the disposable's name."""
        self._known(template)
        for feature in ("gui", "os", "vmexec"):
            self.api.feature(template, feature, "CheckWithTemplate")
        name = self.api.call("admin.vm.CreateDisposable", template)
        if whole_number(str(self.api.get(name, "qrexec_timeout"))) <= 0:
            raise AssertionError("qrexec_timeout")
        self.api.do("admin.vm.Start", name)
        return name

    # ---- devices

    def _give(
        self,
        verb: str,
        devclass: str,
        qube: str,
        head: str,
        mode: str,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Attach or Assign, with every field that the client writes."""
        backend, _, place = head.partition("+")
        port, _, device_id = place.partition(":")
        fields = {
            "device_id": device_id,
            "port_id": port,
            "devclass": devclass,
            "backend_domain": backend,
            "mode": mode,
            "frontend_domain": qube,
            **{f"_{key}": value for key, value in (options or {}).items()},
        }
        # A field without a value leaves its space behind; the reader has to bear it.
        words = [f"{k}='" + v.replace("'", "\\'") + "'" if v else "" for k, v in fields.items()]
        self.api.do(
            f"admin.vm.device.{devclass}.{verb}",
            qube,
            device_argument(head),
            " ".join(words).encode(),
        )

    def _head(self, devclass: str, backend: str, port: str) -> str:
        found = self.api.available(devclass, backend, port)
        if port not in found:
            raise ToolFailure(f"no device at {backend}:{port}")
        return f"{backend}+{port}:{found[port]['device_id']}"

    def devices(self, devclass: str) -> dict[str, list[str]]:
        """qvm-device C list -s: "BACKEND:PORT" -> who has it, attached or assigned."""
        known = list(self._known())
        users: dict[str, list[str]] = {}
        for qube in known:
            for port in self.api.available(devclass, qube):
                users.setdefault(f"{qube}:{port}", [])
        for qube in known:
            for how in ("Attached", "Assigned"):
                for fields in self.api.held(devclass, how, qube).values():
                    key = f"{fields['backend_domain']}:{fields['port_id']}"
                    users.setdefault(key, []).append(f"{qube} {how}")
        return users

    def attach(self, devclass: str, qube: str, backend: str, port: str, **options: str) -> None:
        """qvm-device C attach."""
        self._known(qube, backend)
        head = self._head(devclass, backend, port)
        more = {key.replace("_", "-"): value for key, value in options.items()}
        self._give("Attach", devclass, qube, head, "manual", more)

    def detach(self, devclass: str, qube: str, backend: str, port: str) -> None:
        """qvm-device C detach."""
        self._known(qube, backend)
        head = self._head(devclass, backend, port)
        self.api.do(f"admin.vm.device.{devclass}.Detach", qube, device_argument(head))

    def assign(
        self, devclass: str, qube: str, backend: str, port: str, mode: str, which: str = ""
    ) -> None:
        """qvm-device C assign [--required|--ask] [--port|--device]; which: port or device."""
        self._known(qube, backend)
        _, _, place = self._head(devclass, backend, port).partition("+")
        _, _, device_id = place.partition(":")
        head = {
            "": f"{backend}+{port}:{device_id}",
            "port": f"{backend}+{port}:*",
            "device": f"{backend}+*:{device_id}",
        }[which]
        self._give("Assign", devclass, qube, head, mode)
        self.api.get_all(qube)
        if self.api.running(qube):
            self.api.held(devclass, "Attached", qube)

    def unassign(self, devclass: str, qube: str, head: str) -> None:
        """qvm-device C unassign; head: "BACKEND+PORT:DEVICE" as it was assigned."""
        backend = head.partition("+")[0]
        self._known(qube, backend)
        self.api.available(devclass, backend)
        self.api.do(f"admin.vm.device.{devclass}.Unassign", qube, device_argument(head))
        self.api.held(devclass, "Attached", qube)

    # ---- firewall

    def write_rules(self, qube: str, rules: Sequence[Mapping[str, str]]) -> None:
        """The whole list, in the order of the client's words."""
        order = (
            "action", "proto", "dst4", "dst6", "dsthost", "dstports", "icmptype",
            "specialtarget", "expire", "comment",
        )  # fmt: skip
        text = ""
        for rule in rules:
            # What reaches everything is no destination to the client.
            words = [k for k in order if not rule.get(k, "/0").endswith("/0") or k == "comment"]
            text += " ".join(f"{k}={rule[k]}" for k in words if k in rule) + "\n"
        self.api.do("admin.vm.firewall.Set", qube, payload=text.encode())

    def firewall_add(self, qube: str, rule: Mapping[str, str], before: int = -1) -> None:
        """qvm-firewall V add."""
        self._known(qube)
        rules: list[Mapping[str, str]] = list(self.api.rules(qube))
        rules.insert(len(rules) if before < 0 else before, rule)
        self.write_rules(qube, rules)

    def firewall_del(self, qube: str, number: int) -> None:
        """qvm-firewall V del --rule-no."""
        self._known(qube)
        rules = self.api.rules(qube)
        del rules[number]
        self.write_rules(qube, rules)

    def firewall_reset(self, qube: str) -> None:
        """qvm-firewall V reset."""
        self._known(qube)
        self.write_rules(qube, [{"action": "accept"}])

    # ---- volumes and pools

    def volume_list(self) -> dict[str, tuple[dict[str, Value], list[str]]]:
        """qvm-volume list: "QUBE:VOLUME" -> Info, revisions."""
        found = {}
        for qube in self._known():
            for volume in self.api.volumes(qube):
                first = self.api.volume(qube, volume)
                again = self.api.volume(qube, volume)
                if (first["pool"], first["vid"]) != (again["pool"], again["vid"]):
                    raise AssertionError(f"a volume moves: {first} {again}")
                found[f"{qube}:{volume}"] = again, self.api.revisions(qube, volume)
        return found

    def volume_info(self, qube: str, volume: str) -> dict[str, Value]:
        """qvm-volume info."""
        self._known(qube)
        if volume not in self.api.volumes(qube):
            raise ToolFailure(f"no volume {volume}")
        return {**self.api.volume(qube, volume), "revisions": len(self.api.revisions(qube, volume))}

    def volume_resize(self, qube: str, volume: str, size: int, *, force: bool = False) -> None:
        """qvm-volume resize."""
        now = self.volume_info(qube, volume)["size"]
        if not force and size < whole_number(str(now)):
            raise ToolFailure("smaller than it is")
        self.api.do("admin.vm.volume.Resize", qube, volume, str(size).encode())

    def volume_config(self, qube: str, volume: str, key: str, value: str) -> None:
        """qvm-volume config."""
        self.volume_info(qube, volume)
        self.api.do(f"admin.vm.volume.Set.{key}", qube, volume, value.encode())

    def volume_revert(self, qube: str, volume: str, revision: str = "") -> None:
        """qvm-volume revert: to the last line where none is named."""
        self.volume_info(qube, volume)
        if not revision:
            revision = self.api.revisions(qube, volume)[-1]
        self.api.do("admin.vm.volume.Revert", qube, volume, revision.encode())

    def volume_clone(self, source: str, qube: str, volume: str) -> None:
        """qvm-volume clone."""
        self.volume_info(source, volume)
        self.volume_info(qube, volume)
        self._copy_volume(source, qube, volume)

    def import_stream(
        self, qube: str, volume: str, data: bytes, *, size: int | None = None, resize: bool = True
    ) -> None:
        """qvm-volume import [--no-resize]: the client runs the service's executable itself."""
        head = f"{len(data) if size is None else size}\n".encode() if resize else b""
        with self._script(qube, volume, resize=resize) as script:
            said, errors = script.communicate(head + data, timeout=60)
        try:
            text = self.api.read(said)
        except AccessError as error:
            raise AssertionError(f"nothing on stdout; on stderr {errors!r}") from error
        if text:
            raise AssertionError(f"an import has no result: {said!r}")

    def open_import(self, qube: str, volume: str, begin: bytes) -> subprocess.Popen[bytes]:
        """An import under way: its size line and first data are read, the rest is to come."""
        script = self._script(qube, volume, resize=True)
        self.go_on(script, begin)
        return script

    def go_on(self, script: subprocess.Popen[bytes], data: bytes) -> None:
        """Bring more of an import's data; they are read when this returns."""
        assert script.stdin is not None
        script.stdin.write(data)
        script.stdin.flush()
        deadline = time.monotonic() + 30
        # What it does with them comes before it waits for more.
        while self._unread(script) or self._state(script) != "S":
            if time.monotonic() > deadline:
                raise AssertionError("the script does not read on")
            time.sleep(0.01)

    @staticmethod
    def _state(script: subprocess.Popen[bytes]) -> str:
        return Path(f"/proc/{script.pid}/stat").read_text().rpartition(") ")[2][0]

    @staticmethod
    def _unread(script: subprocess.Popen[bytes]) -> int:
        assert script.stdin is not None
        return int.from_bytes(
            fcntl.ioctl(script.stdin.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder
        )

    def _script(self, qube: str, volume: str, *, resize: bool) -> subprocess.Popen[bytes]:
        method = "admin.vm.volume.ImportWithSize" if resize else "admin.vm.volume.Import"
        self.api.calls.append(f"{method}+{volume} {qube}")
        return subprocess.Popen(
            [
                "env",
                "QREXEC_REMOTE_DOMAIN=dom0",
                f"QREXEC_REQUESTED_TARGET={qube}",
                str(self._rpc / method),
                volume,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **self._environment},
        )

    def volume_import(self, qube: str, volume: str, data: bytes, *, resize: bool = True) -> None:
        """qvm-volume import."""
        self.volume_info(qube, volume)
        self.import_stream(qube, volume, data, resize=resize)

    def pool_list(self) -> dict[str, str]:
        """qvm-pool list: name -> driver."""
        return {
            name: pool_info(self.api.call("admin.pool.Info", "dom0", name))["driver"]
            for name in self.api.pools()
        }

    def pool_info(self, name: str) -> dict[str, str]:
        """qvm-pool info."""
        if name not in self.api.pools():
            raise ToolFailure(f"no pool {name}")
        found = pool_info(self.api.call("admin.pool.Info", "dom0", name))
        for key, value in pairs(self.api.call("admin.pool.UsageDetails", "dom0", name)).items():
            whole_number(value)
            found[key] = value
        return found

    def pool_add(self, name: str, driver: str, **options: str) -> None:
        """qvm-pool add."""
        words = {"name": name, **options}
        payload = "".join(f"{key}={value}\n" for key, value in words.items())
        self.api.do("admin.pool.Add", "dom0", driver, payload.encode())

    def pool_set(self, name: str, key: str, value: str) -> None:
        """qvm-pool set."""
        if name not in self.api.pools():
            raise ToolFailure(f"no pool {name}")
        self.api.do(f"admin.pool.Set.{key}", "dom0", name, value.encode())

    def pool_remove(self, name: str) -> None:
        """qvm-pool remove."""
        self.api.do("admin.pool.Remove", "dom0", name)
