"""The story of the demo. Exit status 0 only when every step held.

Owns the order of the steps and the table at the end. Uses the command line tools as a
person would. Invariant: each step checks what it claims; a step that fails is shown with
its reason, and everything is cleaned up whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from clients.cli.demo.lab import (
    CLOSED_PORT,
    OPEN_PORT,
    PROJECT,
    SERVER_ADDRESS,
    Lab,
    LabError,
    command,
    tool,
    tools_missing,
)

TOOLS = (
    "bulkhead",
    "qvm-create",
    "qvm-clone",
    "qvm-firewall",
    "qvm-kill",
    "qvm-ls",
    "qvm-prefs",
    "qvm-remove",
    "qvm-run-disposable",
    "qvm-shutdown",
    "qvm-start",
    "qvm-volume",
)
BOOT_TIMEOUT_S = 120.0
KERNEL_DIR = PROJECT / ".cache/kernel"


@dataclass(frozen=True)
class Result:
    """One line of the closing table."""

    title: str
    seconds: float
    held: bool
    detail: str


class Story:
    """Runs the steps in order; stops at nothing but a broken foundation."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.results: list[Result] = []
        self.launcher: subprocess.Popen[str] | None = None

    # ---- plumbing

    def step(self, title: str, work: Callable[[], str], *, foundation: bool = False) -> None:
        """Do one step and note how it went."""
        print(f"-- {title}", flush=True)
        began = time.monotonic()
        try:
            detail, held = work(), True
        except (LabError, AssertionError, subprocess.TimeoutExpired, OSError) as error:
            detail, held = str(error) or type(error).__name__, False
        seconds = time.monotonic() - began
        print(f"   {seconds:6.2f} s  {'ok' if held else 'FAILED'}  {detail}", flush=True)
        self.results.append(Result(title, seconds, held, detail))
        if foundation and not held:
            raise LabError(f"cannot go on without: {title}")

    def qvm(self, name: str, *args: str, timeout: float = 180.0, check: bool = True) -> str:
        """A command line tool against this instance's socket."""
        return command(
            tool(name),
            "--socket",
            str(self.lab.root / "run/qubesd.sock"),
            *args,
            timeout=timeout,
            check=check,
        )

    def console(self, qube: str) -> str:
        """What the qube's serial console said in its present boot: the file begins anew."""
        path = self.lab.root / f"var/log/qubes/console/guest-{qube}.log"
        return path.read_bytes().decode(errors="replace") if path.exists() else ""

    def start(self, qube: str) -> str:
        """Start a qube and wait until its guest says that it is ready; its report."""
        self.qvm("qvm-start", qube)
        return self.report(qube)

    def report(self, qube: str) -> str:
        """The guest's report, once it is complete."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while "BULKHEAD ready" not in self.console(qube):
            if time.monotonic() > deadline:
                tail = self.console(qube)[-300:]
                raise AssertionError(f"{qube} did not report; its console ends: {tail!r}")
            time.sleep(0.05)
        return self.console(qube)

    def state(self, qube: str) -> str:
        """Power state by qvm-ls; "" for a qube that does not exist."""
        for line in self.qvm("qvm-ls", "--raw-data", "--fields", "NAME,STATE").splitlines():
            name, _, state = line.partition("|")
            if name == qube:
                return state
        return ""

    # ---- the steps

    def begin(self) -> str:
        """File system, world, store, services."""
        self.lab.make_pool()
        self.lab.make_world()
        command(
            tool("bulkhead"), "init", "--root", str(self.lab.root), "--pool-dir", str(self.lab.pool)
        )
        began = time.monotonic()
        environment = {**os.environ, "BULKHEAD_FAILPOINTS_FILE": str(self.lab.base / "fp/armed")}
        (self.lab.base / "fp").mkdir()
        (self.lab.base / "fp").chmod(0o777)
        self.launcher = subprocess.Popen(
            [
                tool("bulkhead"),
                "run",
                "--root",
                str(self.lab.root),
                "--uplink-namespace",
                self.lab.world,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        assert self.launcher.stdout is not None
        said = []
        for line in self.launcher.stdout:
            said.append(line.strip())
            if line.startswith("ready after"):
                break
        else:
            raise LabError("bulkhead run ended: " + " / ".join(said))
        status = json.loads(
            command(tool("bulkhead"), "status", "--json", "--root", str(self.lab.root))
        )
        users = sorted({row["user"] for row in status})
        assert all(row["ready"] for row in status), "a service is not ready"
        return f"{said[0]}; ready in {time.monotonic() - began:.2f} s; users {', '.join(users)}"

    def template(self) -> str:
        """Kernel and root image become a template."""
        initramfs = self.lab.initramfs(KERNEL_DIR)
        vmlinuz = next(KERNEL_DIR.glob("vmlinuz*"))
        command(
            tool("bulkhead"),
            "kernel",
            "add",
            "demo",
            "--vmlinuz",
            str(vmlinuz),
            "--initramfs",
            str(initramfs),
            "--root",
            str(self.lab.root),
        )
        self.qvm("qvm-create", "--class", "TemplateVM", "--label", "black", "tmpl")
        self.qvm("qvm-prefs", "tmpl", "kernel", "demo")
        self.qvm("qvm-prefs", "tmpl", "memory", "128")
        image = self.lab.image("one")
        self.qvm("qvm-volume", "import", "tmpl:root", str(image))
        return f"{vmlinuz.name} and a {image.stat().st_size >> 20} MiB root image"

    def qubes(self) -> str:
        """A network qube and an app qube behind it."""
        self.qvm("qvm-create", "--template", "tmpl", "--label", "red", "sys-net")
        self.qvm("qvm-prefs", "sys-net", "provides_network", "true")
        self.qvm("qvm-prefs", "sys-net", "netvm", "none")
        self.qvm("qvm-create", "--template", "tmpl", "--label", "blue", "work")
        self.qvm("qvm-prefs", "work", "netvm", "sys-net")
        address = self.qvm("qvm-prefs", "work", "ip").strip()
        gateway = self.qvm("qvm-prefs", "work", "visible_gateway").strip()
        targets = ",".join(f"{SERVER_ADDRESS}:{port}" for port in (OPEN_PORT, CLOSED_PORT))
        options = f"console=ttyS0 quiet panic=-1 bh.ip={address} bh.gw={gateway} bh.try={targets}"
        self.qvm("qvm-prefs", "work", "kernelopts", options)
        return f"work has {address} behind {gateway}"

    def rules(self) -> str:
        """One port is allowed, the rest is dropped."""
        self.qvm("qvm-firewall", "work", "reset")
        self.qvm("qvm-firewall", "work", "del", "--rule-no", "0")
        self.qvm(
            "qvm-firewall", "work", "add", "accept", f"{SERVER_ADDRESS}/32", "tcp", str(OPEN_PORT)
        )
        listed = self.qvm("qvm-firewall", "work")
        assert str(OPEN_PORT) in listed, listed
        return f"accept tcp {SERVER_ADDRESS}:{OPEN_PORT}, drop the rest"

    def boot(self) -> str:
        """The guest boots; its own console tells what it could reach."""
        report = self.start("work")
        assert "root one" in report, report
        opened = f"BULKHEAD port {SERVER_ADDRESS}:{OPEN_PORT} open"
        closed = f"BULKHEAD port {SERVER_ADDRESS}:{CLOSED_PORT} closed"
        assert opened in report, f"the allowed port was not reached: {report[-400:]}"
        assert closed in report, f"the forbidden port was reached: {report[-400:]}"
        return f"console: port {OPEN_PORT} open, port {CLOSED_PORT} closed"

    def change(self) -> str:
        """A change of the template shows after a restart of the qube."""
        self.qvm("qvm-volume", "import", "tmpl:root", str(self.lab.image("two")))
        assert "root one" in self.console("work")
        self.qvm("qvm-kill", "work")
        assert "root two" in self.start("work")
        return "the running qube kept its root; after the restart it has the new one"

    def revert(self) -> str:
        """The template goes back to its former revision."""
        self.qvm("qvm-kill", "work")
        self.qvm("qvm-volume", "revert", "tmpl:root")
        assert "root one" in self.start("work")
        self.qvm("qvm-shutdown", "--wait", "work")
        assert self.state("work") == "Halted", self.state("work")
        return "after the revert the qube has the old root again; it shut down on request"

    def clone(self) -> str:
        """A qube with a full 2 GiB volume is cloned in an instant."""
        self.qvm("qvm-create", "--template", "tmpl", "--label", "green", "vault")
        data = self.lab.base / "data.img"
        with data.open("wb") as file:
            block = os.urandom(1 << 20)
            for _ in range(2048):
                file.write(block)
        self.qvm("qvm-volume", "import", "vault:private", str(data))
        data.unlink()
        before = self.lab.used_bytes()
        began = time.monotonic()
        self.qvm("qvm-clone", "vault", "vault-copy")
        seconds = time.monotonic() - began
        grown = self.lab.used_bytes() - before
        assert grown < 200 << 20, f"the clone took {grown >> 20} MiB of disk"
        return f"2 GiB cloned in {seconds:.2f} s with the tool, {grown >> 20} MiB of new disk"

    def disposable(self) -> str:
        """A disposable runs, ends by itself, and nothing of it is left."""
        self.qvm("qvm-create", "--template", "tmpl", "--label", "orange", "dvm")
        self.qvm("qvm-prefs", "dvm", "template_for_dispvms", "true")
        self.qvm("qvm-prefs", "dvm", "netvm", "none")
        self.qvm("qvm-prefs", "dvm", "kernelopts", "console=ttyS0 quiet panic=-1 bh.once")
        files = self.lab.files()
        name = self.qvm("qvm-run-disposable", "dvm").strip()
        self.report(name)
        deadline = time.monotonic() + 60
        while self.state(name):
            assert time.monotonic() < deadline, f"{name} is still there: {self.state(name)}"
            time.sleep(0.1)
        left = self.lab.files() - files
        assert not left, f"left behind: {sorted(left)}"
        return f"{name} ran, powered off, and left no file and no record"

    def crash(self) -> str:
        """SIGKILL of registry, then of storage, in the middle of a create."""
        outcomes = []
        for service, failpoint in (
            ("registry", "registry.commit.after_commit"),
            ("storage", "storage.ensure.before_rename"),
        ):
            files = self.lab.files()
            name = f"crash-{service}"
            self._arm(f"{failpoint}=kill")
            output = subprocess.run(
                [
                    tool("qvm-create"),
                    "--socket",
                    str(self.lab.root / "run/qubesd.sock"),
                    "--template",
                    "tmpl",
                    "--label",
                    "gray",
                    name,
                ],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert self._fired(), f"{failpoint} was not reached"
            there = self.state(name)
            new = self.lab.files() - files
            if there:
                assert output.returncode == 0, f"refused, yet {name} exists: {output.stderr}"
                assert new, f"{name} exists without files"
                outcomes.append(f"{service} killed: completed")
            else:
                assert output.returncode != 0, f"reported success, yet {name} does not exist"
                assert not new, f"undone, yet files are left: {sorted(new)}"
                outcomes.append(f"{service} killed: undone, nothing left")
        return "; ".join(outcomes)

    def _arm(self, text: str) -> None:
        path = self.lab.base / "fp/armed"
        fired = path.with_name("armed.fired")
        fired.write_text("")
        fired.chmod(0o666)
        new = path.with_name("new")
        new.write_text(text)
        new.chmod(0o666)
        new.rename(path)

    def _fired(self) -> bool:
        return bool((self.lab.base / "fp/armed.fired").read_text())

    def finish(self) -> str:
        """Everything stops; no guest, tap or namespace is left."""
        for line in self.qvm("qvm-ls", "--raw-data", "--fields", "NAME,STATE").splitlines():
            name, _, state = line.partition("|")
            if name != "dom0" and state != "Halted":
                self.qvm("qvm-kill", name)
        command(tool("bulkhead"), "stop", "--root", str(self.lab.root))
        assert self.launcher is not None
        self.launcher.wait(timeout=60)
        return "stopped"

    # ---- the whole

    def run(self) -> bool:
        """All steps; True when every one held."""
        try:
            self.step("start everything on a directory of its own", self.begin, foundation=True)
            self.step(
                "add a kernel, import a root image as a template", self.template, foundation=True
            )
            self.step("create a network qube and an app qube", self.qubes, foundation=True)
            self.step("allow one port, drop the rest", self.rules)
            self.step("boot the qube, watch its console", self.boot)
            self.step("change the template, restart, see the change", self.change)
            self.step("revert the template, restart, shut down", self.revert)
            self.step("clone a qube with a 2 GiB volume", self.clone)
            self.step("run a disposable", self.disposable)
            self.step("kill -9 in the middle of a create", self.crash)
            self.step("stop", self.finish)
        except LabError as error:
            print(f"demo: {error}", file=sys.stderr)
        return all(result.held for result in self.results) and len(self.results) == 11

    def close(self) -> None:
        """End the launcher if a step did not, and say where the logs were."""
        if self.launcher is not None and self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGTERM)
            try:
                self.launcher.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.launcher.kill()
                self.launcher.wait()
        if self.launcher is not None and self.launcher.stdout is not None:
            self.launcher.stdout.close()

    def table(self) -> None:
        """The closing table."""
        print(f"\n{'STEP':<48} {'SECONDS':>8}  RESULT")
        for result in self.results:
            print(f"{result.title:<48} {result.seconds:>8.2f}  {'ok' if result.held else 'FAILED'}")
        print(f"{'in all':<48} {sum(r.seconds for r in self.results):>8.2f}")

    def show_logs(self) -> None:
        """The ends of the logs, when something failed."""
        for path in sorted((self.lab.root / "var/log/qubes").glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-15:]
            print(f"==> {path.name}", *tail, sep="\n", file=sys.stderr)


def main() -> int:
    """Run the story; exit status 0 only if every step held."""
    if os.getuid() != 0:
        print("demo: run it as root: it mounts a file system and makes namespaces", file=sys.stderr)
        return 1
    missing = tools_missing(TOOLS)
    if missing:
        print(f"demo: not installed: {', '.join(missing)}; run: make setup", file=sys.stderr)
        return 1
    lab = Lab()
    story = Story(lab)
    held = False
    try:
        held = story.run()
    finally:
        if not held:
            story.show_logs()
        story.close()
        lab.close()
    story.table()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
