"""A network qube with more clients than its queue has places."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.domains.qube_queue import WAITERS
from services.domains.simhv.client import SimControl
from tests.instance import running
from tests.integration.adminapi_world import KERNEL, add_kernel

pytestmark = pytest.mark.integration

CLIENTS = [f"client{number}" for number in range(WAITERS + 4)]


def test_all_clients_are_brought_up_to_date_at_once() -> None:
    with running() as instance, SimControl.of(instance.root) as sim:

        def ok(method: str, dest: str = "dom0", arg: str = "", payload: str = "") -> str:
            return instance.ok(method, dest, arg, payload.encode())

        def states() -> set[str]:
            rows = [json.loads(line) for line in ok("bulkhead.op.List").splitlines()]
            return {row["state"] for row in rows if row["kind"] == "APPLY"}

        def backends() -> set[tuple[str, bool]]:
            boots = {domain["uuid"]: domain["boot_id"] for domain in sim.domains()}
            nics = [nic for uuid in uuids for nic in sim.guest(uuid)["interfaces"].values()]
            assert len(nics) == len(CLIENTS)
            return {(n["backend"], n["backend_boot"] == boots[n["backend_uuid"]]) for n in nics}

        add_kernel(instance)
        ok("admin.property.Set", arg="default_kernel", payload=KERNEL)
        ok("admin.vm.Create.TemplateVM", payload="name=tmpl label=black")
        for name in ("net", "net2", *CLIENTS):
            ok("admin.vm.Create.AppVM", arg="tmpl", payload=f"name={name} label=red")
        for name in ("net", "net2"):
            ok("admin.vm.property.Set", name, "provides_network", "True")
            ok("admin.vm.Start", name)
        for name in CLIENTS:
            ok("admin.vm.property.Set", name, "memory", "64")
            ok("admin.vm.property.Set", name, "netvm", "net")
            ok("admin.vm.Start", name)
        uuids = [ok("admin.vm.property.Get", n, "uuid").rpartition(" ")[2] for n in CLIENTS]

        ok("admin.vm.Kill", "net")
        ok("admin.vm.Start", "net")
        instance.until(lambda: states() == {"succeeded"}, 30, "clients of the new boot")
        assert backends() == {("net", True)}

        with ThreadPoolExecutor(len(CLIENTS)) as pool:
            list(
                pool.map(
                    lambda name: ok("admin.vm.property.Set", name, "netvm", "net2"),
                    CLIENTS,
                )
            )
        assert states() == {"succeeded"}
        assert backends() == {("net2", True)}
