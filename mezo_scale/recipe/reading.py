"""From a YAML file and `key=value` overrides to a checked recipe; whatever is wrong is said in one line."""

import difflib
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mezo_scale.errors import RecipeError
from mezo_scale.recipe.plain_yaml import read
from mezo_scale.recipe.sections import NUMBER
from mezo_scale.recipe.tree import RECIPE_FILE, Recipe, ignored, options

Kind = TypeVar("Kind", bound=BaseModel)
_PAGE = "docs/recipe.md lists them all"
_LONGEST = 480  # characters of a message; what is longer has lost its middle
_NAME = 100  # characters of a key that could be a misspelt one
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, or the one in a run directory, which then is its own `output.dir`.

    `overrides` are `section.field=value`, the value in YAML; a field's bare name will do where it is the only one.

    Raises:
        RecipeError: in one line, for whatever is wrong with the file, a key or a value.
    """
    source = Path(source)
    is_folder = os.path.isdir(source)  # pathlib's raise for names that no file can have
    path = source / RECIPE_FILE if is_folder else source
    if not os.path.isfile(path):
        found = f"the folder {source} holds no {RECIPE_FILE}" if is_folder else f"there is no file {source}"
        raise _refusal(f"{found}: give a recipe (YAML) or the directory of a run")
    tree = read_yaml(path, f"sections ({', '.join(Recipe.model_fields)})")
    for override in overrides:
        _override(tree, override)
    recipe = parse(tree, str(path))
    directory = str(source) if is_folder else recipe.output.dir or str(Path("runs") / path.stem)
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": directory})})


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises RecipeError, in one line: it is not YAML, or not `expected`."""
    try:
        tree = read(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        raise _refusal(f"{path} is not YAML: {error}") from None
    except OSError as error:
        raise _refusal(f"{path} can't be read ({error.strerror})") from None
    if not isinstance(tree, dict):
        raise _refusal(f"{path} holds {_describe(tree)}, expected {expected}")
    return tree


def parse(tree: dict[str, Any], origin: str = "the recipe") -> Recipe:
    """Checks a tree of plain values. Raises RecipeError, in one line that names the key."""
    # A section whose fields are all commented out is read as null.
    whole = {key: {} if value is None else value for key, value in tree.items()}
    recipe = checked(Recipe, whole, origin, [*Recipe.model_fields, *(option.key for option in options())])
    for key in ignored(recipe):
        section, name = key.split(".")
        raise _refusal(
            f"{origin}: {key} is {getattr(getattr(recipe, section), name)!r}, but method.name is {recipe.method.name}, "
            "which has no use for it: leave one of them out"
        )
    return recipe


def checked(kind: type[Kind], tree: Any, origin: str, known: Sequence[str], elsewhere: str = _PAGE) -> Kind:
    """A tree of plain values as what it is meant to be.

    Args:
        kind: the class of its fields.
        origin: the file, for the message.
        known: the keys that there are, with their sections.
        elsewhere: what is said of a key that is like none of them.

    Raises:
        RecipeError: in one line that names the key.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # A misspelt key explains the one that is missing.
        first, *others = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
        more = f" (and {len(others)} more)" if others else ""
        raise _refusal(f"{origin}: {_explain(first, known, elsewhere)}{more}") from None


def parse_override(
    override: str, known: Sequence[str], elsewhere: str = _PAGE, after: str = "recipe"
) -> tuple[str, Any]:
    """(key, value) of the `key=value` after a file; the key in full, the value from YAML. Raises RecipeError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise _refusal(f"found {override!r} after the {after}, expected key=value")
    if "." not in key:
        matches = [name for name in known if name.endswith(f".{key}")]
        if len(matches) > 1:
            raise _refusal(f"{key}= could be {' or '.join(matches)}: write the one you mean in full")
        key = matches[0] if matches else key
    if key not in known:
        raise _refusal(f"{override}: unknown key {key}{_did_you_mean(key, known, elsewhere)}")
    try:
        return key, read(text)
    except (yaml.YAMLError, ValueError) as error:
        raise _refusal(
            f"{key}={text[:_NAME]}: {text[:_NAME]!r} is not a YAML value ({error}); quote it for YAML and for the shell"
        ) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, value = parse_override(override, [option.key for option in options()])
    section, name = key.split(".")
    if tree.get(section) is None:
        tree[section] = {}
    if isinstance(tree[section], dict):  # otherwise the check of the whole says what is wrong
        tree[section][name] = value


def _refusal(text: str) -> RecipeError:
    """The error in one line, however long or wild what it cites."""
    line = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(line.split())
    half = _LONGEST // 2
    return RecipeError(line if len(line) <= _LONGEST else f"{line[:half]} [...] {line[-half:]}")


def _explain(error: ErrorDetails, known: Sequence[str], elsewhere: str) -> str:
    key = ".".join(str(part) for part in error["loc"] if part != NUMBER)
    if error["type"] == "extra_forbidden":
        near = [name for name in known if len(error["loc"]) == 1 or "." in name]
        return f"unknown key {key}{_did_you_mean(key, near, elsewhere)}"
    if error["type"] == "missing":
        return f"{key} is missing: it has no default"
    if error["type"] == "model_type":
        return f"{key}: found {_describe(error['input'])}, expected fields of a section"
    expected = error["msg"]
    for start in ("Input should be ", "Tuple should have ", "Value error, expected "):
        expected = expected.removeprefix(start)
    expected = expected.replace("a valid integer", "an integer").replace("a valid ", "a ").split(" after validation")[0]
    return f"{key}: found {_describe(error['input'])}, expected {expected}"


def _did_you_mean(key: str, known: Sequence[str], elsewhere: str) -> str:
    if len(key) > _NAME:
        return f"; {elsewhere}"
    section, _, leaf = key.rpartition(".")
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    close = [name for name in known if name.rpartition(".")[2] == leaf]  # right, but for its section
    if not close and beside:  # by their own names: the section's they have in common
        close = [f"{section}.{name}".removeprefix(".") for name in difflib.get_close_matches(leaf, beside, n=1)]
    elif not close:
        close = difflib.get_close_matches(key, known, n=1)
    if not close:
        leaves = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.75)
        close = [name for name in known if name.rpartition(".")[2] in leaves]
    return f"; did you mean {close[0]}?" if close else f"; {elsewhere}"


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = {str: "text", bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "a tree"}
    return f"{_SHORT.repr(value)} ({kinds.get(type(value), type(value).__name__)})"
