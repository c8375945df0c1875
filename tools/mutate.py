"""Damaged logs, exports and recipes by the hundred thousand: each is refused in one line, or is what it says.

    python -m tools.mutate                     100,000 logs and exports, 100,000 recipes; some minutes each
    python -m tools.mutate --count 2000 --seed 7 logs

The result is appended to tools/results/mutate.jsonl. Counted as wrong are: steps that were not written; steps left out
that were on the disk for certain; a recipe that does not come back from its own text, or in which a key is lost; an
exception other than the package's; a message of several lines or of 500 characters.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import yaml

from mezo_scale import recipe as recipes
from mezo_scale.errors import MezoError
from mezo_scale.trajectory import Header, StepRecord, Trajectory, export
from mezo_scale.trajectory.codec import Chain, pack_header, pack_step, slot

Found = TypeVar("Found")

ROWS = Path(__file__).parents[1] / "tools" / "results" / "mutate.jsonl"
LENGTHS = (1, 1, 4, 17, 92, 512, 4096)
LONGEST = 500
HEADER = Header(
    noise_version=1,
    fingerprint="00ff00ff00ff00ff",
    manifest=[["a.weight", [3, 2], "float32", 0, True]],
    num_directions=2,
    num_groups=1,
    distribution="normal",
    rounding="nearest",
    seed=7,
    eps=1e-3,
    run_id="00112233445566778899aabbccddeeff",
)
MANY = replace(HEADER, manifest=[[f"{n}.weight", [1], "float32", 0, True] for n in range(700)])


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One or two changes of the kinds that disks, copies and people make."""
    for _ in range(chance.choice((1, 1, 2))):
        if not data:
            return data
        at, length = chance.randrange(len(data)), chance.choice(LENGTHS)
        kind = chance.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + chance.randbytes(length) + data[at + length :]
        elif kind == 2:
            data = data[:at] + bytes(min(length, len(data) - at)) + data[at + length :]
        elif kind == 3:
            data = data[:at] + data[at + length :]
        elif kind == 4:
            data = data[:at] + data[chance.randrange(len(data)) :][:length] + data[at:]
        else:
            data = data[:at]
    return data


# -- logs and exports -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A file to damage, what it holds, and the file of another run of the same settings."""

    name: str
    data: bytes
    other: bytes
    records: list[StepRecord]
    start: int
    size: int

    def damaged(self, chance: random.Random) -> bytes:
        """The file with a few changes; among them records that are moved, or taken from the other run."""
        kind = chance.randrange(8)
        if self.size == 0 or kind > 2:
            return _relabelled(self.data, chance) if kind == 7 else mutated(self.data, chance)
        parts = [self.data[at : at + self.size] for at in range(self.start, len(self.data), self.size)]
        one, two = chance.randrange(len(parts)), chance.randrange(len(parts))
        if kind == 0:
            parts[one], parts[two] = parts[two], parts[one]
        elif kind == 1:
            parts.insert(one, parts[two])
        else:
            at = self.start + one * self.size
            return self.data[:at] + self.other[at : at + chance.choice((1, 1, len(parts))) * self.size] + self.data[at:]
        return self.data[: self.start] + b"".join(parts)

    def is_wrong(self, data: bytes, found: Trajectory) -> bool:
        """Whether the file may not be taken for what was read of it."""
        if self.size == 0:  # one digest over all
            return data != self.data and _is_sealed(self.data, data)
        kept = self.start + self.size * len(found)
        if len(found.header.manifest) > 1:
            kept = 0  # pieces of bitmaps between the steps
        if list(found) != self.records[: len(found)] or data[:kept] != self.data[:kept]:
            return True
        return kept > 0 and (len(data.rstrip(b"\0")) - kept > 2 * self.size or self._on_disk(data) > len(found))

    def _on_disk(self, data: bytes) -> int:
        """How many records were on the disk for certain, as any record says that is whole, wherever it stands."""
        parts = (data[at : at + self.size] for at in range(self.start, len(data) - self.size + 1, self.size))
        whole = (part for part in parts if zlib.crc32(part[:-4]) == int.from_bytes(part[-4:], "little"))
        return max((int.from_bytes(part[16:24], "little") for part in whole), default=0)


def _is_sealed(original: bytes, data: bytes) -> bool:
    """Whether a changed export has the beginning of the original: who makes a new one says what he likes."""
    return data[:200] == original[:200] and data[-16:] != blake2b(data[:-16], digest_size=16).digest()


def _relabelled(data: bytes, chance: random.Random) -> bytes:
    """Another header with a right checksum; of an export the digest is made right as well."""
    magic, length = data[:8], int.from_bytes(data[8:12], "little")
    fields = json.loads(data[16 : 16 + length])
    rest = data[16 + length :]
    if magic == export.MAGIC and chance.random() < 0.7:
        rest = mutated(rest[:-16], chance) + rest[-16:]
    else:
        fields[chance.choice([*fields, "more"])] = chance.choice(
            (None, -1, 1.5, 10**12, "x", [], {}, [1], {"a": 1}, True)
        )
    text = json.dumps(fields).encode()
    changed = struct.pack("<8sII", magic, len(text), zlib.crc32(text)) + text + rest
    if magic == export.MAGIC:
        changed = changed[:-16] + blake2b(changed[:-16], digest_size=16).digest()
    return changed


def _record(step: int, unread: tuple[int, ...], shift: float) -> StepRecord:
    return StepRecord(step, (2**64 - 1 - step, step), (1.5 + shift, -0.25), (0.5, -0.125), (1.0,), 0.7 + step, unread)


def subjects(folder: Path, steps: int = 30) -> list[Subject]:
    """Logs that are open, closed, with bitmaps, and with the most steps that may not be on the disk, and an export."""

    def written(name: str, head: Header, *, closes: tuple[int, ...], shift: float = 0) -> Path:
        log = Trajectory.create(folder / name, head)
        for step in range(steps):
            unread = () if head is HEADER or len(head.manifest) < 3 else ((0, 3, 699), (3,), ())[min(2, step // 5)]
            log.append(_record(step, unread, shift))
            if step + 1 in closes:
                log.close()
                log = Trajectory.open(folder / name, append=True)
        log.release()
        return folder / name

    found = []
    for name, head, closes in (("open", HEADER, ()), ("closed", HEADER, (steps,)), ("bitmaps", MANY, (steps,))):
        path = written(name, head, closes=closes)
        other = written(f"other {name}", replace(head, run_id="f" * 32), closes=closes, shift=1)
        begin, size = len(pack_header(head)), slot(head).itemsize
        records = Trajectory.open(path).records
        found.append(Subject(name, path.read_bytes(), other.read_bytes(), records, begin, size))
    lagging = replace(HEADER, unsynced=16)
    data, others = (_lagging(replace(lagging, run_id=run_id), steps) for run_id in (HEADER.run_id, "f" * 32))
    begin, size = len(pack_header(lagging)), slot(lagging).itemsize
    found.append(Subject("lagging", data, others, Trajectory.parse(data).records, begin, size))
    Trajectory.open(folder / "bitmaps").export(folder / "export")
    data = (folder / "export").read_bytes()
    found.append(Subject("export", data, data, Trajectory.open(folder / "export").records, 0, 0))
    return found


def _lagging(head: Header, steps: int) -> bytes:
    """A log of which the last 15 steps are never on the disk when the next one is written."""
    data = pack_header(head)
    chain = Chain(data)
    for step in range(steps):
        for body in pack_step(head, _record(step, (), 0), (), max(0, step - 15)):
            data += body + chain.seal(body)
    return data


def logs(count: int, chance: random.Random) -> Iterator[str]:
    """Damages and reads; yields what came of each."""
    warnings.filterwarnings("ignore", message=".*of a record that was cut off")
    with tempfile.TemporaryDirectory() as folder:
        found = subjects(Path(folder))
    for number in range(count):
        subject = found[number % len(found)]
        data = subject.damaged(chance)
        said, trajectory = _outcome(partial(Trajectory.parse, data))
        if trajectory is None:
            yield said
        elif data == subject.data:
            yield "unchanged"
        elif subject.is_wrong(data, trajectory):
            yield "WRONG: accepted"
        else:
            yield f"accepted, {'whole' if len(trajectory) == len(subject.records) else 'without a torn end'}"


# -- recipes ----------------------------------------------------------------------------------------------------------

BEGUN = "model: {name: m}\ntask: {data: d}\n"
WILD = (
    *("null", "true", "3", "-1", "1e-3", ".inf", ".nan", "0x1f", "''", "[]", "{}", "[1,2]", "{a: b}", "x", "9" * 300),
    *("&a", "*a", "!!int", "!!set", "!!python/object:os.system", "?", "-", "|", ">", "#", "%", "@", "`", '"', "'"),
    *("<<: ", "\t", "\0", "\n", "\n  ", ": ", "2020-11-25", "x" * 600, "\x85", "\U0001f600"),
)


def _recipe(chance: random.Random, keys: list[str]) -> str:
    """A recipe of some fields, with values that fit by luck."""
    sections: dict[str, list[str]] = {"model": ["name: m"], "task": ["data: d"]}
    for key in chance.sample(keys, chance.randrange(5)):
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name}: {chance.choice(WILD)}")
    return "".join(f"{section}:\n" + "".join(f"  {line}\n" for line in lines) for section, lines in sections.items())


def recipe_files(count: int, chance: random.Random) -> Iterator[str]:
    """Malformed recipes and overrides; yields what came of each."""
    keys = [option.key for option in recipes.options()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        for _ in range(count):
            text, overrides = _recipe(chance, keys).encode("utf-8", "surrogatepass"), []
            kind = chance.randrange(4)
            if kind == 0:
                text = mutated(text, chance)
            elif kind == 1:
                at = chance.randrange(len(text))
                text = text[:at] + "".join(chance.choices(WILD, k=chance.randrange(1, 6))).encode() + text[at:]
            elif kind == 2:
                overrides = [f"{chance.choice(keys)}={''.join(chance.choices(WILD, k=chance.randrange(1, 3)))}"]
            path.write_bytes(text)
            said, found = _outcome(partial(recipes.load, path, overrides))
            yield said if found is None else _came_back(path, text, found)


def _came_back(path: Path, text: bytes, found: recipes.Recipe) -> str:
    """Whether a recipe that was accepted is the same when it is written and read, and has every key of its file."""
    path.write_text(recipes.dump(found), encoding="utf-8")
    if recipes.load(path) != found:
        return "WRONG: another when read again"
    known = {option.key for option in recipes.options()}
    if not _keys(yaml.compose(text, yaml.SafeLoader)) <= known | {key.split(".")[0] for key in known}:
        return "WRONG: a key is lost"
    return "accepted"


def _keys(node: yaml.Node | None, above: str = "") -> set[str]:
    """Sections, and section.field, as a recipe's text has them."""
    if not isinstance(node, yaml.MappingNode) or "." in above:
        return set()
    found = {f"{above}{key.value}": value for key, value in node.value}
    return set(found).union(*(_keys(value, f"{name}.") for name, value in found.items()))


def _outcome(do: Callable[[], Found]) -> tuple[str, Found | None]:
    try:
        return "", do()
    except MezoError as error:
        said = str(error)
        good = said.isprintable() and 0 < len(said) < LONGEST
        return "refused" if good else f"WRONG: message of {len(said)} characters: {said[:60]!r}", None
    except Exception as error:
        return f"WRONG: {type(error).__name__}", None


SUBJECTS: dict[str, Callable[[int, random.Random], Iterator[str]]] = {"logs": logs, "recipes": recipe_files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[[], *SUBJECTS], help="default: both")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    wrong = 0
    for what in options.what or SUBJECTS:
        began = time.process_time()
        found = Counter(SUBJECTS[what](options.count, random.Random(options.seed)))
        row = {"what": what, "count": options.count, "seed": options.seed, "outcomes": dict(found.most_common(40))}
        row["cpu_seconds"] = round(time.process_time() - began, 1)
        wrong += sum(number for outcome, number in found.items() if outcome.startswith("WRONG"))
        with options.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row, indent=2), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
