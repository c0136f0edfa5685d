"""Names, numbers and device texts from outside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.model import grammar
from bulkhead.model.grammar import DeviceName
from bulkhead.model.refusal import Refusal


def refused(why: str, check: object, *arguments: object, **named: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        check(*arguments, **named)  # type: ignore[operator]
    assert caught.value.reason == why
    assert caught.value.message.isprintable()
    return caught.value


@pytest.mark.parametrize("name", ["a", "work", "Sys-net_2.0", "a" * 31, "dom0", "Default", "x-dmz"])
def test_good_qube_names(name: str) -> None:
    assert grammar.check_qube_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", "1abc", "-x", "_x", ".x", "a b", "a/b", "a" * 32, "Domain-0", "none", "default",
        "vm-dm", "lost+found", "a$b", "aé", "é", "x=y", "a\n", "../x", "@adminvm",
    ],
)  # fmt: skip
def test_bad_qube_names(name: str) -> None:
    refused("INVALID_NAME", grammar.check_qube_name, name)


def test_uuid() -> None:
    good = "0a1b2c3d-0000-4000-8000-0123456789ab"
    assert grammar.check_uuid(good) == good
    for bad in ("", good.upper(), good[:-1], good + "\n", good.replace("-", ""), "{" + good + "}"):
        refused("INVALID_UUID", grammar.check_uuid, bad)


def test_tags_labels_features_pools() -> None:
    assert grammar.check_tag("created-by-dom0_1") == "created-by-dom0_1"
    for bad in ("", "a.b", "a b", "ä"):
        refused("INVALID_TAG", grammar.check_tag, bad)
    assert grammar.check_label_name("3") == "3"
    refused("INVALID_LABEL", grammar.check_label_name, "3", new=True)
    assert grammar.check_label_name("3x", new=True) == "3x"
    for bad in ("", "a b", "a\n"):
        refused("INVALID_LABEL", grammar.check_label_name, bad)
    assert grammar.check_label_color(" 0xAbCdEf\n") == "0xAbCdEf"
    for bad in ("", "0xabcde", "0xabcdeg", "#abcdef", "0xabcdef0", "0x١٢٣٤٥٦"):
        refused("INVALID_LABEL_COLOR", grammar.check_label_color, bad)
    assert grammar.check_feature_name("vm-config.x_Y") == "vm-config.x_Y"
    for bad in ("", "a b", "a:b"):
        refused("INVALID_FEATURE", grammar.check_feature_name, bad)
    assert grammar.check_feature_value("") == ""
    assert grammar.check_feature_value(" ~'\"") == " ~'\""
    for bad in ("a\n", "\t", "é", "\x7f"):
        refused("INVALID_FEATURE", grammar.check_feature_value, bad)
    assert grammar.check_pool_name("a.b-c_d") == "a.b-c_d"
    refused("INVALID_POOL", grammar.check_pool_name, "bad name")
    refused("INVALID_POOL", grammar.check_pool_name, "")


def test_revisions_profiles_services_volumes() -> None:
    assert grammar.check_revision(" 123:abc_-.\n") == "123:abc_-."
    refused("PROTOCOL", grammar.check_revision, "a/b")
    assert grammar.check_backup_profile("daily") == "daily"
    for bad in ("a/b", "", "..", "."):
        refused("PROTOCOL", grammar.check_backup_profile, bad)
    assert grammar.check_service_name("x" * 48) == "x" * 48
    for bad in ("", "x" * 49, "a/b", ".", ".."):
        refused("INVALID_VALUE", grammar.check_service_name, bad)
    assert grammar.check_volume_name("root") == "root"
    for bad in ("", "../x", "-x", ".", "a/b"):
        refused("VOLUME_NOT_FOUND", grammar.check_volume_name, bad)


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("7", 7), ("9" * 19, int("9" * 19))])
def test_good_numbers(text: str, number: int) -> None:
    assert grammar.check_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "00", "01", "-1", "+1", " 1", "1 ", "1_0", "9" * 20, "١", "-0"]
)
def test_bad_numbers(text: str) -> None:
    refused("PROTOCOL", grammar.check_number, text)


def test_signed_and_bounded_numbers() -> None:
    assert grammar.check_number("-1", minimum=-1) == -1
    refused("PROTOCOL", grammar.check_number, "-2", minimum=-1)
    refused("PROTOCOL", grammar.check_number, "-0", minimum=-1)
    refused("PROTOCOL", grammar.check_number, "11", maximum=10)


def test_bool_words() -> None:
    for word in ("0", "no", "False", "OFF"):
        assert grammar.check_bool(word) is False
    for word in ("1", "yes", "TRUE", "on"):
        assert grammar.check_bool(word) is True
    for word in ("", "2", " yes", "y"):
        assert grammar.parse_bool(word) is None
        refused("INVALID_VALUE", grammar.check_bool, word, reason="INVALID_VALUE")


def test_notes() -> None:
    assert grammar.check_notes("a\tb\nü€".encode()) == "a\tb\nü€"
    assert grammar.check_notes(b"") == ""
    assert grammar.check_notes("x\x00\x1b[31m\r\u202ey\u200b".encode()) == "x__[31m__y_"
    refused("INVALID_NOTES", grammar.check_notes, b"\xff")
    refused("INVALID_NOTES", grammar.check_notes, b"a" * 256_001)
    assert len(grammar.check_notes(b"a" * 256_000)) == 256_000


def test_interfaces() -> None:
    assert grammar.check_interfaces("") == ()
    assert grammar.check_interfaces("u080650b******") == ("u080650", "b******")
    refused("INVALID_VALUE", grammar.check_interfaces, "u0806")
    refused("INVALID_PROPERTY_VALUE", grammar.check_interfaces, "x080650")
    refused("INVALID_PROPERTY_VALUE", grammar.check_interfaces, "u08065G")


# ---- devices


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("sys-usb+2-1", DeviceName("sys-usb", "2-1")),
        ("sys-usb+2-1+_", DeviceName("sys-usb", "2-1")),
        ("_+_+_", DeviceName("*", "*", "*")),
        ("_+2-1", DeviceName("*", "2-1")),
        (
            "sys-usb+2-1+1234+5678+ABC+u080650",
            DeviceName("sys-usb", "2-1", "1234:5678:ABC:u080650"),
        ),
        ("sys-usb+_+0000+0000++_______", DeviceName("sys-usb", "*", "0000:0000::?******")),
        ("dom0+00_1f.2", DeviceName("dom0", "00_1f.2")),
    ],
)
def test_device_arguments(argument: str, name: DeviceName) -> None:
    assert grammar.parse_device_argument(argument) == name
    assert grammar.parse_device_argument(name.argument()) == name


@pytest.mark.parametrize(
    "argument", ["", "sys-usb", "+2-1", "sys-usb+", "sys-usb++x", "a+b\n", "a+é"]
)
def test_bad_device_arguments(argument: str) -> None:
    refused("INVALID_DEVICE", grammar.parse_device_argument, argument)
    refused("INVALID_NAME", grammar.parse_device_argument, "-x+1")
    # Any backend is written _; no qube is called *.
    refused("INVALID_NAME", grammar.parse_device_argument, "*+*")


def test_recorded_device_texts() -> None:
    text = (
        "device_id='1234:5678:ABC:u080650' port_id='1-1' devclass='testclass'"
        " backend_domain='sys-net' vendor='ACME' product='O\\'Brien stick' interfaces='u080650'"
    )
    device = DeviceName("sys-net", "1-1", "1234:5678:ABC:u080650")
    assert text == grammar.format_device(
        "testclass",
        device,
        descriptions={"vendor": "ACME", "product": "O'Brien stick", "name": "unknown"},
        interfaces="u080650",
    )
    pairs = grammar.parse_pairs(text)
    assert pairs["product"] == "O'Brien stick"
    unknown = DeviceName("sys-net", "1-2", "0000:0000::?******")
    assert grammar.format_device("testclass", unknown, interfaces="?******") == (
        "device_id='0000:0000::?******' port_id='1-2' devclass='testclass'"
        " backend_domain='sys-net'  interfaces='?******'"
    )
    # A value left out by the other side leaves two spaces.
    assert grammar.parse_pairs("a='1'  b='2'\n") == {"a": "1", "b": "2"}
    assert grammar.parse_pairs("a='1' b='2' a='3'") == {"a": "3", "b": "2"}
    assigned = (
        "device_id='*' port_id='1-2' devclass='testclass' backend_domain='sys-net'"
        " mode='required' frontend_domain='work'"
    )
    name = DeviceName("sys-net", "1-2")
    assert grammar.format_assignment("testclass", name, "required", {}, "work") == assigned
    parsed = grammar.parse_assignment(assigned, "testclass", name, "work")
    assert (parsed.device, parsed.mode, parsed.frontend) == (name, "required", "work")


def test_assignments() -> None:
    name = DeviceName("sys-usb", "2-1")
    empty = grammar.parse_assignment("", "usb", name, "work")
    assert (empty.device, empty.mode, empty.options) == (name, "manual", {})
    full = grammar.parse_assignment("mode='auto-attach' _read-only='yes' _='x'", "usb", name)
    assert full.mode == "auto-attach"
    assert full.options == {"read-only": "yes", "": "x"}
    narrowed = grammar.parse_assignment("device_id='1:2:3:u000000'", "usb", name)
    assert narrowed.device.device_id == "1:2:3:u000000"
    # An empty id is any id; what no argument names could not be taken away again.
    assert grammar.parse_assignment("device_id=''", "usb", name).device == name
    one = DeviceName("sys-usb", "2-1", "1:2")
    refused("INVALID_DEVICE", grammar.parse_assignment, "device_id=''", "usb", one)
    for bad in ("port_id='3'", "devclass='pci'", "backend_domain='dom0'", "other='1'"):
        refused("INVALID_DEVICE", grammar.parse_assignment, bad, "usb", name, "work")
    refused("INVALID_DEVICE", grammar.parse_assignment, "frontend_domain='x'", "usb", name, "work")
    refused("INVALID_DEVICE", grammar.parse_assignment, "mode='now'", "usb", name)


@pytest.mark.parametrize(
    "text",
    ["a", "a=", "a=1", "='1'", "a='é'", "a b='1'", "a='1\n2'", "a='1'b='2'", "a='1 b='2'"],
)
def test_bad_pairs(text: str) -> None:
    refused("INVALID_DEVICE", grammar.parse_pairs, text)


def test_the_last_value_is_cut_where_its_quote_should_be() -> None:
    assert grammar.parse_pairs("a='1' b='yes") == {"a": "1", "b": "ye"}
    assert grammar.parse_pairs("a='1") == {"a": ""}
    assert grammar.parse_pairs("a='1'x") == {"a": "1'"}
    name = DeviceName("sys-usb", "2-1")
    refused("INVALID_DEVICE", grammar.parse_assignment, "mode='required", "usb", name)
    cut = grammar.parse_assignment("mode='required' _read-only='yes", "usb", name)
    assert (cut.mode, cut.options) == ("required", {"read-only": "ye"})


_KEYS = st.text("abcXYZ019!#$%&()*+,-./:;<>?@[\\]^_{|}~", min_size=1, max_size=8)
_VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20).filter(
    lambda value: "='" not in value and not value.endswith("=")
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_pairs_come_back(pairs: dict[str, str]) -> None:
    assert grammar.parse_pairs(grammar.format_pairs(pairs)) == pairs


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for parse in (grammar.parse_pairs, grammar.parse_device_argument, grammar.check_qube_name):
        try:
            parse(text)
        except Refusal as refusal:
            assert refusal.message.isascii()


@given(st.text(max_size=30), st.text(max_size=30))
def test_device_text_from_guests_can_always_be_written(vendor: str, extra: str) -> None:
    text = grammar.format_device(
        "usb", DeviceName("sys-usb", "1"), descriptions={"vendor": vendor}, data={"x": extra}
    )
    grammar.parse_pairs(text)
