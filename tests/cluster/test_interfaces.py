"""By which address ranks of different hosts reach each other: the kernel's routes decide, whatever a host calls itself; --interface overrides."""

from __future__ import annotations

import ipaddress
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ringfold.collectives import interfaces
from ringfold.collectives.environment import INTERFACE, STORE

from tests.cluster.hosts import MASTER_PORT, Hosts
from tests.cluster.test_collectives import values_of
from tests.harness import Outcome

TWO_NETWORKS = pytest.mark.parametrize("hosts", [(2, 2)], indirect=True)


def whom_it_reached(world: Any) -> tuple[dict[int, list[str]], list[str], float]:
    """Return the route to each other rank, what this one has published, and how long the first operation took."""
    began = time.monotonic()
    tensor = torch.ones(100_003)
    world.all_reduce(tensor)
    assert bool((tensor == world.size).all())
    membership = world.session.membership
    hosts = {rank: [address.rpartition(":")[0] for address in routes] for rank, routes in membership.routes.items()}
    return hosts, membership.members[world.rank].addresses, time.monotonic() - began


def test_a_host_name_that_means_the_loopback_is_never_asked(hosts: Hosts) -> None:
    assert "127.0.1.1" in hosts.run(1, "getent", "ahostsv4", "node1")
    with hosts.spawn([0, 1], whom_it_reached) as ranks:
        first, second = values_of(ranks.wait(30))
    assert first[1] == [f"{hosts.address(0)}/24"]
    assert second[1] == [f"{hosts.address(1)}/24"]
    assert second[0] == {0: [hosts.address(0)]}


@pytest.mark.parametrize("rank_0_on", [0, 1])
def test_a_store_at_the_name_of_rank_0s_own_host_does_not_publish_its_loopback(hosts: Hosts, rank_0_on: int) -> None:
    # The other host knows the name by its own /etc/hosts; to rank 0 it is 127.0.1.1.
    other, name = 1 - rank_0_on, f"node{rank_0_on}"
    hosts.run(other, "sh", "-c", f"echo '{hosts.address(rank_0_on)} {name}' >> /etc/hosts")
    with hosts.spawn([rank_0_on, other], whom_it_reached, env={"MASTER_ADDR": name}) as ranks:
        first, second = values_of(ranks.wait(30))
    assert first[1] == [f"{hosts.address(rank_0_on)}/24"]
    assert second[0] == {0: [hosts.address(rank_0_on)]}


@TWO_NETWORKS
def test_the_network_by_which_the_store_is_reached_comes_first(hosts: Hosts) -> None:
    for network in range(2):
        with hosts.spawn([0, 1], whom_it_reached, env={"MASTER_ADDR": hosts.address(0, network)}) as ranks:
            first, second = values_of(ranks.wait(30))
        assert first[1][0] == f"{hosts.address(0, network)}/24"
        assert len(first[1]) == 2
        assert second[0] == {0: [hosts.address(0, network)]}


def test_ipv6_leads_to_a_store_there_and_then_to_the_ranks(hosts: Hosts) -> None:
    for host in range(2):
        hosts.run(host, "ip", "addr", "add", f"fd00:77::{10 + host}/64", "dev", "eth0", "nodad")
    with hosts.spawn([0, 1], whom_it_reached, env={"MASTER_ADDR": "fd00:77::10"}) as ranks:
        first, second = values_of(ranks.wait(30))
    assert first[1] == ["fd00:77::10/64", f"{hosts.address(0)}/24"]
    assert second[0] == {0: ["[fd00:77::10]"]}


def test_hosts_without_ipv6_meet(hosts: Hosts) -> None:
    for host in range(2):
        hosts.run(host, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
    with hosts.spawn([0, 1], whom_it_reached) as ranks:
        _, second = values_of(ranks.wait(30))
    assert second[0] == {0: [hosts.address(0)]}


@TWO_NETWORKS
def test_an_address_that_does_not_answer_is_given_up_for_the_next(hosts: Hosts) -> None:
    # Rank 0 names both; who calls it is a neighbour on both, and the first to be tried is the one by which rank 0 met its store.
    hosts.cut(1, 1)
    env = [{STORE: f"{hosts.address(0, network)}:{MASTER_PORT + 1}"} for network in (1, 0)]
    with hosts.spawn([0, 1], whom_it_reached, env=env) as ranks:
        first, second = values_of(ranks.wait(30))
    assert first[1] == [f"{hosts.address(0, 1)}/24", f"{hosts.address(0, 0)}/24"]
    assert second[0] == {0: [hosts.address(0, 0)]}


@TWO_NETWORKS
@pytest.mark.parametrize("chosen", ["eth1", "10.78.0.0/16"])
def test_a_chosen_interface_is_used_by_both_sides(hosts: Hosts, chosen: str) -> None:
    hosts.run(1, "ip", "addr", "add", "10.79.0.1/24", "dev", "eth0")
    for variables in ([chosen, chosen], [chosen, None], [None, chosen]):
        env = [{} if variable is None else {INTERFACE: variable} for variable in variables]
        with hosts.spawn([0, 1], whom_it_reached, env=env) as ranks:
            first, second = values_of(ranks.wait(30))
        assert second[0] == {0: [hosts.address(0, 1)]}, variables
        assert (first[1] == [f"{hosts.address(0, 1)}/24"]) == (variables[0] is not None)
        assert (second[1] == [f"{hosts.address(1, 1)}/24"]) == (variables[1] is not None)


def errors_of(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    return [(outcome.kind, outcome.message) for outcome in outcomes]


def test_an_unknown_interface_is_refused_with_what_there_is(hosts: Hosts) -> None:
    with hosts.spawn([0, 1], whom_it_reached, env={INTERFACE: "eht0"}, timeout_s=20) as ranks:
        errors = errors_of(ranks.wait(30))
    for host, (kind, message) in enumerate(errors):
        assert kind == "ConfigError"
        assert f"interface eht0: this host (node{host}) has no such interface" in message
        assert "did you mean eth0?" in message
        assert f"There is: eth0 {hosts.address(host)}/24" in message


@TWO_NETWORKS
def test_no_way_to_a_rank_is_told_with_its_addresses(hosts: Hosts) -> None:
    # Rank 0 offers only its first network, rank 1 goes out by its second only.
    with hosts.spawn([0, 1], whom_it_reached, env=[{INTERFACE: "eth0"}, {INTERFACE: "eth1"}], timeout_s=2) as ranks:
        errors = errors_of(ranks.wait(30))
    kind, message = errors[1]
    assert kind == "ConnectError"
    assert "rank 1 did not reach rank 0 (node0" in message
    assert f"there is no route from this host to it: it is at {hosts.address(0)}/24; see {INTERFACE}" in message
    assert "rank 1 did not connect to rank 0" in errors[0][1]


def run_order(theirs: list[str], chosen: str | None) -> list[str]:
    only = interfaces.choose(chosen) if chosen else None
    return interfaces.order([ipaddress.ip_interface(address) for address in theirs], interfaces.local_addresses(), only)


@TWO_NETWORKS
def test_order_prefers_neighbours_and_skips_own_and_unroutable_addresses(hosts: Hosts) -> None:
    hosts.run(0, "ip", "link", "add", "docker0", "type", "bridge")
    hosts.run(0, "ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
    hosts.run(0, "ip", "link", "set", "docker0", "up")
    hosts.run(0, "ip", "route", "add", "10.99.0.0/16", "via", "10.77.0.11")
    theirs = ["192.0.2.5/24", "172.17.0.1/16", "10.99.0.7/24", "10.78.0.11/24", "10.77.0.11/24", "2001:db8::7/64"]
    cases = ((None, ["10.78.0.11", "10.77.0.11", "10.99.0.7"]), ("eth0", ["10.77.0.11", "10.99.0.7"]), ("10.78.0.0/24", ["10.78.0.11"]))
    for chosen, expected in cases:
        # docker0 has no carrier, so its address would not count as ours; a route to it there is nevertheless, for it is local.
        with hosts.spawn([0], run_order, theirs, chosen, joined=False) as ranks:
            assert values_of(ranks.wait(30)) == [expected]


def test_the_launcher_passes_the_interface_on_and_refuses_an_unknown_one(hosts: Hosts, tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text(f"import os\nprint(os.environ['{INTERFACE}'])\n")
    said = hosts.run(0, sys.executable, "-m", "ringfold", "run", "-n", "2", "--interface", "eth0", str(script))
    assert sorted(said.splitlines()) == ["[0] eth0", "[1] eth0"]
    with pytest.raises(RuntimeError, match=r"ended with 2: (?s:.*)--interface eth7: this host \(node0\) has no such interface"):
        hosts.run(0, sys.executable, "-m", "ringfold", "run", "-n", "2", "--interface", "eth7", str(script))
