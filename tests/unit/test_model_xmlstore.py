"""qubes.xml: round trips, files of release 4.4, migrations and quarantine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkhead.model.defaults import new_store
from bulkhead.model.evaluate import evaluate, power_state
from bulkhead.model.invariants import check
from bulkhead.model.records import (
    Assignment,
    Label,
    LabelPut,
    Pool,
    PoolPut,
    Qube,
    QubePut,
    SystemPut,
    Volume,
)
from bulkhead.model.view import View
from bulkhead.model.xmlstore import (
    ParsedStore,
    StoreUnreadable,
    bad_properties,
    document,
    document_of,
    fragment,
    mended,
    parse,
    problems_of,
    resolved_pci_ports,
)
from tests.unit.model_world import World, networked_world

STORE = "7d9f3c1e-1111-4222-8333-444455556666"


def uuid_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


# A file as release 4.4 writes it: no declaration, two spaces, elements in its order.
REFERENCE = f"""<qubes>
  <labels>
    <label id="label-1" color="0xcc0000">red</label>
    <label id="label-5" color="0x555753">gray</label>
    <label id="label-8" color="0x000000">black</label>
  </labels>
  <pools>
    <pool name="varlibqubes" driver="file-reflink" dir_path="/var/lib/qubes" \
revisions_to_keep="1" ephemeral_volatile="False"/>
    <pool name="linux-kernel" driver="linux-kernel" dir_path="/var/lib/qubes/vm-kernels"/>
  </pools>
  <properties>
    <property name="check_updates_vm">True</property>
    <property name="clockvm"/>
    <property name="default_kernel">6.12.1-lab</property>
    <property name="default_pool_kernel">linux-kernel</property>
    <property name="default_template">tmpl</property>
  </properties>
  <domains>
    <domain id="domain-0" class="AdminVM">
      <properties>
        <property name="label">black</property>
      </properties>
      <features>
        <feature name="config.x">1</feature>
      </features>
      <tags/>
    </domain>
    <domain id="domain-2" class="AppVM">
      <properties>
        <property name="debug">True</property>
        <property name="label">red</property>
        <property name="name">sys-net</property>
        <property name="provides_network">True</property>
        <property name="qid">2</property>
        <property name="uuid">{uuid_of(2)}</property>
        <property name="virt_mode">hvm</property>
        <property name="kernelopts">a &lt;b&gt; &amp; "c"</property>
        <property name="netvm"/>
        <property name="template">tmpl</property>
      </properties>
      <features>
        <feature name="servicevm">1</feature>
        <feature name="gui"/>
      </features>
      <tags>
        <tag name="created-by-dom0"/>
        <tag name="guivm-dom0"/>
      </tags>
      <devices class="pci">
        <device backend-domain="dom0" id="00_14.0-00_00.0" mode="required" \
identity="8086:1234::p020000">
          <option name="no-strict-reset">True</option>
        </device>
        <device backend-domain="*" id="*" mode="auto-attach" identity="*"/>
      </devices>
      <volume-config>
        <volume name="root" pool="varlibqubes" vid="appvms/sys-net/root" revisions_to_keep="1" \
rw="True" save_on_stop="False" snap_on_start="True" size="10737418240" \
source="vm-templates/tmpl/root"/>
        <volume name="private" pool="varlibqubes" vid="appvms/sys-net/private" \
revisions_to_keep="-1" rw="True" save_on_stop="True" snap_on_start="False" size="2147483648"/>
        <volume name="volatile" pool="varlibqubes" vid="appvms/sys-net/volatile" \
revisions_to_keep="1" rw="True" save_on_stop="False" snap_on_start="False" ephemeral="True" \
size="10737418240"/>
        <volume name="kernel" pool="linux-kernel" vid="6.12.1-lab" revisions_to_keep="0" \
rw="False" save_on_stop="False" snap_on_start="False"/>
      </volume-config>
    </domain>
    <domain id="domain-1" class="TemplateVM">
      <properties>
        <property name="label">black</property>
        <property name="name">tmpl</property>
        <property name="qid">1</property>
        <property name="uuid">{uuid_of(1)}</property>
      </properties>
      <features/>
      <tags/>
      <volume-config>
        <volume name="root" pool="varlibqubes" vid="vm-templates/tmpl/root" \
revisions_to_keep="1" rw="True" save_on_stop="True" snap_on_start="False" size="10737418240"/>
        <volume name="private" pool="varlibqubes" vid="vm-templates/tmpl/private" \
revisions_to_keep="1" rw="True" save_on_stop="True" snap_on_start="False" size="2147483648"/>
        <volume name="volatile" pool="varlibqubes" vid="vm-templates/tmpl/volatile" \
revisions_to_keep="1" rw="True" save_on_stop="False" snap_on_start="False" size="10737418240"/>
        <volume name="kernel" pool="linux-kernel" vid="6.12.1-lab" revisions_to_keep="0" \
rw="False" save_on_stop="False" snap_on_start="False"/>
      </volume-config>
    </domain>
    <domain id="domain-9" class="RemoteVM">
      <properties>
        <property name="label">red</property>
        <property name="name">zz</property>
        <property name="qid">9</property>
        <property name="remote_name">box</property>
        <property name="uuid">{uuid_of(9)}</property>
        <property name="relayvm">sys-net</property>
      </properties>
      <features/>
      <tags/>
    </domain>
  </domains>
</qubes>
"""


def only(parsed: ParsedStore, name: str) -> Qube:
    qube = parsed.view().qube(name)
    assert qube is not None
    return qube


def test_reference_file_comes_back_byte_for_byte() -> None:
    data = REFERENCE.encode()
    parsed = parse(data)
    assert (parsed.store_id, parsed.revision) == (None, None)
    assert parsed.warnings == () and parsed.quarantined == ()
    view = parsed.view()
    assert check(view) == []
    # Only the migrated gray is another one.
    assert document_of(view, "", 0) == data.replace(b"0x555753", b"0x555555")


def test_reference_file_means_what_it_says() -> None:
    view = parse(REFERENCE.encode()).view()
    net = view.qube("sys-net")
    assert net is not None
    assert (net.uuid, net.qid, net.klass) == (uuid_of(2), 2, "AppVM")
    assert net.properties == {
        "debug": "True", "label": "red", "provides_network": "True", "virt_mode": "hvm",
        "kernelopts": 'a <b> & "c"', "netvm": "", "template": "tmpl",
    }  # fmt: skip
    assert net.features == {"servicevm": "1", "gui": ""}
    assert list(net.features) == ["servicevm", "gui"]
    assert net.tags == {"created-by-dom0", "guivm-dom0"}
    assert net.devices == (
        Assignment(
            "pci", "dom0", "00_14.0-00_00.0", "8086:1234::p020000", "required",
            {"no-strict-reset": "True"},
        ),
        Assignment("pci", "*", "*", "*", "auto-attach"),
    )  # fmt: skip
    private = net.volume("private")
    assert private is not None and private.snapshots_disabled
    volatile = net.volume("volatile")
    assert volatile is not None and volatile.ephemeral is True
    assert view.properties["clockvm"] == ""
    assert evaluate(view, None, "clockvm") is None
    assert evaluate(view, net, "kernel") == "6.12.1-lab"
    admin = view.qube("dom0")
    assert admin is not None and admin.features == {"config.x": "1"}
    assert [qube.name for qube in view.qubes()] == ["dom0", "sys-net", "tmpl", "zz"]


def test_processing_instruction() -> None:
    view = View()
    view.apply_all(new_store("/var/lib/qubes", True))
    data = document_of(view, STORE, 42)
    assert data.startswith(f'<?bulkhead store="{STORE}" revision="42"?>\n<qubes>\n'.encode())
    parsed = parse(data)
    assert (parsed.store_id, parsed.revision) == (STORE, 42)
    other = b'<?xml version="1.0" encoding="UTF-8"?>\n<!-- <!DOCTYPE x> -->\n' + data
    assert parse(other).revision == 42
    assert parse(b"\xef\xbb\xbf" + data).revision == 42
    broken = data.replace(STORE.encode(), b"x")
    assert parse(broken).store_id is None


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0\0\0", b"garbage", b"<qubes>", b"<other/>", REFERENCE.encode()[:900],
        b"<!DOCTYPE qubes><qubes/>", b'<!DOCTYPE q [<!ENTITY a "b">]><qubes>&a;</qubes>',
        b"<?xml version='1.0'?><!-- x --><!DOCTYPE qubes><qubes/>",
        b"<?xml version='1.0' encoding='utf-16'?><qubes/>", "<qubes/>".encode("utf-16"),
        b"<?bulkhead", b"<!-- ", b"<qubes>&a;</qubes>", b"<qubes>\xff</qubes>",
        b"<?xml version='1.0' encoding='koi8-r'?><qubes/>",
    ],
)  # fmt: skip
def test_what_is_no_store_is_refused(data: bytes) -> None:
    with pytest.raises(StoreUnreadable):
        parse(data)


def test_a_file_without_dom0_gets_one() -> None:
    parsed = parse(b"<qubes/>")
    assert only(parsed, "dom0").properties == {"label": "black"}
    assert len(parsed.warnings) == 1


# ---- values in other forms


def edited(*edits: tuple[str, str]) -> ParsedStore:
    text = REFERENCE
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    return parse(text.encode())


def test_other_forms_of_values_are_read() -> None:
    parsed = edited(
        ('<property name="debug">True</property>', '<property name="debug">yes</property>'),
        ('<property name="label">red</property>', '<property name="label" ref="label-8"/>'),
        ('<property name="check_updates_vm">True', '<property name="check_updates_vm">off'),
        ('mode="required"', 'required="yes"'),
        ('<option name="no-strict-reset">True</option>', '<option name="no-strict-reset"/>'),
    )
    assert parsed.quarantined == ()
    net = only(parsed, "sys-net")
    assert (net.properties["debug"], net.properties["label"]) == ("True", "black")
    assert net.devices[0].mode == "required"
    assert net.devices[0].options == {"no-strict-reset": ""}
    assert parsed.view().properties["check_updates_vm"] == "False"


@pytest.mark.parametrize(
    ("attributes", "mode"),
    [('required="yes"', "required"), ('required="no"', "auto-attach"), ("", "required")],
)
def test_old_assignments(attributes: str, mode: str) -> None:
    parsed = edited(
        ('mode="required" identity="8086:1234::p020000"', attributes),
        ('<option name="no-strict-reset">True', '<option name="identity">1:2:3'),
    )
    device = only(parsed, "sys-net").devices[0]
    assert (device.mode, device.identity, device.options) == (mode, "1:2:3", {})


def test_old_properties_migrate() -> None:
    parsed = edited(
        ('<property name="virt_mode">hvm', '<property name="hvm">True'),
        ('<property name="debug">True', '<property name="dispvm_allowed">True'),
    )
    net = only(parsed, "sys-net")
    assert (net.properties["virt_mode"], net.properties["template_for_dispvms"]) == ("hvm", "True")
    parsed = edited(('<property name="virt_mode">hvm', '<property name="hvm">False'))
    assert only(parsed, "sys-net").properties["virt_mode"] == "pv"


def test_meminfo_feature_migrates() -> None:
    net = only(edited(('name="gui"/>', 'name="service.meminfo-writer"/>')), "sys-net")
    assert net.properties["maxmem"] == "0"
    assert "service.meminfo-writer" not in net.features
    net = only(edited(('name="gui"/>', 'name="service.meminfo-writer">1</feature>')), "sys-net")
    assert "maxmem" not in net.properties
    assert net.features["service.meminfo-writer"] == "1"


def test_default_fw_netvm_migrates() -> None:
    def loaded(fw: str, default: str, own: str) -> str | None:
        parsed = edited(
            ('<property name="clockvm"/>', f'<property name="default_fw_netvm">{fw}</property>'),
            ('<property name="default_template">', f'<property name="default_netvm">{default}'
             '</property><property name="default_template">'),
            ('<property name="netvm"/>\n', own),
        )  # fmt: skip
        view = parsed.view()
        assert "default_fw_netvm" not in view.properties
        return only(parsed, "sys-net").properties.get("netvm")

    assert loaded("", "sys-net", "") == ""
    assert loaded("", "", "") is None
    assert loaded("", "sys-net", '<property name="netvm"/>') == ""


def test_wrong_disposable_templates_become_none() -> None:
    parsed = edited(
        ('<property name="clockvm"/>', '<property name="default_dispvm">sys-net</property>'),
        ('<property name="netvm"/>', '<property name="management_dispvm">tmpl</property>'),
    )
    assert parsed.quarantined == ()
    assert parsed.view().properties["default_dispvm"] == ""
    assert only(parsed, "sys-net").properties["management_dispvm"] == ""
    assert len(parsed.warnings) == 2


def test_pci_bus_addresses_become_paths() -> None:
    world = networked_world()
    names = ("03_00.0", "00_1f.2", "04_00.0")
    assigned = tuple(Assignment("pci", "dom0", name) for name in names)
    world.change("work", devices=(*assigned, Assignment("block", "dom0", "03_00.0")))
    assert resolved_pci_ports(world.view) == []
    world.device("dom0", "00_1c.0-00_00.0", data={"sbdf": "0000:03:00.0"})
    world.device("dom0", "00_1f.2", data={"sbdf": "0000:00:1f.2"})
    for change in resolved_pci_ports(world.view):
        world.put(change)
    assert [device.port for device in world.get("work").devices] == [
        "00_1c.0-00_00.0", "00_1f.2", "04_00.0", "03_00.0",
    ]  # fmt: skip
    assert resolved_pci_ports(world.view) == []


def test_missing_uuid_and_volumes_are_made_up_the_same_each_time() -> None:
    edits = (
        (f'<property name="uuid">{uuid_of(1)}</property>', ""),
        (
            '<volume name="volatile" pool="varlibqubes" vid="vm-templates/tmpl/volatile" '
            'revisions_to_keep="1" rw="True" save_on_stop="False" snap_on_start="False" '
            'size="10737418240"/>',
            "",
        ),
    )
    parsed = edited(*edits)
    assert parsed == edited(*edits)
    tmpl = only(parsed, "tmpl")
    assert len(tmpl.uuid) == 36 and tmpl.uuid != uuid_of(1)
    assert tmpl.volume("volatile") == Volume(
        "volatile", "varlibqubes", "vm-templates/tmpl/volatile", 10 * 1024**3, 1, rw=True
    )
    assert [volume.name for volume in tmpl.volumes] == ["root", "private", "volatile", "kernel"]
    assert parsed.quarantined == () and len(parsed.warnings) == 2


def test_network_loops_are_cut() -> None:
    parsed = edited(
        ('<property name="netvm"/>', '<property name="netvm">sys-net</property>'),
    )
    assert only(parsed, "sys-net").properties["netvm"] == ""
    assert any("loop" in warning for warning in parsed.warnings)
    # Also where the default closes it.
    parsed = edited(
        ('<property name="netvm"/>', ""),
        ('<property name="clockvm"/>', '<property name="default_netvm">sys-net</property>'),
    )
    assert only(parsed, "sys-net").properties["netvm"] == ""
    assert check(parsed.view()) == []


# ---- quarantine

BAD_DOMAINS: list[tuple[str, str, str]] = [
    ('class="AppVM"', 'class="GhostVM"', "class GhostVM"),
    ('<property name="debug">True', '<property name="debug">perhaps', "property debug"),
    ('<property name="debug">True', '<property name="invented">True', "property invented"),
    ('<property name="debug">True', '<property name="a:b">True', "property a\\x3ab"),
    ('<property name="template">tmpl', '<property name="template">gone', "property template"),
    ('<property name="template">tmpl', '<property name="template">sys-net', "property template"),
    ('<property name="template">tmpl</property>', "", "property template"),
    ('<property name="netvm"/>', '<property name="netvm">tmpl</property>', "property netvm"),
    ('<property name="netvm"/>', '<property name="guivm">gone</property>', "property guivm"),
    ('<property name="label">red', '<property name="label">pink', "property label"),
    ('<property name="debug">True', '<property name="xid">7', "property xid"),
    ('<property name="debug">True', '<property name="memory">-1', "property memory"),
    ('<property name="debug">True', '<property name="memory">', "property memory"),
    ('<property name="debug">True', '<property name="ip">x', "property ip"),
    (f'<property name="uuid">{uuid_of(2)}', '<property name="uuid">x', "property uuid"),
    (f'<property name="uuid">{uuid_of(2)}', f'<property name="uuid">{uuid_of(9)}', ""),
    ('<property name="qid">2', '<property name="qid">two', "property qid"),
    ('<property name="qid">2', '<property name="qid">0', "property qid"),
    ('pool="varlibqubes" vid="appvms/sys-net/private"', 'pool="gone" vid="x"', "volume private"),
    ('revisions_to_keep="-1"', 'revisions_to_keep="-2"', "volume private"),
    ('vid="appvms/sys-net/private"', 'vid="vm-templates/tmpl/private"', ""),
    ('ephemeral="True"', 'ephemeral="often"', "volume volatile"),
    ('mode="required"', 'mode="sometimes"', "device pci"),
    ('backend-domain="dom0"', 'other="x"', "device pci"),
]


@pytest.mark.parametrize(("old", "new", "problem"), BAD_DOMAINS)
def test_a_bad_qube_is_quarantined_alone(old: str, new: str, problem: str) -> None:
    parsed = edited((old, new))
    view = parsed.view()
    assert len(parsed.quarantined) == 1
    name = parsed.quarantined[0]
    bad = view.qube(name)
    assert bad is not None
    if problem:
        assert name == "sys-net"
        assert any(line.startswith(f"{problem}:") for line in problems_of(bad)), problems_of(bad)
    assert [v for v in check(view) if v.subject != name] == []
    # Listed, halted, readable with defaults, and written back as it was.
    assert power_state(view, bad) == ("Running" if bad.klass == "RemoteVM" else "Halted")
    assert len(list(view.qubes())) == 4
    text = REFERENCE.replace(old, new, 1)
    start = text.index('    <domain id="domain-2"' if bad.qid != 9 else '    <domain id="domain-9"')
    original = text[start + 4 : text.index("</domain>", start) + len("</domain>")].encode()
    if name == "sys-net":
        assert bad.raw == original
    assert fragment(bad) == bad.raw
    data = document_of(view, STORE, 1)
    assert bad.raw in data
    again = parse(data)
    assert again.quarantined == parsed.quarantined
    assert document_of(again.view(), STORE, 1) == data


def test_duplicate_names_and_numbers() -> None:
    parsed = edited(
        ('<property name="name">tmpl', '<property name="name">sys-net'),
        ('<property name="qid">1', '<property name="qid">2'),
        ('<property name="template">tmpl', '<property name="template">other'),
    )
    view = parsed.view()
    second = view.qube("sys-net-again")
    assert second is not None and second.klass == "TemplateVM"
    assert second.qid == 10000
    assert b'<property name="name">sys-net</property>' in fragment(second)
    first = view.qube("sys-net")
    assert first is not None and first.klass == "AppVM"
    third = edited(('<property name="name">tmpl', '<property name="name">dom0'))
    assert "dom0-again" in third.quarantined
    unnamed = edited(('<property name="name">zz', '<property name="name">../etc'))
    assert unnamed.quarantined == ("unnamed-3",)


def test_two_dom0() -> None:
    parsed = edited(('class="RemoteVM"', 'class="AdminVM"'))
    assert [qube.name for qube in parsed.view().qubes()] == ["dom0", "sys-net", "tmpl"]
    assert any("twice" in warning for warning in parsed.warnings)


def test_device_of_a_missing_backend_is_kept() -> None:
    parsed = edited(('backend-domain="dom0"', 'backend-domain="sys-usb"'))
    assert parsed.quarantined == ()
    assert only(parsed, "sys-net").devices[0].backend == "sys-usb"
    assert any("sys-usb" in warning for warning in parsed.warnings)


def test_system_properties_that_are_unknown_or_bad_are_written_back() -> None:
    parsed = edited(
        ('<property name="clockvm"/>', '<property name="invented">a b</property>'),
        ('<property name="default_template">tmpl', '<property name="default_template">gone'),
    )
    view = parsed.view()
    assert evaluate(view, None, "default_template") is None
    assert check(view) == []
    data = document_of(view, "", 0)
    assert b'<property name="invented">a b</property>' in data
    assert b'<property name="default_template">gone</property>' in data
    view.apply(SystemPut("default_template", "tmpl"))
    assert b'<property name="default_template">tmpl</property>' in document_of(view, "", 0)


def test_odd_labels_and_pools_are_left_out_with_a_warning() -> None:
    parsed = edited(
        ('<label id="label-5" color="0x555753">gray', '<label id="label-x" color="0x555753">gray'),
        ('<pool name="linux-kernel"', '<pool name="varlibqubes"'),
    )
    assert "gray" not in [label.name for label in parsed.view().labels.values()]
    assert list(parsed.view().pools) == ["varlibqubes"]
    assert [w.split(":")[0] for w in parsed.warnings] == [
        "A label without a name or a number was left out",
        "The pool 'varlibqubes' is there twice; the first one counts",
        "The system property 'default_pool_kernel' is not used",
    ]
    assert set(parsed.quarantined) == {"sys-net", "tmpl"}  # their kernels' pool is gone


# ---- repair


def quarantined() -> tuple[World, Qube]:
    """sys-net with two bad properties, an unreadable device and an unreadable volume."""
    parsed = edited(
        ('<property name="debug">True', '<property name="debug">perhaps'),
        ('<property name="virt_mode">hvm', '<property name="memory">lots'),
        ('mode="required"', 'mode="sometimes"'),
        ('ephemeral="True"', 'ephemeral="often"'),
    )
    world = World()
    world.view = parsed.view()
    return world, world.get("sys-net")


def test_a_changed_record_is_written_with_what_is_still_bad() -> None:
    world, bad = quarantined()
    assert bad_properties(bad) == {"debug", "memory"}
    changed = world.change("sys-net", tags=bad.tags | {"new"})
    text = fragment(changed).decode()
    assert '<tag name="new"/>' in text
    assert '<property name="debug">perhaps</property>' in text
    assert '<property name="memory">lots</property>' in text
    assert 'mode="sometimes"' in text and 'ephemeral="often"' in text
    again = parse(document_of(world.view, STORE, 2))
    reloaded = only(again, "sys-net")
    assert reloaded.tags == changed.tags
    assert problems_of(reloaded) == problems_of(changed)


def test_setting_the_bad_properties_ends_quarantine() -> None:
    parsed = edited(
        ('<property name="debug">True', '<property name="debug">perhaps'),
        ('<property name="virt_mode">hvm', '<property name="memory">lots'),
    )
    world = World()
    world.view = parsed.view()
    bad = world.get("sys-net")
    assert mended(bad, "vcpus") is bad
    # Set one ...
    half = mended(replace(bad, properties={**bad.properties, "memory": "500"}), "memory")
    assert bad_properties(half) == {"debug"}
    assert b'<property name="memory">500</property>' in fragment(half)
    assert b"perhaps" in fragment(half) and b"lots" not in fragment(half)
    world.put(QubePut(half))
    assert parse(document_of(world.view, STORE, 1)).quarantined == ("sys-net",)
    # ... reset the other.
    whole = mended(half, "debug")
    assert (whole.quarantine, whole.raw) == ("", b"")
    assert b"perhaps" not in fragment(whole)
    world.put(QubePut(whole))
    assert check(world.view) == []
    assert parse(document_of(world.view, STORE, 1)).quarantined == ()


def test_raw_bytes_with_odd_quoting_are_found() -> None:
    text = REFERENCE.replace('<property name="debug">True', '<property name="debug">perhaps')
    text = text.replace('<domain id="domain-2"', "<domain note='a>b/>' id=\"domain-2\"", 1)
    text = text.replace("  </domains>", '    <domain class="Odd>VM"/>\n  </domains>')
    parsed = parse(text.encode())
    assert only(parsed, "sys-net").raw.startswith(b"<domain note='a>b/>' id=")
    assert only(parsed, "sys-net").raw.endswith(b"</domain>")
    odd = next(q for q in parsed.view().qubes() if q.klass == "Odd>VM")
    assert odd.raw == b'<domain class="Odd>VM"/>'


# ---- any store

_NAMES = st.from_regex(r"[a-c][a-z0-9_.-]{0,3}", fullmatch=True).filter(
    lambda name: not name.endswith("-dm")
)
_TEXT = st.text(
    st.one_of(
        st.characters(min_codepoint=0x20, max_codepoint=0x7E), st.sampled_from("\t\n\r<>&\"'")
    ),
    max_size=12,
)
_ANY_TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), max_size=8
)


@st.composite
def stores(draw: st.DrawFn) -> View:
    view = View()
    view.apply_all(new_store("/var/lib/qubes", draw(st.booleans())))
    for index in draw(st.sets(st.integers(9, 40), max_size=2)):
        view.apply(LabelPut(Label(index, f"label.{index}", f"0x{index:06x}")))
    if draw(st.booleans()):
        view.apply(PoolPut(Pool("lvm", "lvm_thin", {"volume_group": 'v"g', "thin_pool": "t"})))
    view.apply(SystemPut("stats_interval", str(draw(st.integers(1, 9)))))
    view.apply(SystemPut("invented", draw(_TEXT)))
    names = draw(st.lists(_NAMES, unique=True, max_size=5))
    labels = [label.name for label in view.labels.values()]
    providers: list[str] = []
    for number, name in enumerate(names, 1):
        klass = draw(st.sampled_from(["TemplateVM", "StandaloneVM", "RemoteVM"]))
        properties = {"label": draw(st.sampled_from(labels))}
        features = draw(st.dictionaries(_ANY_TEXT.filter(bool), _TEXT, max_size=3))
        features.pop("service.meminfo-writer", None)
        tags = frozenset(draw(st.sets(_ANY_TEXT.filter(bool), max_size=3)))
        devices: tuple[Assignment, ...] = ()
        volumes: tuple[Volume, ...] = ()
        if klass == "RemoteVM":
            properties["remote_name"] = draw(_TEXT)
            properties["relayvm"] = draw(st.sampled_from(["", "dom0", *providers]))
        else:
            properties["bootmode"] = draw(_TEXT)
            properties["autostart"] = draw(st.sampled_from(["True", "False"]))
            properties["netvm"] = draw(st.sampled_from(["", *providers]))
            if draw(st.booleans()):
                properties["provides_network"] = "True"
                providers.append(name)
            devices = tuple(
                Assignment(
                    devclass, "dom0", f"p{port}", options=draw(
                        st.dictionaries(_ANY_TEXT.filter(bool).filter(lambda k: k != "identity"),
                                        _TEXT.filter(bool), max_size=2)
                    ),
                )
                for devclass in ("block", "usb")
                for port in range(draw(st.integers(0, 2)))
            )  # fmt: skip
            volumes = tuple(
                Volume(
                    kind,
                    "varlibqubes",
                    f"{name}/{kind}",
                    draw(st.integers(0, 2**50)),
                    draw(st.integers(-1, 5)),
                    rw=draw(st.booleans()),
                    save_on_stop=draw(st.booleans()),
                    ephemeral=draw(st.sampled_from([None, True, False])),
                )
                for kind in ("root", "private", "volatile", "kernel")
            )
        view.apply(
            QubePut(
                Qube(
                    uuid_of(number), name, number, klass, properties=properties,
                    features=features, tags=tags, devices=devices, volumes=volumes,
                )
            )
        )  # fmt: skip
    return view


@given(stores())
@settings(deadline=None)
def test_any_store_comes_back(view: View) -> None:
    data = document_of(view, STORE, 7)
    parsed = parse(data)
    again = parsed.view()
    assert parsed.quarantined == ()
    assert list(again.qubes()) == list(view.qubes())
    assert again.labels == view.labels
    assert again.pools == view.pools
    assert list(again.pools) == list(view.pools)
    assert again.properties == view.properties
    assert [list(q.features) for q in again.qubes()] == [list(q.features) for q in view.qubes()]
    assert document_of(again, STORE, 7) == data


@given(st.integers(0, len(REFERENCE) - 1), st.binary(max_size=3), st.integers(0, 30))
@settings(deadline=None, max_examples=200)
def test_damaged_bytes_give_a_store_or_the_one_error(at: int, put: bytes, cut: int) -> None:
    data = REFERENCE.encode()
    try:
        parsed = parse(data[:at] + put + data[at + cut :])
    except StoreUnreadable:
        return
    view = parsed.view()
    written = document_of(view, STORE, 1)
    again = parse(written)
    assert document_of(again.view(), STORE, 1) == written


def test_characters_that_xml_cannot_hold_do_not_stop_a_write() -> None:
    qube = Qube(
        uuid_of(3), "a", 3, "RemoteVM", properties={"label": "red", "remote_name": "a\x00b"}
    )
    assert b'<property name="remote_name">a b</property>' in fragment(qube)


def test_fragments_depend_on_the_record_alone() -> None:
    world = networked_world()
    before = fragment(world.get("work"))
    world.set("sys-net", label="blue")
    assert fragment(world.get("work")) == before
    assert document("", 0, [], [], {}, []) == (
        b"<qubes>\n  <labels/>\n  <pools/>\n  <properties/>\n  <domains/>\n</qubes>\n"
    )


def test_a_large_store_comes_back_whole() -> None:
    world = networked_world()
    for number in range(2000):
        world.add(f"w{number}", netvm="sys-net", memory="500")
    before = len(world.view)
    parsed = parse(document_of(world.view, STORE, 1))
    assert not parsed.quarantined
    assert len(parsed.view()) == before
