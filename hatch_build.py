"""Build hook: turns proto/ into bulkhead/api/*_pb2.py(i) and clients/bus/_generated.

Owns nothing at run time. The output is not committed; every build or editable
install makes it anew from the .proto files, which are the only source.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs protoc, then the client generator, before every build."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Generate the modules; a protoc failure fails the build with its own message."""
        root = Path(self.root)
        protos = sorted(str(p.relative_to(root / "proto")) for p in root.glob("proto/**/*.proto"))
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                "-I",
                "proto",
                "--python_out=.",
                "--pyi_out=.",
                *protos,
            ],
            cwd=root,
            check=True,
        )
        generator = root / "clients" / "bus" / "generate.py"
        if generator.exists():
            subprocess.run([sys.executable, str(generator)], cwd=root, check=True)
