"""Any torch module, a loss per row, and no backward pass: python examples/own_model.py"""

import torch
import torch.nn.functional as F

import mezo_scale as ms

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3)).eval()
x = torch.randn(128, 8)
batch = {"x": x, "y": x[:, :3].argmax(1)}


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


opt = ms.MeZO(model, lr=2e-2, eps=1e-3, num_directions=4)
found = [opt.step(batch=batch, objective=losses) for _ in range(200)]
print(f"loss {found[0]:.3f} -> {found[-1]:.3f} in {opt.step_count} steps, all branches in one forward: {opt.paired}")
