"""Puts a checkout and its private environment in place as a service of the system.

    .venv/bin/python -m deploy.install --destdir DIR --prefix /opt/bulkhead

Owns the installed tree. Must not start anything, make accounts or touch a store.
Invariant: nothing outside DESTDIR is written, no installed file names DESTDIR or the
checkout, and a second run gives the same tree.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from bulkhead.config import SERVICES
from clients.cli.instance import accounts
from deploy import completion, services

SOURCE = Path(__file__).resolve().parents[1]
PACKAGES = ("bulkhead", "services", "clients")
# Bindings to the system's own libraries, which no package index has for us.
SYSTEM_MODULES = ("libvirt*.py", "libvirtmod*.so", "nftables")


def scripts() -> dict[str, str]:
    """Name of each command -> its entry point "module:function"."""
    data = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    found: dict[str, str] = data["project"]["scripts"]
    return found


class Installation:
    """One installed tree. prefix: absolute, as it will be when DESTDIR is the root."""

    def __init__(self, destdir: Path, prefix: Path) -> None:
        if not prefix.is_absolute():
            raise ValueError(f"PREFIX={prefix} is not absolute")
        self.destdir = destdir.absolute()
        self.prefix = prefix
        self.environment = prefix / ".venv"
        self.python = self.environment / "bin/python"
        self._version = f"python{sys.version_info[0]}.{sys.version_info[1]}"

    def run(self) -> None:
        """Everything."""
        self._environment()
        self._commands()
        self._units()
        self._qrexec()
        self._text("usr/lib/sysusers.d/bulkhead.conf", sysusers())
        self._text("usr/lib/tmpfiles.d/bulkhead.conf", TMPFILES)
        self._text("usr/share/polkit-1/rules.d/50-bulkhead.rules", POLKIT)
        for name, entry in scripts().items():
            text = completion.script(name, completion.parser_of(entry))
            self._text(f"usr/share/bash-completion/completions/{name}", text)

    # ---- pieces

    def _environment(self) -> None:
        """A private environment with this one's packages; it is ours alone, so made anew."""
        place = self._below(self.environment)
        if place.exists():
            shutil.rmtree(place)
        site = place / "lib" / self._version / "site-packages"
        site.mkdir(parents=True)
        base = Path(sys.base_prefix) / "bin"
        interpreter = base / self._version
        (place / "bin").mkdir()
        (place / "bin/python").symlink_to(interpreter)
        (place / "bin/python3").symlink_to("python")
        version = ".".join(str(n) for n in sys.version_info[:3])
        (place / "pyvenv.cfg").write_text(
            f"home = {base}\ninclude-system-site-packages = false\nversion = {version}\n"
        )
        for name in PACKAGES:
            shutil.copytree(
                SOURCE / name, site / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyi")
            )
        for name in runtime_distributions("qubes-bulkhead"):
            _copy_distribution(name, site)
        here = Path(str(importlib.metadata.distribution("pyzmq").locate_file("")))
        for pattern in SYSTEM_MODULES:
            for path in here.glob(pattern):
                (site / path.name).symlink_to(path.resolve())

    def _commands(self) -> None:
        for name, entry in scripts().items():
            module, _, function = entry.partition(":")
            self._text(
                self.environment / "bin" / name,
                f"#!{self.python}\nimport sys\n\nfrom {module} import {function}\n\n"
                f"sys.exit({function}())\n",
                mode=0o755,
            )
            self._link(Path("usr/bin") / name, str(self.environment / "bin" / name))

    def _units(self) -> None:
        for unit in sorted((SOURCE / "deploy/systemd").glob("*.service")):
            self._text(
                f"usr/lib/systemd/system/{unit.name}",
                unit.read_text().replace("/opt/bulkhead/.venv", str(self.environment)),
            )

    def _qrexec(self) -> None:
        for name in services.links():
            self._link(Path("etc/qubes-rpc") / name, services.SOCKET)
        for name, text in services.programs().items():
            self._text(
                Path("etc/qubes-rpc") / name,
                text.replace("@PYTHON@", str(self.python)),
                mode=0o755,
            )

    # ---- files

    def _below(self, path: Path | str) -> Path:
        return self.destdir / str(path).lstrip("/")

    def _text(self, path: Path | str, text: str, *, mode: int = 0o644) -> None:
        place = self._below(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)  # never through a link that stood there
        place.write_text(text)
        place.chmod(mode)

    def _link(self, path: Path, target: str) -> None:
        place = self._below(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target)


def runtime_distributions(name: str) -> list[str]:
    """What the distribution needs to run, and what that needs; without itself."""
    found: list[str] = []
    waiting = [name]
    while waiting:
        for line in importlib.metadata.requires(waiting.pop()) or ():
            requirement, _, marker = line.partition(";")
            # Extras are for development, the other markers for other systems.
            if marker.strip():
                continue
            word = _head(requirement)
            if word not in found:
                found.append(word)
                waiting.append(word)
    return found


def _head(requirement: str) -> str:
    """The name that a requirement begins with."""
    for at, character in enumerate(requirement):
        if not (character.isalnum() or character in "-_."):
            return requirement[:at]
    return requirement


def _copy_distribution(name: str, site: Path) -> None:
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        if ".." in file.parts or "__pycache__" in file.parts:
            continue  # commands of theirs, which nobody here runs
        source = Path(str(distribution.locate_file(file)))
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def sysusers() -> str:
    """sysusers.d: the users and groups of the services, from the accounts' own table."""
    lines = [f"g {accounts.CLIENT_GROUP} -", f"g {accounts.DISK_GROUP} -"]
    for service in SERVICES:
        name = accounts.PREFIX + service
        lines.append(f"g {name} -")
        if service not in accounts.ROOT_SERVICES:
            lines.append(f'u {name} - "Bulkhead {service}" /nonexistent /usr/sbin/nologin')
    return "\n".join(lines) + "\n"


TMPFILES = """\
d /run/bulkhead 0755 root root -
d /run/qubes 0755 root root -
d /var/log/qubes 0755 root root -
"""

# The machine's libvirtd, as Xen has one, asks polkit about every user but root.
POLKIT = f"""\
polkit.addRule(function (action, subject) {{
  if (action.id == "org.libvirt.unix.manage" && subject.user == "{accounts.PREFIX}domains") {{
    return polkit.Result.YES;
  }}
}});
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="install", description=__doc__.splitlines()[0])
    parser.add_argument("--destdir", type=Path, default=Path("/"), metavar="DIR")
    parser.add_argument("--prefix", type=Path, default=Path("/opt/bulkhead"), metavar="DIR")
    args = parser.parse_args(argv)
    os.umask(0o022)
    Installation(args.destdir, args.prefix).run()
    print(f"installed below {args.destdir.absolute()}; commands are in /usr/bin")
    return 0


if __name__ == "__main__":
    sys.exit(main())
