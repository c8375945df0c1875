"""What the ranks say of themselves at the start, and what is found wrong with it."""

import pathlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from mezo_scale.distributed import preflight
from mezo_scale.distributed.launcher import Launcher
from mezo_scale.distributed.preflight import RankInfo
from mezo_scale.errors import LaunchError, SharedError

CPU = torch.device("cpu")
ONE = RankInfo("node1", 0, "H200", "GPU-0", 140.0, "10.0.0.1", {"torch": "2.13.0"})
TWO = replace(ONE, rank=1, identity="GPU-1")
THREE = replace(ONE, host="node2", rank=2, address="10.0.0.2")


def on_ranks(count: int, function: Callable[[int], object]) -> list[object]:
    """The function's result or SharedError on each of `count` ranks that share a store, one thread each."""
    results: list[object] = [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except SharedError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_hears_of_every_other() -> None:
    store = dist.HashStore()

    def call(rank: int) -> object:
        return preflight.exchange(store, Launcher("torchrun", 3, rank, rank, 3, "localhost:1"), CPU)

    first, *others = on_ranks(3, call)
    assert [one.rank for one in first] == [0, 1, 2]
    assert all(other == first for other in others)
    assert {one.device for one in first} == {"cpu"}
    assert first[0].versions.keys() >= {"python", "torch", "mezo-scale", "noise"}


def test_a_rank_that_does_not_come_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOIN_TIMEOUT_S", "1")
    store, began = dist.HashStore(), time.monotonic()

    def call(rank: int) -> object:
        return preflight.exchange(store, Launcher("srun", 4, rank, rank, 4, "localhost:1"), CPU)

    found = on_ranks(2, call)
    assert {str(error) for error in found} == {
        "rank 2-3 of 4 did not come within 1 s, rank 0-1 did: look at the output of the missing ones, or raise "
        "JOIN_TIMEOUT_S"
    }
    assert time.monotonic() - began < 5


def test_versions_and_devices_are_compared() -> None:
    assert preflight._differing_versions([ONE, TWO, THREE]) == ""
    assert preflight._shared_device([ONE, TWO, THREE]) == ""
    old = replace(THREE, versions={"torch": "2.8.0"})
    assert preflight._differing_versions([ONE, TWO, old]) == (
        "torch is 2.13.0 on node1 (rank 0), but 2.8.0 on node2 (rank 2): give all nodes the same environment"
    )
    assert "ranks 0 and 1 share one H200 on node1" in preflight._shared_device([ONE, replace(TWO, identity="GPU-0")])


def test_the_table_has_a_row_per_host() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(preflight.table([ONE, TWO, THREE]))
    rows = [line for line in captured.get().splitlines() if "node" in line]
    assert [row.replace("│", " ").split() for row in rows] == [
        ["node1", "0-1", "2", "x", "H200", "140", "GiB", "10.0.0.1"],
        ["node2", "2", "1", "x", "H200", "140", "GiB", "10.0.0.2"],
    ]


def test_a_shared_folder_is_seen_by_all_and_left_clean(tmp_path: pathlib.Path) -> None:
    store = dist.HashStore()
    run = tmp_path / "not" / "yet"
    assert (
        on_ranks(2, lambda rank: preflight.check_shared(run, store, [ONE, replace(THREE, rank=1)], rank)) == [None] * 2
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_t_be_written_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: pathlib.Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "touch", refuse)
    store = dist.HashStore()
    found = on_ranks(2, lambda rank: preflight.check_shared(tmp_path, store, [ONE, replace(THREE, rank=1)], rank))
    assert {str(error) for error in found} == {
        f"output.dir: node1 can't write in {tmp_path} (Permission denied): give another folder"
    }


@pytest.mark.parametrize("text", ["soon", "0", "-3"])
def test_a_timeout_that_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOIN_TIMEOUT_S", text)
    with pytest.raises(LaunchError, match=f"JOIN_TIMEOUT_S is '{text}', expected seconds"):
        preflight.timeout_s()
