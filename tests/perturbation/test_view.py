"""The perturbed view on one device: exact for every family, leaves no trace, and says so where it can't be exact."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mezo_scale as ms
from mezo_scale.errors import ViewError
from mezo_scale.perturbation import pairing
from tests.support import models

BRANCHES = [(11, 1e-2), (11, -1e-2), (5, 3e-2)]


def physically(model: nn.Module, seed: int, scale: float) -> nn.Module:
    """A copy whose weights are perturbed for good."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in moved.named_parameters():
            if param.requires_grad:
                z = ms.noise.normal(seed, ms.noise.param_id(name), 0, param.numel()).view_as(param)
                param.copy_((param.float() + torch.tensor(scale) * z).to(param.dtype))
    return moved


def tall(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {key: torch.cat([value] * count) for key, value in batch.items()}


def relative(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs() / other.abs().clamp_min(1e-6)).max())


@pytest.mark.parametrize("rows", [1, 2, 9])  # 9 is the sequence length too: rows and positions look alike
@pytest.mark.parametrize("name", list(models.ARCHITECTURES))
def test_a_branch_computes_what_a_physically_perturbed_copy_computes(name: str, rows: int) -> None:
    model, batch, loss = models.build(name), models.batch(name, rows), models.objective(name)
    with ms.perturbed(model, BRANCHES):
        together = loss(model, tall(batch, len(BRANCHES))).view(len(BRANCHES), rows)
    for position, (seed, scale) in enumerate(BRANCHES):
        with torch.no_grad():
            right = loss(physically(model, seed, scale), batch)
        with ms.perturbed(model, [(seed, scale)]):
            alone = loss(model, batch)
        assert relative(alone, right) < 1e-5
        assert relative(together[position], right) < 1e-5


@pytest.mark.parametrize("name", ["llama-tied", "t5", "vit", "opt-lora"])
def test_the_view_writes_no_weight_and_leaves_no_trace(name: str) -> None:
    model, batch, loss = models.build(name), models.batch(name, 2), models.objective(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {module: set(vars(module)) for module in model.modules()}
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    for _ in range(3):
        with ms.perturbed(model, BRANCHES):
            loss(model, tall(batch, 3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {module: set(vars(module)) for module in model.modules()} == attributes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_an_error_inside_the_view_closes_it() -> None:
    model, batch, loss = models.build("llama"), models.batch("llama", 2), models.objective("llama")
    with torch.no_grad():
        right = loss(model, batch)

    def fail() -> None:
        with ms.perturbed(model, BRANCHES[:1]):
            loss(model, batch)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    with torch.no_grad():
        assert torch.equal(loss(model, batch), right)


def test_greedy_generation_inside_both_branches_equals_generation_with_each_copy() -> None:
    model = models.build("llama")
    prompt = {"input_ids": torch.randint(5, 60, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    prompt["attention_mask"][1, :2] = 0
    branches = [(3, 0.1), (3, -0.1)]

    def generate(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
        return model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=1)

    with ms.perturbed(model, branches):
        together = generate(model, tall(prompt, 2)).view(2, 2, -1)
    for position, (seed, scale) in enumerate(branches):
        right = generate(physically(model, seed, scale), prompt)
        with ms.perturbed(model, [(seed, scale)]):
            assert torch.equal(generate(model, prompt), right)
        assert torch.equal(together[position], right)
    assert not torch.equal(together[0], together[1])


def test_generation_with_t5_in_both_branches_is_refused_and_in_one_is_exact() -> None:
    model, batch = models.build("t5"), models.batch("t5", 2)
    prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with ms.perturbed(model, BRANCHES[2:]):
        alone = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(alone, physically(model, *BRANCHES[2]).generate(**prompt, max_new_tokens=4, do_sample=False))
    with pytest.raises(ViewError, match="one branch at a time"), ms.perturbed(model, BRANCHES[:2]):
        model.generate(**tall(prompt, 2), max_new_tokens=4, do_sample=False)


class Gated(nn.Module):
    """Tokens sorted by expert, each expert an ordinary Linear: how rows go where depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.route, self.head = nn.Embedding(50, 12), nn.Linear(12, 3), nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.block = Routed(self.route, self.experts)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embed(ids)).mean(1))


class Routed(nn.Module):
    def __init__(self, route: nn.Linear, experts: nn.ModuleList) -> None:
        super().__init__()
        self.route, self.experts = route, experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        choice = self.route(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            chosen = (choice == number).nonzero().squeeze(-1)
            out[chosen] = expert(flat[chosen])
        return out.view_as(x)


class Prompted(nn.Module):
    """A parameter that is returned, a bias over positions without a batch dim, torch's own attention, a shared head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.prompt = Prompt()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0)
        self.head = nn.Linear(12, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prompt().expand(ids.shape[0], -1, -1), self.embed(ids)], dim=1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.layer(x)).mean(1)


class Prompt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4, 12))

    def forward(self) -> Tensor:
        return self.weight


def class_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["ids"]), batch["labels"], reduction="none")


@pytest.mark.parametrize("make", [Gated, Prompted])
@pytest.mark.parametrize("rows", [1, 4])
def test_modules_that_do_not_divide_by_rows_are_run_by_an_ancestor_that_does(
    make: Callable[[], nn.Module], rows: int
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batch = {"ids": torch.randint(0, 50, (rows, 7)), "labels": torch.randint(0, 4, (rows,))}
    branches = [(1, 0.3), (1, -0.3), (2, 0.3)]
    with ms.perturbed(model, branches):
        together = class_loss(model, tall(batch, 3)).view(3, rows)
    for position, (seed, scale) in enumerate(branches):
        with torch.no_grad():
            assert relative(together[position], class_loss(physically(model, seed, scale), batch)) < 1e-5


class Statistics(nn.Module):
    """Its result mixes the rows of the batch: no pairing can be right."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - y.mean(0)


def test_a_model_that_mixes_rows_is_found_out_and_evaluated_one_branch_at_a_time() -> None:
    torch.manual_seed(0)
    model = Statistics().eval()
    batch = {"x": torch.randn(5, 6), "labels": torch.randint(0, 4, (5,))}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    opt = ms.MeZO(model, lr=1e-3)
    seed = ms.noise.direction_seed(0, 0, 0)
    means = []
    with torch.no_grad():
        for scale in (1e-3, -1e-3):
            means.append(float(loss(physically(model, seed, scale), batch).double().mean()))
    with pytest.warns(UserWarning, match="one at a time"):
        opt.step(batch=batch, objective=loss)
    assert opt.paired is False
    assert opt.last_record is not None
    assert opt.last_record.projected_grads[0] == pytest.approx((means[0] - means[1]) / 2e-3, rel=1e-6)


def test_parameters_that_no_forward_reaches_are_named() -> None:
    model = models.build("llama")
    model.extra = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"extra\.weight"):
        ms.MeZO(model).step(batch=models.batch("llama", 2), objective=models.objective("llama"))


def test_a_batch_that_is_not_repeated_per_branch_is_refused() -> None:
    model = models.build("llama")
    with pytest.raises(ViewError, match=r"3 rows for 2 branches"), ms.perturbed(model, BRANCHES[:2]):
        models.objective("llama")(model, models.batch("llama", 3))


def test_views_do_not_nest_and_need_a_branch() -> None:
    view = ms.View(models.build("llama"))
    with view.branches(BRANCHES), pytest.raises(ViewError, match="do not nest"), view.branches(BRANCHES):
        pass
    with pytest.raises(ValueError, match="branches is empty"), view.branches([]):
        pass


def test_a_16_bit_view_of_float32_weights_rounds_after_perturbing() -> None:
    model, batch, loss = models.build("llama"), models.batch("llama", 3), models.objective("llama")
    seed, scale = BRANCHES[0]
    moved = physically(model, seed, scale)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            right = loss(moved, batch)
        with ms.perturbed(model, BRANCHES[:2], dtype=torch.bfloat16):
            both = loss(model, tall(batch, 2)).view(2, 3)
    assert relative(both[0], right) < 1e-2
    assert not torch.equal(both[0], both[1])


def test_frozen_weights_are_not_perturbed_under_lora() -> None:
    base = models.build("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert [shard.name for shard in ms.shards(model) if "lora" not in shard.name] == []
    batch, loss = models.batch("llama", 2), models.objective("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = ms.MeZO(model, lr=1e-3, eps=1e-2)
        opt.step(batch=batch, objective=loss)
    assert opt.paired is True


def test_tokens_sorted_by_expert_are_not_taken_for_rows() -> None:
    two, three = pairing.Size(4, False, True), pairing.Size(6, False, False)  # as 2 : 3, but block 3 is not block 1
    assert pairing._classify([{"x": two}], [{"x": three}]) == {"x": pairing.MIXED}
    assert pairing._classify([{"x": two}], [{"x": pairing.Size(6, False, True)}]) == {"x": pairing.BATCHED}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("paired", [True, False])
def test_a_normalisation_in_16_bits_feels_perturbations_below_its_spacing(dtype: torch.dtype, paired: bool) -> None:
    norm = nn.LayerNorm(64).to(dtype)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    branches = [(4, 1e-4), (4, -1e-4)]  # the numbers next to 1 are 0.001 or more away
    found = []
    for group in [branches] if paired else [[branch] for branch in branches]:
        with ms.perturbed(norm, group):
            found += norm(torch.cat([x] * len(group))).chunk(len(group))
    for (seed, scale), result in zip(branches, found, strict=True):
        weight, bias = (
            parameter.float() + scale * ms.noise.normal(seed, ms.noise.param_id(name), 0, 64)
            for name, parameter in norm.named_parameters()
        )
        assert result.dtype == dtype
        assert torch.equal(result, F.layer_norm(x.float(), (64,), weight, bias).to(dtype))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.embed_tokens.requires_grad_(False),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
        lambda model: setattr(model, "lm_head", nn.Linear(32, 64)),
    ],
    ids=["frozen", "cast", "loaded", "replaced"],
)
def test_a_view_that_is_kept_is_of_the_model_that_it_was_made_of(change: Callable[[Any], object]) -> None:
    model = models.build("llama")
    view = ms.View(model)
    with view.branches([(7, 1e-2)]):
        pass
    change(model)
    with pytest.raises(ViewError, match="since this View was made"), view.branches([(7, 1e-2)]):
        pass
