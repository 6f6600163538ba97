"""Writes the TorchScript models of the inference benchmark into a folder.

    models.py FOLDER [--slow-ms 10]

`slow.pt` is a recurrent network over its 50 features: many small steps, as in a model over a sequence, so that a forward
over 32 rows costs little more than one over a single row. How many steps it has is found by measuring on this machine,
with one thread inside an operation. `small.pt` is two layers, `small-2.pt` the same with other weights, `noop.pt` hands its first feature back.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

WIDTH = 50
HIDDEN = 64
# Steps that the first measurement is made with.
TRIAL_STEPS = 200


class Slow(torch.nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.enter = torch.nn.Linear(WIDTH, HIDDEN)
        self.again = torch.nn.Linear(HIDDEN, HIDDEN)
        self.leave = torch.nn.Linear(HIDDEN, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.enter(x)
        state = torch.tanh(given)
        for _ in range(self.steps):
            state = torch.tanh(self.again(state) + given)
        return torch.sigmoid(self.leave(state)).squeeze(1)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.layers(x)).squeeze(1)


class Noop(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


def forward_ms(module: torch.jit.ScriptModule, rows: int, times: int = 30) -> float:
    x = torch.rand(rows, WIDTH)
    took = []
    with torch.inference_mode():
        for turn in range(times + 5):
            start = time.thread_time()
            module(x)
            if turn >= 5:
                took.append(time.thread_time() - start)
    # The least, and of the time on a core: what others do to the machine meanwhile makes no model slower.
    return min(took) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slow-ms", type=float, default=10.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    args.folder.mkdir(parents=True, exist_ok=True)
    steps = TRIAL_STEPS
    # The second trial is near the mark, and so is what it measures.
    for _ in range(2):
        trial = forward_ms(torch.jit.script(Slow(steps).eval()), 1)
        steps = max(1, round(steps * args.slow_ms / trial))
    slow = torch.jit.script(Slow(steps).eval())
    slow.save(str(args.folder / "slow.pt"))
    # As slow, with other weights: a file that was registered before is no new version.
    torch.jit.script(Slow(steps).eval()).save(str(args.folder / "other.pt"))
    torch.jit.script(Small().eval()).save(str(args.folder / "small.pt"))
    torch.jit.script(Small().eval()).save(str(args.folder / "small-2.pt"))
    torch.jit.script(Noop().eval()).save(str(args.folder / "noop.pt"))
    said = {"steps": steps, "torch": torch.__version__}
    said |= {f"slow_{rows}_rows_ms": forward_ms(slow, rows) for rows in (1, 32)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
