"""Logs to write, read and damage."""

import contextlib
import errno
import json
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from mezo_scale.trajectory import Header, StepRecord, Trajectory
from mezo_scale.trajectory.codec import pack_header, slot

RUN_ID = "00112233445566778899aabbccddeeff"


def header(**changes: object) -> Header:
    fields = {
        "noise_version": 1,
        "fingerprint": "00ff00ff00ff00ff",
        "manifest": [["a.weight", [3, 2], "float32", 0, True]],
        "num_directions": 2,
        "num_groups": 1,
        "distribution": "normal",
        "rounding": "nearest",
        "seed": 7,
        "eps": 1e-3,
        "run_id": RUN_ID,
    }
    return Header(**{**fields, **changes})  # type: ignore[arg-type]


MANY = header(manifest=[[f"{n}.weight", [1], "float32", 0, True] for n in range(700)])


def record(step: int, unread: tuple[int, ...] = ()) -> StepRecord:
    return StepRecord(step, (2**64 - 1 - step, step), (1.5, -0.25), (0.5, -0.125), (1.0,), 0.693 + step, unread)


def begin(head: Header) -> int:
    """Where a file's records begin."""
    return len(pack_header(head))


def size(head: Header) -> int:
    """Bytes of a record."""
    return int(slot(head).itemsize)


def written(path: pathlib.Path, steps: int = 3, head: Header | None = None, *, closed: bool = True) -> list[StepRecord]:
    """A log with some steps; which parameters are unread changes twice, where there are many."""
    head = head if head is not None else header()
    trajectory = Trajectory.create(path, head)
    for step in range(steps):
        unread = () if len(head.manifest) < 3 else ((0, 3, 699), (3,), ())[min(2, step // 5)]
        trajectory.append(record(step, unread))
    if closed:
        trajectory.close()
    trajectory.release()
    return trajectory.records


def written_in_version_1(path: pathlib.Path, records: list[StepRecord], head: Header) -> None:
    """As the releases before version 2 wrote."""
    fields = {name: getattr(head, name) for name in head.__slots__ if name not in ("run_id", "fingerprints")}
    text = json.dumps(
        {k: v for k, v in fields.items() if v is not None}, sort_keys=True, separators=(",", ":")
    ).encode()
    data = struct.pack("<8sII", b"MEZOTRJ1", len(text), zlib.crc32(text)) + text
    k, g = head.num_directions, head.num_groups
    form = struct.Struct(f"<QIId{k}Q{k}d{g * k}f{g}f")
    room, before = form.size - 16, ()
    for one in records:
        bodies = []
        if one.unread != before:
            every = np.isin(np.arange(len(head.manifest)), one.unread)
            bits = np.packbits(every, bitorder="little").tobytes()
            for number, start in enumerate(range(0, len(bits), room)):
                bodies.append(struct.pack("<QII", one.step, 2, number) + bits[start : start + room].ljust(room, b"\0"))
        numbers = (*one.seeds, *one.projected_grads, *one.alphas, *one.decays)
        bodies.append(form.pack(one.step, int(one.skipped), 0, one.loss, *numbers))
        data += b"".join(body + struct.pack("<I", zlib.crc32(body)) for body in bodies)
        before = one.unread
    path.write_bytes(data)


@contextlib.contextmanager
def failing_fsync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, nothing reaches the disk for certain."""

    def fail(number: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


def with_run_id(head: Header, run_id: str) -> Header:
    return replace(head, run_id=run_id)
