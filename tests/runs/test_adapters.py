"""Runs that tune an adapter, or a few weights: what is saved, how a run goes on, and that it can be had again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mezo_scale import models
from mezo_scale.distributed.world import World
from mezo_scale.errors import MezoError, ModelError, RecipeError, TrajectoryError
from mezo_scale.recipe import Recipe, TuneSection, load
from mezo_scale.runs.evaluate import evaluate_recipe
from mezo_scale.runs.publish import merge, rebuild
from mezo_scale.runs.session import train
from mezo_scale.runs.verify import verify
from tests.support import material
from tests.support.fixtures import write_recipe

MakeRecipe = Callable[..., Recipe]

KINDS = {
    "lora": ("tune.what=lora",),
    "prefix": ("tune.what=prefix",),
    "dora": ("tune.what=peft", "tune.peft={peft_type: LORA, use_dora: true}"),
    "ia3": ("tune.what=peft", "tune.peft={peft_type: IA3}"),
}
BIG_STEPS = ("lr=0.1", "eps=1e-2")


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(7, 19)[None]).logits


def with_peft(recipe: Recipe, folder: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe.model.name), folder)


@pytest.fixture(scope="module", params=KINDS)
def tuned(request: pytest.FixtureRequest, model_folder: Path, reviews_file: Path, tmp_path_factory: Any) -> Recipe:
    """A finished run of each kind of adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    path = write_recipe(folder, model_folder, reviews_file)
    recipe = load(path, [*KINDS[request.param], *BIG_STEPS])
    train(recipe)
    return recipe


def test_an_adapter_is_tuned_and_saved_as_peft_reads_it(tuned: Recipe) -> None:
    begun, ended = tuned.directory / "adapter_init", tuned.directory / "checkpoint"
    besides = {"README.md", "steps.mezo", "adapter_init"}
    assert {path.name for path in ended.iterdir()} == besides | {"adapter_config.json", "adapter_model.safetensors"}
    before, after = adapter(begun), adapter(ended)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(logits(with_peft(tuned, begun)), logits(with_peft(tuned, ended)))


def test_what_a_run_computes_is_what_peft_computes(tuned: Recipe) -> None:
    saved = tuned.directory / "checkpoint"
    section = TuneSection(what="adapter", adapter=str(saved))
    here = models.load(tuned.model_copy(update={"tune": section}), World.from_environment()).model
    torch.testing.assert_close(logits(here), logits(with_peft(tuned, saved)), rtol=1e-5, atol=1e-5)


def test_a_run_of_an_adapter_is_graded_again_as_it_was(tuned: Recipe) -> None:
    found, steps = evaluate_recipe(tuned, "test", None)
    results = json.loads((tuned.directory / "evaluation.json").read_text())
    assert {**found.as_dict(), "step": steps, "skipped": 0} == results["tuned"]


def test_a_run_of_an_adapter_is_rebuilt_and_verified(tuned: Recipe, tmp_path: Path) -> None:
    run, base = tuned.directory, tuned.model.name
    assert list(verify(tuned))[2].endswith("bit for bit what 4 replayed steps give")
    assert rebuild(base, run / "trajectory.mezo", tmp_path / "again", None) == 4
    assert same(adapter(tmp_path / "again"), adapter(run / "checkpoint"))
    moved = tmp_path / "moved.mezo"
    moved.write_bytes((run / "trajectory.mezo").read_bytes())
    rebuild(base, moved, tmp_path / "begun", 0, run / "adapter_init")
    assert same(adapter(tmp_path / "begun"), adapter(run / "adapter_init"))
    with pytest.raises(TrajectoryError, match=r"it tunes .* has not: give its base model and"):
        rebuild(base, moved, tmp_path / "none", None)


def test_a_merged_adapter_computes_what_the_adapter_does(tuned: Recipe, tmp_path: Path) -> None:
    saved, base = tuned.directory / "checkpoint", AutoModelForCausalLM.from_pretrained(tuned.model.name)
    if tuned.tune.what == "prefix":
        with pytest.raises(ModelError, match="changes no weight, so there is nothing to merge"):
            merge(tuned.directory, tmp_path / "merged", None)
        assert not (tmp_path / "merged").exists()
        return
    assert merge(tuned.directory, tmp_path / "merged", None) == tuned.model.name
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(with_peft(tuned, saved)), rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not torch.equal(logits(merged), logits(base))


def test_verify_finds_a_changed_adapter(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("tune.what=lora", "tune.r=2")
    train(recipe)
    folder = recipe.directory / "checkpoint"
    changed = adapter(folder)
    name = min(changed)
    changed[name][0, 0] += 1e-3
    save_file(changed, folder / "adapter_model.safetensors")
    with pytest.raises(TrajectoryError, match=f"1 of 8 weights differ, {name} for one"):
        list(verify(recipe))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_run_of_an_adapter_goes_on(make_recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    options = (*KINDS[kind], *BIG_STEPS, "eval_every=0")
    train(make_recipe(*options, "steps=3", f"output.dir={tmp_path / 'more'}"))
    train(load(tmp_path / "more", ["steps=5"]))
    train(make_recipe(*options, "steps=5", f"output.dir={tmp_path / 'once'}"))
    assert same(adapter(tmp_path / "more" / "checkpoint"), adapter(tmp_path / "once" / "checkpoint"))


def test_a_run_goes_on_with_the_adapter_that_it_kept(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """As if another release of PEFT drew other numbers from the seed."""
    recipe = make_recipe("tune.what=lora", "steps=2")
    train(recipe)
    begun = adapter(recipe.directory / "adapter_init")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, *args, **kwargs: torch.nn.init.ones_(tensor))
        train(load(recipe.directory, ["steps=4"]))
    assert same(adapter(recipe.directory / "adapter_init"), begun)
    assert len(list(verify(load(recipe.directory)))) == 3


def test_an_adapter_begins_by_its_seed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for kind in ("lora", "prefix"):
        runs = {name: tmp_path / f"{kind}-{name}" for name in ("one", "again", "other")}
        for name, run in runs.items():
            seed = 5 if name == "other" else 4
            train(make_recipe(f"tune.what={kind}", f"tune.init_seed={seed}", "steps=1", f"output.dir={run}"))
        one, again, other = (adapter(run / "adapter_init") for run in runs.values())
        assert same(one, again)
        assert not same(one, other)


def test_lora_begins_without_effect_and_a_prefix_with_real_activations(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for kind in ("lora", "prefix"):
        train(make_recipe(f"tune.what={kind}", "steps=1", f"output.dir={tmp_path / kind}"))
    lora, prefix = (adapter(tmp_path / kind / "adapter_init") for kind in ("lora", "prefix"))
    assert {float(value.abs().sum()) for name, value in lora.items() if "lora_B" in name} == {0.0}

    base = AutoModelForCausalLM.from_pretrained(make_recipe().model.name)
    tokens = torch.randint(base.config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = base(input_ids=tokens, use_cache=True).past_key_values.layers
    rows = [
        torch.cat([part[0, :, n].flatten() for layer in layers for part in (layer.keys, layer.values)])
        for n in range(5)
    ]
    torch.testing.assert_close(prefix["prompt_embeddings"], torch.stack(rows))


def test_a_tuned_adapter_is_tuned_further(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for kind in ("lora", "prefix"):
        first, second = tmp_path / f"{kind}-first", tmp_path / f"{kind}-second"
        train(make_recipe(f"tune.what={kind}", *BIG_STEPS, f"output.dir={first}"))
        options = ("tune.what=adapter", f"tune.adapter={first / 'checkpoint'}")
        train(make_recipe(*options, *BIG_STEPS, f"output.dir={second}"))
        assert same(adapter(second / "adapter_init"), adapter(first / "checkpoint"))
        assert not same(adapter(second / "checkpoint"), adapter(first / "checkpoint"))
        assert len(list(verify(load(second)))) == 3


def test_a_merge_keeps_the_dtype_of_the_base(make_recipe: MakeRecipe, tmp_path: Path, model_folder: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(half)
    material.tokenizer().save_pretrained(half)
    recipe = make_recipe("tune.what=lora", f"model.name={half}")
    train(recipe)
    merge(recipe.directory / "checkpoint", tmp_path / "merged", None)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_named_weights_are_tuned_and_the_others_are_not(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("tune.what=names", "tune.names=['model.layers.1.*', '*.0.mlp.up_proj.weight']")
    train(recipe)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (Path(recipe.model.name), recipe.directory / "checkpoint")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers.1." in name or ".0.mlp.up_proj" in name}
    assert not (recipe.directory / "adapter_init").exists()
    assert len(list(verify(recipe))) == 3


def test_the_head_is_tuned_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = material.write_model("llama-untied", tmp_path / "untied")
    recipe = make_recipe("tune.what=head", f"model.name={model}")
    train(recipe)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, recipe.directory / "checkpoint"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["lm_head.weight"]
    assert len(list(verify(recipe))) == 3
    report = (recipe.directory / "report.md").read_text()
    tuned = before["lm_head.weight"].numel()
    assert f"Tuned (head): {tuned:,} parameters; frozen: {sum(x.numel() for x in before.values()) - tuned:,}" in report


def test_an_adapter_in_bfloat16_with_stochastic_rounding_is_verified(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("tune.what=lora", "model.dtype=bfloat16", "rounding=stochastic", *BIG_STEPS)
    train(recipe)
    assert {tensor.dtype for tensor in adapter(recipe.directory / "checkpoint").values()} == {torch.bfloat16}
    assert len(list(verify(recipe))) == 3


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_autocast_computes_an_adapter_in_bfloat16(make_recipe: MakeRecipe, kind: str) -> None:
    recipe = make_recipe(*KINDS[kind], *BIG_STEPS, "compute_dtype=bfloat16")
    train(recipe)
    assert {tensor.dtype for tensor in adapter(recipe.directory / "checkpoint").values()} == {torch.float32}
    assert len(list(verify(recipe))) == 3


REFUSED: dict[str, tuple[tuple[str, ...], type[MezoError], str]] = {
    "a field of another kind": (("tune.r=4",), RecipeError, "expected r only where what is lora"),
    "nothing named": (("tune.what=names",), RecipeError, "expected names as well, since what is names"),
    "a name that is none": (
        ("tune.what=names", "tune.names=[model.layers.0.mlp.up.weight]"),
        RecipeError,
        "no parameter is called model.layers.0.mlp.up.weight; the nearest are model.layers.0.mlp.up_proj.weight,",
    ),
    "a tied head": (("tune.what=head",), RecipeError, "tied to its input embedding, .*tune.names to .model.embed"),
    "no such module": (
        ("tune.what=lora", "tune.target_modules=[q]"),
        RecipeError,
        "PEFT can't put LORA into this model .*: name some of its modules, which are called .*k_proj, .*q_proj",
    ),
    "no such method": (("tune.what=peft", "tune.peft={peft_type: LOLA}"), RecipeError, "found LOLA, expected LO"),
    "no method": (("tune.what=peft", "tune.peft={r: 4}"), RecipeError, "tune.peft.peft_type: found NONE, expected"),
    "no such field": (
        ("tune.what=peft", "tune.peft={peft_type: LORA, lora_alfa: 4}"),
        RecipeError,
        "tune.peft.lora_alfa: LORA has no such field; did you mean lora_alpha?",
    ),
    "a value that PEFT refuses": (
        ("tune.what=peft", "tune.peft={peft_type: LORA, r: 0}"),
        RecipeError,
        "PEFT can't put LORA into this model .*should be a positive integer",
    ),
    "a prompt": (
        ("tune.what=peft", "tune.peft={peft_type: PROMPT_TUNING, num_virtual_tokens: 3}"),
        RecipeError,
        "set tune.what to prefix",
    ),
    "an initialisation that moves the base": (
        ("tune.what=peft", "tune.peft={peft_type: LORA, init_lora_weights: pissa}"),
        RecipeError,
        "begins by changing the base model's own weights",
    ),
    "no adapter": (("tune.what=adapter", "tune.adapter=nowhere"), RecipeError, "nowhere has no adapter_config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_tuned_is_refused_before_anything_is_written(make_recipe: MakeRecipe, case: str) -> None:
    options, kind, said = REFUSED[case]
    with pytest.raises(kind, match=said) as met:
        train(make_recipe(*options))
    assert "\n" not in str(met.value)
    assert not make_recipe().directory.exists()


@pytest.mark.parametrize("name", ["mamba"])
def test_a_model_without_keys_and_values_has_no_prefix(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    model = material.write_model(name, tmp_path / name)
    with pytest.raises(MezoError, match="does not keep plain keys and values"):
        train(make_recipe("tune.what=prefix", f"model.name={model}"))


def test_an_adapter_of_another_model_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    gpt2 = material.write_model("gpt2", tmp_path / "gpt2")
    for kind in ("lora", "prefix"):
        run = tmp_path / kind
        train(make_recipe(f"tune.what={kind}", f"model.name={gpt2}", f"output.dir={run}"))
        with pytest.raises(MezoError, match=r"PEFT can't put LORA|of another model"):
            train(make_recipe("tune.what=adapter", f"tune.adapter={run / 'checkpoint'}"))
    other = make_recipe().model.name
    with pytest.raises(MezoError, match=r"PEFT can't put LORA|can't be merged"):
        merge(tmp_path / "lora" / "checkpoint", tmp_path / "merged", other)
    with pytest.raises(RecipeError, match="tuned an adapter of other weights than"):  # a run knows which it began with
        merge(tmp_path / "lora", tmp_path / "merged", other)


def test_a_model_that_counts_positions_takes_a_prefix(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for name in ("opt", "gpt2"):
        model = material.write_model(name, tmp_path / name)
        recipe = make_recipe(
            "tune.what=prefix", f"model.name={model}", f"output.dir={tmp_path / f'run-{name}'}", *BIG_STEPS
        )
        train(recipe)
        assert len(list(verify(recipe))) == 3


def test_a_prefix_takes_places_of_a_table_of_positions(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = material.write_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(RecipeError, match=r"task.max_length is 76, but .* has 80 positions, 5 of them the prefix's"):
        train(make_recipe("tune.what=prefix", f"model.name={model}", "task.max_length=76"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("{peft_type: POLY, r: 2, target_modules: [q_proj]}", "can't be called as a task does .*task_ids"),
        ("{peft_type: ADALORA, target_modules: [q_proj]}", "does not take these fields .*total_step"),
    ],
)
def test_a_method_that_tasks_can_not_serve_is_refused(make_recipe: MakeRecipe, fields: str, said: str) -> None:
    with pytest.raises(MezoError, match=said) as met:
        train(make_recipe("tune.what=peft", f"tune.peft={fields}"))
    assert "\n" not in str(met.value)
    assert not make_recipe().directory.exists()


def test_adalora_is_put_in(make_recipe: MakeRecipe) -> None:
    fields = "{peft_type: ADALORA, target_modules: [q_proj], total_step: 10, init_r: 4, target_r: 2}"
    models.check(make_recipe("tune.what=peft", f"tune.peft={fields}"), World.from_environment())
    loaded = models.load(make_recipe("tune.what=peft", f"tune.peft={fields}"), World.from_environment())
    assert {name.split(".")[-2] for name, param in loaded.model.named_parameters() if param.requires_grad} == {
        "lora_A",
        "lora_B",
        "lora_E",
    }
