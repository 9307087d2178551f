"""Transfer: crafted on a surrogate network, judged on the model. Papernot et al. 2016, arXiv 1605.07277.

What it breaks although gradient attacks on the model itself did not, their gradients had missed: they are masked.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks import engine
from attacks.attack import Outcome, State, Task
from attacks.evaluation import padded, vote
from attacks.mifgsm import MIFGSM


@dataclass(frozen=True, kw_only=True)
class Transfer(MIFGSM):
    """MI-FGSM run on `surrogate` to its last step; the model is asked about the last point only.

    surrogate: maps (N, C, H, W) in [0, 1] to logits of the same classes.

    Costs the model 1 forward for each eps on a sample that stands; the surrogate's evaluations are not counted.
    """

    name: ClassVar[str] = "transfer"
    source: ClassVar[str] = "arXiv 1605.07277, 1710.06081"

    points: ClassVar[int] = 1
    asks_gradients: ClassVar[bool] = False

    surrogate: nn.Module

    @classmethod
    def kind(cls) -> str:
        return "surrogate, fixed eps"

    @classmethod
    def cost(cls) -> str:
        return "1 forward an eps"

    def fools(self, pred: Tensor, state: State) -> Tensor:
        return torch.zeros_like(state.y, dtype=torch.bool)  # fooling the surrogate is no reason to stop

    def run(
        self, model: nn.Module, tasks: Iterable[Task], eps: Sequence[float], *, slots: int, seed: int, draws: int = 1
    ) -> Iterator[Outcome]:
        """Like `attacks.engine.run`."""
        standing = list(tasks)
        for rung, radius in enumerate(eps):
            begun = [task for task in standing if task.first <= rung]
            crafted = engine.run(self.surrogate, self, begun, [radius], slots=slots, seed=seed)
            points = {outcome.position: outcome.x_adv for outcome in crafted}
            left = [task for task in standing if task.first > rung]
            for task, fooled in zip(begun, self._judge(model, begun, points, slots, draws), strict=True):
                if not fooled and rung + 1 < len(eps):
                    left.append(task)
                    continue
                yield Outcome(
                    position=task.position,
                    x_adv=points[task.position],
                    found=fooled,
                    rung=rung if fooled else None,
                    restart=0 if fooled else None,
                    forwards=tuple(draws if task.first <= k <= rung else 0 for k in range(len(eps))),
                    gradients=(0,) * len(eps),
                )
            standing = left

    def _judge(
        self, model: nn.Module, tasks: Sequence[Task], points: dict[int, Tensor], slots: int, draws: int
    ) -> Iterator[bool]:
        for start in range(0, len(tasks), slots):
            batch = tasks[start : start + slots]
            x = torch.stack([points[task.position] for task in batch])
            y = torch.tensor([task.y for task in batch], device=x.device)
            with torch.no_grad():
                pred = vote([model(padded(x, slots))[: len(x)] for _ in range(draws)])
            yield from (pred == y if self.targeted else pred != y).tolist()
