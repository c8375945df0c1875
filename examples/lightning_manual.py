"""A LightningModule with manual optimisation, saved and taken up again: python examples/lightning_manual.py"""

import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import mezo_scale as ms

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")  # its advice on workers and logging


class Classifier(lightning.LightningModule):
    """Three classes from eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # automatic optimisation calls backward
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ms.MeZO(self, lr=2e-2, eps=1e-3, num_directions=4)

    def training_step(self, batch: list[torch.Tensor], _: int) -> None:
        x, y = batch
        # Lightning's optimizer passes on a closure and nothing else: it is called once per branch.
        self.loss = self.optimizers().step(closure=lambda: F.cross_entropy(self.net(x), y))


def fit(epochs: int, ckpt_path: Path | None, keep: Path) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    x = torch.randn(256, 8)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=64)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    trainer.save_checkpoint(keep)
    return model


with tempfile.TemporaryDirectory() as place:
    half, whole, resumed = (Path(place) / f"{name}.ckpt" for name in ("half", "whole", "resumed"))
    fit(10, None, half)
    straight, again = fit(20, None, whole), fit(20, half, resumed)
    same = all(map(torch.equal, straight.parameters(), again.parameters()))
    print(f"{again.global_step} steps, last loss {again.loss:.3f}; resumed weights are equal: {same}")
