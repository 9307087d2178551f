"""From a model, data and options to verified verdicts in a store.

The data streams through in windows. For each window: the clean pass and what can be certified; then each attack on
the samples that the model gets right, where nothing proves that it is in vain; then re-verification of everything the
attack claims, on the user's own module. Attacks run on a faster twin of it; a claim that the module does not confirm
goes back to be attacked on the module itself.
"""

import contextlib
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from operator import add
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import attacks
from attacks.engine import padded, vote
from attacks.noise import sample_key
from attacks.norms import NORMS, per_slot
from robust.certify import Certifier, Contradiction, NoBounds
from robust.data.labels import label_of
from robust.data.sample import Dataset, Sample
from robust.diagnostics import CONTROL, check_keeps_input, has_input_gradient, preflight, review
from robust.errors import InputError, unknown
from robust.models.model import Model
from robust.models.prepare import TOLERANCE as TWIN_TOLERANCE
from robust.models.prepare import fast_twin, frozen, judging_format
from robust.models.probe import apart, describe
from robust.options import Options
from robust.precision import arithmetic
from robust.store import Clean, Picture, Result, Store

# What float32 arithmetic may add to a distance that was projected onto eps: this, and this share of eps.
TOLERANCE = 1e-6
# Rounding x + delta to float32 moves a pixel below 1 by up to this, and all pixels alike where deltas are alike.
HALF_ULP = 2**-25

PREFLIGHT_IMAGES = 8
LONG = 200  # points of a sample that stands, from which on it pays to prove first that there is nothing to be found
SAME = 1e-3  # how far logits may be from those that the run began with, relative to the largest; TF32 is off by as much
PUSHES = (1.001, 1.01, 1.05)  # how far out the nearest point is tried again
RANDOM_PUSHES = (*PUSHES, 1.1, 1.2, 1.5, 2.0)  # of a random model, whose nearest point is that of its luckiest vote


class Listener(Protocol):
    """Is told of samples as they are done: n of them, of which `robust` stand at the largest eps."""

    def __call__(self, attack: str, n: int, robust: int) -> None: ...


@dataclass(frozen=True)
class Plan:
    """The attacks of a run, ready to go."""

    attacks: tuple[attacks.AnyAttack, ...]
    target: int | None  # class index
    device: torch.device
    surrogate: nn.Module | None = None


def check(options: Options) -> None:
    """InputError for attacks and options that are wrong whatever the model is, which may take long to load."""
    _attacks(options, None, None if options.surrogate is None else nn.Identity())


def plan(options: Options, model: Model, class_names: Sequence[str] | None, surrogate: Model | None = None) -> Plan:
    """Options made concrete for the model; InputError for names that it or this project does not know."""
    device = pick_device(options.device)
    if surrogate is not None and surrogate.num_classes != model.num_classes:
        raise InputError(
            f"the surrogate {surrogate.name} has {surrogate.num_classes} classes and the model {model.num_classes}; "
            "name one trained on the same classes"
        )
    crafted_on = None if surrogate is None else surrogate.module
    watched = None if surrogate is None else _Watched(f"surrogate {surrogate.name}", surrogate.module)
    made = _attacks(options, model.num_classes, watched)
    named = replace(model, class_names=tuple(class_names) if class_names else None)
    target = None if options.target is None else label_of(options.target, named, "target")
    return Plan(made, target, device, crafted_on)


def _attacks(options: Options, classes: int | None, surrogate: nn.Module | None) -> tuple[attacks.AnyAttack, ...]:
    told = {option: getattr(options, option) for option in attacks.OPTIONS}
    targeted = options.target is not None
    made = []
    for name in options.attacks:
        try:
            made.append(attacks.make(name, options.norm, targeted, classes, surrogate, **told))
        except KeyError:
            raise unknown("attack", name, attacks.names()) from None
        except ValueError as error:
            raise InputError(str(error)) from None
    _check_taken(options)
    return tuple(made)


def _check_taken(options: Options) -> None:
    """InputError for an option that no attack of the run takes: who gives it expects something of it."""
    for option in attacks.OPTIONS:
        value, default = getattr(options, option), getattr(Options, option)
        if value == default or any(option in attacks.takes(name, options.random_start) for name in options.attacks):
            continue
        takers = [name for name in attacks.names() if option in attacks.takes(name) and name not in options.attacks]
        fit = [name for name in takers if name in attacks.ATTACKS and options.norm in attacks.ATTACKS[name].norms]
        foreign = ["many of foolbox's"] if any(name.startswith(attacks.PREFIX) for name in takers) else []
        could = any(option in attacks.takes(name) for name in options.attacks)
        without = " without a random start" if could else ""
        others = f", or add an attack that takes it: {', '.join(fit + foreign)}" if fit or foreign else ""
        raise InputError(
            f"{option} means nothing to {' or '.join(options.attacks)}{without}: leave it out{others} "
            "(see --list-attacks)"
        )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None
    return device


def evaluate(
    model: Model,
    data: Dataset,
    options: Options,
    plan: Plan,
    store: Store,
    listener: Listener = lambda attack, n, robust: None,
) -> None:
    """Do what is not in the store yet, and record the findings.

    InputError where the data are not those of the store, or the model's output is no classifier's.
    """
    failed: dict[str, str] = {}
    left_out: list[str] = []
    with contextlib.ExitStack() as stack:
        for module in (model.module, plan.surrogate):
            if module is not None:
                stack.enter_context(_on(module, plan.device))
                stack.enter_context(frozen(module))
        stack.enter_context(arithmetic("float32"))
        stack.enter_context(_own_randomness(plan.device))
        stack.enter_context(_readable_exhaustion(options.batch_size))
        _keep_freed_memory()
        job: _Job | None = None
        end = 0
        samples = _attackable(data, plan.target, left_out)
        for start, window in _windows(samples, options.batch_size, plan.device):
            x = torch.stack([sample.x for sample in window]).to(plan.device)
            first = job is None
            job = job or _Job.prepare(model, x, options, plan, store)
            clean = job.clean_window(start, window, x)
            if first:
                job.recognise(x)
            end = start + len(window)
            for attack in plan.attacks:
                if attack.name in failed:
                    continue
                try:
                    job.attack_window(attack, start, clean, x, listener)
                except attacks.AttackFailed as error:
                    # Half a data set under one attack is no result.
                    failed[attack.name] = str(error)
                    store.drop_attack(attack.name)
        if job is None:
            raise InputError("no image to evaluate: every one already has the target's label")
    if end != store.size():
        raise InputError(
            f"the data have changed since the run began: {end} images, {store.size()} then; "
            "start anew with another --output"
        )
    if len(failed) == len(plan.attacks):
        raise InputError("; ".join(failed.values()))
    store.set(
        data_fingerprint=_fingerprint(store),
        skipped_images=data.skipped,
        target_images=len(left_out),
        failed_attacks=failed,
    )
    store.set_findings(review(store))


@dataclass(frozen=True)
class _Verified:
    """An attack's claim about one sample, after a fresh forward pass on the model itself."""

    outcome: attacks.Outcome
    x_adv: Tensor
    rung: int | None  # of the smallest eps that it lies within
    fooled: bool  # verified: inside the ball and the box, and the model errs (or hits the target)
    fooled_8bit: tuple[bool, ...]  # for each eps: whether a version of it in 8 bits a channel does
    pred: int
    confidence: float
    logits: Tensor  # (K,), a random model's mean
    distances: Mapping[str, float]  # by norm

    @property
    def broken_at(self) -> int | None:
        """The rung of the smallest eps within which it fools the model."""
        return self.rung if self.fooled else None

    @property
    def broken(self) -> bool:
        return self.broken_at is not None

    @property
    def refuted(self) -> bool:
        return self.outcome.found and not self.fooled

    @property
    def overlooked(self) -> bool:
        return self.fooled and not self.outcome.found


@dataclass
class _Job:
    """What every window of a run shares."""

    model: Model
    twin: nn.Module  # what is attacked: the model itself, once the twin has been seen to be something else
    by_rows: bool  # whether attacks/backward.py may take the twin's gradient
    options: Options
    plan: Plan
    store: Store
    pixels: int  # values in an image
    certifier: Certifier | None
    steady: bool  # whether the model says the same each time
    memory_format: torch.memory_format  # in which it is given the images that it judges

    @classmethod
    def prepare(cls, model: Model, x: Tensor, options: Options, plan: Plan, store: Store) -> "_Job":
        """Look the model over and make its fast twin, on the first few images x."""
        few = x[:PREFLIGHT_IMAGES]
        _seed(options.seed, 0, "preflight")
        both_ways = "it must take one image and several, with gradients and without"
        with _readable_failure(f"model {model.name}", "on the first images", both_ways):
            check_keeps_input(model, few)
            logits = _logits(model.module, few, model.num_classes)
            findings = list(preflight(model, few, logits, options.draws))
            passed = {finding.name: finding.level == "pass" for finding in findings}
            has_gradient = passed["gradients"] or has_input_gradient(model, few)
        if not has_gradient and any(needs_gradient(attack) for attack in plan.attacks):
            raise InputError(
                "the model passes no gradient back to its input: take no_grad and detach out of its forward, "
                "or use --attack noise"
            )
        twin, description, by_rows = fast_twin(model.module, few)
        if strayed := store.details.get("twin_strayed"):
            twin, description, by_rows = model.module, strayed, False
        certifier, found = None, _why_not_certified(options, plan, passed)
        if not found:
            certifier, found = _certifier(model.module, few, logits.argmax(1), plan.target, options)
        store.set(twin=description, certifier=found, preflight=[asdict(finding) for finding in findings])
        steady = options.draws == 1 and passed["deterministic"]
        memory_format = judging_format(model.module, few[:2], logits[:2]) if steady else torch.contiguous_format
        return cls(model, twin, by_rows, options, plan, store, x[0].numel(), certifier, steady, memory_format)

    def recognise(self, x: Tensor) -> None:
        """Record what the networks say of the first two images or, in a run that is resumed, compare.

        A fingerprint sees tensors and layers. It does not see what Python code does with them, nor its constants.
        """
        stored, said = self.store.details.get("said"), self._say(x[:2])
        if stored is None:
            self.store.set(said={name: logits.tolist() for name, logits in said.items()})
            return
        for name, logits in said.items():
            before = torch.tensor(stored[name])
            # A network that is random in a way that no seed governs never says the same.
            if apart(before, logits) > SAME >= apart(self._say(x[:2])[name], logits):
                raise InputError(
                    f"the {name} has changed since the run began: its weights are the same, but not what it says of "
                    "the first images; start anew with another --output"
                )

    def _say(self, x: Tensor) -> dict[str, Tensor]:
        """The logits of the model and of the surrogate, if there is one, a random one's with a seed of their own."""
        networks = {"model": self.model.module, "surrogate": self.plan.surrogate}
        said = {}
        for name, module in networks.items():
            if module is not None:
                _seed(self.options.seed, 0, name)
                with _readable_failure(name, "on the first two images", "mend that and begin anew"):
                    said[name] = _logits(module, x, self.model.num_classes, name).cpu()
        return said

    def clean_window(self, start: int, window: Sequence[Sample], x: Tensor) -> list[Clean]:
        """The verdicts on the unchanged images, from the store where it has them."""
        stored = self.store.clean(start, len(window))
        if stored and len(stored) == len(window):
            for row, sample in zip(stored, window, strict=True):
                if (row.sample_id, row.sha256, row.label) != (sample.id, sample.sha256, sample.y):
                    raise InputError(
                        f"the data have changed since the run began: {sample.id} is not the {row.sample_id} "
                        "evaluated then; start anew with another --output"
                    )
            return stored
        if stored:
            raise InputError(
                f"the data have changed since the run began: there are more than the {self.store.size()} images "
                "evaluated then; start anew with another --output"
            )
        for sample in window:
            if not 0 <= sample.y < self.model.num_classes:
                raise InputError(
                    f"label {sample.y} of {sample.id} is none of the model's {self.model.num_classes} classes"
                )
        _seed(self.options.seed, start, "clean")
        pred, confidence, _ = self._predict(x)
        y = torch.tensor([sample.y for sample in window], device=x.device)
        certified = self._certify(x, y, pred == y)
        rows = [
            Clean(start + k, sample.id, sample.sha256, sample.y, int(pred[k]), float(confidence[k]), certified[k])
            for k, sample in enumerate(window)
        ]
        self.store.add_clean(rows)
        return rows

    def _certify(self, x: Tensor, y: Tensor, right: Tensor) -> list[int]:
        """Within how many of the eps, from the smallest, it is proved of each image that no adversarial exists."""
        counts = torch.zeros(len(x), dtype=torch.long)
        rows = right.nonzero().squeeze(1)
        for eps in self.options.eps:
            if self.certifier is None or len(rows) == 0:
                break
            try:
                rows = rows[self.certifier.certifies(x[rows], y[rows], _reach(eps), self.plan.target)]
            except Contradiction as fault:
                raise InputError(
                    f"{fault}: what was proved of it cannot be believed; begin anew with --no-certify (certify=False)"
                ) from None
            except NoBounds:  # at larger eps they are wider still
                break
            counts[rows.cpu()] += 1
        return counts.tolist()

    def attack_window(
        self, attack: attacks.AnyAttack, start: int, clean: Sequence[Clean], x: Tensor, listener: Listener
    ) -> None:
        """Attack the samples that the model gets right, verify every claim, and store the unit."""
        if self.store.done(start, attack.name):
            listener(attack.name, len(clean), self.store.standing(start, len(clean), attack.name))
            return
        _seed(self.options.seed, start, attack.name)
        began = time.perf_counter()
        right = [row for row in clean if row.clean_pred == row.label]
        listener(attack.name, len(clean) - len(right), 0)
        safe = {row.position: row.certified for row in right if _is_spared(attack)}
        if certified := sum(count == len(self.options.eps) for count in safe.values()):
            right = [row for row in right if safe.get(row.position) != len(self.options.eps)]
            listener(attack.name, certified, certified)
        tasks = {
            row.position: attacks.Task(
                row.position,
                sample_key(row.sample_id),
                x[row.position - start],
                row.label if self.plan.target is None else self.plan.target,
                first=safe.get(row.position, 0),
            )
            for row in right
        }
        # First those of which the model is surest: they take longest, and so the batch stays full to the end.
        surest = sorted(right, key=lambda row: row.clean_confidence, reverse=True)
        queue = [tasks[row.position] for row in surest]
        claims = self._run(self.twin, attack, queue, listener)
        verified = self._verify(attack, claims, tasks)
        if reason := self._strays(verified):
            self.twin, self.by_rows = self.model.module, False
            self.store.set(twin=reason, twin_strayed=reason)
            _seed(self.options.seed, start, attack.name)  # as a run does that is interrupted and resumed here
            verified = self._verify(attack, self._run(self.twin, attack, queue), tasks)
        by_position = {v.outcome.position: v for v in verified}
        _hold_to_proofs(attack, right, by_position)
        refuted, overlooked = [v.outcome for v in verified if v.refuted], [v.outcome for v in verified if v.overlooked]
        # What the twin overlooked at one eps it may have overlooked at smaller ones.
        again = [
            (claim, tasks[claim.position].first)
            for claim in refuted + (overlooked if self.twin is not self.model.module else [])
        ]
        while again:
            begun = [replace(tasks[claim.position], first=first) for claim, first in again]
            new = self._run(self.model.module, attack, begun)
            counted = [_with_counts(late, early) for late, (early, _) in zip(new, again, strict=True)]
            begun_on = {task.position: task.first for task in begun}
            anew = self._verify(attack, counted, tasks)
            by_position |= {v.outcome.position: _better(by_position[v.outcome.position], v) for v in anew}
            _hold_to_proofs(attack, right, by_position)
            # What a random model refutes even then is attacked at the larger eps, if there are any.
            still = [v.outcome for v in anew if v.refuted and v.outcome.rung is not None]
            again = [(claim, max(claim.rung or 0, begun_on[claim.position]) + 1) for claim in still]
            again = [(claim, first) for claim, first in again if first < len(self.options.eps)]
        verified = [by_position[row.position] for row in right]
        seconds = time.perf_counter() - began
        self.store.add_unit(
            start,
            attack.name,
            seconds,
            results=[
                result for row in clean for result in self._results(row, attack.name, by_position.get(row.position))
            ],
            pictures=[
                picture
                for row in right
                if attack.name != CONTROL
                for picture in self._pictures(row, attack.name, by_position[row.position], x[row.position - start])
            ],
            adversarials=[
                (v.outcome.position, tasks[v.outcome.position].x.cpu().numpy(), v.x_adv.cpu().numpy())
                for v in verified
                if v.broken and self.options.save_adversarials
            ],
            nearest=[
                (v.outcome.position, v.distances[self.options.norm])
                for v in verified
                if v.fooled and _is_minimal(attack)
            ],
            components=_components(attack, [v for v in verified if v.broken]),
            refuted=len(refuted),
            overlooked=len(overlooked),
        )

    def _strays(self, verified: Sequence[_Verified]) -> str:
        """Why the twin is not the model under this attack, or ''.

        It agreed on the first images; others may take another way through a network. What broke at the smallest eps
        the model has confirmed; where samples stand, or broke later, the twin may have been the harder one to fool.
        """
        doubtful = [v for v in verified if not v.outcome.found or v.outcome.rung != 0]
        if self.twin is self.model.module or not doubtful:
            return ""
        x_adv, rows = torch.stack([v.x_adv for v in doubtful]), self.options.batch_size
        with torch.no_grad():
            said = [self.twin(padded(part, rows))[: len(part)].clone() for part in x_adv.split(rows)]
        off = apart(torch.stack([v.logits for v in doubtful]), torch.cat(said))
        if off <= TWIN_TOLERANCE:
            return ""
        return f"the model itself: under attack, a copy's logits were off by {off:.2g} of the largest"

    def _run(
        self,
        module: nn.Module,
        attack: attacks.AnyAttack,
        tasks: Sequence[attacks.Task],
        listener: Listener | None = None,
    ) -> list[attacks.Outcome]:
        """The outcomes in the order of the tasks, so that what follows does not depend on who broke first."""
        outcomes = {}
        for outcome in attacks.run(
            _Watched(f"model {self.model.name}", module, self.by_rows and module is self.twin),
            attack, tasks, self.options.eps,
            slots=self.options.batch_size, seed=self.options.seed, draws=self.options.draws,
        ):  # fmt: skip
            outcomes[outcome.position] = outcome
            if listener is not None:
                listener(attack.name, 1, int(outcome.rung is None))
        return [outcomes[task.position] for task in tasks]

    def _verify(
        self, attack: attacks.AnyAttack, claims: Sequence[attacks.Outcome], tasks: Mapping[int, attacks.Task]
    ) -> list[_Verified]:
        """Every claim and every last point of a sample that stood, judged afresh by the model itself."""
        if not claims:
            return []
        x = torch.stack([tasks[claim.position].x for claim in claims])
        y = torch.tensor([tasks[claim.position].y for claim in claims], device=x.device)
        point = torch.stack([claim.x_adv for claim in claims])
        found = torch.tensor([claim.found for claim in claims], device=x.device)
        in_8bit = torch.zeros_like(found)
        versions: Iterator[Tensor] = iter([point])  # of each claim, judged in turn until one fools the model
        if _is_minimal(attack):
            # The nearest point lies on the boundary, where rounding or chance decides: farther out they do not.
            pushes = RANDOM_PUSHES if self.options.draws > 1 else PUSHES
            versions = chain([point], ((x + factor * (point - x)).clamp_(0, 1) for factor in pushes))
        else:
            # First as it would be saved: what fools the model so is the adversarial and its 8-bit image in one.
            distance = self._measure(attack, claims, x, point)[self.options.norm]
            if self.steady and attack.budget == "fixed":
                in_8bit, rounded = self._in_8bit(x, point, self._rungs(distance, self.pixels))
                in_8bit &= found
                versions = iter([torch.where(per_slot(in_8bit, x), rounded, point), point])
        x_adv = next(versions).clone()
        try:
            pred, confidence, logits = self._predict(x_adv)
        except InputError as error:
            raise InputError(f"at a point that {attack.name} found, {error}") from error
        saved = in_8bit & self._fools(pred, y)
        for version in versions:
            rows = (found & ~self._fools(pred, y)).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            x_adv[rows] = version[rows]
            pred[rows], confidence[rows], logits[rows] = self._predict(version[rows])
        if _is_minimal(attack):
            claims = [replace(claim, rung=None) if claim.found else claim for claim in claims]
        distances = self._measure(attack, claims, x, x_adv)
        distance = distances[self.options.norm]
        # The image itself is no adversarial, whatever a random model says of it this time.
        fooled = self._fools(pred, y) & (distance > 0)
        # What is projected onto eps may be rounded beyond it; where the search is for the distance itself, that counts.
        rungs = self._rungs(distance, 0 if _is_minimal(attack) else self.pixels)
        fooled_8bit = self._survive_8bit(x, y, x_adv, rungs, fooled, in_8bit, saved)
        reached = [rung if rung < len(self.options.eps) else None for rung in rungs.tolist()]
        sizes = {norm: values.tolist() for norm, values in distances.items()}
        return [
            _Verified(
                claim, x_adv[k], reached[k], bool(fooled[k]), tuple(fooled_8bit[k].tolist()), int(pred[k]),
                float(confidence[k]), logits[k], {norm: values[k] for norm, values in sizes.items()},
            )
            for k, claim in enumerate(claims)
        ]  # fmt: skip

    def _measure(
        self, attack: attacks.AnyAttack, claims: Sequence[attacks.Outcome], x: Tensor, x_adv: Tensor
    ) -> dict[str, Tensor]:
        """By norm the distances (N,) of the claims' points from x; an error where one has left the ball or the box."""
        delta = x_adv.double() - x.double()
        distances = {norm: ball.distance(delta) for norm, ball in NORMS.items()}
        distance = distances[self.options.norm]
        in_box = (x_adv.flatten(1).amin(1) >= 0) & (x_adv.flatten(1).amax(1) <= 1)
        limit = torch.tensor([self._limit(claim) for claim in claims], device=x.device, dtype=distance.dtype)
        outside = ~(in_box & self._within(distance, limit))
        if bool(outside.any()):
            worst = int(outside.nonzero()[0])
            message = (
                f"{attack.name} left the ball or the box on sample {claims[worst].position}: "
                f"{self.options.norm} distance {distance[worst]:.9g}, eps {limit[worst]:.9g}"
            )
            if isinstance(attack, attacks.FoolboxAttack):
                raise attacks.AttackFailed(message)
            raise RuntimeError(f"{message}; this is a bug")
        return distances

    def _rungs(self, distance: Tensor, rounding: int) -> Tensor:
        """(N,) of the smallest eps that each distance lies within; len(eps) where there is none."""
        return torch.stack([~within(distance, eps, self.options.norm, rounding) for eps in self.options.eps]).sum(0)

    def _limit(self, claim: attacks.Outcome) -> float:
        """How far from x the claim may lie; the nearest adversarial that there is, anywhere."""
        if claim.rung is None:
            return math.inf if claim.found else self.options.eps[-1]
        return self.options.eps[claim.rung]

    def _in_8bit(self, x: Tensor, x_adv: Tensor, rungs: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) bool: whose 8-bit version, which is not x, lies within the same eps; and the versions."""
        eps = torch.tensor([*self.options.eps, self.options.eps[-1]], dtype=torch.float64, device=x.device)[rungs]
        rounded = round_to_8bit(x, x_adv, eps.to(x), self.options.norm)
        distance = NORMS[self.options.norm].distance(rounded.double() - x.double())
        return self._within(distance, eps) & (distance > 0), rounded

    def _survive_8bit(
        self, x: Tensor, y: Tensor, x_adv: Tensor, first: Tensor, fooled: Tensor, tried: Tensor, saved: Tensor
    ) -> Tensor:
        """(N, len(eps)) bool: whether an 8-bit image within eps, made from the adversarial, fools the model.

        first: (N,), the smallest eps that the adversarial lies within.
        tried, saved: (N,) bool, for whom that is known already at the first eps, and for whom it does.

        At the eps where the adversarial was found it is that image rounded; at a larger eps, as long as no
        smaller one has survived, the same perturbation scaled up to that eps and rounded.
        """
        eps = self.options.eps
        survives = torch.zeros(len(x), len(eps), dtype=torch.bool)
        first, fooled, tried, saved = first.cpu(), fooled.cpu(), tried.cpu(), saved.cpu()
        for k, radius in enumerate(eps):
            if k:
                survives[:, k] = survives[:, k - 1]
            known = tried & (first == k)
            survives[:, k] |= known & saved
            rows = torch.nonzero(fooled & (first <= k) & ~known & ~survives[:, k]).squeeze(1)
            if len(rows) == 0:
                continue
            there = rows.to(x.device)
            # A larger eps in l0 is not more of each change.
            grows = self.options.norm != "l0"
            scale = torch.tensor([radius / eps[int(first[row])] if grows else 1.0 for row in rows], device=x.device)
            scaled = x[there] + per_slot(scale, x) * (x_adv[there] - x[there])
            rounded = round_to_8bit(x[there], scaled.clamp_(0, 1), radius, self.options.norm)
            pred, _, _ = self._predict(rounded)
            inside = self._within(NORMS[self.options.norm].distance(rounded - x[there]), radius)
            survives[rows, k] = (self._fools(pred, y[there]) & inside).cpu()
        return survives

    def _within(self, distance: Any, eps: Any) -> Any:
        return within(distance, eps, self.options.norm, self.pixels)

    def _fools(self, pred: Tensor, y: Tensor) -> Tensor:
        return pred != y if self.plan.target is None else pred == y

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) predictions of the model itself, their softmax confidences, and (N, K) logits, a random one's mean."""
        draws = [self._ask(x) for _ in range(self.options.draws)]
        # Confidences may tie at 1.0 in float32 where logits do not.
        pred = vote(draws)
        confidence = torch.stack([logits.softmax(1) for logits in draws]).mean(0).gather(1, pred[:, None]).squeeze(1)
        return pred, confidence, torch.stack(draws).mean(0)

    def _ask(self, x: Tensor) -> Tensor:
        module, rows = self.model.module, self.options.batch_size
        with _readable_failure(
            f"model {self.model.name}",
            f"on batches of up to {rows} images",
            "mend that and go on, or begin anew with a batch_size that it takes",
        ):
            parts = [
                _logits(module, padded(part, rows), self.model.num_classes)[: len(part)]
                for part in x.contiguous(memory_format=self.memory_format).split(rows)
            ]
        return torch.cat(parts)

    def _results(self, row: Clean, attack: str, verified: _Verified | None) -> Iterator[Result]:
        for k, eps in enumerate(self.options.eps):
            broken_at = None if verified is None else verified.broken_at
            found = verified if broken_at is not None and broken_at <= k else None
            yield Result(
                position=row.position,
                attack=attack,
                eps=eps,
                success=found is not None,
                success_8bit=verified is not None and verified.fooled_8bit[k],
                adv_pred=found.pred if found else None,
                adv_confidence=found.confidence if found else None,
                distance_linf=found.distances["linf"] if found else None,
                distance_l2=found.distances["l2"] if found else None,
                distance_l1=found.distances["l1"] if found else None,
                distance_l0=found.distances["l0"] if found else None,
                forwards=verified.outcome.forwards[k] if verified else 0,
                gradients=verified.outcome.gradients[k] if verified else 0,
                restart=found.outcome.restart if found else None,
            )

    def _pictures(self, row: Clean, attack: str, verified: _Verified, x: Tensor) -> Iterator[Picture]:
        chance = sample_key(row.sample_id) / 2**64  # a rank drawn for the sample, whatever its company
        eps, distance = self.options.eps, verified.distances[self.options.norm]
        if verified.broken:
            roles = {"smallest": verified.distances["l2"], "typical": chance, "confident": -verified.confidence}
        else:
            # One that broke beyond every eps shows neither a success nor an image that withstands.
            roles = {} if verified.fooled else {"withstood": chance}
        for role, rank in roles.items():
            yield Picture(
                role=role,
                rank=rank,
                position=row.position,
                attack=attack,
                eps=eps[-1 if verified.broken_at is None else verified.broken_at],
                adv_pred=verified.pred,
                adv_confidence=verified.confidence,
                distance=distance,
                distance_linf=verified.distances["linf"],
                distance_l2=verified.distances["l2"],
                x=x.cpu().numpy(),
                x_adv=verified.x_adv.cpu().numpy(),
            )


class _Watched(nn.Module):
    """A module, named where it fails under an attack."""

    def __init__(self, name: str, module: nn.Module, by_rows: bool = False):
        super().__init__()
        self.name, self.module, self.by_rows = name, module, by_rows

    def forward(self, x: Tensor) -> Tensor:
        with _readable_failure(
            self.name, "under attack", "mend that and go on, or begin anew with a smaller batch_size"
        ):
            return self.module(x)


def _better(early: _Verified, late: _Verified) -> _Verified:
    """Of two verdicts on one sample, the later one with the counts of both, unless it alone did not fool the model."""
    if late.fooled or not early.fooled:
        return late
    counted = replace(early.outcome, forwards=late.outcome.forwards, gradients=late.outcome.gradients)
    return replace(early, outcome=counted)


def _why_not_certified(options: Options, plan: Plan, passed: Mapping[str, bool]) -> str:
    """Why nothing is to be proved in this run, or ''; `passed` are the checks of the model."""
    if options.norm != "linf":
        return "there are bounds in linf only"
    if options.certify is None and not any(_points(attack) >= LONG for attack in plan.attacks if _is_spared(attack)):
        return "no attack of the run is long enough for it to pay; it can be asked for with --certify"
    if options.certify is False:
        return "not asked for"
    if options.draws > 1 or not passed["deterministic"] or not passed["rows independent"]:
        return "the model is random, or mixes the images of a batch"
    return ""


def _points(attack: attacks.AnyAttack) -> int:
    """How many points an attack asks about on a sample that stands, at most; 0 for foolbox's, which do not say."""
    if isinstance(attack, attacks.Ensemble):
        return sum(map(_points, attack.stages))
    return attack.queries * attack.restarts * max(1, attack.targets) if isinstance(attack, attacks.Attack) else 0


def _certifier(
    module: nn.Module, x: Tensor, y: Tensor, target: int | None, options: Options
) -> tuple[Certifier | None, str]:
    """A certifier, if it proves anything of the first images x, which the module says are y; and in words."""
    try:
        certifier = Certifier(module, options.batch_size)
        some = bool((certifier.certifies(x, y, _reach(options.eps[0]), target) & (y != target)).any())
    except NoBounds as reason:
        return None, str(reason)
    return (certifier, "CROWN-IBP") if some else (None, "nothing was proved of the first images")


def _reach(eps: float) -> float:
    """How far from an image a point may lie that counts as within eps in linf; see `within`."""
    return eps * (1 + TOLERANCE) + TOLERANCE + HALF_ULP


def _hold_to_proofs(attack: attacks.AnyAttack, clean: Sequence[Clean], verified: Mapping[int, _Verified]) -> None:
    for row in clean:
        broken_at = verified[row.position].broken_at
        if broken_at is not None and broken_at < row.certified:
            raise RuntimeError(
                f"{attack.name} broke sample {row.position} where it was proved that nothing does; this is a bug, "
                "and certify=False a way around it"
            )


def within(distance: Any, eps: Any, norm: str, pixels: int) -> Any:
    """Whether distances of images of that many values lie inside eps, up to rounding; numbers or tensors."""
    if norm == "l0":
        return distance <= eps
    rounding = HALF_ULP * {"linf": 1, "l2": math.sqrt(pixels), "l1": pixels}[norm]
    return distance <= eps * (1 + TOLERANCE) + TOLERANCE + rounding


def _is_minimal(attack: attacks.AnyAttack) -> bool:
    return isinstance(attack, attacks.Attack) and attack.budget == "minimal"


def _is_spared(attack: attacks.AnyAttack) -> bool:
    """Whether it leaves out what is certified: the control does not, nor what looks for a distance beyond any eps."""
    return attack.name != CONTROL and not _is_minimal(attack)


def needs_gradient(attack: attacks.AnyAttack) -> bool:
    """Whether an attack cannot do without the model's; foolbox's do not say."""
    if isinstance(attack, attacks.Ensemble):
        return any(map(needs_gradient, attack.stages))
    return isinstance(attack, attacks.Attack) and attack.needs_grad and attack.name != "transfer"


def round_to_8bit(x: Tensor, x_adv: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """x_adv (N, C, H, W) as it comes back from an 8-bit image file, kept within eps of x where that can be.

    eps is one for all or (N,). Rounds to the nearest of 256 levels; in linf, to the nearest of those within eps; in l2,
    where the nearest leave the ball, towards x. (Where x itself lies between levels there may be none within eps.)
    """
    levels = (x_adv * 255).round()
    if norm == "linf":
        slack, radius = TOLERANCE * 255 / 2, per_slot(eps, x) if isinstance(eps, Tensor) else eps
        low, high = ((x - radius) * 255 - slack).ceil(), ((x + radius) * 255 + slack).floor()
        levels = levels.clamp(low, high)
    else:
        towards = (x * 255).round() + ((x_adv - x) * 255).trunc()
        leaves = NORMS[norm].distance(levels / 255 - x) > eps
        levels = torch.where(per_slot(leaves, x), towards, levels)
    rounded = levels.clamp(0, 255) / 255
    # Where few values change, rounding the others too would be most of the distance.
    return torch.where(x_adv == x, x, rounded) if norm in ("l1", "l0") else rounded


def _logits(module: nn.Module, x: Tensor, num_classes: int, name: str = "model") -> Tensor:
    """(N, num_classes) finite logits of the model itself, in float32 or float64, or InputError, which names it."""
    with torch.no_grad():
        logits = module(x)
    if not isinstance(logits, Tensor) or logits.shape != (len(x), num_classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"the {name}'s output must be logits of shape ({len(x)}, {num_classes}), not {shape}; "
            "wrap the model so that it returns one row of logits an image"
        )
    if not bool(logits.isfinite().all()):
        raise InputError(
            f"the {name}'s output holds NaN or infinity; check its weights and the normalisation inside it"
        )
    # Half the digits may tie where all do not. A copy, as a module may write its next output over this one.
    return logits.to(logits.dtype if logits.dtype == torch.float64 else torch.float32, copy=True)


def _seed(seed: int, start: int, what: str) -> None:
    """Give a random model the same draws in this unit, whatever came before it."""
    digest = hashlib.sha256(f"{seed} {start} {what}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


@contextlib.contextmanager
def _readable_failure(name: str, where: str, advice: str) -> Iterator[None]:
    """InputError for whatever a user's module raises when it is asked."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"the {name} fails {where}: {describe(error)}; {advice}") from error


@contextlib.contextmanager
def _readable_exhaustion(batch_size: int) -> Iterator[None]:
    """InputError for memory that the device has not."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f", or begin anew with a batch_size below {batch_size}" if batch_size > 1 else ""
        raise InputError(
            f"the device has too little memory ({describe(error)}): free some and go on{smaller}"
        ) from error


def _attackable(data: Dataset, target: int | None, left_out: list[str]) -> Iterator[Sample]:
    """The samples, without those that have the target's label already; their ids are added to `left_out`."""
    for sample in data:
        if sample.y == target:
            left_out.append(sample.id)
        else:
            yield sample


def _windows(samples: Iterator[Sample], batch_size: int, device: torch.device) -> Iterator[tuple[int, list[Sample]]]:
    """(position of the first, samples) of each window."""
    first = next(samples, None)
    if first is None:
        return
    # A window is what an interruption can lose, and what keeps the slots full. Where images are quick, several
    # batches deep; large ones on a CPU, where full batches gain nothing, one.
    quick = device.type != "cpu" or first.x[0].numel() <= 64 * 64
    samples, size, start = chain([first], samples), 8 * batch_size if quick else batch_size, 0
    while window := list(islice(samples, size)):
        yield start, window
        start += len(window)


def _with_counts(new: attacks.Outcome, old: attacks.Outcome) -> attacks.Outcome:
    """The outcome of a second run, with the evaluations of the first added to its own."""
    return replace(
        new,
        forwards=tuple(map(add, new.forwards, old.forwards)),
        gradients=tuple(map(add, new.gradients, old.gradients)),
    )


def _fingerprint(store: Store) -> str:
    digest = hashlib.sha256()
    for row in store.clean():
        digest.update(f"{row.sample_id}\0{row.label}\0{row.sha256}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device` while the block runs."""
    before = next(chain(module.parameters(), module.buffers()), torch.empty(0)).device
    module.to(device)
    try:
        yield
    finally:
        module.to(before)


def _components(attack: attacks.AnyAttack, broken: Sequence[_Verified]) -> dict[str, int]:
    """How many of the samples that an ensemble broke each of its parts did."""
    if not isinstance(attack, attacks.Ensemble):
        return {}
    counts = Counter(v.outcome.component for v in broken)
    return {stage.name: counts[stage.name] for stage in attack.stages}


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Torch's global generators put back as they were; a model that is random draws from them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _keep_freed_memory() -> None:
    """Have the C library keep what layers free, rather than give it back and fetch it anew page by page.

    glibc gives blocks back that are larger than the largest freed so far, up to 32 MiB (M_MMAP_THRESHOLD in
    mallopt(3)). This one is not written to, and so costs nothing, unless torch fills new memory to be deterministic.
    It holds for the rest of the process, as if the process had freed such a block itself.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)
