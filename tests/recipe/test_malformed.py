"""Malformed recipes: whatever the file or an override holds, one line says what is wrong."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mezo_scale import recipe as recipes
from mezo_scale.errors import RecipeError

HEAD = "model: {name: m}\ntask: {data: d}\n"
NINE = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi"))

ODD = {
    "a date that is none": "output: {dir: 2020-13-45}",
    "a date": "train: {steps: 2020-11-25}",
    "an empty integer": "train: {steps: !!int ''}",
    "a word tagged as a truth": "output: {checkpoint: !!bool z}",
    "a word tagged as a number": "optimizer: {lr: !!float y}",
    "a word tagged as a time": "output: {dir: !!timestamp t}",
    "5,000 digits": f"train: {{steps: {'9' * 5000}}}",
    "4,000 digits": f"train: {{steps: {'9' * 4000}}}",
    "hexadecimal digits": f"train: {{steps: 0x{'f' * 9000}}}",
    "bytes": "output: {dir: !!binary aGVsbG8=}",
    "a set": "train: !!set {steps, seed}",
    "a set of answers": "task: {data: d, candidates: !!set {a, b}}",
    "an ordered mapping": "train: !!omap [steps: 3]",
    "a merge key": "train: {<<: {steps: 3}}",
    "a merge of an alias": "base: &base {steps: 3}\ntrain:\n  <<: *base",
    "an alias": "output: {dir: &a x}\noptimizer: {rounding: *a}",
    "an alias that grows": "a: &a [x, x, x, x, x, x, x, x, x]\n" + NINE,
    "an alias to itself": "train: &a [*a]",
    "a character that is none": 'output: {dir: "\\U00110000"}',
    "a null byte": 'output: {dir: "\\0"}',
    "a line break": 'output: {dir: "a\\nb"}',
    "an escape": 'output: {dir: "\\e[31m"}',
    "a key with a line break": '"a\\nb": 1',
    "a long key": f"{'k' * 900}: 1",
    "a very long key": f"? {'k' * 100_000}\n: 1",
    "a key that is a list": "? [a, b]\n: 1",
    "a key that is a number": "1: 2",
    "a key that is nothing": "~: 2",
    "a long value": f"output: {{dir: {'x' * 300}}}",
    "a very long value": f"model: {{name: {'x' * 900_000}}}",
    "a key twice": "train: {steps: 1, steps: 2}",
    "a section twice": "train: {steps: 1}\ntrain: {seed: 2}",
    "3,000 lists": f"train: {'[' * 3000}{']' * 3000}",
    "3,000 trees": f"train: {'{a: ' * 3000}1{'}' * 3000}",
    "a list of a million": f"train: [{'1,' * 200_000}1]",
    "two documents": "---\nmodel: {name: m}",
    "another tag": "train: !mine {steps: 3}",
    "Python": "train: !!python/object/apply:os.getcwd []",
    "a tab": "train:\n\tsteps: 3",
    "control characters": "train: {steps: \x01}",
    "infinity": "train: {steps: .inf}",
    "sixty seconds": "optimizer: {lr: 1:60:60}",
}


def outcome(path: Path, *overrides: str) -> str:
    """The refusal, checked for its form; or nothing, if the recipe is one."""
    try:
        recipes.load(path, overrides)
    except RecipeError as error:
        said = str(error)
        assert said.isprintable(), repr(said)
        assert 0 < len(said) < 500
        return said
    return ""


@pytest.mark.parametrize("what", ODD)
def test_an_odd_value_is_refused_in_one_short_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "r.yaml"
    taken = {line.split(":")[0] for line in ODD[what].splitlines()}
    head = "".join(line for line in HEAD.splitlines(keepends=True) if line.split(":")[0] not in taken)
    path.write_text(head + ODD[what] + "\n")
    began = time.process_time()
    said = outcome(path)
    assert time.process_time() - began < 30
    if what == "a date that is none":  # text like any other: a folder may be called so
        assert said == ""
        assert recipes.load(path).output.dir == "2020-13-45"
    else:
        assert said.startswith(str(path))


@pytest.mark.parametrize(
    "text", ["!!int ''", "9" * 5000, "!!binary aGVsbG8=", "[" * 3000, "*a", "!!set {a}", '"\\0"', "x" * 2_000_000]
)
def test_an_odd_override_is_refused_in_one_short_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(HEAD)
    for key in ("output.dir", "train.steps", "dir", "nothing", "x" * 5000):
        assert outcome(path, f"{key}={text}")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"# " + b"x" * 1_000_000 + b"\n" + HEAD.encode(), "it has 1,000,036 bytes, expected at most 1,000,000"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"train: {steps: \xff}", "is not YAML"),
        (HEAD.encode() + b"train: {steps: 1, steps: 2}", "the key steps twice: keep one"),
        (HEAD.encode() + b"train: {steps: &a 1, seed: *a}", "an alias (*name): write the value out instead"),
        (HEAD.encode() + b"train: " + b"[" * 30, "more than 20 levels inside each other"),
    ],
)
def test_what_a_recipe_may_not_hold_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    assert said in outcome(path)


def test_a_folder_or_a_file_that_can_not_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").mkdir()
    assert "holds no recipe.yaml" in outcome(tmp_path)
    assert "there is no file" in outcome(Path("x" * 5000))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=9)
values: st.SearchStrategy[Any] = st.recursive(
    scalars | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars | st.dates(), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([option.key for option in recipes.options()])
wild = st.text(st.sampled_from("abm: {}[],&*!|>-#?%@`'\"\\\n\t0123456789.~<=\0\u2028\U0001f600"), max_size=80)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(fields=st.dictionaries(keys, values, max_size=3), more=st.dictionaries(scalars, values, max_size=2))
def test_any_tree_is_a_recipe_or_one_line(tmp_path: Path, fields: dict[str, Any], more: dict[Any, Any]) -> None:
    tree: dict[Any, Any] = {"model": {"name": "m"}, "task": {"data": "d"}}
    for key, value in fields.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(more | tree), encoding="utf-8")
    outcome(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(text=wild | st.text(max_size=40), key=keys)
def test_any_text_is_a_recipe_or_one_line(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes((HEAD + text).encode("utf-8", "surrogatepass"))
    outcome(path)
    path.write_text(HEAD)
    outcome(path, f"{key}={text}")
