"""The check before the first step finds out a model or an objective that mixes the rows of branches, however little
the branches differ at the run's own eps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mezo_scale as ms
from tests.support import models

CANNOT = "can't evaluate several branches in one batch"


def preferred(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Both answers of every row in one forward, chosen ones first: where rows are repeated per branch, the chosen all
    get one branch, and the rejected the other."""
    ids = torch.cat([batch["chosen"], batch["rejected"]])
    logits = model(input_ids=ids, use_cache=False).logits.float()[:, :-1].log_softmax(-1)
    scores = logits.gather(-1, ids[:, 1:, None])[..., 0].sum(1)
    chosen, rejected = scores.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected))


def slopes(paired: bool | None, eps: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(5, 67, (8, 9), generator=generator) for name in ("chosen", "rejected")}
    opt = ms.MeZO(models.build("llama-lora", dtype=torch.bfloat16), lr=1e-4, eps=eps, paired=paired)
    found = []
    for _ in range(2):
        opt.step(batch=batch, objective=preferred)
        assert opt.last_record is not None
        found += opt.last_record.projected_grads
    assert opt.paired is False
    return found


@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_an_objective_that_puts_rows_beside_each_other_is_found_out_in_16_bits(eps: float) -> None:
    with pytest.warns(UserWarning, match=CANNOT):
        checked = slopes(None, eps)
    assert checked == slopes(False, eps)
    assert all(checked)


def test_statistics_over_all_rows_are_found_out_where_the_head_is_small() -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 1).requires_grad_(False)
    head.weight.mul_(1e-2)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False, track_running_stats=False), head)
    opt = ms.MeZO(model, lr=1e-6, eps=1e-3)
    with pytest.warns(UserWarning, match=CANNOT):
        opt.step(batch={"x": torch.randn(8, 4)}, objective=lambda model, batch: model(batch["x"])[:, 0])


def test_what_does_not_move_at_all_still_runs_in_one_batch(recwarn: pytest.WarningsRecorder) -> None:
    """As the accuracy of a few rows: no probe tells its branches apart, and they agree."""
    model = nn.Linear(4, 1)
    opt = ms.MeZO(model, lr=1e-6, eps=1e-3)
    opt.step(batch={"x": torch.randn(8, 4)}, objective=lambda model, batch: 0 * model(batch["x"])[:, 0])
    assert opt.paired is True
    assert not recwarn.list


@pytest.mark.parametrize(("share", "paired"), [(0.06, True), (0.4, False)])
@pytest.mark.filterwarnings("ignore:the model can't evaluate several branches")
def test_rounding_is_held_against_how_far_the_branches_are_apart(share: float, paired: bool) -> None:
    """Losses of 16 bits that lie far apart between branches differ between two ways of computing them, too."""

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses = 10 * model(batch["x"]).float()[:, 0]
        rounded = 1 + share * (-1) ** torch.arange(len(losses))
        return losses * rounded if len(losses) > 8 else losses  # in one batch

    torch.manual_seed(0)
    opt = ms.MeZO(nn.Linear(4, 1, dtype=torch.bfloat16), lr=1e-6, eps=3e-1)
    opt.step(batch={"x": torch.randn(8, 4).bfloat16()}, objective=objective)
    assert opt.paired is paired


def test_a_model_is_not_driven_further_than_it_takes_to_tell_branches_apart(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Far out, where nothing is learned, rounding may be as large as what it is told from."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1, dtype=torch.bfloat16), torch.randn(8, 4).bfloat16()
    furthest = 2 * (1 + float(10 * model(x).detach().abs().max()))

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses = 10 * model(batch["x"]).float()[:, 0]
        far_out = (losses.abs() > furthest) & (len(losses) > 8)  # in one batch
        return torch.where(far_out, -losses, losses)

    opt = ms.MeZO(model, lr=1e-6, eps=1e-1)
    opt.step(batch={"x": x}, objective=objective)
    assert opt.paired is True
    assert not recwarn.list
