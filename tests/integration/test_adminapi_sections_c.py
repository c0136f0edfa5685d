"""Features, tags, labels, firewall rules and notes: odd arguments, events, guests.

Owns what every call answers and announces where the qube's class, a name that means
something, or hostile text decides; and what a running guest then reads. Written from the
documented interface. Must not know how the services do it. Invariant: one instance, one
order; a row that does not hold is named with its line.
"""

from __future__ import annotations

import json

import pytest

from tests.integration.adminapi_world import started
from tests.integration.test_adminapi_sections_b import REFUSED, Script, create

pytestmark = pytest.mark.integration

V, X = "QubesValueError", "ProtocolError"
ABSENT = "QubesFeatureNotFoundError"
LOOKUPS = ("Template", "Netvm", "AdminVM", "TemplateAndAdminVM")


def world(r: Script) -> None:
    for name in ("work", "net1", "net2", "dvm", "mgmt"):
        create(r, name)
    r.c("vm.Create.StandaloneVM", payload="name=alone label=green")
    r.c("vm.Create.RemoteVM", payload="name=far label=orange")
    for name in ("net1", "net2"):
        r.c("prop.Set", name, "provides_network", "True")
    r.c("prop.Set", "net1", "netvm", "net2")
    r.c("prop.Set", "work", "netvm", "net1")
    r.c("prop.Set", "dvm", "template_for_dispvms", "True")
    r.c("vm.Create.DispVM", arg="dvm", payload="name=named label=green")
    r.subscribe("all")
    r.forget("all")


def features(r: Script) -> None:
    for qube in ("work", "tmpl", "alone", "named", "dom0", "far"):
        r.c("feat.Set", qube, "f", "v")
        r.c("feat.Set", qube, "f", "")
        r.c("feat.Get", qube, "f")
        r.c("feat.List", qube, want="~(.*\n)?f\n")
        r.c("feat.Remove", qube, "f")
        r.c("feat.Remove", qube, "f", want=ABSENT)
    lines = (
        "domain-feature-pre-set:f feature=f value=v",
        "domain-feature-set:f feature=f value=v",
        "domain-feature-pre-set:f feature=f value= oldvalue=v",
        "domain-feature-set:f feature=f value= oldvalue=v",
        "domain-feature-pre-delete:f feature=f",
        "domain-feature-delete:f feature=f",
        "domain-feature-pre-delete:f feature=f",  # also of one that is not there
    )
    qubes = ("work", "tmpl", "alone", "named", "far")  # dom0's fence is the stream's own
    got = ("work", "tmpl", "alone", "named", "dom0", "far")
    assert set(qubes) < set(got)
    r.events("all", *(f"{qube}:{line}" for qube in got for line in lines))
    # Names and values
    for name in ("a/b", "a+b", "@x", "a\tb", "a\nb"):
        r.c("feat.Set", "work", name, "1", want=X)
        r.c("feat.Get", "work", name, want=ABSENT)
        r.c("feat.CheckWithTemplate", "work", name, want=ABSENT)
    for value in ("\n", "a\n", "\t", "\u00e9", b"\xff", "a\0b", "\x7f", "\x1f"):
        r.c("feat.Set", "work", "v", value, want=X)
    for value in (" ", "0", "None", "%s %d", "<>&\"'", "x" * 60_000):
        r.c("feat.Set", "work", "v", value)
        r.c("feat.Get", "work", "v", want=f"={value}")
    r.c("feat.Remove", "work", "v")
    r.c("feat.Set", "work", "n" * 300, "1")
    r.c("feat.Remove", "work", "n" * 300)
    r.c("feat.Get", "work", "v", "payload", want=X)
    r.c("feat.Nope", "work", "v", want=X)
    r.c("feat.Set", "nosuch", "v", want="QubesVMNotFoundError")
    r.forget("all")
    # Chains; the first qube that has it decides, also with an empty value
    for qube, name in (("tmpl", "t"), ("dvm", "v"), ("net1", "n"), ("net2", "n2"), ("dom0", "d")):
        r.c("feat.Set", qube, name, f"of {qube}")
    found = {
        ("work", "t"): {"Template": "tmpl", "TemplateAndAdminVM": "tmpl"},
        ("work", "n"): {"Netvm": "net1"},
        ("work", "n2"): {"Netvm": "net2"},
        ("work", "d"): {"AdminVM": "dom0", "TemplateAndAdminVM": "dom0"},
        ("named", "t"): {"Template": "tmpl", "TemplateAndAdminVM": "tmpl"},
        ("named", "v"): {"Template": "dvm", "TemplateAndAdminVM": "dvm"},
        ("alone", "t"): {},
        ("alone", "d"): {"AdminVM": "dom0", "TemplateAndAdminVM": "dom0"},
        ("tmpl", "n2"): {},
        ("far", "d"): {"AdminVM": "dom0", "TemplateAndAdminVM": "dom0"},
        ("far", "n"): {},
        ("dom0", "t"): {},
        ("dom0", "d"): dict.fromkeys(LOOKUPS, "dom0"),
    }
    for (qube, name), by in found.items():
        for how in LOOKUPS:
            want = f"=of {by[how]}" if how in by else ABSENT
            r.c(f"feat.CheckWith{how}", qube, name, want=want)
    r.c("feat.Set", "work", "t")
    r.c("feat.CheckWithTemplate", "work", "t")
    r.c("feat.Remove", "work", "t")
    r.forget("all")


def special_features(r: Script) -> None:
    exported = (
        ("service.", "1"),
        ("service..", "1"),
        ("service...", "1"),
        ("service." + "n" * 49, "1"),
        ("vm-config.", "1"),
        ("vm-config.1a", "1"),
        ("vm-config." + "n" * 53, "1"),
        ("custom-persist.", "/x"),
        ("custom-persist." + "n" * 55, "/x"),
        ("custom-persist.a", "relative"),
        ("custom-persist.a", "dir:u:g:0799:/x"),
        ("custom-persist.a", "link:u:g:0755:/x"),
        ("custom-persist.a", ""),
    )
    for qube in ("work", "tmpl", "alone", "named", "dom0"):
        for name, value in exported:
            r.c("feat.Set", qube, name, value, want=V)
            r.events("all", f"{qube}:domain-feature-pre-set:{name} feature={name} value={value}")
            r.c("feat.Get", qube, name, want=ABSENT)
    # What a remote qube has is exported nowhere: no rules.
    for name, value in exported:
        r.c("feat.Set", "far", name, value)
    for name in {name for name, _ in exported}:
        r.c("feat.Remove", "far", name)
    r.forget("all")
    # Preloading: rules where a disposable can be preloaded from, and on dom0
    for value in ("1", "x", "", "-1"):
        for qube in ("work", "alone", "dvm"):  # no agent that could tell
            r.c("feat.Set", qube, "preload-dispvm-max", value, want=V)
        for qube in ("tmpl", "named", "far", "dom0"):  # dom0: there is no default one yet
            r.c("feat.Set", qube, "preload-dispvm-max", value)
    for qube in ("work", "dvm", "dom0"):
        for value in ("x", ".2.", "1 1", "nan", "inf"):
            r.c("feat.Set", qube, "preload-dispvm-delay", value, want=V)
        for value in ("", "0", "-1", "1.5", ".5", "5.", "1e1"):
            r.c("feat.Set", qube, "preload-dispvm-delay", value)
    r.c("feat.Set", "dom0", "preload-dispvm-threshold", "100")
    for value in ("x", "-5", "1.5"):
        r.c("feat.Set", "dom0", "preload-dispvm-threshold", value, want=V)
        r.c("feat.Set", "work", "preload-dispvm-threshold", value)
    r.c("sys.Set", arg="default_dispvm", payload="dvm")
    r.c("feat.Set", "dom0", "preload-dispvm-max", "2", want=V)
    r.c("feat.Set", "dom0", "preload-dispvm-max", "-1")  # what it has already
    r.c("sys.Set", arg="default_dispvm", payload="")
    for name in ("preload-dispvm-max", "preload-dispvm-delay", "preload-dispvm-threshold"):
        r.c("feat.Remove", "dom0", name)
    for name in ("preload-dispvm", "preload-dispvm-completed", "preload-dispvm-in-progress"):
        for qube in ("work", "dvm", "named", "dom0", "far"):
            r.c("feat.Set", qube, name, "1", want="PermissionDenied")
            r.c("feat.Remove", qube, name, want="PermissionDenied")
    r.c("feat.Set", "work", "deferred-netvm-original", "\u00e9", want=X)  # text comes first
    r.forget("all")
    # What others change: before the event of the cause
    r.c("feat.Set", "work", "boot-mode.active", "x")
    r.c("feat.Set", "far", "boot-mode.active", "x")
    r.c("feat.Set", "work", "service.meminfo-writer", "")
    r.c("feat.Set", "work", "service.meminfo-writer", "1")
    head, value = "work:domain-feature", "feature=service.meminfo-writer"
    deleted = (
        f"{head}-pre-delete:service.meminfo-writer {value}",
        f"{head}-delete:service.meminfo-writer {value}",
    )
    r.events(
        "all",
        "work:domain-feature-pre-set:boot-mode.active feature=boot-mode.active value=x",
        "work:property-reset:bootmode name=bootmode",
        "work:domain-feature-set:boot-mode.active feature=boot-mode.active value=x",
        "far:domain-feature-pre-set:boot-mode.active feature=boot-mode.active value=x",
        "far:domain-feature-set:boot-mode.active feature=boot-mode.active value=x",
        f"{head}-pre-set:service.meminfo-writer {value} value=",
        "work:property-pre-set:maxmem name=maxmem newvalue=0 oldvalue=4000",
        "work:property-set:maxmem name=maxmem newvalue=0 oldvalue=4000",
        *deleted,
        f"{head}-set:service.meminfo-writer {value} value=",
        f"{head}-pre-set:service.meminfo-writer {value} value=1",
        *(
            f"work:property-{kind}:maxmem name=maxmem oldvalue=0"
            for kind in ("pre-reset", "pre-del", "reset", "del")
        ),
        *deleted,
        f"{head}-set:service.meminfo-writer {value} value=1",
    )
    r.c("feat.Get", "work", "service.meminfo-writer", want=ABSENT)
    r.c("prop.Get", "work", "maxmem", want="=default=True type=int 4000")


def tags(r: Script) -> None:
    for qube in ("work", "tmpl", "alone", "named", "dom0", "far"):
        r.c("tag.Get", qube, "t", want="=0")
        r.c("tag.Set", qube, "t")
        r.c("tag.Set", qube, "t")
        r.c("tag.Get", qube, "t", want="=1")
        r.c("tag.Remove", qube, "t")
        r.c("tag.Remove", qube, "t", want="QubesTagNotFoundError")
        r.events("all", f"{qube}:domain-tag-add:t tag=t", f"{qube}:domain-tag-delete:t tag=t")
    for tag in ("a.b", "a+b", "a/b", "@x", "a:b", "a\n", "a$", "*", "created-by-a.b"):
        for call in ("Get", "Set", "Remove"):
            r.c(f"tag.{call}", "work", tag, want="QubesInvalidTagError")
    for tag in ("-", "_", "0", "A_b-9", "x" * 300, "created-by", "guivm-x", "disp-created-by-x"):
        r.c("tag.Set", "work", tag)
        r.c("tag.Get", "work", tag, want="=1")
        r.c("tag.Remove", "work", tag)
    r.c("tag.Set", "work", "t", "payload", want=X)
    r.c("tag.Set", "work", "", want=X)
    r.forget("all")
    # Whose it is
    for tag in ("created-by-nosuch", "created-by-"):
        r.c("tag.Set", "work", tag, want=REFUSED)
        r.c("tag.Get", "work", tag, want="=0")
        for call in ("Set", "Remove"):
            r.c(f"tag.{call}", "work", tag, src="mgmt", want="PermissionDenied")
    r.c("feat.Set", "mgmt", "tag-created-vm-with", "ta  a.b created-by-dom0 tb")
    r.c("feat.Set", "mgmt", "set-created-guivm", "net1")
    r.forget("all")
    r.c("tag.Set", "alone", "created-by-mgmt")
    r.c("tag.Set", "far", "created-by-mgmt")
    guivm = "name=guivm newvalue=net1 oldvalue=dom0"
    r.events(
        "all",
        "alone:domain-tag-add:ta tag=ta",
        "alone:domain-tag-add:tb tag=tb",
        f"alone:property-pre-set:guivm {guivm}",
        "alone:domain-tag-delete:guivm-dom0 tag=guivm-dom0",
        "alone:domain-tag-add:guivm-net1 tag=guivm-net1",
        f"alone:property-set:guivm {guivm}",
        "alone:domain-tag-add:created-by-mgmt tag=created-by-mgmt",
        "far:domain-tag-add:created-by-mgmt tag=created-by-mgmt",
    )
    r.c("prop.Reset", "alone", "guivm")
    r.c("tag.Set", "work", "backup-restore-in-progress")
    r.c("vm.Start", "work", want="QubesVMError")
    r.c("tag.Remove", "work", "backup-restore-in-progress")
    r.forget("all")


def labels(r: Script) -> None:
    label = "admin.label."
    for text, want in (("red", "=1"), ("1", "=1"), ("01", "=1"), ("8", "=8")):
        r.c(label + "Index", arg=text, want=want)
        r.c(label + "Remove", arg=text, want=X)
    unknown = "QubesLabelNotFoundError"
    for text in ("9", "0", "-1", "Red", "1.0", "label-1", "x" * 300):
        for call in ("Get", "Index", "Remove"):
            r.c(label + call, arg=text, want=unknown)
    for text in ("a+b", "a/b", "a\n"):
        for call in ("Get", "Index", "Remove"):
            r.c(label + call, arg=text, want="QubesInvalidLabelError")
        r.c(label + "Create", arg=text, payload="0x112233", want="QubesInvalidLabelError")
    for color in ("0XABCDEF", "abcdef", "#abcdef", "0xabcde", "0xabcdef0", "0xgggggg", " ", "red",
                  "0x+abcde", "0xab_cde", "0x abcde", "\u00e90xabcd", b"\xff" * 8, "0xabcdef\0",
                  "0x" + "\u0661" * 6):  # fmt: skip
        r.c(label + "Create", arg="new", payload=color, want="QubesInvalidLabelValueError")
        r.c(label + "Get", arg="new", want=unknown)
    r.c(label + "Create", arg="new", want=X)
    r.c(label + "Create", "work", "new", "0x112233", want=X)
    r.c(label + "Create", arg="new", payload="\t0xABcdef \n")
    r.c(label + "Get", arg="new", want="=0xABcdef")
    r.c(label + "Get", arg="9", want="=0xABcdef")
    r.c(label + "Create", arg="new", payload="0x112233", want="QubesLabelInUseError")
    r.c(label + "Create", arg="new", payload="bad", want="QubesInvalidLabelValueError")
    r.c(label + "Create", arg="10", payload="0x112233", want="QubesInvalidLabelError")
    for index, name in enumerate(("label-3", "a.b", "-x", "..", "1a"), start=10):
        r.c(label + "Create", arg=name, payload="0x112233")
        r.c(label + "Index", arg=name, want=f"={index}")
    # A property's value: label-N is an index, whatever labels are called.
    shown = "=default=False type=label "
    for value, name in (("new", "new"), ("9", "new"), ("label-9", "new"), ("label-3", "yellow"),
                        ("label-10", "label-3"), ("3", "yellow"), ("a.b", "a.b")):  # fmt: skip
        r.c("prop.Set", "work", "label", value)
        r.c("prop.Get", "work", "label", want=shown + name)
    for value in ("label-77", "label-", "77", "RED", ""):
        r.c("prop.Set", "work", "label", value, want=unknown)
    r.forget("all")
    r.c(label + "Remove", arg="a.b", want="QubesLabelInUseError")
    r.c(label + "Remove", arg="11", want="QubesLabelInUseError")
    r.events("all")
    r.c("prop.Set", "work", "label", "red")
    for name in ("new", "10", "a.b", "-x", ".."):
        r.c(label + "Remove", arg=name)
    r.c(label + "Create", arg="last", payload="0x112233")
    r.c(label + "Index", arg="last", want="=15")
    r.forget("all")


ACCEPTED_RULES = (
    ("\taction=accept\t", "action=accept"),
    ("action=drop\r\naction=accept\x0baction=drop", "action=drop\naction=accept\naction=drop"),
    ("dstports=00080 proto=tcp action=accept", "action=accept proto=tcp dstports=80-80"),
    ("action=accept dst4=1.2.3.5/24", "action=accept dst4=1.2.3.5/24"),
    ("action=accept dst4=1.2.3.4/08", "action=accept dst4=1.2.3.4/08"),
    ("action=accept dst4=0.0.0.0/0", "action=accept dst4=0.0.0.0/0"),
    ("action=accept dst6=1.2.3.4", "action=accept dst4=1.2.3.4/32"),
    ("action=accept dst4=2001:DB8::1", "action=accept dst6=2001:DB8::1/128"),
    ("action=accept dst6=::ffff:1.2.3.4", "action=accept dst6=::ffff:1.2.3.4/128"),
    ("action=accept dst6=::/0", "action=accept dst6=::/0"),
    ("action=accept dstname=a_b.c.", "action=accept dsthost=a_b.c."),
    *(
        (f"action=accept dst4={name}", f"action=accept dsthost={name}")
        for name in ("127.1", "1.2.3", "1.2.3.256", "12345", "-a", "_a", "", ".", "a..b", "x" * 300)
    ),
    ("action=accept proto=icmp icmptype=008", "action=accept proto=icmp icmptype=8"),
    ("action=accept expire=04000000000", "action=accept expire=04000000000"),
    ("action=accept expire=1\naction=drop", "action=drop"),
    ("action=accept comment=", "action=accept"),
    ("action=accept comment= a  b ", "action=accept comment= a  b "),
    (
        "action=drop specialtarget=dns dstports=1-2 proto=tcp dst4=10.0.0.0/8 expire=4000000000"
        " comment=all [of]: them; 1,2./-_",
        "action=drop expire=4000000000 dst4=10.0.0.0/8 proto=tcp specialtarget=dns dstports=1-2"
        " comment=all [of]: them; 1,2./-_",
    ),
)
REFUSED_RULES = (
    "\n", " ", "action=accept\n\n", "\naction=accept", "action=accept  proto=tcp",
    "action=accept\tproto=tcp", "action=accept action=drop", "proto=tcp", "action=ACCEPT",
    "action=accept dst4=1.2.3.4/33", "action=accept dst4=1.2.3.4/", "action=accept dst4=127/8",
    "action=accept dst4=1.2.3.4/24/24", "action=accept dst4=a.b/24", "action=accept dst6=::1/129",
    "action=accept dst6=fe80::1%eth0", "action=accept dst6=[::1]", "action=accept dsthost=A.b",
    "action=accept dst4=1.2.3.4 dst6=::1", "action=accept proto=tcp dstports=65536",
    "action=accept proto=tcp dstports=80-", "action=accept dstports=80",
    "action=accept proto=icmp icmptype=0008", "action=accept icmptype=8",
    "action=accept expire=-1", "action=accept comment=a=b", "action=accept comment=a!b",
    "comment=only", "action=accept xcomment=y", "action=accept\0",
)  # fmt: skip


def firewall(r: Script) -> None:
    wall = "vm.firewall."
    for qube in ("work", "tmpl", "alone", "dvm", "named"):
        r.c(wall + "Get", qube, want="=action=accept\n")
        r.c(wall + "Set", qube, payload="action=drop\n")
        r.c(wall + "Set", qube, payload="action=drop\n")
        r.c(wall + "Reload", qube)
        r.c(wall + "Set", qube, payload="action=maybe", want=REFUSED)
        r.c(wall + "Get", qube, want="=action=drop\n")
        r.events("all", *[f"{qube}:firewall-changed"] * 3)
    for call, payload in (("Get", ""), ("Set", "action=drop"), ("Reload", "")):
        r.c(wall + call, "dom0", payload=payload, want=X)
        r.c(wall + call, "far", payload=payload, want=REFUSED)
        r.c(wall + call, "nosuch", payload=payload, want="QubesVMNotFoundError")
        r.c(wall + call, "work", "x", payload, want=X)
    for payload, shown in ACCEPTED_RULES:
        r.c(wall + "Set", "work", payload=payload)
        r.c(wall + "Get", "work", want=f"={shown}\n")
        r.c(wall + "Reload", "work")
        r.c(wall + "Get", "work", want=f"={shown}\n")
    r.c(wall + "Set", "work", payload="action=drop\n")
    r.forget("all")
    for bad in REFUSED_RULES:
        r.c(wall + "Set", "work", payload=bad, want=REFUSED)
    r.c(wall + "Set", "work", want=X)
    r.c(wall + "Set", "work", payload=b"action=accept\xff", want=X)
    r.c(wall + "Get", "work", want="=action=drop\n")
    r.events("all")
    many = "".join(f"action=accept dst4=10.0.{i // 250}.{i % 250}/32\n" for i in range(1500))
    r.c(wall + "Set", "work", payload=many)
    r.c(wall + "Get", "work", want=f"={many}")
    r.c(wall + "Set", "work", payload="action=accept")
    r.forget("all")


def notes(r: Script) -> None:
    get, put = "vm.notes.Get", "vm.notes.Set"
    for qube in ("work", "tmpl", "alone", "named"):
        r.c(put, qube, payload=f"of {qube}\n")
        r.c(get, qube, want=f"=of {qube}\n")
    for payload, shown in (
        ("caf\u00e9 \u4e2d\u6587 \U0001f600", "caf\u00e9 \u4e2d\u6587 \U0001f600"),
        ("a\tb\nc\r\n", "a\tb\nc_\n"),
        ("\0\x01\x7f\x1b[31m\u0085", "____[31m_"),
        ("\u200b\u200e\u202e\u2066x\ufeff\u2028", "____x__"),
        ("%s \\n {}", "%s \\n {}"),
        ("x" * 65_000, "x" * 65_000),
    ):
        r.c(put, "work", payload=payload)
        r.c(get, "work", want=f"={shown}")
    for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80"):
        r.c(put, "work", payload=bad, want=X)
    for qube, want in (("dom0", X), ("far", REFUSED), ("nosuch", "QubesVMNotFoundError")):
        r.c(put, qube, payload="x", want=want)
        r.c(get, qube, want=want)
    r.c(put, "work", "x", "x", want=X)
    r.c(get, "work", payload="x", want=X)
    r.events("all")


def guests(r: Script) -> None:
    """What a running guest reads of its features, and its netvm of its rules."""
    for name in ("net2", "net1"):
        r.c("vm.Start", name)
    r.c("feat.Set", "work", "service.before", "")
    r.c("feat.Set", "work", "check-updates", "")
    r.c("feat.Set", "work", "vm-config.at-start", "v")
    r.c("vm.Start", "work")
    uuid = r.c("prop.Get", "work", "uuid", want="~.*").text.split(" ")[-1]
    net = r.c("prop.Get", "net1", "uuid", want="~.*").text.split(" ")[-1]
    folder = r.instance.settings.service_dir("domains") / "guest-keys"

    def keys(of: str, *heads: str) -> dict[str, str]:
        content: dict[str, str] = json.loads((folder / f"{of}.json").read_text())["keys"]
        return {key: value for key, value in content.items() if key.startswith(heads)}

    def reads(**added: str) -> None:
        want = {
            "/qubes-service/before": "0",
            "/qubes-service/qubes-update-check": "0",
            "/qubes-service/meminfo-writer": "1",
            "/vm-config/at-start": "v",
            **{f"/{key.replace('__', '/').replace('_', '-')}": v for key, v in added.items()},
        }
        heads = ("/qubes-service/", "/vm-config/", "/persist/", "/hash-app-dispvm/")
        r.same(str(sorted(keys(uuid, *heads).items())), str(sorted(want.items())))

    reads()
    r.c("feat.Set", "work", "service.now", "0")  # not empty: true
    r.c("feat.Set", "work", "vm-config.c", "a b")
    r.c("feat.Set", "work", "custom-persist.p", "file:user:user:0644:/etc/x")
    more = {"qubes_service__now": "1", "vm_config__c": "a b"}
    reads(**more, persist__p="file:user:user:0644:/etc/x")
    r.c("feat.Remove", "work", "custom-persist.p")
    r.c("feat.Set", "work", "custom-persist.p", "relative", want=V)
    r.c("feat.Set", "work", "vm-config.1", "x", want=V)
    r.c("feat.Set", "tmpl", "service.of-template", "1")
    reads(**more)
    r.c("feat.Set", "work", "service.now", "")
    r.c("feat.Remove", "work", "vm-config.c")
    reads(qubes_service__now="0")
    r.c("feat.Set", "work", "service.app-dispvm.x.desktop", "1")
    hashed = keys(uuid, "/hash-app-dispvm/")
    r.same(str(list(hashed.values())), "['x.desktop']")
    r.same(str({len(key.rpartition("/")[2]) for key in hashed}), "{43}")
    r.c("feat.Remove", "work", "service.app-dispvm.x.desktop")
    reads(qubes_service__now="0")
    # Tags and labels of a running qube are its record's alone.
    r.forget("all")
    r.c("tag.Set", "work", "running")
    r.c("prop.Set", "work", "label", "blue")
    r.events(
        "all",
        "work:domain-tag-add:running tag=running",
        "work:property-pre-set:label name=label newvalue=blue oldvalue=red",
        "work:property-reset:icon name=icon",
        "work:property-set:label name=label newvalue=blue oldvalue=red",
    )
    # Rules: numbered by their place, without names that would block the whole client.
    ip = r.c("prop.Get", "work", "ip", want="~.*").text.split(" ")[-1]
    lines = (
        "action=accept dst4=10.0.0.0/08 comment=zeros",
        "action=accept dsthost=127.1",
        "action=accept dst6=::1",
        "action=drop dsthost=a..b proto=udp",
        "action=accept expire=1",
        "action=accept dsthost=example.com expire=4000000000",
    )
    r.c("vm.firewall.Set", "work", payload="\n".join(lines))
    base = f"/qubes-firewall/{ip}"
    r.same(
        str(sorted(keys(net, base).items())),
        str(
            sorted(
                {
                    base: "",
                    f"{base}/policy": "drop",
                    f"{base}/0000": "action=accept dst4=10.0.0.0/8",
                    f"{base}/0003": "action=drop proto=udp",
                    f"{base}/0004": "action=accept dsthost=example.com",
                }.items()
            )
        ),
    )
    r.events("all", "work:firewall-changed")
    for name in ("work", "net1", "net2"):
        r.c("vm.Kill", name)


SECTIONS = (world, features, special_features, tags, labels, firewall, notes, guests)


def test_every_call_event_and_key() -> None:
    with started() as (instance, _, pool):
        script = Script(instance, pool, __file__)
        try:
            for section in SECTIONS:
                section(script)
        finally:
            script.close()
        assert not script.wrong, "\n".join(script.wrong)
