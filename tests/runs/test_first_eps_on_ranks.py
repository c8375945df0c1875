"""`optimizer.eps: auto` on several ranks: one eps for all of them, which the log keeps."""

from pathlib import Path

from mezo_scale.recipe import load
from mezo_scale.runs.verify import verify
from mezo_scale.trajectory import Trajectory
from tests.runs.test_snapshots_on_ranks import go_on
from tests.support.pool import Ranks

OPTIONS = ["eps=auto", "steps=2", "snapshot_every=0"]


def test_all_ranks_take_one_eps(ranks: Ranks, recipe_file: Path, tmp_path: Path) -> None:
    for size, strategy, batch_size in ((3, "single", 4), (2, "fsdp2", 8), (2, "zero3", 8)):
        folder = tmp_path / f"{strategy}-{size}"
        overrides = [*OPTIONS, f"strategy={strategy}", f"train.batch_size={batch_size}", f"output.dir={folder}"]
        shown = ranks(size, go_on, recipe=str(recipe_file), overrides=overrides, done=0)
        eps = Trajectory.open(folder / "trajectory.mezo").header.eps
        assert f"optimizer.eps: auto is {eps:g} in this run" in shown[0]
        assert "auto" not in "".join(shown[1:])
        lines = list(verify(load(folder)))
        assert "bit for bit" in lines[2]
