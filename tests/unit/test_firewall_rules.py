"""The grammar of firewall rules: what is accepted, refused and printed."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model import firewall_rules as fr
from bulkhead.model.refusal import Refusal

NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("text", "key", "normal"),
    [
        ("1.2.3.4", "dst4", "1.2.3.4/32"),
        ("1.2.3.0/24", "dst4", "1.2.3.0/24"),
        ("1.2.3.5/24", "dst4", "1.2.3.5/24"),
        ("0.0.0.0/0", "dst4", "0.0.0.0/0"),
        ("2001:db8::1", "dst6", "2001:db8::1/128"),
        ("2001:DB8::1", "dst6", "2001:DB8::1/128"),
        ("::ffff:1.2.3.4", "dst6", "::ffff:1.2.3.4/128"),
        ("::/0", "dst6", "::/0"),
        ("example.org", "dsthost", "example.org"),
        ("example.org.", "dsthost", "example.org."),
        ("_srv.example.org", "dsthost", "_srv.example.org"),
        ("a", "dsthost", "a"),
        ("1.2.3.4/08", "dst4", "1.2.3.4/08"),
        ("2001:db8::/0064", "dst6", "2001:db8::/0064"),
        ("", "dsthost", ""),
        ("127.1", "dsthost", "127.1"),
        ("1.2.3", "dsthost", "1.2.3"),
        ("1.2.3.256", "dsthost", "1.2.3.256"),
        ("-leading.org", "dsthost", "-leading.org"),
        ("a..b", "dsthost", "a..b"),
        ("x" * 64 + ".org", "dsthost", "x" * 64 + ".org"),
        ("x" * 300, "dsthost", "x" * 300),
    ],
)
def test_destination(text: str, key: str, normal: str) -> None:
    for name in ("dsthost", "dst4", "dst6", "dstname"):
        rule = fr.parse_line(f"action=accept {name}={text}")
        assert rule.destination == fr.Destination(key, normal)
        assert fr.api_line(rule) == f"action=accept {key}={normal}"


@pytest.mark.parametrize(
    "text",
    [
        "1.2.3.4/33",
        "1.2.3.4/033",
        "1.2.3.4/" + "0" * 20 + "1",
        "1.2.3.4/-1",
        "1.2.3.4/",
        "1.2.3.4/a",
        "1.2.3.4/24/24",
        "2001:db8::/129",
        "127/8",
        "example.org/24",
        "Example.org",
        "exa mple.org",
        "fe80::1%eth0",
        "host;drop",
        "1.2.\n3.4",
        "x" * 4000,
        "\u0661.2.3.4",
    ],
)
def test_destination_refused(text: str) -> None:
    with pytest.raises(Refusal) as refused:
        fr.parse_line(f"action=accept dsthost={text}")
    assert refused.value.reason == "INVALID_RULE"


def test_host_bits_are_kept_in_the_text_and_ignored_in_the_network() -> None:
    destination = fr.parse_destination("1.2.3.5/24")
    assert destination.text == "1.2.3.5/24"
    assert str(destination.network()) == "1.2.3.0/24"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("example.org", ""),
        ("example.org.", ""),
        ("_srv.example.org", ""),
        ("4.example.org", ""),
        (".".join(["abcdefg"] * 31), ""),
        ("1.2.3.4/08", ""),
        ("::1", ""),
        ("", "empty"),
        (".", "no host name"),
        ("a..b", "no host name"),
        ("-a.org", "no host name"),
        ("127.1", "ends in a number"),
        ("1.2.3.256.", "ends in a number"),
        ("x" * 64 + ".org", "longer"),
        (".".join(["abcdefgh"] * 30), "longer"),
    ],
)
def test_names_that_nobody_can_look_up(text: str, problem: str) -> None:
    found = fr.parse_destination(text).problem()
    assert problem in found and bool(problem) == bool(found)


def test_zeros_before_a_prefix_length_are_kept_but_not_for_a_guest() -> None:
    rule = fr.parse_line("action=accept dst4=10.0.0.0/08 comment=x")
    assert fr.api_line(rule) == "action=accept dst4=10.0.0.0/08 comment=x"
    assert fr.guest_value(rule) == "action=accept dst4=10.0.0.0/8"
    assert rule.destination is not None and str(rule.destination.network()) == "10.0.0.0/8"
    assert ("dsthost", "10.0.0.0/08") in fr.properties(rule)


@pytest.mark.parametrize(
    "line",
    [
        "action=accept",
        "action=drop",
        "action=accept proto=tcp",
        "action=accept proto=icmp icmptype=8",
        "action=drop specialtarget=dns",
        "action=accept expire=4000000000 dst4=1.2.3.4/32 proto=tcp dstports=80-90 comment=a b",
        "action=accept dsthost=example.org proto=udp dstports=0-65535",
        "action=accept proto=tcp specialtarget=dns dstports=53-53",
        "action=accept dsthost=",
        "action=accept comment=[a]: b;c,d./_-",
    ],
)
def test_a_printed_line_parses_to_the_same_rule(line: str) -> None:
    rule = fr.parse_line(line)
    assert fr.api_line(rule) == line
    assert fr.parse_line(fr.api_line(rule)) == rule


@pytest.mark.parametrize(
    "line",
    [
        "",
        " ",
        "proto=tcp",
        "comment=only",
        "action=accept  proto=tcp",
        "action=reject",
        "action=ACCEPT",
        "action",
        "action=accept action=accept",
        "action=accept dst4=1.2.3.4 dst6=::1",
        "action=accept dst4=1.2.3.4 dsthost=a.b",
        "action=accept unknown=1",
        "action=accept proto=sctp",
        "action=accept proto=",
        "action=accept specialtarget=ntp",
        "action=accept dstports=80",
        "action=accept proto=icmp dstports=80",
        "action=accept proto=tcp dstports=80-",
        "action=accept proto=tcp dstports=-80",
        "action=accept proto=tcp dstports=90-80",
        "action=accept proto=tcp dstports=65536",
        "action=accept proto=tcp dstports=80,443",
        "action=accept proto=tcp icmptype=8",
        "action=accept icmptype=8",
        "action=accept proto=icmp icmptype=256",
        "action=accept proto=icmp icmptype=0008",
        "action=accept proto=icmp icmptype=-1",
        "action=accept expire=soon",
        "action=accept expire=-1",
        "action=accept expire=1.5",
        "action=accept comment=a=b",
        "action=accept comment=<b>",
        "action=accept comment=a\tb",
        "action=accept comment=\u00e4",
        "action=accept dpi=http",
        "action=accept default=accept",
    ],
)
def test_line_refused(line: str) -> None:
    with pytest.raises(Refusal) as refused:
        fr.parse_line(line)
    assert refused.value.reason == "INVALID_RULE"


def test_key_order_is_free_and_trailing_space_and_empty_comment_are_ignored() -> None:
    expected = "action=accept dst4=1.2.3.4/32 proto=tcp dstports=80-80"
    for line in (
        "dstports=80 proto=tcp dst4=1.2.3.4 action=accept",
        "proto=tcp action=accept dstports=80-80 dsthost=1.2.3.4/32 ",
        "proto=tcp action=accept dstports=80-80 dsthost=1.2.3.4/32 comment=",
        "\tproto=tcp action=accept dstports=00080 dsthost=1.2.3.4/32\t",
    ):
        assert fr.api_line(fr.parse_line(line)) == expected


def test_parse_lines_names_the_bad_one() -> None:
    with pytest.raises(Refusal) as refused:
        fr.parse_lines(["action=accept", "action=maybe", "action=drop"])
    assert refused.value.metadata["number"] == "2"
    assert "rule 2" in refused.value.message


def test_too_many_rules_and_too_long_a_rule_are_refused() -> None:
    with pytest.raises(Refusal):
        fr.parse_lines(["action=drop"] * (fr.RULES_LIMIT + 1))
    assert len(fr.parse_lines(["action=drop"] * fr.RULES_LIMIT)) == fr.RULES_LIMIT


def test_guest_value_has_neither_expire_nor_comment() -> None:
    rule = fr.parse_line(
        "action=accept expire=4000000000 dst4=1.2.3.4/32 proto=tcp dstports=80-90 comment=a b"
    )
    assert fr.guest_value(rule) == "action=accept dst4=1.2.3.4/32 proto=tcp dstports=80-90"


def test_file_properties_have_their_own_names_and_port_form() -> None:
    rule = fr.parse_line("action=accept dst6=::1 proto=tcp dstports=80 expire=5 comment=c d")
    assert fr.properties(rule) == (
        ("action", "accept"),
        ("comment", "c d"),
        ("expire", "5"),
        ("dsthost", "::1/128"),
        ("proto", "tcp"),
        ("dstports", "80"),
    )


def test_proto_change_drops_what_no_longer_fits() -> None:
    ports = fr.parse_line("action=accept proto=tcp dstports=80")
    assert fr.with_proto(ports, "udp").dstports == (80, 80)
    assert fr.with_proto(ports, "icmp").dstports is None
    assert fr.with_proto(ports, "").dstports is None
    ping = fr.parse_line("action=accept proto=icmp icmptype=8")
    assert fr.with_proto(ping, "icmp").icmptype == 8
    assert fr.with_proto(ping, "tcp").icmptype is None
    assert fr.with_proto(ping, "").icmptype is None


def test_equality_is_that_of_api_lines_and_expired_rules_are_all_equal() -> None:
    one = fr.parse_line("action=accept dst4=1.2.3.4")
    assert fr.same_rule(one, fr.parse_line("dsthost=1.2.3.4/32 action=accept"), NOW)
    assert not fr.same_rule(one, fr.parse_line("action=drop dst4=1.2.3.4"), NOW)
    past = fr.parse_line("action=accept expire=5")
    assert fr.same_rule(past, fr.parse_line("action=drop expire=6"), NOW)
    assert not fr.same_rule(past, one, NOW)


def test_expired_rules_are_not_listed() -> None:
    rules = fr.parse_lines(["action=accept expire=999999", "action=drop expire=1000001"])
    assert fr.api_lines(rules, NOW) == ("action=drop expire=1000001",)


def test_digest_follows_content_and_order() -> None:
    a, b = fr.parse_line("action=accept"), fr.parse_line("action=drop")
    assert fr.digest([a, b]) != fr.digest([b, a])
    assert fr.digest([a]) == fr.digest(fr.DEFAULT_RULES)


_text = st.text(alphabet=string.printable + "\u00e4\u4e00\x00", max_size=40)


@given(st.lists(st.tuples(st.sampled_from([*fr.ORDER, "dst4", "dst6", "dpi"]), _text), max_size=6))
def test_whatever_parses_prints_clean_and_parses_back(pairs: list[tuple[str, str]]) -> None:
    line = " ".join(f"{key}={text}" for key, text in pairs)
    try:
        rule = fr.parse_line(line)
    except Refusal as refusal:
        assert refusal.reason == "INVALID_RULE"
        return
    printed = fr.api_line(rule)
    allowed = set(string.ascii_letters + string.digits + ":;,./-_[] =")
    assert set(printed) <= allowed
    assert fr.parse_line(printed) == rule
    assert fr.make_rule(dict(fr.properties(rule))) == rule
