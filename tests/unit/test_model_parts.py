"""Addresses, labels, features, memory, volumes, events: the small parts of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model import addresses, events, labels
from bulkhead.model.defaults import (
    GIB,
    class_volumes,
    kernel_vid,
    new_store,
    new_vid,
    new_volume,
    wants_kernel_volume,
)
from bulkhead.model.features import (
    LOOKUPS,
    check_feature,
    exported_keys,
    feature,
    guest_keys_of,
    is_exported,
    truthy,
)
from bulkhead.model.invariants import check
from bulkhead.model.memory import boots_own_kernel, bytes_needed, hotplug_usable, stubdom_bytes
from bulkhead.model.properties import CLASSES
from bulkhead.model.records import (
    Assignment,
    HostFact,
    KernelFact,
    Label,
    LabelPut,
    Operation,
    OperationPut,
    OperationState,
    Phase,
    Pool,
    QubePut,
    RecordState,
    Run,
    SystemPut,
    WireEvent,
)
from bulkhead.model.refusal import Refusal
from bulkhead.model.view import View
from tests.unit.model_world import KERNEL, World, networked_world, recorded_world

# ---- addresses


@pytest.mark.parametrize(
    ("number", "tail"),
    [
        (0, "0.0"), (3, "0.3"), (254, "0.254"), (255, "1.1"), (256, "1.2"), (509, "2.1"),
        (4711, "18.139"), (9999, "39.93"), (10000, "39.94"),
    ],
)  # fmt: skip
def test_ipv4_vectors(number: int, tail: str) -> None:
    assert addresses.ipv4(number, disposable=False) == f"10.137.{tail}"
    assert addresses.ipv4(number, disposable=True) == f"10.138.{tail}"


def test_ipv6_vectors() -> None:
    assert addresses.ipv6(3, disposable=False) == "fd09:24ef:4179::a89:3"
    assert addresses.ipv6(4711, disposable=True) == "fd09:24ef:4179::a8a:1267"


def test_addresses_are_unique() -> None:
    for make in (addresses.ipv4, addresses.ipv6):
        found = {make(n, disposable=d) for n in range(10001) for d in (False, True)}
        assert len(found) == 2 * 10001


# ---- labels


def test_labels() -> None:
    world = World()
    assert labels.find_label(world.view, "red").index == 1
    assert labels.find_label(world.view, "8").name == "black"
    assert labels.next_index(world.view) == 9
    assert labels.next_index(View()) == 9
    world.put(LabelPut(Label(12, "7", "0x010203")))
    assert labels.find_label(world.view, "7").index == 12  # a name before a number
    assert labels.next_index(world.view) == 13
    # Calls know names and indexes; a property's value "label-N" too, before any name.
    world.put(LabelPut(Label(13, "label-3", "0x010203")))
    assert labels.find_label(world.view, "label-3").index == 13
    assert labels.label_of_value(world.view, "label-3").name == "yellow"
    assert labels.label_of_value(world.view, "label-13").name == "label-3"
    assert labels.label_of_stored(world.view, "label-3").index == 13
    assert labels.label_of_stored(world.view, "label-4").name == "green"
    assert labels.find_label(world.view, "01").name == "red"
    for find, text in (
        (labels.find_label, "label-4"),
        (labels.label_of_value, "label-77"),
        (labels.label_of_value, "label-x"),
        (labels.find_label, "-1"),
        (labels.find_label, "1.0"),
    ):
        with pytest.raises(Refusal):
            find(world.view, text)
    assert labels.migrate_color("0x555753") == "0x555555"
    assert labels.html_color(labels.BUILTIN[0]) == "#cc0000"
    assert labels.icon(labels.BUILTIN[0]) == "appvm-red"
    with pytest.raises(Refusal):
        labels.find_label(world.view, "9999999999999999999")


# ---- features


def test_lookups() -> None:
    world = networked_world()
    view = world.view
    disp = world.add("disp1", "DispVM", template="dvm", dispid="1", netvm="sys-net")
    assert feature(view, disp, "x", "template") is None
    world.feature("tmpl", x="from template", y="t")
    world.feature("dom0", x="from dom0", z="0")
    world.feature("sys-net", x="from netvm")
    results = {how: feature(view, disp, "x", how) for how in LOOKUPS}
    assert results == {
        "plain": None,
        "template": "from template",
        "netvm": "from netvm",
        "adminvm": "from dom0",
        "template+adminvm": "from template",
    }
    # Present but empty stops the search; "0" is true.
    world.feature("dvm", x="")
    assert feature(view, disp, "x", "template") == ""
    assert not truthy(view, disp, "x", "template", default=True)
    assert truthy(view, disp, "z", "adminvm")
    assert truthy(view, disp, "nosuch", default=True)
    disp = world.feature("disp1", x="own")
    assert all(feature(view, disp, "x", how) == "own" for how in LOOKUPS)
    with pytest.raises(ValueError, match="no such look-up"):
        feature(view, disp, "none", "sideways")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("service.x", ""), ("service." + "x" * 48, "1"), ("service.app-dispvm." + "x" * 99, "1"),
        ("vm-config.a1", "v"), ("vm-config.a" + "1" * 51, ""), ("custom-persist.k", "/rw/x"),
        ("custom-persist.k", "dir:user:user:0755:/home/x y"), ("custom-persist.k", "file:a:b:7:/x"),
        ("preload-dispvm-threshold", "500"), ("preload-dispvm-delay", "-1.5"),
        ("preload-dispvm-delay", ""), ("anything.else", "x"), ("service", "x"),
    ],
)  # fmt: skip
def test_features_allowed(name: str, value: str) -> None:
    world = recorded_world()
    check_feature(world.view, world.get("work"), name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("service.", "1"), ("service.a/b", "1"), ("service..", "1"), ("service...", "1"),
        ("service." + "x" * 49, "1"), ("vm-config.", "v"), ("vm-config.1a", "v"),
        ("vm-config.a" + "1" * 52, ""), ("custom-persist.", "/x"),
        ("custom-persist." + "k" * 55, "/x"),
        ("custom-persist.k", "relative"), ("custom-persist.k", "dir:u:g:0799:/x"),
        ("custom-persist.k", "link:u:g:0755:/x"), ("custom-persist.k", "dir:u:g:17777:/x"),
        ("preload-dispvm-delay", "soon"),
        ("preload-dispvm-delay", "nan"),
    ],
)  # fmt: skip
def test_features_refused(name: str, value: str) -> None:
    world = recorded_world()
    with pytest.raises(Refusal) as caught:
        check_feature(world.view, world.get("work"), name, value)
    assert caught.value.reason == "INVALID_VALUE"
    assert caught.value.metadata == {"feature": name, "qube": "work"}


@pytest.mark.parametrize(
    ("qube", "name", "value", "allowed"),
    [
        # What is exported nowhere has no rules, and preloading is one of some classes only.
        ("remote", "service.", "1", True),
        ("remote", "vm-config.1", "1", True),
        ("remote", "custom-persist.x", "relative", True),
        ("remote", "preload-dispvm-max", "x", True),
        ("tmpl", "preload-dispvm-max", "x", True),
        ("tmpl", "preload-dispvm-delay", "x", True),
        ("tmpl", "service.", "1", False),
        ("disp1", "preload-dispvm-max", "x", True),
        ("work", "preload-dispvm-max", "", False),
        ("work", "preload-dispvm-threshold", "x", True),
        ("dom0", "preload-dispvm-threshold", "x", False),
        ("dom0", "preload-dispvm-threshold", "", True),
        ("dom0", "preload-dispvm-delay", "x", False),
        ("work", "preload-dispvm-delay", ".5", True),
        ("work", "preload-dispvm-delay", "5.", True),
        ("work", "preload-dispvm-delay", "+1e1", True),
        ("work", "preload-dispvm-delay", "inf", False),
        ("work", "preload-dispvm-delay", ".", False),
        ("work", "preload-dispvm-delay", ".2.", False),
        ("work", "preload-dispvm-delay", "1 1", False),
        ("dom0", "preload-dispvm-max", "x", True),
    ],
)
def test_features_have_the_rules_of_the_class(
    qube: str, name: str, value: str, allowed: bool
) -> None:
    world = recorded_world()
    if qube == "remote":
        world.add("remote", "RemoteVM")
    elif qube == "disp1":
        world.add("disp1", "DispVM", template="work", dispid="1")
    if allowed:
        check_feature(world.view, world.get(qube), name, value)
    else:
        with pytest.raises(Refusal):
            check_feature(world.view, world.get(qube), name, value)


def test_preload_max() -> None:
    world = networked_world()
    view = world.view

    def tried(holder: str, value: str) -> bool:
        try:
            check_feature(view, world.get(holder), "preload-dispvm-max", value)
        except Refusal:
            return False
        return True

    assert not tried("dvm", "2")
    world.feature("tmpl", qrexec="1")
    assert not tried("dvm", "2")
    world.change(
        "tmpl",
        features={
            "qrexec": "1",
            "supported-rpc.qubes.WaitForRunningSystem": "1",
            "supported-rpc.qubes.WaitForSession": "1",
        },
    )
    assert tried("dvm", "2") and tried("dvm", "")
    assert not tried("dvm", "-1") and not tried("dvm", "two")
    # dom0's number counts for the default disposable template, where there is one.
    assert tried("dom0", "2")
    world.add("dvm2", template="none-such", template_for_dispvms="True")
    world.system("default_dispvm", "dvm2")
    assert not tried("dom0", "2")
    world.feature("dom0", preload_dispvm_max="2")
    assert tried("dom0", "2")


def test_guest_keys() -> None:
    world = recorded_world()
    qube = world.change(
        "work",
        features={
            "service.a": "1",
            "service.b": "",
            "service.app-dispvm.x": "1",
            "vm-config.c": "v",
            "custom-persist.d": "/rw/d",
            "os": "Linux",
            "service.x/y": "1",
        },
    )
    assert exported_keys(qube, balanced=True) == {
        "/qubes-service/a": "1",
        "/qubes-service/b": "0",
        "/qubes-service/app-dispvm.x": "1",
        "/hash-app-dispvm/LXEWQrcmsEQBYnyp-6wy9chTD7GQPMTbAiWHF5IaSIE": "x",
        "/vm-config/c": "v",
        "/persist/d": "/rw/d",
        "/qubes-service/meminfo-writer": "1",
    }
    assert exported_keys(replace(qube, features={}), balanced=False) == {
        "/qubes-service/meminfo-writer": "0"
    }
    assert [key.value for key in guest_keys_of("service.a", None)] == [None]
    assert guest_keys_of("vm-config.", "x") == ()
    assert is_exported("service.a") and not is_exported("os")


# ---- memory


def test_memory_example() -> None:
    world = recorded_world()
    assert bytes_needed(world.view, world.get("work")) == 459538432


def test_memory_formula() -> None:
    world = recorded_world()
    view = world.view
    mib = 1024 * 1024
    work = world.set("work", virt_mode="pv", memory="100", vcpus="1", maxmem="0")
    assert bytes_needed(view, work) == 100 * mib + 4 * mib + 3 * mib // 2
    work = world.set("work", virt_mode="pvh")
    assert bytes_needed(view, work) == 100 * mib + 4 * mib + 3 * mib // 2 + 100 * 8192
    work = world.set("work", virt_mode="hvm")
    assert stubdom_bytes(view, work) == (128 + 16) * mib
    work = world.feature("work", linux_stubdom="")
    assert stubdom_bytes(view, work) == (28 + 16) * mib
    work = world.set("work", stubdom_mem="200")
    assert stubdom_bytes(view, work) == (200 + 16) * mib


def test_hotplug_decision() -> None:
    world = recorded_world()
    view = world.view
    assert not hotplug_usable(view, world.get("work"))
    world.fact(KernelFact(KERNEL, memory_hotplug=True))
    assert hotplug_usable(view, world.get("work"))
    assert not hotplug_usable(view, world.set("work", virt_mode="hvm"))
    work = world.set("work", virt_mode="pvh", kernel="pvgrub2-pvh")
    assert boots_own_kernel(view, work) and not hotplug_usable(view, work)
    world.change("tmpl", features={"supported-feature.memory-hotplug": "1"})
    assert hotplug_usable(view, work)
    world.feature("work", memory_hotplug="")
    assert not hotplug_usable(view, world.get("work"))
    world.feature("work", memory_hotplug="1")
    world.fact(HostFact("kvm", memory_kib=1, cpus=1))
    assert not hotplug_usable(view, world.get("work"))
    assert not hotplug_usable(view, world.get("dom0"))


# ---- start state and volumes


def test_start_state() -> None:
    view = View()
    view.apply_all(new_store("/var/lib/qubes/", False))
    assert [label.name for label in view.labels.values()] == [
        "red", "orange", "yellow", "green", "gray", "blue", "purple", "black"
    ]  # fmt: skip
    assert list(view.pools) == ["varlibqubes", "linux-kernel"]
    assert view.pools["varlibqubes"] == Pool(
        "varlibqubes",
        "file",
        {
            "dir_path": "/var/lib/qubes",
            "revisions_to_keep": "1",
            "ephemeral_volatile": "False",
        },
    )
    assert view.pools["linux-kernel"].options == {"dir_path": "/var/lib/qubes/vm-kernels"}
    assert view.properties == {"default_pool_kernel": "linux-kernel"}
    assert [(q.name, q.qid, q.properties) for q in view.qubes()] == [
        ("dom0", 0, {"label": "black"})
    ]
    assert check(view) == []


def test_class_volumes() -> None:
    assert class_volumes("AdminVM") == class_volumes("RemoteVM") == ()
    for klass in set(CLASSES) - {"AdminVM", "RemoteVM"}:
        assert [v.name for v in class_volumes(klass)] == ["root", "private", "volatile", "kernel"]
    kinds = {
        klass: [
            (v.save_on_stop, v.snap_on_start, v.rw, v.size // GIB) for v in class_volumes(klass)
        ]
        for klass in ("TemplateVM", "AppVM", "DispVM")
    }
    volatile, kernel = (False, False, True, 10), (False, False, False, 0)
    assert kinds["TemplateVM"] == [
        (True, False, True, 10),
        (True, False, True, 2),
        volatile,
        kernel,
    ]
    assert kinds["AppVM"] == [(False, True, True, 0), (True, False, True, 2), volatile, kernel]
    assert kinds["DispVM"] == [
        (False, True, True, 0),
        (False, True, True, 0),
        (False, False, True, 12),
        kernel,
    ]


def test_new_volumes() -> None:
    world = networked_world()
    work = world.get("work")
    root, private = work.volume("root"), work.volume("private")
    assert root is not None and private is not None
    assert (root.pool, root.vid, root.source, root.size) == (
        "varlibqubes", "appvms/work/root", "vm-templates/tmpl/root", 10 * GIB,
    )  # fmt: skip
    assert (private.vid, private.source, private.revisions_to_keep) == (
        "appvms/work/private", "", 1,
    )  # fmt: skip
    disp = world.add("disp1", "DispVM", template="dvm", dispid="1")
    assert [(v.name, v.source) for v in disp.volumes if v.source] == [
        ("root", "vm-templates/tmpl/root"), ("private", "appvms/dvm/private"),
    ]  # fmt: skip
    kernel = disp.volume("kernel")
    assert kernel is not None
    assert (kernel.pool, kernel.vid, kernel.revisions_to_keep) == ("linux-kernel", KERNEL, 0)
    assert kernel_vid(world.view, disp) == KERNEL
    assert wants_kernel_volume(world.view, disp)
    assert not wants_kernel_volume(world.view, world.set("disp1", kernel=""))
    lvm = Pool("lvm", "lvm_thin", {"volume_group": "vg", "thin_pool": "tp"})
    assert new_vid(lvm, "AppVM", "work", "root") == "vg/vm-work-root"
    zfs = Pool("z", "zfs", {"container": "tank/q"})
    assert new_vid(zfs, "TemplateVM", "t", "root") == "tank/q/t/root"
    world.view.pools.clear()
    assert new_volume(world.view, world.get("tmpl"), class_volumes("TemplateVM")[0]).pool == ""


# ---- events


def pairs_of(event: WireEvent) -> list[str]:
    return [f"{key}={value}" for key, value in event.pairs]


def test_property_events() -> None:
    world = recorded_world()
    work = world.get("work")
    burst = events.property_set(work, "label", "blue", "red", [events.value_changed(work, "icon")])
    assert [(event.name, pairs_of(event)) for event in burst] == [
        ("property-pre-set:label", ["name=label", "newvalue=blue", "oldvalue=red"]),
        ("property-reset:icon", ["name=icon"]),
        ("property-set:label", ["name=label", "newvalue=blue", "oldvalue=red"]),
    ]
    assert {event.subject for event in burst} == {"work"}
    assert {event.subject_uuid for event in burst} == {work.uuid}
    none = events.property_set(None, "default_netvm", None, True)
    assert none[0].subject == "" and none[0].subject_uuid == ""
    assert pairs_of(none[0]) == ["name=default_netvm", "newvalue=None", "oldvalue=True"]
    without = events.property_set(None, "default_kernel", "6.1")
    assert pairs_of(without[0]) == ["name=default_kernel", "newvalue=6.1"]
    reset = events.property_reset(work, "memory", 500)
    assert [event.name for event in reset] == [
        "property-pre-reset:memory", "property-pre-del:memory",
        "property-reset:memory", "property-del:memory",
    ]  # fmt: skip
    assert all(pairs_of(event) == ["name=memory", "oldvalue=500"] for event in reset)


def test_other_events() -> None:
    world = recorded_world()
    work, dom0 = world.get("work"), world.get("dom0")
    device = Assignment("block", "dom0", "sda1", "*", options={"read-only": "yes"})
    cases: list[tuple[WireEvent, str, str, list[str]]] = [
        (events.domain_add(work), "", "domain-add", ["vm=work"]),
        (events.domain_pre_delete(work), "", "domain-pre-delete", ["vm=work"]),
        (events.domain_delete(work), "", "domain-delete", ["vm=work"]),
        (events.domain_create_on_disk(work), "work", "domain-create-on-disk", []),
        (events.tag_add(work, "t"), "work", "domain-tag-add:t", ["tag=t"]),
        (events.tag_delete(work, "t"), "work", "domain-tag-delete:t", ["tag=t"]),
        (
            events.domain_pre_start(work, True, 459538432),
            "work", "domain-pre-start", ["start_guid=True", "mem_required=459538432"],
        ),
        (
            events.domain_pre_shutdown(work, False),
            "work", "domain-pre-shutdown", ["force=False"],
        ),
        (
            events.domain_shutdown_failed(work, "it's late"),
            "work", "domain-shutdown-failed", ["reason=it's late"],
        ),
        (
            events.device_assign(work, device)[1],
            "work", "device-assign:block", ["device=dom0:sda1:*", "options={'read-only': 'yes'}"],
        ),
        (
            events.device_pre_detach(work, "block", "dom0", "sda1"),
            "work", "device-pre-detach:block", ["port=dom0:sda1"],
        ),
        (
            events.device_unassign(work, device),
            "work", "device-unassign:block", ["device=dom0:sda1:*"],
        ),
        (
            events.device_added(dom0, "pci", "00_1f.2", "1:2:3"),
            "dom0", "device-added:pci", ["device=dom0:00_1f.2:1:2:3"],
        ),
        (
            events.import_volume(work, "private", "appvms/x/private"),
            "work", "domain-import-volume", ["name=private", "source=appvms/x/private"],
        ),
        (
            events.features_request(work, {"a": "1"}),
            "work", "features-request", ["untrusted_features={'a': '1'}"],
        ),
        (events.pool_add("p"), "", "pool-add", ["pool=p"]),
        (events.preload_start(work, "why"), "work", "domain-preload-dispvm-start", ["reason=why"]),
        (events.net_domain_connect(dom0, work), "dom0", "net-domain-connect", ["vm=work"]),
    ]  # fmt: skip
    for event, subject, name, pairs in cases:
        assert (event.subject, event.name, pairs_of(event)) == (subject, name, pairs)
    assert [event.name for event in events.domain_spawned(work, True)] == [
        "property-reset:xid", "property-reset:stubdom_xid", "property-reset:start_time",
        "domain-spawn",
    ]  # fmt: skip
    assert [event.name for event in events.domain_stopped(work)] == [
        "domain-stopped",
        "property-reset:xid", "property-reset:stubdom_xid", "property-reset:start_time",
    ]  # fmt: skip
    changed = events.device_assignment_changed(work, device)
    assert [event.name for event in changed] == [
        "device-pre-assign:block", "device-assignment-changed:block"
    ]  # fmt: skip
    burst = events.feature_set(work, "f", "", "1") + events.feature_delete(work, "f")
    assert [(event.name, pairs_of(event)) for event in burst] == [
        ("domain-feature-pre-set:f", ["feature=f", "value=", "oldvalue=1"]),
        ("domain-feature-set:f", ["feature=f", "value=", "oldvalue=1"]),
        ("domain-feature-pre-delete:f", ["feature=f"]),
        ("domain-feature-delete:f", ["feature=f"]),
    ]


# ---- invariants


def violated(world: World) -> set[str]:
    return {violation.rule for violation in check(world.view)}


def test_a_sound_world_has_no_violations() -> None:
    world = networked_world()
    world.add("disp1", "DispVM", template="dvm", dispid="1")
    world.add("far", "RemoteVM")
    assert check(world.view) == []


def test_violations_are_found() -> None:
    def broken(**changes: object) -> set[str]:
        world = networked_world()
        world.change("work", **changes)
        return violated(world)

    base = dict(networked_world().get("work").properties)
    assert broken(properties={**base, "netvm": "gone"}) == {"stored values validate"}
    assert broken(properties={**base, "netvm": "dvm"}) == {
        "stored values validate", "netvm provides a network",
    }  # fmt: skip
    assert broken(properties={**base, "debug": "yes"}) == {"stored form"}
    assert broken(properties={**base, "nosuch": "1"}) == {"known property"}
    assert broken(properties={**base, "name": "work"}) == {"identity is no property"}
    assert "required property" in broken(properties={"label": "red"})
    assert "required property" in broken(properties={"template": "tmpl"})
    assert broken(run=Run(Phase.UP, "")) == {"boot id while not halted"}
    assert broken(run=Run(Phase.HALTED, "b")) == {"boot id while not halted"}
    assert broken(run=Run(Phase.STARTING, "b")) == {"starting and stopping have an operation"}
    assert broken(state=RecordState.DELETING) == {"hidden records have an operation"}
    assert broken(quarantine="property x: y") == {"quarantine keeps the original"}
    assert broken(qid=2) == {"unique qid"}
    volumes = networked_world().get("work").volumes
    assert broken(volumes=(volumes[0], volumes[0])) == {"one volume of a name"}
    assert broken(volumes=(replace(volumes[1], pool="gone"),)) == {"pool of a volume exists"}
    assert broken(volumes=(replace(volumes[0], source=""),)) == {"snapshots have a source"}
    assert broken(volumes=(replace(volumes[1], vid="appvms/dvm/private"),)) == {"unique vid"}


def test_network_loops_and_missing_dom0_are_found() -> None:
    world = networked_world()
    world.set("work", provides_network="True")
    world.set("sys-net", netvm="work")
    assert violated(world) == {"no network loops"}
    assert violated_of(View()) == {"dom0 exists"}
    world = networked_world()
    world.put(SystemPut("default_template", "work"))
    assert violated(world) == {"stored values validate"}


def violated_of(view: View) -> set[str]:
    return {violation.rule for violation in check(view)}


def test_hidden_records_with_an_operation_are_fine() -> None:
    world = networked_world()
    work = world.change("work", state=RecordState.CREATING)
    operation = Operation("1", "create", None, (work.uuid,), OperationState.RUNNING)
    world.put(OperationPut(operation))
    assert check(world.view) == []


@given(
    st.sampled_from(["netvm", "template", "guivm"]),
    st.sampled_from(["tmpl", "sys-net", "dvm", "work", "x"]),
)
def test_check_never_fails_on_bad_references(prop: str, target: str) -> None:
    world = networked_world()
    world.set("dvm", **{prop: target})
    world.put(QubePut(replace(world.get("work"), klass="GhostVM")))
    assert all(str(violation) for violation in check(world.view))
