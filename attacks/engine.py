"""Continuous batching for attacks: the batch stays full of samples that still stand.

Each slot holds one run of an attack on one sample: one rung of its eps ladder, one target, one restart. A slot
whose query fools the model retires at once; one that runs out of queries begins the sample's next run or, after
the last, climbs to the next eps; freed slots are refilled from the queue. An adversarial found at a small eps
lies inside every larger ball too, so a sample climbs only until it breaks, and a whole accuracy-against-eps curve
is one run. An attack that looks for the least distance does not climb: it answers for every eps at once.

When the queue is empty and another row costs little, slots speculate on what the samples left may need later: their
next runs, ahead of their turn, and the next points of a search that knows them unless it is told something new. What is
found and counted is what would have been, one after the other; what was evaluated in vain counts for nobody.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from attacks.attack import Attack, MinimalState, Outcome, State, Task, cat
from attacks.evaluation import cheap, evaluate, padded
from attacks.noise import Noise
from attacks.norms import inside, per_slot

STEADY = 16  # evaluations of equally many rows, after which kernels of their own pay and they are no longer padded
LOOKAHEAD = 16  # points of a slot that are asked about at once, at most


def run(
    model: Callable[[Tensor], Tensor],
    attack: Attack,
    tasks: Iterable[Task],
    eps: Sequence[float],
    *,
    slots: int,
    seed: int,
    draws: int = 1,
    enough: float = 0.0,
) -> Iterator[Outcome]:
    """Attack every task over the rising ladder `eps`; outcomes come as slots retire, in no fixed order.

    `model` maps (B, C, H, W) to (B, K) logits, row by row; if its `by_rows` is true, attacks/backward.py may take its
    gradient. At most `slots` rows are evaluated at once; of small images, if that is odd and not 1, one more. What is
    found on a sample depends on (seed, key) and not on its company in the batch.

    draws: evaluations of each point, for models that are random: gradients and logits are averaged, and the
        class is the vote of the draws (EOT, arXiv 1802.00420). A run goes on until all draws are fooled, and has
        otherwise found the point that most of them were fooled by: the first majority is often a lucky one.
    enough: attacks on the least distance stop on a sample once they have come within this.
    """
    queue = _climbs(model, attack, tasks, eps, slots, draws)
    filled: _Slots | None = None
    starting = _refill(queue, [], slots, draws == 1)
    lookahead = 2 if attack.foresees else 1  # how many points of each slot to ask about at once
    before, steady = 0, 0  # rows of the last evaluation, and for how many they have been as many

    while filled or starting:
        if starting:
            filled = _join(filled, _begin(attack, starting, eps, seed))
        assert filled is not None
        asking, waiting = _split(filled, attack)
        state = asking.state
        before, steady = len(asking), steady + 1 if len(asking) == before else 0
        room = slots if steady < STEADY else max(len(asking), min(slots, 2))

        asked, state.asked = state.asked, state.asked + 1
        wants_grad = attack.needs_grad and bool((attack.wants_grad(state) & ~attack.last(state)).any())
        ahead = min(slots // len(asking), lookahead, attack.queries) if cheap(state.x[0]) else 1
        logits, state.fooled, doubt, gradient = evaluate(model, attack, state, wants_grad, room, draws, ahead)
        if ahead > 1:  # next time half as far again as it got
            lookahead = min(LOOKAHEAD, 1 + int(1.5 * float((state.asked - asked).float().mean())))
        done = _done(attack, asking, doubt, enough)

        starting, kept = [], None
        outcomes: list[Outcome] = []
        ended = done | attack.last(state)
        if bool(ended.any()):
            over = ended.nonzero().squeeze(1)
            starting, outcomes = _retire(attack, asking[over], done[over], eps, draws)
            ended |= asking.vain()
            kept = (~ended).nonzero().squeeze(1)
            asking, logits = asking[kept], logits[kept]
            if waiting:
                waiting = waiting[(~waiting.vain()).nonzero().squeeze(1)]
        grad = gradient(asking.state, kept) if asking and wants_grad else None
        del gradient  # and the graph, before the model makes another one
        yield from outcomes
        if kept is not None:
            going = [*asking.runs, *(waiting.runs if waiting else ()), *starting]
            starting += _refill(queue, going, slots - len(going), draws == 1)
        if asking:
            if wants_grad:
                asking.state.graded += 1
            asking.state = attack.step(asking.state, logits, grad)
        filled = _join(waiting, asking)


@dataclass
class _Slots:
    """What is in the batch: row b of the state belongs to runs[b]."""

    runs: list["_Run"]
    state: State

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, rows: Tensor) -> "_Slots":
        return _Slots([self.runs[row] for row in rows.tolist()], self.state[rows])

    def vain(self) -> Tensor:
        """(B,) bool: of which the climb does without."""
        return torch.tensor([run.number > run.climb.stop for run in self.runs], device=self.state.x.device)


def _join(first: _Slots | None, second: _Slots) -> _Slots:
    if not first:
        return second
    return _Slots(first.runs + second.runs, cat(first.state, second.state)) if second else first


def _split(filled: _Slots, attack: Attack) -> tuple[_Slots, _Slots | None]:
    """The slots to ask about now, and those that wait.

    Those for which a forward is enough go first, so that the others ask for gradients in a full batch.
    """
    if not attack.needs_grad:
        return filled, None
    wanting = attack.wants_grad(filled.state)
    if bool(wanting.all()) or not bool(wanting.any()):
        return filled, None
    later, now = (rows.nonzero().squeeze(1) for rows in (wanting, ~wanting))
    return filled[now], filled[later]


def _done(attack: Attack, asking: _Slots, doubt: Tensor, enough: float) -> Tensor:
    """(B,) bool: whose run ends here because of what it found; what else is worth keeping is kept.

    doubt: (B,), the share of draws that are not fooled.
    """
    state = asking.state
    if isinstance(state, MinimalState):
        _keep_nearest(attack, state)
        return state.best_distance <= enough
    found = _moved(state)
    if attack.strays:
        found = found & inside(attack.ball, state.query - state.x, state.eps)
    likely = found & (doubt > 0)
    for row in likely.nonzero().squeeze(1).tolist():
        asking.runs[row].climb.keep(state.query[row], float(doubt[row]))
    return found & ~likely


def _retire(
    attack: Attack, gone: _Slots, done: Tensor, eps: Sequence[float], draws: int
) -> tuple[list["_Run"], list[Outcome]]:
    """Of slots whose runs have ended, the runs that follow on the same samples, and what became of those that are over.

    done: (B,) bool, whose run ended because of what it found.
    """
    minimal = attack.budget == "minimal"
    starting, outcomes = [], []
    for run, end in zip(gone.runs, _ends(gone.state, done), strict=True):
        run.climb.ended[run.number] = end
    for climb in dict.fromkeys(run.climb for run in gone.runs):
        climb.settle(minimal, draws)
        if climb.over:
            outcomes.append(climb.outcome(eps, minimal))
        elif climb.begun == climb.number:
            starting.append(climb.begin())
    return starting, outcomes


@dataclass(eq=False)
class _Climb:
    """One sample's way through the runs of an attack, and up the eps ladder."""

    task: Task
    targets: Sequence[int]  # those of the runs of one rung, each as often as there are restarts
    rungs: int
    forwards: list[int]
    gradients: list[int]
    rung: int = 0
    number: int = 0  # of the run whose turn it is
    begun: int = 0  # how many runs of this rung have been begun
    ended: dict[int, "_End"] = field(default_factory=dict, repr=False)  # runs that ended before their turn
    over: bool = False
    point: Tensor | None = field(default=None, repr=False)  # what it has to show: the nearest, else the last
    distance: float = math.inf  # of a fixed budget, where all points are as near: the share of draws not fooled
    found_in: int | None = None

    @property
    def found(self) -> bool:
        return self.found_in is not None

    @property
    def stop(self) -> float:
        """The number of the last run that counts."""
        if self.over:
            return -1
        return min((number for number, end in self.ended.items() if end.fell), default=math.inf)

    @property
    def has_more(self) -> bool:
        """Whether a run of this rung has not been begun that may count."""
        return self.begun < len(self.targets) and self.begun <= self.stop

    def begin(self) -> "_Run":
        self.begun += 1
        return _Run(self, self.begun - 1)

    def keep(self, point: Tensor, distance: float) -> None:
        """Take an adversarial point that is not the last of its run."""
        if distance < self.distance:
            self.point, self.distance, self.found_in = point.clone(), distance, self.number

    def settle(self, minimal: bool, draws: int) -> None:
        """Take what runs have left, each in its turn, up to the first that has not ended or settles it."""
        while end := self.ended.pop(self.number, None):
            self.forwards[self.rung] += end.asked * draws
            self.gradients[self.rung] += end.graded * draws
            if end.distance < self.distance:
                self.point, self.distance, self.found_in = end.point, end.distance, self.number
            elif not self.found:
                self.point = end.point
            if end.fell or (self.found and not minimal) or not self._advance():
                self.over = True
                return

    def _advance(self) -> bool:
        """On to the next run, or the next rung; False at the top."""
        self.number += 1
        if self.number == len(self.targets):
            if self.rung + 1 == self.rungs:
                return False
            self.rung, self.number, self.begun = self.rung + 1, 0, 0
        return True

    def outcome(self, eps: Sequence[float], minimal: bool) -> Outcome:
        assert self.point is not None
        rung = self.rung if self.found else None
        if minimal:
            # Rounded as distances are: one that is `enough` is inside.
            radii = torch.tensor(eps, dtype=self.point.dtype).tolist()
            rung = next((k for k, radius in enumerate(radii) if self.distance <= radius), None)
        # The last point of a search for the least distance may lie anywhere.
        return Outcome(
            position=self.task.position,
            x_adv=self.task.x if minimal and not self.found else self.point,
            found=self.found,
            rung=rung,
            restart=self.found_in,
            forwards=tuple(self.forwards),
            gradients=tuple(self.gradients),
        )


class _Run(NamedTuple):
    """A run of one rung of a climb, from 0."""

    climb: _Climb
    number: int


class _End(NamedTuple):
    """What a run leaves."""

    asked: int  # points asked about
    graded: int  # gradients given
    point: Tensor  # to show
    distance: float  # of the point; infinite where none was found
    fell: bool  # whether no other run is needed


def _ends(state: State, done: Tensor) -> Iterator[_End]:
    """Of runs that have ended. Those of a fixed budget that found something are all as good as one another."""
    point, distance = state.query, torch.where(done, 0.0, torch.inf)
    if isinstance(state, MinimalState):
        distance = state.best_distance
        point = torch.where(per_slot(distance.isfinite(), state.x), state.best, state.query)
    return map(_End, state.asked.tolist(), state.graded.tolist(), point, distance.tolist(), done.tolist())


def _refill(queue: Iterator[_Climb], going: Sequence[_Run], free: int, ahead: bool) -> list[_Run]:
    """Runs for slots that are free, beside those that are going on: of new samples and, when there are no more, further
    ones of the same samples ahead of their turn, if `ahead` and another row of their size costs little.
    """
    new = [climb.begin() for climb in islice(queue, free)]
    climbs = list(dict.fromkeys(run.climb for run in [*going, *new]))
    if ahead and climbs and cheap(climbs[0].task.x):
        while len(new) < free and (climbs := [climb for climb in climbs if climb.has_more]):
            new += [climb.begin() for climb in climbs[: free - len(new)]]
    return new


def _climbs(
    model: Callable[[Tensor], Tensor],
    attack: Attack,
    tasks: Iterable[Task],
    eps: Sequence[float],
    slots: int,
    draws: int,
) -> Iterator[_Climb]:
    """A climb for each task, with its targets: the wrong classes that the model finds likeliest."""
    queue = iter(tasks)
    ladder = 1 if attack.budget == "minimal" else len(eps)
    while batch := list(islice(queue, slots)):
        targets = [[task.y] for task in batch]
        if attack.targets:
            x, y = torch.stack([task.x for task in batch]), torch.tensor([task.y for task in batch])
            with torch.no_grad():
                drawn = [model(padded(x, slots))[: len(batch)].clone() for _ in range(draws)]
            logits = torch.stack(drawn).mean(0)
            wrong = logits.scatter(1, y.to(logits.device)[:, None], -torch.inf).argsort(1, descending=True)
            targets = wrong[:, : min(attack.targets, logits.shape[1] - 1)].tolist()
        for task, wanted in zip(batch, targets, strict=True):
            runs = [target for target in wanted for _ in range(attack.restarts)]
            rungs = min(ladder, len(eps) if task.rungs is None else task.rungs)
            climb = _Climb(task, runs, rungs, [0] * len(eps), [0] * len(eps), rung=min(task.first, rungs - 1))
            if attack.targets:  # looking which classes are likely cost a forward
                climb.forwards[climb.rung] = draws
            yield climb


def _begin(attack: Attack, runs: list[_Run], eps: Sequence[float], seed: int) -> _Slots:
    x = torch.stack([run.climb.task.x for run in runs])

    def column(values: list) -> Tensor:
        return torch.tensor(values, device=x.device)

    known = {
        "x": x,
        "y": column([run.climb.task.y for run in runs]),
        "target": column([run.climb.targets[run.number] for run in runs]),
        # To an attack on the least distance eps is only a scale, and must not depend on the smaller ones asked for.
        "eps": column([eps[-1 if attack.budget == "minimal" else run.climb.rung] for run in runs]).to(x),
        "query": x.clone(),
        "asked": torch.zeros(len(runs), dtype=torch.long, device=x.device),
        "graded": torch.zeros(len(runs), dtype=torch.long, device=x.device),
        "fooled": torch.zeros(len(runs), dtype=torch.bool, device=x.device),
    }
    # No noise on the rung: what breaks a sample must not depend on which other eps were asked for.
    keys, numbers = [run.climb.task.key for run in runs], [run.number for run in runs]
    noise = Noise(seed, keys, numbers, tuple(x.shape[1:]), x.device, x.dtype)
    if attack.budget == "minimal":
        nothing = {"best": x, "best_distance": torch.full((len(x),), torch.inf, device=x.device)}
        return _Slots(runs, attack.init(MinimalState(**known, **nothing), noise))
    return _Slots(runs, attack.init(State(**known), noise))


def _moved(state: State) -> Tensor:
    """(B,) bool: who is fooled by another point than the image itself, which is no adversarial, whatever one draw of a
    random model says of it."""
    if not bool(state.fooled.any()):
        return state.fooled
    return state.fooled & (state.query != state.x).flatten(1).any(1)


def _keep_nearest(attack: Attack, state: MinimalState) -> None:
    distance = attack.ball.distance(state.query - state.x)
    # As in `_moved`.
    nearer = state.fooled & (distance < state.best_distance) & (distance > 0)
    if bool(nearer.any()):
        state.best = torch.where(per_slot(nearer, state.x), state.query, state.best)
        state.best_distance = torch.where(nearer, distance, state.best_distance)
