"""Resuming event streams of a running instance, with both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice

import pytest

from clients.admin import AdminClient, AsyncAdminClient, Event
from tests.instance import Instance, running

TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    with running() as made:
        yield made


def _tags(instance: Instance, *names: str) -> list[str]:
    for name in names:
        instance.ok("admin.vm.tag.Set", "dom0", name)
    return [f"domain-tag-add:{name}" for name in names]


async def _take(instance: Instance, count: int, resume: str) -> list[Event]:
    client = AsyncAdminClient(instance.socket)
    found: list[Event] = []
    async with asyncio.timeout(TIMEOUT_S):
        async for event in client.events(resume=resume):
            found.append(event)
            if len(found) == count:
                break
    return found


def test_a_stream_goes_on_where_it_was_left(instance: Instance) -> None:
    client = AdminClient(instance.socket, timeout=TIMEOUT_S)
    stream = client.events(resume="")
    first = next(stream)
    assert first.name == "connection-established"
    wanted = _tags(instance, "r-one", "r-two")
    seen = list(islice(stream, 2))
    assert [event.name for event in seen] == wanted
    stream.close()  # type: ignore[attr-defined]
    wanted += _tags(instance, "r-three")
    for position, left in ((first, wanted), (seen[0], wanted[1:]), (seen[1], wanted[2:])):
        again = list(islice(client.events(resume=position.values["position"]), 1 + len(left)))
        assert [event.name for event in again[1:]] == left
    later = asyncio.run(_take(instance, 3, seen[0].values["position"]))
    assert [event.name for event in later[1:]] == wanted[1:]


def test_restarts_are_survived_or_said(instance: Instance) -> None:
    client = AdminClient(instance.socket, timeout=TIMEOUT_S)
    stream = client.events(resume="")
    position = next(stream).values["position"]
    stream.close()  # type: ignore[attr-defined]
    # Another adminapi does not know the past: if the sequence moved meanwhile, it says so.
    old = instance.kill("adminapi")
    instance.wait_restarted("adminapi", old)
    instance.wait_ready()
    stream = client.events(resume=position)
    assert next(stream).name == "connection-established"
    _tags(instance, "r-after-adminapi")
    names = [event.name for event in islice(stream, 1)]
    if names == ["events-lost"]:
        names = [event.name for event in islice(stream, 1)]
    assert names == ["domain-tag-add:r-after-adminapi"]
    # Another start of the registry: said in the open stream and to whoever comes back.
    old = instance.kill("registry")
    instance.wait_restarted("registry", old)
    assert next(event for event in stream if event.name == "events-lost")
    stream.close()  # type: ignore[attr-defined]
    names = [event.name for event in islice(client.events(resume=position), 2)]
    assert names == ["connection-established", "events-lost"]


def test_a_malformed_position_is_refused(instance: Instance) -> None:
    reply = instance.call("bulkhead.Events", "dom0", "nonsense")
    assert (reply.kind, reply.exception) == ("exc", "ProtocolError")
