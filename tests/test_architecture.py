"""The shape of the code: which way imports point, and what no module may do."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import mezo_scale

ROOT = pathlib.Path(mezo_scale.__file__).parents[1]
SOURCES = sorted((ROOT / "mezo_scale").rglob("*.py"))


def names_used(path: pathlib.Path) -> Iterator[str]:
    """Dotted names that a module reads or imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def users_of(*forbidden: str, under: str = "") -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "mezo_scale" / under)
        for name in names_used(path)
        if any(name == word or name.startswith(f"{word}.") for word in forbidden)
    ]


def test_imports_point_down_the_floors_only() -> None:
    lint = pathlib.Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_nothing_is_unpickled() -> None:
    assert users_of("pickle", "dill", "marshal", "shelve", "torch.load") == []


def test_yaml_is_only_loaded_safely() -> None:
    assert users_of("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader") == []


def test_no_remote_code_is_trusted() -> None:
    trusting = [
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword)
        and node.arg == "trust_remote_code"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert trusting == []


def test_the_noise_knows_no_distribution() -> None:
    assert users_of("torch.distributed", "dist", under="noise") == []


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "misc", "manager"])
def test_no_module_has_a_name_that_says_nothing(word: str) -> None:
    assert [path.name for path in SOURCES if word in path.stem.split("_")] == []


def test_the_public_surface_is_a_list() -> None:
    assert all(hasattr(mezo_scale, name) for name in mezo_scale.__all__)
    promised = {"MeZO", "StepRecord", "noise", "perturbed", "replay", "shards"}
    assert promised <= set(mezo_scale.__all__)
