"""Small networks and plain drivers that several tests share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import attacks
from attacks import AnyAttack
from attacks.attack import Attack, MinimalState, State, Task
from attacks.noise import Noise, sample_key


class Linear(nn.Module):
    """Two classes, logits (f, -f) with f = w·x + b: the nearest boundary point is known in every norm."""

    def __init__(self, d: int, seed: int = 0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(d, generator=g))
        # f = 0 at mid-grey, so that grey images are near the boundary and far from the box.
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum())

    def score(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight + self.bias

    def forward(self, x: Tensor) -> Tensor:
        f = self.score(x)
        return torch.stack([f, -f], 1)

    def distance(self, x: Tensor, norm: str) -> Tensor:
        """To the boundary: |f| over the dual norm of w (far from the box)."""
        dual = {"linf": 1, "l2": 2}[norm]
        return (self.score(x).abs() / self.weight.norm(dual)).detach()


class Outputs(nn.Module):
    """Whatever `make` makes of the images."""

    def __init__(self, make: Callable[[Tensor], Any]):
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def conv_net(channels: int = 3, classes: int = 5, seed: int = 0) -> nn.Module:
    """A small convolutional network with batch-norm whose statistics are not trivial, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes),
        )  # fmt: skip
        net.train()
        net(torch.rand(64, channels, 12, 12) * 2)
    return net.eval()


def images(n: int, shape: tuple[int, ...] = (3, 12, 12), seed: int = 1) -> Tensor:
    """(n, *shape) in [0, 1], some of them on the edges of the box."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, *shape, generator=g) * 1.2 - 0.1).clamp(0, 1)


def tasks(x: Tensor, y: Tensor) -> list[Task]:
    return [Task(k, sample_key(str(k)), x[k], int(y[k])) for k in range(len(x))]


def at_their_own(attack: AnyAttack, model: nn.Module, x: Tensor, y: Tensor, eps: Sequence[float]) -> list[bool]:
    """Of each image whether the attack breaks it within its own eps, all of them side by side."""
    ladder = sorted(set(eps))
    rungs = [ladder.index(radius) for radius in eps]
    begun = [replace(task, first=rung, rungs=rung + 1) for task, rung in zip(tasks(x, y), rungs, strict=True)]
    broken = {o.position for o in attacks.run(model, attack, begun, ladder, slots=64, seed=0) if o.rung is not None}
    return [k in broken for k in range(len(x))]


def noise(n: int, shape: tuple[int, ...], seed: int = 0, restart: int = 0, first: int = 0) -> Noise:
    keys = [sample_key(str(first + k)) for k in range(n)]
    return Noise(seed, keys, [restart] * n, shape, torch.device("cpu"))


def begin(attack: Attack, x: Tensor, y: Tensor, eps: float, target: Tensor | None = None, first: int = 0) -> State:
    """The state in which the attack begins on these images, with the noise of the samples from number `first` on."""
    known = {
        "x": x, "y": y, "target": y if target is None else target, "eps": torch.full((len(x),), eps),
        "query": x.clone(), "asked": torch.zeros(len(x), dtype=torch.long),
        "graded": torch.zeros(len(x), dtype=torch.long), "fooled": torch.zeros(len(x), dtype=torch.bool),
    }  # fmt: skip
    if attack.budget == "minimal":
        state: State = MinimalState(**known, best=x, best_distance=torch.full((len(x),), torch.inf))
    else:
        state = State(**known)
    return attack.init(state, noise(len(x), tuple(x.shape[1:]), first=first))


def queries(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
    """Every point that the attack asks about, on a batch that never retires anything."""
    state = begin(attack, x, y, eps)
    points = [state.query.clone()]
    for _ in range(attack.queries - 1):
        state.asked += 1
        query = state.query.detach().requires_grad_()
        logits = model(query)
        (grad,) = torch.autograd.grad(attack.loss(logits, state).sum(), query)
        state.fooled = attack.fools(logits.argmax(1), state)
        state = attack.step(state, logits.detach(), grad)
        points.append(state.query.clone())
    return points


def verdicts(run: Any) -> list:
    """What a run decided, row by row."""
    return run.samples[["sample_id", "attack", "eps", "success", "robust"]].to_numpy().tolist()
