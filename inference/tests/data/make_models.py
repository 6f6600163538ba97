"""Makes the TorchScript modules that the tests of the `torch` feature load.

Run `python make_models.py` in this folder, with torch 2.11, after changing it. The weights are small whole numbers,
so that the tests can state exact results.
"""

import torch
from torch import Tensor, nn


class Delay(nn.Module):
    """score = 1*dense[0] + 2*dense[1] + 3*dense[2] + bonus[carrier], with bonus = 10, 20, 30."""

    def __init__(self) -> None:
        super().__init__()
        self.bonus = nn.Embedding(3, 1)
        self.linear = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.bonus.weight.copy_(torch.tensor([[10.0], [20.0], [30.0]]))
            self.linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))

    def forward(self, dense: Tensor, carrier: Tensor) -> Tensor:
        return self.linear(dense) + self.bonus(carrier.squeeze(1))


class Many(nn.Module):
    """Two outputs, (sum, [double, is negative]) of one input, as a tuple. Dropout shows that it is not in training."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = self.dropout(x).sum(dim=1)
        return total, torch.stack([2.0 * total, (total < 0).to(torch.float32)], dim=1).t().contiguous().t()


class Half(nn.Module):
    """An output of a type that is not served."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=1).to(torch.float16)


for name, module in [("delay", Delay()), ("many", Many()), ("half", Half())]:
    torch.jit.script(module).save(f"{name}.pt")
