"""Recipes: what is read, what is refused and in which words, and the pages made from the descriptions."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from mezo_scale import recipe as recipes
from mezo_scale.errors import RecipeError
from mezo_scale.recipe.sections import TrainSection

ROOT = Path(__file__).parents[2]
NEEDED = {"model": {"name": "a/model"}, "task": {"data": "reviews.csv"}}


def write(path: Path, tree: Any) -> Path:
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def refusal(tmp_path: Path, tree: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        recipes.load(write(tmp_path / "r.yaml", tree), overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_reference_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "recipe.md"
    assert page.read_text() == recipes.reference(), "run: mezo-scale recipe > docs/recipe.md"


def test_every_field_says_what_it_does_and_stands_on_the_page() -> None:
    page = recipes.reference()
    fields = list(recipes.options())
    assert len(fields) == len({field.key for field in fields})
    for field in fields:
        assert field.description.endswith(".")
        assert f"`{field.key}`" in page


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("demo*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_along_are_valid(path: Path) -> None:
    assert recipes.load(path).output.dir == f"runs/{path.stem}"


def test_a_number_may_be_written_as_1e_minus_6(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "model: {name: m}\ntask: {data: d}\noptimizer: {lr: 1e-6, eps: 2E-3}\n")
    loaded = recipes.load(path, ["weight_decay=1e-1"])
    assert (loaded.optimizer.lr, loaded.optimizer.eps, loaded.optimizer.weight_decay) == (1e-6, 2e-3, 0.1)


def test_what_is_dumped_is_read_back_the_same(tmp_path: Path) -> None:
    asked = recipes.parse(NEEDED | {"optimizer": {"lr": "3e-7"}, "train": {"micro_batch": 2}})
    assert recipes.parse(yaml.safe_load(recipes.dump(asked))) == asked


def test_an_override_takes_the_place_of_a_field_in_full_or_by_its_bare_name(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", NEEDED)
    loaded = recipes.load(path, ["train.steps=7", "lr=1e-3", "candidates=[' no', ' yes']", "sharding.replicate=2"])
    assert loaded.train.steps == 7
    assert loaded.optimizer.lr == 1e-3
    assert loaded.task.candidates == (" no", " yes")
    assert loaded.sharding.replicate == 2


def test_a_section_whose_fields_are_all_commented_out_has_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "model: {name: m}\ntask: {data: d}\ntrain:\n  # steps: 3\n")
    assert recipes.load(path).train == TrainSection()


def test_a_run_directory_is_a_recipe_that_writes_to_itself(tmp_path: Path) -> None:
    write(tmp_path / recipes.RECIPE_FILE, NEEDED | {"output": {"dir": "where/it/was/made"}})
    assert recipes.load(tmp_path).output.dir == str(tmp_path)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.step=3", "train.steps"),
        ("optimiser.lr=1", "optimizer.lr"),
        ("learning_rate.lr=1", "optimizer.lr"),
        ("batchsize=2", "train.batch_size"),
        ("train.num_directions=2", "optimizer.num_directions"),
        ("optimizer.steps=2", "train.steps"),
        ("task.lab=x", "task.labels"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(tmp_path: Path, override: str, meant: str) -> None:
    message = refusal(tmp_path, NEEDED, override)
    assert message.endswith(f"unknown key {override.partition('=')[0]}; did you mean {meant}?")


@pytest.mark.parametrize("override", ["tune.pattern=x", "task.k=5"])
def test_no_key_is_proposed_that_has_only_its_section_in_common(tmp_path: Path, override: str) -> None:
    assert "did you mean" not in refusal(tmp_path, NEEDED, override)


def test_an_unknown_key_in_the_file_is_refused_too(tmp_path: Path) -> None:
    assert "unknown key trian; did you mean train?" in refusal(tmp_path, NEEDED | {"trian": {"steps": 1}})
    misspelt = {"modle": {"name": "m"}, "task": {"data": "d"}}
    assert "unknown key modle; did you mean model?" in refusal(tmp_path, misspelt)
    assert "unknown key task.temlate; did you mean task.template?" in refusal(
        tmp_path, {"model": {"name": "m"}, "task": {"data": "d", "temlate": "x"}}
    )
    assert "docs/recipe.md lists them all" in refusal(tmp_path, NEEDED | {"qqq": 1})


@pytest.mark.parametrize(
    ("override", "found", "expected"),
    [
        ("train.steps=many", "'many' (text)", "an integer"),
        ("train.steps=1.5", "1.5 (a number)", "an integer"),
        ("train.steps=true", "True (true or false)", "an integer"),
        ("train.steps=0", "0 (an integer)", "greater than or equal to 1"),
        ("optimizer.lr=fast", "'fast' (text)", "a number"),
        ("optimizer.lr=0", "0 (an integer)", "greater than 0"),
        ("optimizer.lr=-1e-6", "-1e-06 (a number)", "greater than 0"),
        ("optimizer.lr=.inf", "inf (a number)", "a finite number"),
        ("optimizer.lr=.nan", "nan (a number)", "a finite number"),
        ("optimizer.eps=0.0", "0.0 (a number)", "greater than 0"),
        ("optimizer.eps=.nan", "nan (a number)", "a finite number"),
        ("model.name=3", "3 (an integer)", "a string"),
        ("model.dtype=int8", "'int8' (text)", "'float32', 'bfloat16' or 'float16'"),
        ("sharding.cpu_offload=1", "1 (an integer)", "a boolean"),
        ("task.candidates=[' one']", "[' one'] (a list)", "at least 2 items"),
        ("task.candidates=great", "'great' (text)", "a tuple"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_found_and_what_was_expected(
    tmp_path: Path, override: str, found: str, expected: str
) -> None:
    message = refusal(tmp_path, NEEDED, override)
    assert f"{override.partition('=')[0]}: found {found}, expected {expected}" in message


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ("", "holds nothing, expected sections"),
        ("- a\n- b\n", "holds ['a', 'b'] (a list), expected sections"),
        ("model: [", "is not YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ({"task": {"data": "d"}}, "model is missing: it has no default"),
        ({"model": {}, "task": {"data": "d"}}, "model.name is missing: it has no default"),
        (NEEDED | {"train": 5}, "train: found 5 (an integer), expected fields of a section"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, tree: Any, said: str) -> None:
    assert said in refusal(tmp_path, tree)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps", "found 'steps' after the recipe, expected key=value"),
        ("=3", "found '=3' after the recipe, expected key=value"),
        ("name=x", "name= could be model.name or task.name or method.name: write the one you mean in full"),
        ("task.data=[1", "'[1' is not a YAML value"),
    ],
)
def test_an_override_that_is_none_is_refused(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, NEEDED, override)


def test_a_missing_recipe_is_refused_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*absent\.yaml: give a recipe"):
        recipes.load(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match=r"the folder .* holds no recipe\.yaml"):
        recipes.load(tmp_path)


def test_a_run_may_go_on_longer_and_in_another_layout_but_not_with_another_method() -> None:
    recorded = recipes.parse(NEEDED)
    free = {"train": {"steps": 9, "micro_batch": 1}, "sharding": {"strategy": "zero3"}, "output": {"dir": "else"}}
    assert recipes.differences(recorded, recipes.parse(NEEDED | free)) == []
    fixed = {"optimizer": {"lr": 1e-3}, "train": {"batch_size": 8}}
    changes = recipes.differences(recorded, recipes.parse(NEEDED | fixed))
    assert changes == ["optimizer.lr: 1e-06, now 0.001", "train.batch_size: 16, now 8"]


def test_every_default_is_what_the_page_says() -> None:
    loaded = recipes.parse(NEEDED)
    for field in itertools.islice(recipes.options(), None):
        section, name = field.key.split(".")
        if field.default != "required":
            assert getattr(getattr(loaded, section), name) == recipes.parse(
                {**NEEDED, section: {**NEEDED.get(section, {}), name: yaml.safe_load(field.default)}}
            ).__getattribute__(section).__getattribute__(name)
