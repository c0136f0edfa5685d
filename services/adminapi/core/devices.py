"""Device calls: from arguments and payloads to assignments, from facts to lines.

Owns what a device call names and how its reply is ordered. Must not know the text's
grammar (bulkhead.model.grammar) nor whether a device may be assigned. Invariant: a line
is always readable text, whatever a guest wrote into a device's description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from bulkhead.model.grammar import (
    ANY,
    DeviceName,
    format_assignment,
    format_device,
    parse_device_argument,
)
from bulkhead.model.grammar import (
    parse_assignment as parse_assignment_text,
)
from bulkhead.model.records import Assignment, DeviceFact, Qube
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View

_PORT_OWNER_SEPARATOR = "+"


def parse_argument(view: View, devclass: str, untrusted_arg: str) -> Assignment:
    """`BACKEND+PORT[+DEVID]` as an identity (mode "manual", no options).

    Refusal INVALID_DEVICE for a malformed argument, QUBE_NOT_FOUND for an unknown backend.
    """
    name = parse_device_argument(untrusted_arg)
    if name.backend != ANY and view.qube(name.backend) is None:
        raise Refusal("QUBE_NOT_FOUND", "no qube is called as the device's backend")
    return Assignment(devclass, name.backend, name.port, name.device_id, mode="manual")


def parse_assignment(identity: Assignment, frontend: Qube, untrusted_payload: bytes) -> Assignment:
    """An assignment from a payload; what the payload leaves out comes from `identity`.

    Refusal PROTOCOL or INVALID_DEVICE for a malformed payload or one that contradicts the
    argument, or for an unknown mode.
    """
    try:
        untrusted_text = untrusted_payload.decode("ascii")
    except UnicodeDecodeError as error:
        raise Refusal("PROTOCOL", "device data are not ASCII") from error
    named = DeviceName(identity.backend, identity.port, identity.identity)
    text = parse_assignment_text(untrusted_text, identity.devclass, named, frontend.name)
    device = text.device
    return Assignment(
        identity.devclass,
        device.backend,
        device.port,
        device.device_id,
        text.mode,
        text.options,
        frontend_told=bool(text.frontend),
    )


def _device_line(view: View, backend: Qube, fact: DeviceFact, shown: Callable[[Qube], bool]) -> str:
    frontend = view.by_uuid(fact.attached_to) if fact.attached_to else None
    if frontend is not None and not shown(frontend):
        frontend = None
    text = format_device(
        fact.devclass,
        DeviceName(backend.name, fact.port, fact.device_id),
        descriptions=fact.fields,
        attachment=frontend.name if frontend is not None else "",
        interfaces=fact.interfaces,
        parent_port=fact.parent_port,
        parent_devclass=fact.parent_devclass,
        data=fact.data,
    )
    return f"{fact.port}:{fact.device_id} {text}\n"


def _assignment_line(device: Assignment, frontend: Qube) -> str:
    name = DeviceName(device.backend, device.port, device.identity)
    user = frontend.name if device.frontend_told else ""
    try:
        text = format_assignment(device.devclass, name, device.mode, device.options, user)
    except Refusal:
        # Options that were stored by other means: the assignment still has to be seen.
        text = format_assignment(device.devclass, name, device.mode, {}, user)
    return f"{device.backend}{_PORT_OWNER_SEPARATOR}{device.port}:{device.identity} {text}\n"


def _sorted_lines(lines: Iterable[str]) -> str:
    return "".join(sorted(lines, key=lambda line: line.split(" ", 1)[0]))


def _anyone(_frontend: Qube) -> bool:
    return True


def available(
    view: View,
    backend: Qube,
    devclass: str,
    port: str,
    shown: Callable[[Qube], bool] = _anyone,
) -> str:
    """Lines of the devices that a backend offers now; port "" = all of them.

    shown: whether to say that a device is attached to that qube.
    """
    return _sorted_lines(
        _device_line(view, backend, fact, shown)
        for fact in view.devices_of(backend.uuid)
        if fact.devclass == devclass and port in ("", fact.port)
    )


def split_port_argument(untrusted_arg: str) -> tuple[str, str] | None:
    """`BACKEND+PORT` as a pair, None for no argument. Refusal INVALID_DEVICE without "+"."""
    if not untrusted_arg:
        return None
    backend, plus, port = untrusted_arg.partition(_PORT_OWNER_SEPARATOR)
    if not plus:
        raise Refusal("INVALID_DEVICE", "a device is written BACKEND+PORT")
    return backend, port


def assigned(frontend: Qube, devclass: str, only: tuple[str, str] | None) -> str:
    """Lines of a qube's assignments of one class."""
    return _sorted_lines(
        _assignment_line(device, frontend)
        for device in frontend.devices
        if device.devclass == devclass and only in (None, (device.backend, device.port))
    )


def attached(view: View, frontend: Qube, devclass: str, only: tuple[str, str] | None) -> str:
    """Lines of what is attached to a qube now; an identical assignment gives mode and options."""
    declared: Mapping[tuple[str, str, str], Assignment] = {
        (d.backend, d.port, d.identity): d for d in frontend.devices if d.devclass == devclass
    }
    lines = []
    for fact in view.devices_attached_to(frontend.uuid):
        backend = view.by_uuid(fact.backend_uuid)
        if fact.devclass != devclass or backend is None:
            continue
        if only not in (None, (backend.name, fact.port)):
            continue
        device = declared.get((backend.name, fact.port, fact.device_id))
        if device is None:
            device = Assignment(
                devclass, backend.name, fact.port, fact.device_id, "manual", fact.attach_options
            )
        lines.append(_assignment_line(device, frontend))
    return _sorted_lines(lines)
