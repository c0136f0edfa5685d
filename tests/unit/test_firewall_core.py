"""Files, guest keys, translation and judgement: the firewall's pure part."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model.firewall_rules import Rule, parse_line, parse_lines
from bulkhead.model.refusal import Refusal
from services.firewall.core import (
    dns_message,
    flows,
    guest_keys,
    iptables,
    names,
    rules_file,
    ruleset,
)
from services.firewall.core.enforcement import KernelRefusal
from services.firewall.core.expiry import next_expiry, without_expired
from services.firewall.core.planned_table import PlannedTable
from services.firewall.core.resolv_conf import name_servers
from services.firewall.core.wire import LIMIT, Frames, WireError, pack

NOW = 1_000_000.0
A = "11111111-1111-4111-8111-111111111111"
B = "22222222-2222-4222-8222-222222222222"
NET = "99999999-9999-4999-8999-999999999999"


def target(uuid: str = A, interface: str = "bh20", ip: str = "10.137.0.20") -> ruleset.Target:
    return ruleset.make_target(uuid, "work", "boot", NET, "bh-net-6", interface, ip, "")


# ---- the file


def test_file_round_trip_keeps_order_and_text_and_drops_expired() -> None:
    rules = parse_lines(
        [
            "action=accept dst4=1.2.3.4/32 proto=tcp dstports=80 comment=a b",
            "action=drop expire=5",
            "action=accept dsthost=example.org expire=4000000000",
            "action=drop proto=icmp icmptype=8",
            "action=accept dst6=2001:DB8::1/64 specialtarget=dns",
        ]
    )
    data = rules_file.render(rules, NOW)
    assert rules_file.parse(data) == (rules[0], *rules[2:])
    text = data.decode()
    assert '<property name="dstports">80</property>' in text
    assert '<property name="dsthost">1.2.3.4/32</property>' in text
    assert text.index('name="action"') < text.index('name="comment"') < text.index('name="dsthost"')


def test_file_as_release_4_4_writes_it() -> None:
    data = b"""<firewall version="2">
  <rules>
    <rule>
      <properties>
        <property name="action">accept</property>
        <property name="dsthost">1.2.3.0/24</property>
        <property name="proto">tcp</property>
        <property name="dstports">80-90</property>
      </properties>
    </rule>
    <rule><properties><property name="action">drop</property></properties></rule>
  </rules>
</firewall>
"""
    assert rules_file.parse(data) == (
        parse_line("action=accept dst4=1.2.3.0/24 proto=tcp dstports=80-90"),
        Rule("drop"),
    )


def test_empty_list_is_a_file_without_rules() -> None:
    assert rules_file.parse(rules_file.render((), NOW)) == ()


def test_file_with_an_empty_host_name_is_that_of_an_earlier_set() -> None:
    rules = parse_lines(["action=accept dsthost=", "action=drop dst4=10.0.0.0/08"])
    assert rules_file.parse(rules_file.render(rules, NOW)) == rules


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not xml",
        b"<firewall version='3'><rules/></firewall>",
        b"<firewall version='2'/>",
        b"<other version='2'><rules/></other>",
        b"<firewall version='2'><rules><rule/></rules></firewall>",
        b"<firewall version='2'><rules><rule><properties><property name='action'>x</property>"
        b"</properties></rule></rules></firewall>",
        b"<firewall version='2'><rules><rule><properties><property name='dsthost'>A</property>"
        b"<property name='action'>accept</property></properties></rule></rules></firewall>",
        b"<firewall><rule address='1.2.3.4'/></firewall>",
        b"<firewall policy='perhaps'/>",
        b"<!DOCTYPE firewall [<!ENTITY a 'accept'>]><firewall version='2'><rules/></firewall>",
        b"x" * (rules_file.SIZE_LIMIT + 1),
    ],
)
def test_file_with_anything_else_is_refused_whole(data: bytes) -> None:
    with pytest.raises(rules_file.RulesFileError):
        rules_file.parse(data)


def test_version_1_allow() -> None:
    data = b"""<firewall policy="allow" dns="deny" icmp="allow">
      <rule address="1.2.3.4" proto="tcp" port="80"/>
      <rule address="10.0.0.0" netmask="8" proto="udp" port="53" toport="60"/>
      <rule address="example.org" port="443" expire="4000000000"/>
      <rule address="5.6.7.8" netmask="0" proto="any"/>
    </firewall>"""
    assert rules_file.parse(data) == parse_lines(
        [
            "action=drop specialtarget=dns",
            "action=accept proto=icmp",
            "action=drop dst4=1.2.3.4/32 proto=tcp dstports=80",
            "action=drop dst4=10.0.0.0/8 proto=udp dstports=53-60",
            "action=drop dsthost=example.org proto=tcp dstports=443 expire=4000000000",
            "action=drop dst4=5.6.7.8/32",
            "action=accept",
        ]
    )


def test_version_1_deny_has_no_final_accept_and_inherits_the_policy() -> None:
    data = b'<firewall policy="deny" version="1"><rule address="1.2.3.4"/></firewall>'
    assert rules_file.parse(data) == parse_lines(
        ["action=drop specialtarget=dns", "action=drop proto=icmp", "action=accept dst4=1.2.3.4"]
    )


# ---- expiry


def test_next_expiry_is_the_nearest_future_end() -> None:
    rules = parse_lines(
        ["action=accept expire=999999", "action=drop expire=1000500", "action=drop expire=1000100"]
    )
    assert next_expiry(rules, NOW) == 1000100
    assert next_expiry(rules, 2_000_000) is None
    assert without_expired(rules, NOW) == rules[1:]


# ---- guest keys


def test_guest_keys_are_numbered_with_gaps_and_the_base_comes_last() -> None:
    rules = parse_lines(
        [
            "action=accept dst4=1.2.3.4",
            "action=drop expire=5",
            "action=accept dst6=::1",
            "action=accept dsthost=example.org comment=x",
            "action=drop",
        ]
    )
    base = "/qubes-firewall/10.137.0.20"
    assert guest_keys.tree(rules, "10.137.0.20", NOW) == (
        (f"{base}/policy", "drop"),
        (f"{base}/0000", "action=accept dst4=1.2.3.4/32"),
        (f"{base}/0003", "action=accept dsthost=example.org"),
        (f"{base}/0004", "action=drop"),
        (base, ""),
    )
    six = guest_keys.tree(rules, "fd09::14", NOW)
    assert [path.rpartition("/")[2] for path, _ in six] == [
        "policy",
        "0002",
        "0003",
        "0004",
        "fd09::14",
    ]


def test_guest_keys_leave_out_names_that_would_block_the_whole_client() -> None:
    rules = parse_lines(
        [
            "action=accept dsthost=127.1 proto=tcp",
            "action=drop dsthost=a..b proto=udp",
            "action=accept dst4=10.0.0.0/08",
        ]
    )
    base = "/qubes-firewall/10.137.0.20"
    assert guest_keys.tree(rules, "10.137.0.20", NOW) == (
        (f"{base}/policy", "drop"),
        (f"{base}/0001", "action=drop proto=udp"),
        (f"{base}/0002", "action=accept dst4=10.0.0.0/8"),
        (base, ""),
    )


def test_guest_keys_for_unreadable_rules_let_nothing_pass() -> None:
    assert guest_keys.trees(None, ("10.137.0.20", ""), NOW) == (
        "/qubes-firewall/10.137.0.20/policy=drop",
        "/qubes-firewall/10.137.0.20=",
    )


# ---- iptables text; what the tool makes of it is an integration test


def _text(lines: list[str]) -> tuple[list[str], bool]:
    entries, whole = iptables.keys(parse_lines(lines), "u", "10.137.0.20", 7, NOW)
    (header, _), (path, text), last = entries
    assert (header, path) == ("/qubes-iptables-header", "/qubes-iptables-domainrules/7")
    assert last == ("/qubes-iptables", "reload")
    assert all(len(value) <= 3072 for _, value in entries)
    head, tail = text.split("-A q7 ", 1)
    assert head == "# u\n# 10.137.0.20\n*filter\n:q7 - [0:0]\n-A clients -s 10.137.0.20 -j q7\n"
    rules = tail.removesuffix("\nCOMMIT\n").split("\n-A q7 ")
    assert rules.pop() == "-j refuse"
    return rules, whole


def test_iptables_text_holds_the_rules_in_order_and_no_comment() -> None:
    lines = [
        "action=accept dst4=1.2.3.5/024 proto=tcp dstports=80-90 comment=-j ACCEPT",
        "action=accept expire=5",
        "action=drop dsthost=example.org proto=icmp icmptype=3",
        "action=accept dst6=::1",
    ]
    assert _text(lines) == (
        [
            "-d 1.2.3.0/24 -p tcp --dport 80:90 -j ACCEPT",
            "-d example.org -p icmp --icmp-type 3 -j refuse",
        ],
        True,
    )


@pytest.mark.parametrize(
    ("line", "accept", "drop"),
    [
        # What cannot be said opens nothing where it accepts, and closes more where it drops.
        ("dsthost=127.1 proto=udp", [], ["-p udp -j refuse"]),
        ("dsthost=-j", [], ["-j refuse"]),
        ("proto=icmp icmptype=255", [], ["-p icmp -j refuse"]),
        ("specialtarget=dns dst4=10.0.0.1", ["-d 10.0.0.1/32 -j dns-accept"], ["-j dns-refuse"]),
        # What can match no packet is left out.
        ("specialtarget=dns dst6=::1", [], []),
        ("specialtarget=dns proto=icmp", [], []),
        ("specialtarget=dns proto=tcp dstports=53-54", [], []),
        (
            "specialtarget=dns proto=tcp dstports=53",
            ["-p tcp -j dns-accept"],
            ["-p tcp -j dns-refuse"],
        ),
    ],
)
def test_iptables_text_of_what_iptables_cannot_say(
    line: str, accept: list[str], drop: list[str]
) -> None:
    assert _text([f"action=accept {line}"])[0] == accept
    assert _text([f"action=drop {line}"])[0] == drop


def test_iptables_text_that_is_too_long_lets_nothing_pass() -> None:
    line = "action=accept dst4=200.200.200.0/24 proto=tcp dstports=10000-20000"
    fits = next(n for n in range(1, 999) if not _text([line] * (n + 1))[1])
    assert fits > 30
    assert len(_text([line] * fits)[0]) == fits
    assert _text([line] * (fits + 1)) == ([], False)
    assert iptables.keys(None, "u", "10.137.0.20", 7, NOW)[1] is False


# ---- translation

ADDRESSES = {"example.org": ("192.0.2.7", "192.0.2.8", "2001:db8::7"), "four.org": ("192.0.2.9",)}


@pytest.mark.parametrize(
    ("line", "matches"),
    [
        ("action=accept", ("",)),
        ("action=accept proto=tcp", ("meta l4proto 6",)),
        ("action=drop proto=udp dstports=53", ("udp dport 53",)),
        ("action=accept proto=tcp dstports=80-90", ("tcp dport 80-90",)),
        ("action=accept dst4=1.2.3.5/24", ("ip daddr 1.2.3.0/24",)),
        ("action=accept dst4=0.0.0.0/0", ("ip daddr 0.0.0.0/0",)),
        ("action=accept dst6=::1 proto=tcp dstports=1", ("ip6 daddr ::1/128 tcp dport 1",)),
        ("action=drop proto=icmp", ("meta l4proto 1", "meta l4proto 58")),
        ("action=drop proto=icmp icmptype=8", ("icmp type 8", "icmpv6 type 8")),
        (
            "action=drop proto=icmp icmptype=8 dst4=1.2.3.4",
            ("ip daddr 1.2.3.4/32 icmp type 8",),
        ),
        (
            "action=accept dsthost=example.org proto=tcp dstports=443",
            (
                "ip daddr { 192.0.2.7, 192.0.2.8 } tcp dport 443",
                "ip6 daddr { 2001:db8::7 } tcp dport 443",
            ),
        ),
        ("action=accept dsthost=four.org", ("ip daddr { 192.0.2.9 }",)),
        (
            "action=accept specialtarget=dns",
            (
                "ip daddr @dns4 tcp dport 53",
                "ip daddr @dns4 udp dport 53",
                "ip6 daddr @dns6 tcp dport 53",
                "ip6 daddr @dns6 udp dport 53",
            ),
        ),
        (
            "action=accept specialtarget=dns proto=udp dstports=53 dst4=10.139.1.1",
            ("ip daddr 10.139.1.1/32 ip daddr @dns4 udp dport 53",),
        ),
        ("action=accept specialtarget=dns proto=udp dstports=54", ()),
        ("action=accept specialtarget=dns proto=icmp", ()),
        ("action=accept dsthost=unknown.org", ()),
        ("action=drop dsthost=unknown.org proto=tcp", ("meta l4proto 6",)),
        ("action=accept dsthost=1.2.3", ()),
        ("action=accept dsthost=", ()),
        ("action=drop dsthost=unknown..org proto=tcp", ("meta l4proto 6",)),
        ("action=accept dst4=10.1.0.0/08", ("ip daddr 10.0.0.0/8",)),
    ],
)
def test_translation(line: str, matches: tuple[str, ...]) -> None:
    compiled = ruleset.compile_rule(parse_line(line), ADDRESSES)
    assert compiled.matches == matches
    assert compiled.inert is (matches == ())
    assert bool(compiled.why) is ("unknown" in line or matches == ())


def test_strict_makes_every_rule_inert_when_one_name_is_unknown() -> None:
    rules = parse_lines(["action=accept", "action=accept dsthost=unknown.org"])
    assert all(item.inert for item in ruleset.compile_rules(rules, ADDRESSES, strict=True))
    known = parse_lines(["action=accept", "action=accept dsthost=four.org"])
    assert not any(item.inert for item in ruleset.compile_rules(known, ADDRESSES, strict=True))


def test_a_chain_ends_with_a_reject_and_carries_its_digest() -> None:
    table = PlannedTable()
    table.execute(ruleset.base_commands("up0", ("9.9.9.9",)))
    compiled = ruleset.compile_rules(parse_lines(["action=accept dst4=1.2.3.4"]), {})
    done = ruleset.apply(target(), compiled)
    table.execute(done.commands)
    own = ruleset.tag(A)
    assert table.chains[f"q_{own}"] == (
        'ip daddr 1.2.3.4/32 counter accept comment "r0"',
        'counter reject with icmpx admin-prohibited comment "policy"',
    )
    assert table.mark(own) == done.marks[own]
    assert table.elements("by_interface") == {'"bh20"': f"goto q_{own}"}
    assert table.elements("source4") == {'"bh20" . 10.137.0.20': ""}


def test_apply_and_withdraw_may_be_repeated_and_leave_nothing() -> None:
    table = PlannedTable()
    table.execute(ruleset.base_commands("", ()))
    empty = (table.chains, table.elements("clients"), table.elements("address4"))
    compiled = ruleset.compile_rules(parse_lines(["action=accept"]), {})
    for _ in range(2):
        table.execute(ruleset.apply(target(), compiled).commands)
    for _ in range(2):
        table.execute(ruleset.withdraw(target()).commands)
    assert (table.chains, table.elements("clients"), table.elements("address4")) == empty


def test_a_new_place_replaces_the_old_one_and_evicts_who_is_there() -> None:
    table = PlannedTable()
    compiled = ruleset.compile_rules(parse_lines(["action=accept"]), {})
    other = target(B, "bh21", "10.137.0.21")
    table.execute(ruleset.define("", (), [(target(), compiled), (other, compiled)]).commands)
    moved = target(A, "bh21", "10.137.0.22")
    done = ruleset.apply(moved, compiled, (target(), other))
    table.execute(done.commands)
    assert table.elements("by_interface") == {'"bh21"': f"goto q_{ruleset.tag(A)}"}
    assert table.elements("source4") == {'"bh21" . 10.137.0.22': ""}
    assert f"q_{ruleset.tag(B)}" not in table.chains
    assert done.marks[ruleset.tag(B)] == ""


def test_planned_table_says_no_where_the_kernel_does_and_changes_nothing() -> None:
    table = PlannedTable()
    with pytest.raises(KernelRefusal):
        table.execute(ruleset.apply(target(), ()).commands)
    table.execute(ruleset.base_commands("", ()))
    before = table.chains
    for bad in (
        "delete chain inet bulkhead q_missing",
        'delete element inet bulkhead clients { "nobody" }',
        "add rule inet bulkhead forward ip daddr @nowhere accept",
        "add rule inet bulkhead nowhere accept",
        "delete chain inet bulkhead forward",
    ):
        with pytest.raises(KernelRefusal):
            table.execute(["add chain inet bulkhead q_new", bad])
        assert table.chains == before


@pytest.mark.parametrize(
    "command",
    [
        "add table inet other",
        "add rule inet bulkheads forward accept",
        "flush ruleset",
        'include "/etc/passwd"',
        "add rule inet bulkhead forward accept; add table ip x",
        "add rule inet bulkhead forward accept\nadd table ip x",
        'add rule inet bulkhead forward accept comment "a" ; flush ruleset ; comment "b"',
        'add rule inet bulkhead forward accept comment "open',
        "add rule inet bulkhead forward accept }; flush ruleset; {",
        "add rule inet bulkhead forward $x",
        "add rule inet bulkhead forward \u00e4",
        "list table inet bulkhead",
        "",
    ],
)
def test_worker_refuses_commands_that_are_not_on_its_table(command: str) -> None:
    with pytest.raises(Refusal):
        ruleset.check_command(command)


def test_every_command_that_is_made_is_accepted_by_the_worker() -> None:
    compiled = ruleset.compile_rules(
        parse_lines(["action=accept dsthost=example.org", "action=drop specialtarget=dns"]),
        ADDRESSES,
    )
    done = ruleset.define("up0", ("9.9.9.9", "2001:db8::53"), [(target(), compiled)])
    for command in (*done.commands, *ruleset.withdraw(target()).commands):
        assert ruleset.check_command(command) == command


@pytest.mark.parametrize(
    "changes",
    [
        {"untrusted_uuid": "x"},
        {"untrusted_interface": 'a" }'},
        {"untrusted_interface": "a" * 16},
        {"untrusted_interface": ""},
        {"untrusted_ip": "10.0.0.1; drop"},
        {"untrusted_ip": "::1"},
        {"untrusted_ip6": "10.0.0.1"},
        {"untrusted_ip6": "fe80::1%eth0"},
        {"untrusted_ip": "10.0.0.1/24"},
    ],
)
def test_target_with_hostile_parts_is_refused(changes: dict[str, str]) -> None:
    good = {
        "untrusted_uuid": A,
        "qube": "work",
        "boot_id": "b",
        "netvm_uuid": NET,
        "namespace": "bh-net-6",
        "untrusted_interface": "bh20",
        "untrusted_ip": "10.137.0.20",
        "untrusted_ip6": "",
    }
    ruleset.make_target(**good)
    with pytest.raises(Refusal):
        ruleset.make_target(**{**good, **changes})


# ---- judgement of flows

_LINES = [
    "action=accept",
    "action=drop dst4=10.0.0.0/8",
    "action=accept dst4=10.1.0.0/16 proto=tcp",
    "action=accept proto=tcp dstports=80-443",
    "action=drop proto=udp dstports=53",
    "action=accept dsthost=example.org",
    "action=accept dsthost=unknown.org",
    "action=drop dsthost=unknown.org proto=tcp",
    "action=accept specialtarget=dns",
    "action=accept proto=icmp icmptype=8",
    "action=drop dst6=2001:db8::/32",
]
_DNS = ("10.139.1.1", "2001:db8::53")


def _matches(expression: str, flow: flows.Flow) -> bool:
    """What the kernel would do with one expression of ours, by its text alone."""
    words = iter(expression.replace("{ ", "{").replace(" }", "}").replace(", ", ",").split())
    destination = ipaddress.ip_address(flow.destination)
    for word in words:
        if word in ("ip", "ip6"):
            assert next(words) == "daddr"
            if destination.version != (4 if word == "ip" else 6):
                return False
            wanted = next(words)
            if wanted.startswith("@"):
                nets = [ipaddress.ip_network(a) for a in _DNS]
            else:
                nets = [ipaddress.ip_network(a) for a in wanted.strip("{}").split(",")]
            if not any(n.version == destination.version and destination in n for n in nets):
                return False
        elif word == "meta":
            assert next(words) == "l4proto"
            if flow.protocol != int(next(words)):
                return False
        elif word in ("tcp", "udp"):
            assert next(words) == "dport"
            first, _, last = next(words).partition("-")
            if flow.protocol != (6 if word == "tcp" else 17) or flow.port is None:
                return False
            if not int(first) <= flow.port <= int(last or first):
                return False
        else:
            assert word in ("icmp", "icmpv6") and next(words) == "type"
            if flow.protocol != (1 if word == "icmp" else 58) or flow.icmptype != int(next(words)):
                return False
    return True


@given(
    st.lists(st.sampled_from(_LINES), max_size=5),
    st.sampled_from(
        ["10.1.2.3", "10.139.1.1", "192.0.2.7", "8.8.8.8", "2001:db8::7", "2001:db8::53", "fd00::1"]
    ),
    st.sampled_from([("tcp", 80), ("tcp", 100), ("tcp", 53), ("udp", 53), ("udp", 9), ("icmp", 8)]),
)
def test_judgement_agrees_with_the_translation(
    lines: list[str], destination: str, kind: tuple[str, int]
) -> None:
    proto, number = kind
    if proto == "icmp":
        six = ":" in destination
        flow = flows.Flow("10.137.0.20", destination, 58 if six else 1, None, number)
    else:
        flow = flows.Flow("10.137.0.20", destination, 6 if proto == "tcp" else 17, number)
    rules = parse_lines(lines)
    expected = False
    for item in ruleset.compile_rules(rules, ADDRESSES):
        if any(_matches(expression, flow) for expression in item.matches):
            expected = item.rule.action == "accept"
            break
    assert flows.passes(flow, rules, ADDRESSES, _DNS) is expected


def test_a_port_range_is_compared_as_numbers() -> None:
    rules = parse_lines(["action=accept proto=tcp dstports=80-443"])
    assert flows.passes(flows.Flow("10.1.1.1", "1.1.1.1", 6, 100), rules, {}, ())


# ---- names, resolvers, frames


def test_an_address_stays_for_a_while_and_a_failure_changes_nothing() -> None:
    table = names.NameTable()
    table.want(["a.org"])
    assert table.due(0) == ("a.org",)
    assert table.answer("a.org", ("192.0.2.1",), 60, 0)
    assert table.due(59) == () and table.due(60) == ("a.org",)
    assert table.answer("a.org", ("192.0.2.2",), 60, 60)
    assert table.addresses(["a.org"]) == {"a.org": ("192.0.2.1", "192.0.2.2")}
    table.failed("a.org", "silence", 100)
    assert table.error("a.org") == "silence"
    assert table.addresses(["a.org"])["a.org"] == ("192.0.2.1", "192.0.2.2")
    assert table.answer("a.org", ("192.0.2.2",), 60, names.HOLD_S + 1)
    assert table.addresses(["a.org"]) == {"a.org": ("192.0.2.2",)}
    table.keep_only([])
    assert table.next_due() is None and not table.answer("a.org", ("192.0.2.9",), 1, 1)


def test_time_to_live_and_addresses_are_bounded() -> None:
    table = names.NameTable()
    table.want(["a.org"])
    table.answer("a.org", [f"10.0.{n // 256}.{n % 256}" for n in range(1000)], 0, 0)
    assert len(table.addresses(["a.org"])["a.org"]) == names.ADDRESSES_LIMIT
    assert table.next_due() == names.TTL_LEAST_S
    table.answer("a.org", (), 10**9, 0)
    assert table.next_due() == names.TTL_MOST_S


def _answer(number: int, name: str, kind: int, records: list[tuple[str, int, int, bytes]]) -> bytes:
    data = bytearray(dns_message.question(number, name, kind))
    data[2:4] = b"\x81\x80"
    data[6:8] = len(records).to_bytes(2, "big")
    for owner, record, ttl, body in records:
        owner_bytes = dns_message.question(0, owner, 1)[12:-4]
        data += owner_bytes + record.to_bytes(2, "big") + b"\0\1" + ttl.to_bytes(4, "big")
        data += len(body).to_bytes(2, "big") + body
    return bytes(data)


def test_dns_answer_follows_aliases_and_takes_the_least_ttl() -> None:
    alias = dns_message.question(0, "b.org", 1)[12:-4]
    data = _answer(
        7,
        "a.org",
        dns_message.A,
        [
            ("a.org", dns_message.CNAME, 50, alias),
            ("b.org", dns_message.A, 300, b"\x01\x02\x03\x04"),
            ("evil.org", dns_message.A, 300, b"\x06\x06\x06\x06"),
        ],
    )
    assert dns_message.parse(data, 7, "a.org", dns_message.A) == dns_message.Answer(
        ("1.2.3.4",), 50
    )


@pytest.mark.parametrize(
    ("number", "name", "kind"), [(8, "a.org", 1), (7, "b.org", 1), (7, "a.org", 28)]
)
def test_dns_answer_to_another_question_is_refused(number: int, name: str, kind: int) -> None:
    data = _answer(7, "a.org", 1, [("a.org", 1, 5, b"\x01\x02\x03\x04")])
    with pytest.raises(dns_message.DnsError):
        dns_message.parse(data, number, name, kind)


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
def test_dns_parser_survives_anything(junk: bytes, at: int, value: int) -> None:
    good = bytearray(_answer(7, "a.org", 1, [("a.org", 1, 5, b"\x01\x02\x03\x04")]))
    good[min(at, len(good) - 1)] = value
    for data in (junk, bytes(good), bytes(good)[:at]):
        try:
            dns_message.parse(data, 7, "a.org", 1)
        except dns_message.DnsError:
            pass


def test_name_servers_are_plain_addresses() -> None:
    servers = ("9.9.9.9", "fe80::1%eth0", "bad", "2001:db8::53")
    text = "# x\nsearch a\n" + "".join(f"nameserver {server}\n" for server in servers)
    assert name_servers(text) == ("9.9.9.9", "2001:db8::53")


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), max_size=4), st.data()
)
def test_frames_come_out_whole_however_they_are_cut(
    messages: list[dict[str, int]], data: st.DataObject
) -> None:
    stream = b"".join(pack(message) for message in messages)
    cut = data.draw(st.integers(0, len(stream)))
    frames = Frames()
    assert frames.feed(stream[:cut]) + frames.feed(stream[cut:]) == messages


@pytest.mark.parametrize("data", [(LIMIT + 1).to_bytes(4, "big"), b"\0\0\0\1x", b"\0\0\0\2[]"])
def test_frames_refuse_what_is_no_message(data: bytes) -> None:
    with pytest.raises(WireError):
        Frames().feed(data)


@pytest.mark.parametrize(
    ("old", "new", "sure"),
    [
        (["action=accept"], ["action=accept"], True),
        ([], ["action=accept dst4=1.2.3.4"], True),
        (["action=accept"], [], False),
        (["action=drop"], [], True),
        (["action=accept"], ["action=drop dst4=1.2.3.4", "action=accept"], False),
        (["action=drop dst4=1.2.3.4", "action=accept"], ["action=accept"], True),
        (["action=accept dst4=1.2.3.4"], ["action=accept dst4=1.2.3.5"], False),
        (
            ["action=accept dst4=1.2.3.4", "action=drop"],
            ["action=accept dst4=1.2.3.5", "action=accept dst4=1.2.3.4", "action=drop"],
            True,
        ),
        (["action=drop", "action=accept"], ["action=accept", "action=drop"], False),
    ],
)
def test_a_change_that_only_loosens_is_known(old: list[str], new: list[str], sure: bool) -> None:
    before = ruleset.compile_rules(parse_lines(old), {})
    after = ruleset.compile_rules(parse_lines(new), {})
    assert flows.only_loosened(before, after) is sure


@given(
    st.lists(st.sampled_from(_LINES), max_size=5),
    st.lists(st.sampled_from(_LINES), max_size=5),
    st.sampled_from(["10.1.2.3", "10.139.1.1", "192.0.2.7", "8.8.8.8", "2001:db8::7", "fd00::1"]),
    st.sampled_from([("tcp", 80), ("tcp", 53), ("udp", 53), ("icmp", 8)]),
)
def test_no_flow_ends_by_a_change_that_only_loosens(
    old: list[str], new: list[str], destination: str, kind: tuple[str, int]
) -> None:
    proto, number = kind
    before, after = parse_lines(old), parse_lines(new)
    compiled = [ruleset.compile_rules(rules, ADDRESSES) for rules in (before, after)]
    if not flows.only_loosened(*compiled):
        return
    numbers = {"tcp": 6, "udp": 17, "icmp": 58 if ":" in destination else 1}
    flow = flows.Flow(
        "10.137.0.20",
        destination,
        numbers[proto],
        None if proto == "icmp" else number,
        number if proto == "icmp" else None,
    )
    if flows.passes(flow, before, ADDRESSES, _DNS):
        assert flows.passes(flow, after, ADDRESSES, _DNS)
