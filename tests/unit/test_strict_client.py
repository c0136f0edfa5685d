"""The strict client refuses what the public client would stumble over."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes import strict_client as strict
from tests.fakes.strict_client import Choke, StrictClient

DEVICE = (
    "1-1:1234:5678:ABC:u080650 device_id='1234:5678:ABC:u080650' port_id='1-1' "
    "devclass='testclass' backend_domain='sys-net' vendor='ACME' product='O\\'Brien stick' "
    "interfaces='u080650'\n"
)
UNKNOWN = (
    "1-2:0000:0000::?****** device_id='0000:0000::?******' port_id='1-2' devclass='testclass' "
    "backend_domain='sys-net'  interfaces='?******'\n"
)
ASSIGNED = (
    "sys-net+1-2:* device_id='*' port_id='1-2' devclass='testclass' backend_domain='sys-net' "
    "mode='required' frontend_domain='work'\n"
)
VOLUME = (
    "pool=varlibqubes\nvid=appvms/work/root\nsize=10737418240\nusage=0\nrw=True\n"
    "source=vm-templates/fedora-41/root\npath=/p\nsave_on_stop=False\nsnap_on_start=True\n"
    "revisions_to_keep=0\nephemeral=False\nis_outdated=False\n"
)
UUID = "01234567-89ab-cdef-0123-456789abcdef"


def _devices(text: str) -> object:
    return strict.devices(text, "testclass", "sys-net")


def _assignments(text: str) -> object:
    return strict.assignments(text, "testclass", "work")


def test_documented_samples_are_read() -> None:
    found = strict.devices(DEVICE + UNKNOWN, "testclass", "sys-net")
    assert found["1-1"]["product"] == "O'Brien stick"
    assert strict.assignments(ASSIGNED, "testclass", "work")["sys-net+1-2:*"]["mode"] == "required"
    assert strict.volume_info(VOLUME)["size"] == 10737418240
    assert strict.property_of("default=True type=vm sys-net").value == "sys-net"
    assert strict.property_of("default=True type=vm ").value is None
    assert strict.property_of("default=True type=str ").value == ""
    with pytest.raises(AttributeError):
        _ = strict.property_of("default=True type=int ").value
    assert strict.rules_of(
        "action=accept dst4=1.2.3.4/32 proto=tcp dstports=80-80 comment=hello world\naction=drop\n"
    ) == [
        {
            "action": "accept",
            "dst4": "1.2.3.4/32",
            "proto": "tcp",
            "dstports": "80-80",
            "comment": "hello world",
        },
        {"action": "drop"},
    ]
    assert strict.unescaped("a\\\\nb\\nc") == "a\\nb\nc"
    state = strict.current_state("mem=0 mem_static_max=0 cputime=0 power_state=Halted")
    assert state.power_state == "Halted"
    assert strict.pool_info("dir_path=/x\ndriver=linux-kernel\nname=k\nincluded_in=v\n")
    assert strict.device_argument("dom0+sda:0:1:?******") == "dom0+sda+0+1+_______"


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (strict.lines, "a"),
        (strict.lines, "a\n\nb\n"),
        (strict.pairs, "a\n"),
        (strict.property_of, "default=True type=vm"),
        (strict.property_of, "default=1 type=vm x"),
        (strict.property_of, "default=True type=list x"),
        (strict.property_of, "default=True type=bool true"),
        (strict.property_of, "default=True type=int 2.0"),
        (strict.properties_of, "name default=True type=str a\\tb\n"),
        (strict.properties_of, ""),
        (strict.listed, f"work state=Halted uuid={UUID}\n"),
        (strict.listed, f"work class=AppVM state=Off uuid={UUID}\n"),
        (strict.listed, f"work class=AppVM state=Halted uuid={UUID} x\n"),
        (strict.current_state, "mem=0 mem_static_max=0 cputime=0 power_state=Halted\n"),
        (strict.volume_info, VOLUME.replace("rw=True", "rw=1")),
        (strict.volume_info, VOLUME.replace("size=10737418240", "size=")),
        (strict.volume_info, VOLUME.replace("ephemeral=False\n", "")),
        (strict.pool_info, "dir_path=/x\nname=k\n"),
        (strict.pool_info, "driver=file\ndir_path=/x\n"),
        (strict.serialised, "a='1' b='2"),
        (strict.serialised, "a=1"),
        (strict.serialised, "a='it's'"),
        (strict.serialised, "a='\n'"),
        (_devices, DEVICE.replace("port_id='1-1'", "port_id='1-3'")),
        (_devices, DEVICE.replace("1-1:1234", "1-1:1235")),
        (_devices, DEVICE.replace("'sys-net'", "'other'")),
        (_devices, DEVICE.replace(" interfaces='u080650'", "")),
        (_devices, UNKNOWN + DEVICE),
        (_assignments, ASSIGNED.replace("required", "mandatory")),
        (_assignments, ASSIGNED.replace("'work'", "'other'")),
        (strict.rules_of, ""),
        (strict.rules_of, "proto=tcp\n"),
        (strict.rules_of, "action=accept dstname=a.b\n"),
        (strict.rules_of, "action=accept proto=tcp dstports=80\n"),
        (strict.rules_of, "action=accept  proto=tcp\n"),
    ],
)
def test_what_is_malformed_chokes(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(Choke):
        read(text)


@pytest.mark.parametrize(
    "answer",
    [
        b"2\0QubesException\0\x00100% sure\0",
        b"2\0QubesException\0\0a %s\0",
        b"2\0QubesException\0\0%d\0x\0",
        b"2\0QubesInvalidTagError\0\0%\0",
        b"2\0QubesException\0\0text",
        b"2\0QubesException\0\0\0",
        b"3\0",
        b"0",
        b"0\0\xff",
    ],
)
def test_exceptions_and_replies_that_choke(answer: bytes) -> None:
    with pytest.raises(Choke):
        StrictClient.read(answer)


@pytest.mark.parametrize(
    ("answer", "parents", "text"),
    [
        (b"2\0QubesValueError\0\x00100%% sure\0", (ValueError, strict.QubesException), "100% sure"),
        (b"2\0QubesNoSuchPropertyError\0\0x\0", (AttributeError,), "x"),
        (b"2\0QubesFeatureNotFoundError\0\0x\0", (KeyError,), "x"),
        (b"2\0QubesException\0\0%s has %d\0work\x007\0", (strict.QubesException,), "work has 7"),
        (b"2\0ProtocolError\0\x00100% sure\0", (AssertionError,), "100% sure"),
        (b"2\0NewError\0\0x\0", (strict.QubesException,), "x"),
        (b"2\0ZeroDivisionError\0\0x\0", (ArithmeticError,), "x"),
        (b"", (strict.AccessError,), "no answer"),
    ],
)
def test_exceptions_are_of_the_clients_kinds(
    answer: bytes, parents: tuple[type[Exception], ...], text: str
) -> None:
    for parent in parents:
        with pytest.raises(parent) as error:
            StrictClient.read(answer)
        assert error.value.args == (text,)


HELLO = b"1\0\0connection-established\0\0"


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        (b"1\0work\0property-set:netvm\0newvalue\0x\0\0", Choke),
        (b"1\0\0domain-add\0\0", Choke),
        (b"1\0\0domain-start\0\0", Choke),
        (b"1\0work\0domain-add\0vm\0work\0\0", Choke),
        (b"1\0work\0device-attach:block\0port\0dom0:sda\0\0", Choke),
        (b"9\0", Choke),
        (b"2\0QubesException\0\x00100%\0", Choke),
        (b"2\0QubesException\0\0slow\0", strict.StreamBroken),
        (b"1\0work\0domain-st", strict.StreamBroken),
        (b"", strict.StreamBroken),
    ],
)
def test_streams(tmp_path: Path, sent: bytes, wanted: type[Exception]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                while peer.recv(4096):
                    pass
                peer.sendall(HELLO + sent)

        thread = threading.Thread(target=serve)
        thread.start()
        with strict.Stream(tmp_path / "s") as stream:
            assert stream.next().name == "connection-established"
            with pytest.raises(wanted):
                stream.next()
        thread.join()
