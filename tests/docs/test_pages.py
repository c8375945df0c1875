"""What the pages say is run: their Python, recipes and commands. A tiny model stands in the place of the demo's."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import mezo_scale as ms
from mezo_scale import cli, errors, recipe
from mezo_scale.bench import comparison
from tests.support import material
from tests.support.fixtures import ROOT
from tests.support.launch import Launch

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN_FOR_A_FILE = re.compile(r"# (\w+\.py)\n")
# A thread of gloo's that still has a tensor to let go of aborts at the interpreter's end: on a busy machine one program
# in twelve that ends with a collective, with PyTorch alone as well.
LETTING_GO = "import time\n\ntime.sleep(1)\n"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with(language: str, folder: str = "docs") -> list[Path]:
    return [page for page in PAGES if name_of(page).startswith(folder) and blocks(page, language)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as the pages expect it: the demo's model and data, tiny, and the page's recipe."""
    material.write_model("llama", tmp_path / ".demo" / "model")
    material.write_reviews(tmp_path / ".demo" / "rotten_tomatoes.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_the_python_of_a_page_runs_and_what_it_claims_holds(page: Path, place: Path) -> None:
    code = blocks(page, "python")
    assert any("assert " in block for block in code), f"{name_of(page)} claims nothing that could fail"
    for recipe_text in blocks(page, "yaml"):
        (place / "recipe.yaml").write_text(recipe_text)
    here = [block for block in code if not WRITTEN_FOR_A_FILE.match(block)]
    exec(compile("\n".join(here), name_of(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", [page for page in PAGES if "# train.py" in page.read_text()], ids=name_of)
def test_a_program_that_a_page_shows_runs_on_two_ranks(page: Path, place: Path, launch: Launch) -> None:
    for block in blocks(page, "python"):
        if named := WRITTEN_FOR_A_FILE.match(block):
            program = f"import os\n\nos.chdir({str(place)!r})\n{block}\n{LETTING_GO}"
            (place / named[1]).write_text(program)
            done = launch("torchrun", "--standalone", "--nproc-per-node", "2", place / named[1])
            assert done.code == 0, done.output


@pytest.mark.parametrize("page", pages_with("yaml", folder=""), ids=name_of)
def test_the_recipes_of_a_page_are_recipes(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"recipe{number}.yaml"
        path.write_text(text)
        assert recipe.load(path).model.name


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.yaml")), ids=name_of)
def test_the_comparisons_behind_the_results_are_comparisons(path: Path) -> None:
    assert {cell.seed for cell in comparison.load(path, ["task.data=there"]).cells} >= {0, 1, 2}


@pytest.mark.parametrize("page", pages_with("console", folder=""), ids=name_of)
def test_the_commands_of_a_page_have_the_options_that_it_gives_them(page: Path) -> None:
    lines = [line for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        for number, word in enumerate(words):
            if word == "mezo-scale":
                check_command(words[number + 1 :])
            if word == "make":
                assert re.search(rf"^{words[number + 1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            if word.startswith(("launch/", "tools/")):
                assert (ROOT / word).is_file(), line


def check_command(words: list[str]) -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert words[0] in commands, f"there is no command {words[0]}"
    command = commands[words[0]]
    for word in words[1:2]:  # of a group
        command = getattr(command, "commands", {}).get(word, command)
    options = {name for option in command.params for name in option.opts} | {"--help"}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= options, f"{words[0]} has no option {given - options}"


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    documented = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    modules = {"estimators": (), "noise": ("VERSION",), "objectives": (), "rules": ()}
    missing = set(ms.__all__) - documented - modules.keys()
    assert not missing, f"docs/reference/api.md lacks {sorted(missing)}"
    for module, unsaid in modules.items():
        names = set(getattr(ms, module).__all__) - set(unsaid)
        assert names <= set(re.findall(rf'["`]{module}\.(\w+)["`]', page)), module


def test_every_error_is_explained() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    kinds = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert kinds
    assert [name for name in kinds if f"| `{name}` |" not in page] == []
