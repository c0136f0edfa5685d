"""qvm-firewall: what a qube may reach.

Owns the grammar of rules as a person types them. Must not know how they are enforced.
Invariant: what is not among the rules is dropped, so an empty list and the single rule
"drop" mean the same; the daemon takes no empty list, hence the tool writes that rule for it,
and takes it away again when a rule is appended.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import time
from collections.abc import Iterable, Mapping, Sequence

from clients.admin import AdminClient
from clients.cli import tool

Rule = Mapping[str, str]

COLUMNS = (
    "NO",
    "ACTION",
    "HOST",
    "PROTOCOL",
    "PORT(S)",
    "SPECIAL TARGET",
    "ICMP TYPE",
    "EXPIRE",
    "COMMENT",
)
HOSTS = ("dst4", "dst6", "dsthost")
# The order in which a rule is written; a comment may have spaces, so it is the last.
ORDER = (
    "action",
    "proto",
    *HOSTS,
    "dstports",
    "icmptype",
    "specialtarget",
    "expire",
    "comment",
)
NOTHING: Rule = {"action": "drop"}
_PROTOCOLS = ("tcp", "udp", "icmp")


# ---- rules as text


def parse(line: str) -> Rule:
    """A rule of the daemon: key=value words, the comment last."""
    head, mark, comment = line.partition("comment=")
    rule = dict(word.split("=", 1) for word in head.split())
    if mark:
        rule["comment"] = comment
    return rule


def text(rule: Rule) -> str:
    """A rule for the daemon.

    An empty host stays: without it the rule would speak of every destination.
    """
    return " ".join(
        f"{key}={rule[key]}" for key in ORDER if rule.get(key) or (key in rule and key in HOSTS)
    )


def typed(words: Sequence[str], now: float) -> Rule:
    """A rule as typed: [action] [host] [proto] [ports or icmptype], or key=value words.

    now: Unix seconds, what expire=+SECONDS counts from. UsageError.
    """
    rule: dict[str, str] = {}
    places = ["action", "host", "proto", "last"]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            if places[:2] == ["host", "proto"] and word in _PROTOCOLS:
                places.pop(0)
            if not places:
                raise tool.UsageError(f"{word}: a rule is ACTION [HOST [PROTO [PORTS]]]")
            key, value = places.pop(0), word
            if key == "last":
                key = "icmptype" if rule.get("proto") == "icmp" else "dstports"
        elif key in places:
            places.remove(key)
        elif key in (*HOSTS, "dstname") and "host" in places:
            places.remove("host")
        _put(rule, "host" if key == "dstname" or key in HOSTS else key, value, now)
    if rule.get("action") not in ("accept", "drop"):
        raise tool.UsageError("a rule begins with accept or drop")
    return normal(rule)


def _put(rule: dict[str, str], key: str, value: str, now: float) -> None:
    if key == "host":
        if not value:
            raise tool.UsageError("the host is empty; leave it out for every destination")
        key, value = _host(value)
        if not value:
            return
    elif key == "expire" and value.startswith("+"):
        if not value[1:].isdigit():
            raise tool.UsageError(f"expire={value}: say +SECONDS or a Unix time")
        value = str(int(now) + int(value[1:]))
    elif key not in ORDER:
        raise tool.UsageError(f"{key} is no part of a rule; there are {', '.join(ORDER)}")
    if key in rule or (key in HOSTS and any(host in rule for host in HOSTS)):
        raise tool.UsageError(f"{key} is given twice")
    rule[key] = value


def _host(value: str) -> tuple[str, str]:
    """Key and value of a destination; "" for the whole world of one family."""
    try:
        network = ipaddress.ip_interface(value)
    except ValueError:
        return "dsthost", value
    if network.network.prefixlen == 0:
        return "", ""
    return f"dst{network.version}", network.with_prefixlen


def normal(rule: Rule) -> Rule:
    """The same rule as the daemon writes it, so that equal rules compare equal."""
    made = dict(rule)
    for key in ("dst4", "dst6"):
        if key in made:
            made.pop(key)
            made.update([_host(rule[key])])
    made.pop("", None)
    if "dstports" in made:
        first, _, last = made["dstports"].partition("-")
        made["dstports"] = f"{first}-{last or first}"
    return made


# ---- the daemon


def load(api: AdminClient, qube: str) -> list[Rule]:
    """The qube's rules."""
    return [parse(line) for line in api.lines("admin.vm.firewall.Get", qube)]


def store(api: AdminClient, qube: str, rules: Sequence[Rule]) -> None:
    """Replace the qube's rules."""
    lines = "".join(text(rule) + "\n" for rule in rules or [NOTHING])
    api.call("admin.vm.firewall.Set", qube, payload=lines.encode("ascii", "replace"))


# ---- the tool


def work(args: argparse.Namespace, api: AdminClient) -> int:
    """One subcommand, then a reload where that is wanted."""
    command = args.command
    if command == "add":
        add(api, args.qube, typed(args.rule, time.time()), args.before)
    elif command in ("del", "remove"):
        delete(api, args.qube, args)
    elif command == "reset":
        store(api, args.qube, [{"action": "accept"}])
    elif command == "effective":
        effective(args, api)
    elif command == "list" or not args.reload:
        show(args, load(api, args.qube))
    if args.reload:
        api.call("admin.vm.firewall.Reload", args.qube)
    return 0


def add(api: AdminClient, qube: str, rule: Rule, before: int | None) -> None:
    """Append the rule, or insert it before rule number `before`."""
    rules = load(api, qube)
    if before is None:
        if rules == [NOTHING]:
            rules = []
        rules.append(rule)
    else:
        if not 0 <= before <= len(rules):
            raise tool.UsageError(f"--before {before}: there are rules 0 to {len(rules) - 1}")
        rules.insert(before, rule)
    store(api, qube, rules)


def delete(api: AdminClient, qube: str, args: argparse.Namespace) -> None:
    """Take away one rule, by number or as it is."""
    words = list(args.rule) + list(args.rule_text.split() if args.rule_text else [])
    if (args.rule_no is None) == (not words):
        raise tool.UsageError("say --rule-no N, or the rule itself")
    rules = load(api, qube)
    if args.rule_no is not None:
        if not 0 <= args.rule_no < len(rules):
            raise tool.ToolError(f"{qube} has no rule {args.rule_no}; it has {len(rules)}")
        del rules[args.rule_no]
    else:
        wanted = typed(words, time.time())
        for number, rule in enumerate(rules):
            if normal(rule) == wanted:
                del rules[number]
                break
        else:
            raise tool.ToolError(f"{qube} has no rule {text(wanted)}")
    store(api, qube, rules)


def show(args: argparse.Namespace, rules: Sequence[Rule]) -> None:
    """The rules as a table, raw, or as JSON."""
    if args.raw:
        for rule in rules:
            print(text(rule))
    elif args.json:
        tool.as_json([dict(rule) for rule in rules])
    else:
        tool.table([COLUMNS, *(_row(number, rule) for number, rule in enumerate(rules))])


def _row(number: int, rule: Rule) -> tuple[str, ...]:
    first, _, last = rule.get("dstports", "").partition("-")
    ports = first if last in ("", first) else f"{first}-{last}"
    expire = rule.get("expire", "")
    if expire.isdigit():
        expire = f"{int(expire) - int(time.time()):+d}s"
    cells: Iterable[str] = (
        str(number),
        rule.get("action", ""),
        next((rule[key] or '""' for key in HOSTS if key in rule), ""),
        rule.get("proto", ""),
        ports,
        rule.get("specialtarget", ""),
        rule.get("icmptype", ""),
        expire,
        rule.get("comment", ""),
    )
    return tuple(cell or "-" for cell in cells)


def effective(args: argparse.Namespace, api: AdminClient) -> None:
    """What is in force now, with counters; only our daemon can tell."""
    answer = json.loads(api.text("bulkhead.vm.firewall.Effective", args.qube))
    if args.json:
        tool.as_json(answer)
        return
    if args.raw:
        print(answer["ruleset"])
        return
    if not answer["enforced"]:
        print("nothing is enforced now: the qube or its network qube does not run")
    rows = [
        (
            str(number),
            str(rule["packets"]),
            str(rule["bytes"]),
            rule["rule"],
            f"without effect: {rule['why']}" if rule["inert"] else "",
        )
        for number, rule in enumerate(answer["rules"])
    ]
    tool.table([("NO", "PACKETS", "BYTES", "RULE", ""), *rows])


RULE_HELP = (
    "ACTION [HOST [PROTO [PORTS or ICMPTYPE]]], or words like action=accept "
    "dsthost=example.org proto=tcp dstports=443-444 icmptype=8 specialtarget=dns "
    "expire=+SECONDS comment=TEXT"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    made = tool.parser("qvm-firewall", "Look at and change what a qube may reach.")
    made.add_argument("--reload", "-r", action="store_true", help="load the rules again")
    made.add_argument("--raw", action="store_true", help="rules as they are stored")
    tool.json_option(made)
    made.add_argument("qube", metavar="VMNAME")
    command = tool.commands(made)
    for name, about in (
        ("list", "show the rules"),
        ("reset", "one rule: accept all"),
        ("effective", "show what is in force, with counters"),
    ):
        verb = command(name, about)
        tool.json_option(verb, again=True)
        verb.add_argument(
            "--raw",
            action="store_true",
            default=argparse.SUPPRESS,
            help="rules as they are stored",
        )
        _reload(verb)
    verb = command("add", "append a rule, or insert it")
    verb.add_argument("--before", type=int, metavar="N", help="insert before rule N")
    verb.add_argument("rule", nargs="+", metavar="RULE", help=RULE_HELP)
    _reload(verb)
    verb = command("del", "take a rule away", aliases=("remove",))
    verb.add_argument("--rule-no", type=int, metavar="N", help="its number")
    verb.add_argument("--rule", dest="rule_text", metavar="RULE", help="the rule, in one word")
    verb.add_argument("rule", nargs="*", metavar="RULE", help=RULE_HELP)
    _reload(verb)
    return tool.run(made, work, argv)


def _reload(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--reload",
        "-r",
        action="store_true",
        default=argparse.SUPPRESS,
        help="load the rules again",
    )
