"""Preflight: before anything is loaded, every rank says where it is and what it has; what can't work stops here.

All of it goes through the rendezvous' store, which needs no more than that they reach one address. So a
run whose processes can't work together ends within `JOIN_TIMEOUT_S` (300, or what the environment says), with the host
named, instead of in a collective that waits for an hour.
"""

import importlib.metadata
import ipaddress
import json
import os
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from rich.table import Table

from mezo_scale import noise
from mezo_scale.distributed.launcher import Launcher
from mezo_scale.errors import LaunchError, SharedError

_SAME = ("mezo-scale", "torch", "transformers", "deepspeed", "numpy")
_LINGER_S = 5
_SEEN_WITHIN_S = 15  # what one node writes to a network file system, others may see seconds later


@dataclass(frozen=True)
class RankInfo:
    """What one rank says of itself.

    Attributes:
        host, rank: where, and which one.
        device: "cpu", or the accelerator's name and number.
        identity: what tells two devices of a host apart; empty for CPUs, which may be shared.
        memory_gib: the device's memory.
        address: this host's address on the way to the rendezvous.
        versions: of what must be the same everywhere.
    """

    host: str
    rank: int
    device: str
    identity: str
    memory_gib: float
    address: str
    versions: dict[str, str]


def timeout_s() -> int:
    """How long the ranks may wait for each other at the start. Raises LaunchError if the environment says nonsense."""
    text = os.environ.get("JOIN_TIMEOUT_S", "300")
    if not text.isdecimal() or int(text) == 0:
        raise LaunchError(f"JOIN_TIMEOUT_S is {text!r}, expected seconds")
    return int(text)


def rendezvous(launcher: Launcher) -> dist.Store:
    """The store that all ranks of the launch share.

    Raises:
        LaunchError: the address can't be reached in time, or its port is taken; says which host found out.
    """
    host, seconds = socket.gethostname(), timeout_s()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise LaunchError(
                f"{host}: the port of the rendezvous at {launcher.rendezvous} is taken, by an earlier run perhaps: end "
                "it, or set MASTER_PORT to another one"
            ) from None
        raise LaunchError(
            f"{host} (rank {launcher.rank}) can't reach the rendezvous at {launcher.rendezvous} within {seconds} s: "
            "check that rank 0 runs there, that the name resolves and that no firewall is in between"
        ) from None
    return dist.PrefixStore("mezo-scale", store)


def exchange(store: dist.Store, launcher: Launcher, device: torch.device) -> list[RankInfo]:
    """What every rank says of itself, in rank order; each rank calls it.

    Raises:
        SharedError: ranks that did not come, versions that differ between hosts, two ranks on one device.
        LaunchError: the store is gone.
    """
    rank, size = launcher.rank, launcher.world_size
    try:
        store.set(f"ranks/{rank}", json.dumps(asdict(own_info(launcher, device))))
        everyone = [RankInfo(**json.loads(text)) for text in _collect(store, "ranks", rank, size)]
        problem = _differing_versions(everyone) or _shared_device(everyone)
        if problem:
            _raise_on_all(store, rank, size, problem)
    except dist.DistError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LaunchError(
            f"{socket.gethostname()} (rank {rank}) lost the rendezvous at {launcher.rendezvous} ({reason}): look at "
            "the output of rank 0"
        ) from None
    return _reachable(everyone, rank)


def check_shared(folder: Path, store: dist.Store, everyone: Sequence[RankInfo], rank: int) -> None:
    """Whether all hosts see one and the same `folder`, which need not exist yet. Leaves nothing behind.

    Raises:
        SharedError: naming the hosts that do not see what rank 0's host writes, or what keeps that one from writing.
    """
    if len({one.host for one in everyone}) == 1:
        return
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    mark = parent / f".mezo-scale-{os.getpid()}-{time.time_ns()}"
    if rank == 0:
        try:
            mark.touch()
            store.set("shared/mark", str(mark))
        except OSError as error:
            store.set("shared/mark", "")
            problem = f"output.dir: {everyone[0].host} can't write in {parent} ({error.strerror}): give another folder"
            store.set("shared/problem", problem)
    try:
        name = store.get("shared/mark").decode()
        if not name:
            _raise_on_all(store, rank, len(everyone), store.get("shared/problem").decode())
        store.set(f"shared/{rank}", "seen" if _appears(Path(name)) else "")
        seen = _collect(store, "shared", rank, len(everyone))
        blind = dict.fromkeys(one.host for one, text in zip(everyone, seen, strict=True) if not text)
        if blind:
            problem = (
                f"output.dir: {folder} is not shared: what {everyone[0].host} writes there, {', '.join(blind)} can't "
                "see; give a folder on a file system that all nodes mount"
            )
            _raise_on_all(store, rank, len(everyone), problem)
    finally:
        if rank == 0:
            mark.unlink(missing_ok=True)


def table(everyone: Sequence[RankInfo]) -> Table:
    """One row per host."""
    shown = Table(title="ranks", title_justify="left", title_style="bold")
    for name in ("host", "ranks", "devices", "memory each", "address"):
        shown.add_column(name)
    for host in dict.fromkeys(one.host for one in everyone):
        here = [one for one in everyone if one.host == host]
        devices = " + ".join(_counted([one.device for one in here]))
        memory = f"{min(one.memory_gib for one in here):.0f} GiB"
        shown.add_row(host, _ranges([one.rank for one in here]), devices, memory, here[0].address)
    return shown


def own_info(launcher: Launcher, device: torch.device) -> RankInfo:
    """What this rank says of itself."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, identity, memory = properties.name, str(properties.uuid), properties.total_memory
    else:
        name, identity, memory = "cpu", "", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    versions = {"python": platform.python_version(), "noise": str(noise.VERSION)}
    for package in _SAME:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    address = own_address((launcher.rendezvous or "localhost:0").rpartition(":")[0])
    return RankInfo(socket.gethostname(), launcher.rank, name, identity, memory / 2**30, address, versions)


def own_address(towards: str) -> str:
    """The address from which this host speaks to another one; sends nothing."""
    for family, _, _, _, target in socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(target)
            except OSError:
                continue
            return str(probe.getsockname()[0])
    raise LaunchError(f"{socket.gethostname()} has no route to {towards}: check its network")


def _collect(store: dist.Store, kind: str, rank: int, world_size: int) -> list[str]:
    """Every rank's value, in rank order. Raises SharedError with the ranks that have none in time."""
    keys, seconds = [f"{kind}/{rank}" for rank in range(world_size)], timeout_s()
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            came = [other for other, key in enumerate(keys) if store.check([key])]
            absent = [other for other in range(world_size) if other not in came]
            problem = (
                f"rank {_ranges(absent)} of {world_size} did not come within {seconds} s, rank {_ranges(came)} did: "
                "look at the output of the missing ones, or raise JOIN_TIMEOUT_S"
            )
            _raise_on_all(store, rank, len(came), problem)
        time.sleep(0.05)
    return [store.get(key).decode() for key in keys]


def _raise_on_all(store: dist.Store, rank: int, count: int, problem: str) -> NoReturn:
    """Rank 0 may be the one that holds the store: it leaves last of `count`, or after a while."""
    told, deadline = store.add("told", 1), time.monotonic() + _LINGER_S
    while rank == 0 and told < count and time.monotonic() < deadline:
        time.sleep(0.05)
        told = store.add("told", 0)
    raise SharedError(problem)


def _reachable(everyone: list[RankInfo], rank: int) -> list[RankInfo]:
    """Sees to it that other hosts get an address of this one that they can reach.

    Debian's hosts file maps a machine's own name to a loopback address, which gloo would offer to everyone.
    """
    mine = everyone[rank]
    others = [one.address for one in everyone if one.host != mine.host and not _is_loopback(one.address)]
    if not others:
        return everyone
    if _is_loopback(mine.address):  # on the rendezvous' own host
        address = own_address(others[0])
        everyone = [replace(one, address=address) if one.host == mine.host else one for one in everyone]
    try:
        named = socket.gethostbyname(mine.host)
    except OSError:
        named = "127.0.0.1"  # no name at all is no better
    if _is_loopback(named) and "GLOO_SOCKET_IFNAME" not in os.environ:
        for interface, addresses in psutil.net_if_addrs().items():
            if everyone[rank].address in [one.address for one in addresses]:
                os.environ["GLOO_SOCKET_IFNAME"] = interface
    return everyone


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _differing_versions(everyone: Sequence[RankInfo]) -> str:
    first = everyone[0]
    for package, version in first.versions.items():
        for other in everyone:
            if other.versions.get(package) != version:
                return (
                    f"{package} is {version} on {first.host} (rank {first.rank}), but {other.versions.get(package)} on "
                    f"{other.host} (rank {other.rank}): give all nodes the same environment"
                )
    return ""


def _shared_device(everyone: Sequence[RankInfo]) -> str:
    holders: dict[tuple[str, str], RankInfo] = {}
    for one in everyone:
        other = holders.setdefault((one.host, one.identity), one)
        if one.identity and other is not one:
            return (
                f"ranks {other.rank} and {one.rank} share one {one.device} on {one.host}: start one process per GPU, "
                "and let the launcher tell them apart (LOCAL_RANK, CUDA_VISIBLE_DEVICES)"
            )
    return ""


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        if path.parent.is_dir():
            os.scandir(path.parent).close()  # network file systems look again
        time.sleep(0.2)
    return True


def _counted(names: Sequence[str]) -> list[str]:
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"
