"""AutoAttack: the standard ensembles, as lists of attacks. Croce & Hein 2020, arXiv 2003.01690.

Each attack runs on what the ones before it left standing, on every eps of the ladder that still stands.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import ClassVar, Literal

from torch import nn

from attacks import engine
from attacks.apgd import APGDCE, APGDDLR, APGDT
from attacks.attack import Attack, Outcome, Task
from attacks.fab import FAB
from attacks.square import Square

NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Several attacks in turn, each on the samples that still stand.

    draws: evaluations of each point at least, for random models; see `engine.run`.
    left_out: the parts of the standard that the number of classes does not allow, in words.
    """

    name: str
    norm: str
    stages: tuple[Attack, ...]
    draws: int = 1
    left_out: tuple[str, ...] = ()
    budget: ClassVar[Literal["fixed"]] = "fixed"  # FAB's part ends within eps
    source: ClassVar[str] = "arXiv 2003.01690"

    @property
    def points(self) -> int:
        """As `Attack.points`."""
        return sum(stage.points for stage in self.stages)

    @property
    def asks_gradients(self) -> bool:
        """As `Attack.asks_gradients`."""
        return any(stage.asks_gradients for stage in self.stages)

    def run(
        self, model: nn.Module, tasks: Iterable[Task], eps: Sequence[float], *, slots: int, seed: int, draws: int = 1
    ) -> Iterator[Outcome]:
        """Like `attacks.engine.run`; each outcome names the component that found it."""
        standing = {task.position: task for task in tasks}
        done: dict[int, Outcome] = {}
        for stage in self.stages:
            found = engine.run(
                model, stage, list(standing.values()), eps,
                slots=slots, seed=seed, draws=max(draws, self.draws), enough=eps[0],
            )  # fmt: skip
            for claimed in found:
                outcome, task = replace(claimed, component=stage.name), standing[claimed.position]
                limit = len(eps) if task.rungs is None else task.rungs
                if outcome.found and (outcome.rung is None or outcome.rung >= limit):  # no news
                    outcome = replace(outcome, found=False, rung=None, restart=None, x_adv=task.x)
                outcome = _merged(done.get(outcome.position), outcome)
                done[outcome.position] = outcome
                if outcome.rung is not None and outcome.rung <= task.first:  # nobody asks about smaller eps
                    del standing[outcome.position]
                    yield done.pop(outcome.position)
                elif outcome.rung is not None:
                    standing[outcome.position] = replace(standing[outcome.position], rungs=outcome.rung)
            if not standing:
                return
        yield from done.values()


def _merged(before: Outcome | None, after: Outcome) -> Outcome:
    """The better of two outcomes on one sample, with the evaluations of both."""
    if before is None:
        return after
    kept = before if after.rung is None else after
    return replace(
        kept,
        forwards=tuple(map(add, before.forwards, after.forwards)),
        gradients=tuple(map(add, before.gradients, after.gradients)),
    )


def standard(norm: str, classes: int) -> Ensemble:
    """APGD-CE, targeted APGD-DLR, targeted FAB, Square; nine targets, or all where there are fewer.

    In l1 five restarts and five targets (arXiv 2103.01208). With three classes the targeted DLR loss, which needs a
    fourth logit, gives way to the untargeted one; with two there is no DLR loss at all (auto-attack#70, #76).
    """
    l1 = norm == "l1"
    dlr: dict[int, tuple[tuple[Attack, ...], str]] = {
        2: ((), "apgd-t is left out: a DLR loss needs three classes"),
        3: ((APGDDLR(norm=norm),), "apgd-t gives way to apgd-dlr: its loss needs four classes"),
    }
    second, left_out = dlr.get(classes, ((APGDT(norm=norm, n_targets=5 if l1 else 9),), ""))
    stages = (APGDCE(norm=norm, restarts=5 if l1 else 1), *second, FAB(norm=norm, search=0), Square(norm=norm))
    return Ensemble(name="autoattack", norm=norm, stages=stages, left_out=(left_out,) if left_out else ())


def rand(norm: str, classes: int) -> Ensemble:
    """For randomised networks: APGD-CE and APGD-DLR on gradients averaged over 20 draws."""
    dlr = (APGDDLR(norm=norm),) if classes > 2 else ()
    left_out = () if dlr else ("apgd-dlr is left out: its loss needs three classes",)
    return Ensemble(name="autoattack-rand", norm=norm, stages=(APGDCE(norm=norm), *dlr), draws=20, left_out=left_out)


ENSEMBLES = {"autoattack": standard, "autoattack-rand": rand}
