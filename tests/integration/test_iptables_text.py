"""Rules as iptables-save text, loaded by the kernel's own tool: what it takes, and what passes."""

from __future__ import annotations

import itertools
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from bulkhead.model.firewall_rules import Rule, parse_lines
from services.firewall.core import iptables
from tests.integration.network_lab import SERVER, SERVER2, Lab, inside, ip, lab, uuid_of

pytestmark = pytest.mark.integration

# The client's qid, its xid, and another client of the same network qube.
QID, XID, OTHER = 5, 37, 7
ADDRESS = f"10.137.0.{QID}"
# What passed once goes on to pass: each ping is a flow of its own.
_FLOWS = itertools.count(1)
EMPTY = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
# What nft stands for now, and what stood there before; either may be missing on a host.
TOOLS = [tool for tool in ("iptables-nft", "iptables-legacy") if shutil.which(f"{tool}-restore")]


class Agent:
    """A network qube that reads iptables-save text, as the keys have it."""

    def __init__(self, made: Lab, tool: str, hosts: Path) -> None:
        self.lab, self.tool, self._hosts = made, tool, hosts

    def run(self, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """In the namespace, with host names from the test's own file."""
        shell = 'mount --bind "$0" /etc/hosts && exec "$@"'
        words = ["ip", "netns", "exec", self.lab.namespace, "sh", "-c", shell, str(self._hosts)]
        return subprocess.run(
            [*words, *command], input=text, capture_output=True, text=True, check=False
        )

    def restore(self, text: str, *options: str) -> str:
        """What the tool says; "" = it took the text."""
        done = self.run(f"{self.tool}-restore", *options, text=text)
        return done.stderr or ("refused" if done.returncode else "")

    def load(self, rules: Sequence[Rule] | None, *texts: str) -> list[str]:
        """Read all keys, the client's and further texts; what the tool said of each."""
        keys = dict(iptables.keys(rules, uuid_of(QID), ADDRESS, XID, 1000)[0])
        assert keys["/qubes-iptables"] == "reload"
        said = [self.restore(keys["/qubes-iptables-header"])]
        for text in (keys[f"/qubes-iptables-domainrules/{XID}"], *texts):
            said.append(self.restore(text, "--noflush"))
        return said

    def chain(self, name: str) -> list[str]:
        done = self.run(self.tool, "-S", name)
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def base() -> Iterator[Lab]:
    with lab() as made:
        for port in (8080, 9090, 53):
            made.serve(port)
        made.serve(53, socket.SOCK_DGRAM)
        for qid, xid in ((QID, XID), (OTHER, XID + 1)):
            tap, vif = made.add_client(qid), f"vif{xid}.0"
            made.plug(qid)
            # As a network qube names them; routes go with a link that is down.
            ip("link", "set", tap, "down", namespace=made.namespace)
            ip("link", "set", tap, "name", vif, namespace=made.namespace)
            ip("link", "set", vif, "up", namespace=made.namespace)
            ip("route", "replace", f"10.137.0.{qid}", "dev", vif, namespace=made.namespace)
        # Each refusal is told, however many there are in a second.
        for name, value in (("ip_forward", "1"), ("icmp_ratelimit", "0")):
            inside(made.namespace, partial(Path("/proc/sys/net/ipv4", name).write_text, value))
        yield made


@pytest.fixture(params=TOOLS or ["iptables-nft"])
def agent(base: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Agent]:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{SERVER2} two.example\n{SERVER} many\n{SERVER2} many\n")
    made = Agent(base, request.param, hosts)
    nat = (
        ("POSTROUTING", "-o", "up0", "-j", "MASQUERADE"),
        ("PREROUTING", "-d", "10.139.1.1", "-j", "DNAT", "--to-destination", SERVER),
    )
    if made.run(made.tool, "-t", "nat", "-L").returncode and "legacy" in made.tool:
        pytest.skip("this kernel has no iptables of old")
    for rule in nat:
        done = made.run(made.tool, "-t", "nat", "-A", *rule)
        assert done.returncode == 0, done.stderr
    yield made
    made.restore(EMPTY)
    for rule in nat:
        made.run(made.tool, "-t", "nat", "-D", *rule)


def _random_lines(dice: random.Random) -> list[str]:
    lines = []
    for _ in range(dice.randrange(12)):
        words = [f"action={dice.choice(('accept', 'drop'))}"]
        where = dice.choice(
            ["", "dst4=1.2.3.5/24", "dst4=0.0.0.0/0", "dst4=9.9.9.9/08", "dst6=2001:db8::/32",
             "dsthost=two.example", "dsthost=many", "dsthost=-x", "dsthost=127.1", "dsthost="]
        )  # fmt: skip
        words += [where] if where else []
        proto = dice.choice(("", "tcp", "udp", "icmp"))
        words += [f"proto={proto}"] if proto else []
        if proto in ("tcp", "udp") and dice.random() < 0.6:
            words.append(f"dstports={dice.choice(('53', '0', '65535', '0-65535', '80-443'))}")
        if proto == "icmp" and dice.random() < 0.6:
            words.append(f"icmptype={dice.choice((0, 3, 8, 42, 254, 255))}")
        if dice.random() < 0.3:
            words.append("specialtarget=dns")
        if dice.random() < 0.2:
            words.append(f"expire={dice.choice((1, 99999))}")
        if dice.random() < 0.3:
            words.append(f"comment={dice.choice(('a b', '-j ACCEPT', '[x]; COMMIT'))}")
        lines.append(" ".join(words))
    return lines


def test_the_tool_takes_every_text(agent: Agent) -> None:
    assert agent.restore(iptables.header(), "--test") == ""
    assert agent.restore(iptables.header()) == ""
    dice = random.Random(4)
    for number in range(40):
        lines = _random_lines(dice)
        text = iptables.domain_rules(parse_lines(lines), uuid_of(QID), ADDRESS, number, 1000)
        assert agent.restore(text, "--noflush", "--test") == "", (lines, text)
        for word in ("ACCEPT a", "[x]", "::"):
            assert word not in text


def test_what_the_tool_makes_of_each_rule(agent: Agent) -> None:
    lines = [
        "action=accept dst4=1.2.3.5/24 proto=tcp dstports=80-90 comment=web",
        "action=accept proto=udp dstports=0",
        "action=drop proto=icmp icmptype=8",
        "action=accept proto=icmp icmptype=255",
        "action=drop proto=icmp icmptype=255",
        "action=accept expire=5",
        "action=accept dst6=2001:db8::1",
        "action=accept dsthost=two.example",
        "action=accept dsthost=-j",
        "action=drop dsthost=127.1 proto=tcp",
        "action=accept specialtarget=dns proto=udp",
        "action=accept specialtarget=dns dst4=10.0.0.0/8",
        "action=drop specialtarget=dns dst4=10.139.1.1",
        "action=accept specialtarget=dns proto=tcp dstports=80",
        "action=accept specialtarget=dns proto=icmp",
        "action=accept",
    ]
    assert agent.load(parse_lines(lines)) == ["", ""]
    chain = f"q{XID}"
    assert agent.chain(chain) == [
        f"-N {chain}",
        f"-A {chain} -d 1.2.3.0/24 -p tcp -m tcp --dport 80:90 -j ACCEPT",
        f"-A {chain} -p udp -m udp --dport 0 -j ACCEPT",
        f"-A {chain} -p icmp -m icmp --icmp-type 8 -j refuse",
        f"-A {chain} -p icmp -j refuse",
        f"-A {chain} -d {SERVER2}/32 -j ACCEPT",
        f"-A {chain} -p tcp -j refuse",
        f"-A {chain} -p udp -j dns-accept",
        f"-A {chain} -d 10.0.0.0/8 -j dns-accept",
        f"-A {chain} -j dns-refuse",
        f"-A {chain} -j ACCEPT",
        f"-A {chain} -j refuse",
    ]
    assert agent.chain("clients") == ["-N clients", f"-A clients -s {ADDRESS}/32 -j {chain}"]
    # Read again, nothing is there twice.
    assert agent.load(parse_lines(lines)) == ["", ""]
    assert agent.chain("clients") == ["-N clients", f"-A clients -s {ADDRESS}/32 -j {chain}"]


@pytest.mark.parametrize(
    ("lines", "tcp", "other_port", "other_host", "virtual_dns", "ping"),
    [
        ("action=accept", "yes", "yes", "yes", "yes", True),
        ("", "rejected", "rejected", "rejected", "rejected", False),
        ("action=accept proto=tcp dstports=8000-9000", "yes", "rejected", "yes", "rejected", False),
        (f"action=drop dst4={SERVER2}\naction=accept proto=tcp",
         "yes", "yes", "rejected", "rejected", False),
        ("action=accept dsthost=two.example\naction=accept proto=icmp icmptype=8",
         "rejected", "rejected", "yes", "rejected", True),
        ("action=accept dsthost=many proto=tcp dstports=8080",
         "yes", "rejected", "yes", "rejected", False),
        ("action=accept specialtarget=dns", "rejected", "rejected", "rejected", "yes", False),
        ("action=drop specialtarget=dns\naction=accept", "yes", "yes", "yes", "rejected", True),
        ("action=drop proto=icmp\naction=accept proto=icmp\naction=accept expire=5",
         "rejected", "rejected", "rejected", "rejected", False),
    ],
)  # fmt: skip
def test_what_passes(
    agent: Agent,
    lines: str,
    tcp: str,
    other_port: str,
    other_host: str,
    virtual_dns: str,
    ping: bool,
) -> None:
    assert agent.load(parse_lines(lines.splitlines())) == ["", ""]
    made = agent.lab
    assert made.reach(QID, 8080) == tcp
    assert made.reach(QID, 9090) == other_port
    assert made.reach(QID, 8080, SERVER2) == other_host
    # Rewritten to the real resolver on its way.
    assert made.ask_udp(QID, 53, "10.139.1.1") == virtual_dns
    assert made.ping(QID, flow=next(_FLOWS)) is ping
    # Another client is no concern of this text.
    assert made.reach(OTHER, 8080) == "silent"


def test_nothing_passes_without_a_text_that_was_loaded(agent: Agent) -> None:
    made = agent.lab
    assert agent.restore(iptables.header()) == ""
    assert made.reach(QID, 8080) == "silent"
    # A name without address: the tool refuses the text as a whole.
    said = agent.load(parse_lines(["action=accept", "action=drop dsthost=no.such.invalid"]))
    assert said[0] == "" and said[1] != ""
    assert made.reach(QID, 8080) == "silent"
    for rules in (
        None,
        parse_lines([f"action=accept dst4=10.0.{n // 250}.{n % 250}" for n in range(99)]),
    ):
        assert agent.load(rules) == ["", ""]
        assert agent.chain(f"q{XID}") == [f"-N q{XID}", f"-A q{XID} -j refuse"]
    # Two clients, each by its own text; never anew from one to the other.
    other = iptables.domain_rules(
        parse_lines(["action=accept"]), uuid_of(OTHER), f"10.137.0.{OTHER}", XID + 1, 1000
    )
    assert agent.load(parse_lines(["action=accept"]), other) == ["", "", ""]
    assert made.reach(QID, 8080) == made.reach(OTHER, 8080) == "yes"
    assert made.reach(QID, 8080, f"10.137.0.{OTHER}") == "silent"
    # What is established goes on when the texts are read again.
    with made.connect(QID, 8080):
        assert agent.load(parse_lines(["action=accept"])) == ["", ""]
        assert made.reach(OTHER, 8080) == "silent"
