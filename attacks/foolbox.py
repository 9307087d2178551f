"""Any attack of foolbox by the name of its class: "foolbox:LinfDeepFoolAttack".

Foolbox runs whole batches and keeps no count, so this file wraps the model to count, drives the attack up the
eps ladder, and hands back the same outcomes as the engine. What foolbox returns is as unverified as our own.

Foolbox draws from torch's, numpy's and Python's global generators: they are seeded for each batch and put back
as they were. Its noise is therefore keyed by batch, not by sample.
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from attacks.attack import Outcome, Task
from attacks.generators import seeded
from attacks.norms import NORMS, per_slot

PREFIX = "foolbox:"
OPTIONS = {"steps": "steps", "step_size": "rel_stepsize", "random_start": "random_start"}  # our names, theirs


class AttackFailed(Exception):
    """The attack itself raised; the message names it and says what."""


@dataclass(frozen=True, kw_only=True)
class FoolboxAttack:
    """One of foolbox's attacks, with foolbox's own defaults.

    options: what is given instead of them.
    """

    name: str  # with the prefix
    norm: str
    targeted: bool = False
    restarts: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    source: ClassVar[str] = "github.com/bethgelab/foolbox"
    # Foolbox's attacks say neither.
    points: ClassVar[int] = 0
    asks_gradients: ClassVar[bool] = False

    @classmethod
    def of(cls, name: str, norm: str, targeted: bool, given: dict[str, Any]) -> "FoolboxAttack":
        """The attack `name`, told those of the options `given` that it has; ValueError where it cannot run."""
        takes = inspect.signature(foolbox_attacks()[name]).parameters
        options = {theirs: given[ours] for ours, theirs in OPTIONS.items() if ours in given and theirs in takes}
        if missing := [ours for ours in _needed(name) if ours not in given]:
            raise ValueError(f"{name} needs {missing[0]}: foolbox has no default for it")
        attack = cls(name=name, norm=norm, targeted=targeted, restarts=given.get("restarts", 1), options=options)
        try:
            own = _norm_of(attack._make().distance)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name} needs {error.name}: pip install {error.name}") from None
        except (TypeError, ImportError, AttributeError) as error:  # some are broken in foolbox itself
            raise ValueError(f"{name} cannot be used: {error}") from None
        if own != norm:
            raise ValueError(f"{name} measures its perturbations in {own}, not in {norm}")
        takes = get_type_hints(foolbox_attacks()[name].run)["criterion"]  # one class of foolbox's, or a union
        kinds = [kind for kind in get_args(takes) or [takes] if isinstance(kind, type)]
        if not any(issubclass(attack._criterion(), kind) for kind in kinds):
            how = "without a target only" if targeted else "with a target only: name it with --target"
            raise ValueError(f"{name} runs {how}")
        return attack

    @property
    def budget(self) -> Literal["fixed", "minimal"]:
        from foolbox.attacks.base import MinimizationAttack

        return "minimal" if issubclass(foolbox_attacks()[self.name], MinimizationAttack) else "fixed"

    def _criterion(self) -> type:
        from foolbox import Misclassification, TargetedMisclassification

        return TargetedMisclassification if self.targeted else Misclassification

    def _make(self) -> Any:
        kind = foolbox_attacks()[self.name]
        takes = inspect.signature(kind).parameters
        distance = {"distance": _distance(self.norm)} if "distance" in takes else {}
        return kind(**self.options, **distance)

    def run(
        self, model: nn.Module, tasks: Iterable[Task], eps: Sequence[float], *, slots: int, seed: int, draws: int = 1
    ) -> Iterator[Outcome]:
        """Like `attacks.engine.run`, but foolbox judges every point by one draw. AttackFailed where foolbox raises."""
        queue = iter(tasks)
        while batch := list(islice(queue, slots)):
            with seeded(seed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    outcomes = self._attack(model, batch, eps)
                except torch.OutOfMemoryError:  # no fault of the attack's
                    raise
                except Exception as error:
                    raise AttackFailed(f"{self.name} raised {type(error).__name__}: {error}") from error
            yield from outcomes

    def _attack(self, model: nn.Module, batch: Sequence[Task], eps: Sequence[float]) -> list[Outcome]:
        from foolbox import PyTorchModel

        x = torch.stack([task.x for task in batch])
        y = torch.tensor([task.y for task in batch], device=x.device)
        criterion = self._criterion()
        counted = _Counted(model)
        judge = PyTorchModel(counted.eval(), bounds=(0, 1), device=x.device)
        attack = self._make()
        if self.restarts > 1:
            attack = attack.repeat(self.restarts)
        # The least distance answers for every eps at once; a fixed eps is tried on what still stands.
        minimal = self.budget == "minimal"
        x_adv = x.clone()
        rung = torch.full((len(batch),), -1)
        first = torch.tensor([0 if minimal else task.first for task in batch])
        forwards = np.zeros((len(batch), len(eps)), int)
        gradients = np.zeros((len(batch), len(eps)), int)
        for k in [len(eps) - 1] if minimal else range(len(eps)):
            standing = torch.nonzero((rung < 0) & (first <= k)).squeeze(1)
            if len(standing) == 0:
                continue
            rows = standing.to(x.device)
            counted.forwards = counted.gradients = 0
            found, clipped, success = attack(judge, x[rows], criterion(y[rows]), epsilons=None if minimal else eps[k])
            if minimal:
                x_adv, rung = self._drawn_back(counted, x, y, found.detach(), success, eps)
            else:
                x_adv[rows] = clipped.detach()
                rung[standing[success.cpu()]] = k
            # As an array, for numpy takes a tensor of one number for that number.
            at = standing.numpy(), 0 if minimal else k
            forwards[at] = _share(counted.forwards, len(rows))
            gradients[at] = _share(counted.gradients, len(rows))
        # A search that ended outside every eps, or in NaN, found nothing: its last point is the clean image.
        found_none = (rung < 0) | ~x_adv.flatten(1).isfinite().all(1).cpu()
        rung[found_none] = -1
        x_adv = torch.where(per_slot(found_none.to(x.device), x), x, x_adv)
        return [
            Outcome(
                position=task.position,
                x_adv=x_adv[row],
                found=bool(rung[row] >= 0),
                rung=int(rung[row]) if rung[row] >= 0 else None,
                restart=0 if rung[row] >= 0 else None,
                forwards=tuple(forwards[row].tolist()),
                gradients=tuple(gradients[row].tolist()),
            )
            for row, task in enumerate(batch)
        ]

    def _drawn_back(
        self, model: nn.Module, x: Tensor, y: Tensor, found: Tensor, success: Tensor, eps: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Adversarial points (N, C, H, W), and the rung (N,) of the smallest eps that each is within, -1 for none.

        As foolbox does where it is told an eps: what a search found beyond it is drawn back to it, and judged again.
        """
        points, rung = found.clone(), torch.full((len(x),), -1)
        distance = NORMS[self.norm].distance(found - x)
        for k, radius in enumerate(eps):
            near = (rung < 0) & (success & (distance <= radius + 1e-6)).cpu()
            rung[near] = k
            rows = torch.nonzero((rung < 0).to(x.device) & distance.isfinite()).squeeze(1)
            if self.norm == "l0" or len(rows) == 0:  # in l0 there is no way back
                continue
            clipped = _distance(self.norm).clip_perturbation(x[rows], found[rows], radius)
            with torch.no_grad():
                pred = model(clipped).argmax(1)
            fools = pred == y[rows] if self.targeted else pred != y[rows]
            points[rows[fools]] = clipped[fools]
            rung[rows[fools].cpu()] = k
        return points, rung


def foolbox_attacks() -> dict[str, Any]:
    """Foolbox's attack classes by prefixed name: those whose perturbation a norm bounds, and that need nothing but
    a model and images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # foolbox uses names that scipy will drop; test suites make errors of that
        import foolbox.attacks as catalogue
    from foolbox.attacks.base import AttackWithDistance

    classes = {name: value for name, value in vars(catalogue).items() if inspect.isclass(value)}
    return {
        PREFIX + name: value
        for name, value in sorted(classes.items())
        if issubclass(value, AttackWithDistance) and not inspect.isabstract(value)
        # Those that need images to choose from, or adversarials of another attack to refine.
        if not hasattr(value, "feed") and name != "BinarizationRefinementAttack"
    }


def norms_and_kind(name: str) -> tuple[list[str], str]:
    """The norms that one of foolbox's attacks can be run in, and what it looks for; or none, and the reason."""
    needed = _needed(name)
    given = dict.fromkeys(needed, 1)
    norms: dict[bool, list[str]] = {False: [], True: []}  # by whether there is a target
    reason = ""
    for targeted, norm in product((False, True), NORMS):
        try:
            attack = FoolboxAttack.of(name, norm, targeted, given)
        except ValueError as error:
            reason = str(error).removeprefix(f"{name} ")
        else:
            norms[targeted].append(norm)
            budget = attack.budget
    either = norms[False] or norms[True]
    if not either:
        return [], reason
    only = "" if norms[False] == norms[True] else f", {'without' if norms[False] else 'with'} a target only"
    needs = "".join(f", needs {option}" for option in needed)
    return either, f"{'least distance' if budget == 'minimal' else 'fixed eps'}{only}{needs}"


def _needed(name: str) -> list[str]:
    """Our names of the options that foolbox has no default for."""
    takes = inspect.signature(foolbox_attacks()[name]).parameters
    return [
        ours for ours, theirs in OPTIONS.items() if theirs in takes and takes[theirs].default is inspect.Parameter.empty
    ]


def _norm_of(distance: Any) -> str:
    return f"l{distance.p:g}"  # p is 0, 1, 2 or inf


def _distance(norm: str) -> Any:
    from foolbox import distances

    return getattr(distances, norm)


class _Counted(nn.Module):
    """The model, counting the rows it evaluates and the gradients taken with respect to its input."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.forwards = 0
        self.gradients = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._count_gradient)
        return self.model(x)

    def _count_gradient(self, grad: Tensor) -> None:
        self.gradients += len(grad)


def _share(total: int, n: int) -> np.ndarray:
    """`total` evaluations shared out over n samples, so that they add up exactly."""
    return total // n + (np.arange(n) < total % n)
