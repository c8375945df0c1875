"""The shape of the code: which way imports point, and what no module may do."""

import ast
import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib
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


def test_the_public_surface_is_this_list() -> None:
    promised = "MeZO MezoError Shard StepRecord Trajectory View perturbed replay shards"
    modules = "estimators noise objectives rules"
    assert sorted(mezo_scale.__all__) == sorted([*promised.split(), *modules.split()])
    assert all(hasattr(mezo_scale, name) for name in mezo_scale.__all__)


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a program has imported."""
    program = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_pulls_neither_hugging_face_nor_deepspeed() -> None:
    loaded = loaded_after("import mezo_scale\nfor name in mezo_scale.__all__: getattr(mezo_scale, name)")
    assert "torch" in loaded
    assert not loaded & {"transformers", "deepspeed", "accelerate", "datasets", "peft", "pydantic", "typer", "yaml"}


def test_the_command_line_answers_without_torch() -> None:
    assert not loaded_after("import mezo_scale.cli") & {"torch", "transformers", "numpy", "numba"}


def test_importing_the_models_silences_nobody() -> None:
    code = "from transformers import logging\nbefore = logging.get_verbosity()\nimport mezo_scale.models\n"
    assert loaded_after(code + "assert logging.get_verbosity() == before")


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert importlib.metadata.version("mezo-scale").split(".")[0].isdecimal()
    assert mezo_scale.__version__.count(".") == 2
