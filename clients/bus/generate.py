"""Writes the typed clients of the bus services from their descriptors.

Owns clients/bus/_generated/. Must not import anything but the standard library and
protobuf, nor the rest of Bulkhead: the build runs it in an environment that has nothing
else, after protoc. Invariant: one module per service, the same bytes for the same protos.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROTOS = ROOT / "proto" / "bulkhead" / "api"

_HEADER = '''"""Typed client of the bus service {service}; made by clients/bus/generate.py."""

from __future__ import annotations

from bulkhead.api import {modules}
from bulkhead.bus.client import CallContext, Channel


class {service}Client:
    """Calls to {full_name}.

    Every method takes a timeout in seconds (None = the method's own limit) and a
    context, returns the reply message and raises bulkhead.bus.errors.BusError.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
'''

_METHOD = '''
    async def {snake}(
        self,
        request: {request},
        *,
        timeout: float | None = None,
        context: CallContext | None = None,
    ) -> {reply}:
        """{full_name}; for {callers}."""
        return await self.channel.call(
            "{full_name}",
            request,
            {reply},
            timeout=timeout,
            context=context,
        )
'''


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _type(descriptor: object) -> tuple[str, str]:
    """("storage_pb2", "storage_pb2.EnsureRequest") of a message descriptor."""
    module = Path(descriptor.file.name).stem + "_pb2"  # type: ignore[attr-defined]
    name = descriptor.full_name.removeprefix("bulkhead.api.")  # type: ignore[attr-defined]
    return module, f"{module}.{name}"


def main() -> None:
    """Generate every client anew; removes those of services that are gone."""
    sys.path.insert(0, str(ROOT))
    options = importlib.import_module("bulkhead.api.options_pb2")
    target = HERE / "_generated"
    target.mkdir(exist_ok=True)
    written = {"__init__.py"}
    exports = []
    for proto in sorted(PROTOS.glob("*.proto")):
        module = importlib.import_module(f"bulkhead.api.{proto.stem}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            modules: set[str] = set()
            methods = []
            for method in service.methods:
                (in_module, request), (out_module, reply) = map(
                    _type, (method.input_type, method.output_type)
                )
                modules |= {in_module, out_module}
                access = method.GetOptions().Extensions[options.access]
                methods.append(
                    _METHOD.format(
                        snake=_snake(method.name),
                        request=request,
                        reply=reply,
                        full_name=method.full_name,
                        callers=", ".join(access.callers),
                    )
                )
            text = _HEADER.format(
                service=service.name,
                full_name=service.full_name,
                modules=", ".join(sorted(modules)),
            )
            name = _snake(service.name)
            _write(target / f"{name}.py", text + "".join(methods))
            written.add(f"{name}.py")
            exports.append((name, f"{service.name}Client"))
    lines = ['"""Typed clients; made by clients/bus/generate.py."""', ""]
    lines += [f"from clients.bus._generated.{name} import {client}" for name, client in exports]
    lines += ["", "__all__ = ["] + [f'    "{client}",' for _, client in exports] + ["]", ""]
    _write(target / "__init__.py", "\n".join(lines))
    for stale in target.glob("*.py"):
        if stale.name not in written:
            stale.unlink()


def _write(path: Path, text: str) -> None:
    """Write only what changed, so that a build does not make everything newer."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    main()
