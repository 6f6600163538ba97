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


class Odd(nn.Module):
    """The sum of each row; what the first number of the first row says goes wrong."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum(dim=1)
        what = int(x[0, 0].item())
        if what == 1:
            raise ValueError("the first number is 1")
        elif what == 2:
            return total * float("nan")
        elif what == 3:
            return total[1:]
        elif what == 4:
            return total.to(torch.float64)
        elif what == 5:
            return total + self.hold(1 << 50)
        elif what == 6:
            # So many MiB, not touched: whoever grants them notices nothing.
            return total + self.hold(int(x[0, 1].item()) << 20)
        elif what == 7:
            return total.sum()
        return total

    def hold(self, size: int) -> int:
        return torch.empty([size], dtype=torch.uint8).dim() - 1


class Mapped(nn.Module):
    """An output of a kind that is not served."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"total": x.sum(dim=1)}


class Layers(nn.Module):
    """What freezing has something to do with: batch normalisation is folded into the layer before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid()
        )
        normalisation = self.layers[1]
        normalisation.running_mean.normal_()
        normalisation.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Counter(nn.Module):
    """Remembers how often it was called, so that no two calls are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0
        return x.sum(dim=1) + self.calls


class Endless(nn.Module):
    """The sum of a row, unless that is above 1e9: then it never returns."""

    def forward(self, x: Tensor) -> Tensor:
        while bool(x.sum() > 1e9):
            x = x + 1.0
        return x.sum(dim=1)


modules = {
    "delay": Delay(),
    "many": Many(),
    "half": Half(),
    "odd": Odd(),
    "mapped": Mapped(),
    "layers": Layers(),
    "counter": Counter(),
    "endless": Endless(),
}
for name, module in modules.items():
    torch.jit.script(module).save(f"{name}.pt")
