"""A small system for tests of the model: the start state and a few qubes in one view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from bulkhead.model.defaults import class_volumes, new_store, new_volume
from bulkhead.model.records import (
    Change,
    DeviceFact,
    FactPut,
    HostFact,
    KernelFact,
    Phase,
    PowerFact,
    Qube,
    QubePut,
    Run,
    SystemPut,
)
from bulkhead.model.view import View

KERNEL = "6.12.1-lab"


class World:
    """A view with shorthands; qubes get numbers in the order they are added."""

    def __init__(self) -> None:
        self.view = View()
        self.view.apply_all(new_store("/var/lib/qubes", True))
        self.fact(HostFact("sim", memory_kib=16384 * 1024, cpus=4, dom0_maxmem_mib=4096))
        self.fact(KernelFact(KERNEL, has_initramfs=True, has_modules=True))
        self.system("default_kernel", KERNEL)
        self._next = 1

    def put(self, change: Change) -> None:
        self.view.apply(change)

    def fact(self, fact: Any) -> None:
        self.view.apply(FactPut(fact))

    def system(self, name: str, value: str) -> None:
        self.view.apply(SystemPut(name, value))

    def add(
        self,
        name: str,
        klass: str = "AppVM",
        *,
        qid: int | None = None,
        features: dict[str, str] | None = None,
        tags: frozenset[str] = frozenset(),
        **properties: str,
    ) -> Qube:
        """A halted qube with its class's volumes, and a template where it needs one."""
        number = self._next if qid is None else qid
        self._next = number + 1
        texts = {"label": "red", **properties}
        if klass == "AppVM":
            texts.setdefault("template", "tmpl")
        qube = Qube(
            uuid=str(uuid5(NAMESPACE_OID, name)),
            name=name,
            qid=number,
            klass=klass,
            properties=texts,
            features=features or {},
            tags=tags,
        )
        volumes = tuple(new_volume(self.view, qube, spec) for spec in class_volumes(klass))
        qube = replace(qube, volumes=volumes)
        self.view.apply(QubePut(qube))
        return qube

    def get(self, name: str) -> Qube:
        qube = self.view.qube(name)
        assert qube is not None
        return qube

    def change(self, name: str, **fields: Any) -> Qube:
        """Replace fields of a record."""
        qube = replace(self.get(name), **fields)
        self.view.apply(QubePut(qube))
        return qube

    def set(self, name: str, **properties: str) -> Qube:
        """Store property texts."""
        return self.change(name, properties={**self.get(name).properties, **properties})

    def feature(self, name: str, **features: str) -> Qube:
        """Store features; "__" in a keyword stands for ".", "_" for "-"."""
        named = {k.replace("__", ".").replace("_", "-"): v for k, v in features.items()}
        return self.change(name, features={**self.get(name).features, **named})

    def run(self, name: str, power: str = "running", phase: Phase = Phase.UP, **more: Any) -> Qube:
        """Make the qube run in a boot called "b1"."""
        qube = self.change(name, run=Run(phase, "b1"))
        self.fact(PowerFact(qube.uuid, "b1", 1, power, **more))
        return qube

    def device(self, backend: str, port: str, **more: Any) -> None:
        self.fact(DeviceFact(self.get(backend).uuid, "pci", port, **more))


def recorded_world() -> World:
    """The state in which the golden property replies were recorded."""
    world = World()
    world.add("tmpl", "TemplateVM", label="black")
    world.system("default_template", "tmpl")
    world.add("work", "AppVM")
    world.add("remote1", "RemoteVM", qid=6, label="orange")
    return world


def networked_world() -> World:
    """tmpl, sys-net (a provider), work behind it and dvm (a disposable template)."""
    world = World()
    world.add("tmpl", "TemplateVM", label="black")
    world.add("sys-net", provides_network="True", netvm="")
    world.add("work", netvm="sys-net")
    world.add("dvm", template_for_dispvms="True")
    return world
