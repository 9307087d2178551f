"""Continuous batching for attacks: the batch stays full of samples that still stand.

Each slot holds one sample on one rung of its eps ladder. A slot whose query fools the model retires at once; one
that runs out of queries begins its next restart or, after the last, climbs to the next eps; freed slots are
refilled from the queue. An adversarial found at a small eps lies inside every larger ball too, so a sample
climbs only until it breaks, and a whole accuracy-against-eps curve is one run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from attacks.attack import Attack, Outcome, State, Task, cat
from attacks.noise import Noise


def run(
    model: Callable[[Tensor], Tensor],
    attack: Attack,
    tasks: Iterable[Task],
    eps: Sequence[float],
    *,
    slots: int,
    seed: int,
) -> Iterator[Outcome]:
    """Attack every task over the rising ladder `eps`; outcomes come as slots retire, in no fixed order.

    `model` maps (B, C, H, W) to (B, K) logits, row by row. At most `slots` rows are evaluated at once. What is
    found on a sample depends on (seed, key) and not on its company in the batch.
    """
    queue = iter(tasks)
    climbs: list[_Climb] = []  # row b of the state belongs to climbs[b]
    state: State | None = None
    asked = np.zeros(0, int)  # queries made in the current run of each slot
    starting = [_Climb.on(task, eps) for task in islice(queue, slots)]

    while climbs or starting:
        if starting:
            fresh = _begin(attack, starting, eps, seed)
            state = fresh if state is None else cat(state, fresh)
            climbs += starting
            asked = np.concatenate([asked, np.zeros(len(starting), int)])
        assert state is not None

        wants_grad = attack.needs_grad and bool((asked + 1 < attack.queries).any())
        logits, grad = _evaluate(model, attack, state, wants_grad, slots)
        asked += 1
        hit = logits.argmax(1) == state.y
        fooled = (hit if attack.targeted else ~hit).cpu().numpy()
        ended = fooled | (asked == attack.queries)

        starting = []
        for row in np.flatnonzero(ended):
            climb = climbs[row]
            climb.count(int(asked[row]), attack.needs_grad)
            if fooled[row] or not climb.advance(attack.restarts, len(eps)):
                yield climb.outcome(state.query[row].clone(), fooled=bool(fooled[row]))
            else:
                starting.append(climb)
        if ended.any():
            kept = np.flatnonzero(~ended)
            climbs, asked = [climbs[row] for row in kept], asked[kept]
            rows = torch.from_numpy(kept).to(logits.device)
            state, logits, grad = state[rows], logits[rows], None if grad is None else grad[rows]
            free = slots - len(climbs) - len(starting)
            starting += [_Climb.on(task, eps) for task in islice(queue, free)]
        if climbs:
            state = attack.step(state, logits, grad)
        else:
            state = None


@dataclass
class _Climb:
    """One sample's way up the eps ladder."""

    task: Task
    forwards: list[int]
    gradients: list[int]
    rung: int = 0
    restart: int = 0

    @classmethod
    def on(cls, task: Task, eps: Sequence[float]) -> "_Climb":
        return cls(task, [0] * len(eps), [0] * len(eps))

    def count(self, asked: int, needs_grad: bool) -> None:
        self.forwards[self.rung] += asked
        # The gradient at the point that ends a run is never used.
        self.gradients[self.rung] += asked - 1 if needs_grad else 0

    def advance(self, restarts: int, rungs: int) -> bool:
        """On to the next restart, or the next rung; False at the top."""
        self.restart += 1
        if self.restart == restarts:
            if self.rung + 1 == rungs:
                return False
            self.rung, self.restart = self.rung + 1, 0
        return True

    def outcome(self, x_adv: Tensor, fooled: bool) -> Outcome:
        return Outcome(
            position=self.task.position,
            x_adv=x_adv,
            rung=self.rung if fooled else None,
            restart=self.restart if fooled else None,
            forwards=tuple(self.forwards),
            gradients=tuple(self.gradients),
        )


def _begin(attack: Attack, climbs: Sequence[_Climb], eps: Sequence[float], seed: int) -> State:
    x = torch.stack([climb.task.x for climb in climbs])
    y = torch.tensor([climb.task.y for climb in climbs], device=x.device)
    radius = torch.tensor([eps[climb.rung] for climb in climbs], device=x.device, dtype=x.dtype)
    noise = Noise(
        seed,
        [climb.task.key for climb in climbs],
        [climb.restart for climb in climbs],
        tuple(x.shape[1:]),
        x.device,
    )
    return attack.init(x, y, radius, noise)


def padded(x: Tensor, slots: int) -> Tensor:
    """x (n, ...) with copies of its first rows behind it, up to one of a few sizes, at most `slots`.

    Four sizes an octave: each new one costs kernels made for it and memory in fragments, and copies up to a
    quarter of a batch cost less than either. What is said of the copies counts for nobody.
    """
    n = len(x)
    step = 1 << max(0, n.bit_length() - 3)
    extra = min(-n % step, slots - n)
    return torch.cat([x, x[:extra]]) if extra > 0 else x


def _evaluate(
    model: Callable[[Tensor], Tensor], attack: Attack, state: State, wants_grad: bool, slots: int
) -> tuple[Tensor, Tensor | None]:
    n, query = len(state.query), padded(state.query.detach(), slots)
    if not wants_grad:
        with torch.no_grad():
            return model(query)[:n], None
    query.requires_grad_()
    with torch.enable_grad():
        logits = model(query)[:n]
        (grad,) = torch.autograd.grad(attack.loss(logits, state).sum(), query)
    grad = grad[:n]
    # An attack may overwrite its gradient; that of a sum is one number seen many times.
    return logits.detach(), grad.clone() if 0 in grad.stride() else grad
