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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from operator import add
from typing import Protocol

import torch
from torch import Tensor, nn

import attacks
from attacks.evaluation import padded
from attacks.generators import put_back
from attacks.noise import sample_key
from robust.certify import Certifier, Contradiction, NoBounds
from robust.data.sample import Dataset, Sample
from robust.device import keep_freed_memory, on, readable_exhaustion
from robust.diagnostics import review
from robust.errors import InputError
from robust.judge import Judge, Verified, reach
from robust.models.asking import Watched, logits_of, readable_failure
from robust.models.model import Model
from robust.models.prepare import TWIN_TOLERANCE, fast_twin, frozen, judging_format
from robust.models.probe import apart
from robust.options import Options
from robust.plan import Plan, is_minimal, is_spared
from robust.precision import arithmetic
from robust.preflight import check_keeps_input, has_input_gradient, inspect_model
from robust.randomness import seed_unit
from robust.statistics import CONTROL
from robust.store import Clean, Picture, Result, Store

PREFLIGHT_IMAGES = 8  # that the model is looked over on, or the batch size, and two at least
LONG = 200  # points of a sample that stands, from which on it pays to prove first that there is nothing to be found
SAME = 1e-3  # how far logits may be from those that the run began with, relative to the largest; TF32 is off by as much


class Listener(Protocol):
    """Is told of samples as an attack lets go of them, before they are verified: n of them, of which `robust` stand at
    the largest eps."""

    def __call__(self, attack: str, n: int, robust: int) -> None: ...


def evaluate(
    model: Model,
    data: Dataset,
    options: Options,
    plan: Plan,
    store: Store,
    listener: Listener = lambda attack, n, robust: None,
) -> None:
    """Do what is not in the store yet, and record the findings.

    InputError where the data are not those of the store or hold no image to attack, the model's output is no
    classifier's, every attack failed or memory ran out; RuntimeError where an attack left the ball or broke a proof.
    """
    failed: dict[str, str] = {}
    left_out: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(readable_exhaustion(options.batch_size))
        for module in (model.module, plan.surrogate):
            if module is not None:
                stack.enter_context(on(module, plan.device))
                stack.enter_context(frozen(module))
        stack.enter_context(arithmetic("float32"))
        stack.enter_context(put_back())
        keep_freed_memory()
        job: _Job | None = None
        end = 0
        samples = _attackable(data, plan.target, left_out)
        for start, window in _windows(samples, options.batch_size, plan.device):
            x = torch.stack([sample.x for sample in window]).to(plan.device)
            job = job or _Job.prepare(model, x, options, plan, store)
            clean = job.clean_window(start, window, x)
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


@dataclass
class _Job:
    """What every window of a run shares."""

    model: Model
    twin: nn.Module  # what is attacked: the model itself, once the twin has been seen to be something else
    by_rows: bool  # whether attacks/backward.py may take the twin's gradient
    options: Options
    plan: Plan
    store: Store
    judge: Judge
    certifier: Certifier | None

    @classmethod
    def prepare(cls, model: Model, x: Tensor, options: Options, plan: Plan, store: Store) -> "_Job":
        """Look the model over and make its fast twin, on the first few images x."""
        few = x[: max(2, min(PREFLIGHT_IMAGES, options.batch_size))]
        seed_unit(options.seed, 0, "preflight")
        both_ways = "it must take one image and several, with gradients and without"
        with readable_failure(f"model {model.name}", "on the first images", both_ways):
            check_keeps_input(model, few)
            logits = logits_of(model.module, few, model.num_classes)
            findings = list(inspect_model(model, few, logits, options.draws))
            passed = {finding.name: finding.level == "pass" for finding in findings}
            has_gradient = passed["gradients"] or has_input_gradient(model, few)
        if not has_gradient and any(attack.asks_gradients for attack in plan.attacks):
            raise InputError(
                "the model passes no gradient back to its input: take no_grad and detach out of its forward, "
                "or use --attack noise"
            )
        if strayed := store.details.get("twin_strayed"):  # as it was seen to before the run was interrupted
            twin, description, by_rows = model.module, strayed, False
        else:
            twin, description, by_rows = fast_twin(model.module, few)
        certifier, found = None, _why_not_certified(options, plan, passed)
        if not found:
            certifier, found = _certifier(model.module, few, logits.argmax(1), plan.target, options)
        store.set(twin=description, certifier=found, preflight=[asdict(finding) for finding in findings])
        steady = options.draws == 1 and passed["deterministic"]
        memory_format = judging_format(model.module, few[:2], logits[:2]) if steady else torch.contiguous_format
        judge = Judge(model, options, plan.target, x[0].numel(), steady, memory_format)
        return cls(model, twin, by_rows, options, plan, store, judge, certifier)

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
            if start == 0:
                self._recognise(x)
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
        seed_unit(self.options.seed, start, "clean")
        pred, confidence, _ = self.judge.predict(x)
        y = torch.tensor([sample.y for sample in window], device=x.device)
        certified = self._certify(x, y, pred == y)
        rows = [
            Clean(start + k, sample.id, sample.sha256, sample.y, int(pred[k]), float(confidence[k]), certified[k])
            for k, sample in enumerate(window)
        ]
        # In one transaction: where there are rows, a resumed run is held against what the networks said.
        said = {"said": {name: logits.tolist() for name, logits in self._say(x[:2]).items()}} if start == 0 else {}
        self.store.add_clean(rows, **said)
        return rows

    def _recognise(self, x: Tensor) -> None:
        """InputError where the networks do not say of the first two images what they said when the run began.

        A fingerprint sees tensors and layers. It does not see what Python code does with them, nor its constants.
        """
        stored = self.store.details.get("said")
        if stored is None:
            raise InputError("the run does not say what its networks said at first; start anew with another --output")
        for name, logits in self._say(x[:2]).items():
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
                seed_unit(self.options.seed, 0, name)
                with readable_failure(name, "on the first two images", "mend that and begin anew"):
                    said[name] = logits_of(module, x, self.model.num_classes, name).cpu()
        return said

    def _certify(self, x: Tensor, y: Tensor, right: Tensor) -> list[int]:
        """Within how many of the eps, from the smallest, it is proved of each image that no adversarial exists."""
        counts = torch.zeros(len(x), dtype=torch.long)
        rows = right.nonzero().squeeze(1)
        for eps in self.options.eps:
            if self.certifier is None or len(rows) == 0:
                break
            try:
                rows = rows[self.certifier.certifies(x[rows], y[rows], reach(eps, "linf", 1), self.plan.target)]
            except Contradiction as fault:
                raise InputError(
                    f"{fault}: what was proved of it cannot be believed; begin anew with --no-certify"
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
        began = time.perf_counter()
        right = [row for row in clean if row.clean_pred == row.label]
        listener(attack.name, len(clean) - len(right), 0)
        tasks = self._tasks(attack, start, right, x)
        if certified := len(right) - len(tasks):
            listener(attack.name, certified, certified)
        verified, refuted, overlooked = self._attack(attack, start, right, tasks, listener)
        seconds = time.perf_counter() - began
        broken = {position: v for position, v in verified.items() if v.broken}
        self.store.add_unit(
            start,
            attack.name,
            seconds,
            results=[result for row in clean for result in self._results(row, attack.name, verified.get(row.position))],
            pictures=[
                picture
                for row in right
                if row.position in verified and attack.name != CONTROL
                for picture in self._pictures(row, attack.name, verified[row.position], x[row.position - start])
            ],
            adversarials=[
                (position, tasks[position].x.cpu().numpy(), v.x_adv.cpu().numpy())
                for position, v in broken.items()
                if self.options.save_adversarials
            ],
            nearest=[
                (position, v.distances[self.options.norm])
                for position, v in verified.items()
                if v.fooled and is_minimal(attack)
            ],
            components=_components(attack, broken.values()),
            refuted=refuted,
            overlooked=overlooked,
        )

    def _tasks(
        self, attack: attacks.AnyAttack, start: int, right: Sequence[Clean], x: Tensor
    ) -> dict[int, attacks.Task]:
        """By position what there is to attack: each image from the first eps that is not proved, if there is one."""
        safe = {row.position: row.certified if is_spared(attack) else 0 for row in right}
        return {
            row.position: attacks.Task(
                row.position,
                sample_key(row.sample_id),
                x[row.position - start],
                row.label if self.plan.target is None else self.plan.target,
                first=safe[row.position],
            )
            # First those of which the model is surest: they take longest, and so the batch stays full to the end.
            for row in sorted(right, key=lambda row: row.clean_confidence, reverse=True)
            if safe[row.position] < len(self.options.eps)
        }

    def _attack(
        self,
        attack: attacks.AnyAttack,
        start: int,
        right: Sequence[Clean],
        tasks: Mapping[int, attacks.Task],
        listener: Listener,
    ) -> tuple[dict[int, Verified], int, int]:
        """By position in data order what became of the tasks; how many claims the model refuted, and how many that it
        confirmed the twin had overlooked."""
        seed_unit(self.options.seed, start, attack.name)
        queue = list(tasks.values())
        first = self.judge.verify(attack, self._run(self.twin, attack, queue, listener), tasks)
        if reason := self._why_twin_differs(first):
            self.twin, self.by_rows = self.model.module, False
            self.store.set(twin=reason, twin_strayed=reason)
            seed_unit(self.options.seed, start, attack.name)  # as a run does that is interrupted and resumed here
            first = self.judge.verify(attack, self._run(self.twin, attack, queue), tasks)
        verified = {v.outcome.position: v for v in first}
        _hold_to_proofs(attack, right, verified)
        refuted, overlooked = [v.outcome for v in first if v.refuted], [v.outcome for v in first if v.overlooked]
        # What the twin overlooked at one eps it may have overlooked at smaller ones.
        again = [
            (claim, tasks[claim.position].first)
            for claim in refuted + (overlooked if self.twin is not self.model.module else [])
        ]
        while again:
            begun = [replace(tasks[claim.position], first=rung) for claim, rung in again]
            new = self._run(self.model.module, attack, begun)
            counted = [_with_counts(late, early) for late, (early, _) in zip(new, again, strict=True)]
            begun_on = {task.position: task.first for task in begun}
            anew = self.judge.verify(attack, counted, tasks)
            verified |= {v.outcome.position: _better(verified[v.outcome.position], v) for v in anew}
            _hold_to_proofs(attack, right, verified)
            # What a random model refutes even then is attacked at the larger eps, if there are any.
            still = [v.outcome for v in anew if v.refuted and v.outcome.rung is not None]
            again = [(claim, max(claim.rung or 0, begun_on[claim.position]) + 1) for claim in still]
            again = [(claim, rung) for claim, rung in again if rung < len(self.options.eps)]
        return {position: verified[position] for position in sorted(verified)}, len(refuted), len(overlooked)

    def _why_twin_differs(self, verified: Sequence[Verified]) -> str:
        """Why the twin is not the model under this attack, or ''.

        It agreed on the first images; others may take another way through a network. What broke at the smallest eps
        the model has confirmed; where samples stand, or broke later, the twin may have been the harder one to fool.
        """
        doubtful = [v for v in verified if not v.outcome.found or v.outcome.rung != 0]
        if self.twin is self.model.module or not doubtful:
            return ""
        x_adv, rows = torch.stack([v.x_adv for v in doubtful]), self.judge.rows
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
            Watched(f"model {self.model.name}", module, self.by_rows and module is self.twin),
            attack, tasks, self.options.eps,
            slots=self.judge.rows, seed=self.options.seed, draws=self.options.draws,
        ):  # fmt: skip
            outcomes[outcome.position] = outcome
            if listener is not None:
                listener(attack.name, 1, int(outcome.rung is None))
        return [outcomes[task.position] for task in tasks]

    def _results(self, row: Clean, attack: str, verified: Verified | None) -> Iterator[Result]:
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

    def _pictures(self, row: Clean, attack: str, verified: Verified, x: Tensor) -> Iterator[Picture]:
        chance = sample_key(row.sample_id) / 2**64  # a rank drawn for the sample, whatever its company
        eps, distance = self.options.eps, verified.distances[self.options.norm]
        if verified.broken:
            roles = {"smallest": verified.distances["l2"], "typical": chance, "confident": -verified.confidence}
        else:
            # One that broke beyond every eps shows neither a success nor an image that withstands.
            roles = {} if verified.fooled else {"withstood": chance}
        if not roles:
            return
        image, adversarial = x.cpu().numpy(), verified.x_adv.cpu().numpy()
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
                x=image,
                x_adv=adversarial,
            )


def _better(early: Verified, late: Verified) -> Verified:
    """Of two verdicts on one sample the one that broke it at the smaller eps, in doubt the later; with the later's
    counts, which are those of both.
    """
    if _strength(late) <= _strength(early):
        return late
    counted = replace(early.outcome, forwards=late.outcome.forwards, gradients=late.outcome.gradients)
    return replace(early, outcome=counted)


def _strength(verified: Verified) -> tuple[bool, float]:
    """The smaller, the more it shows: at which eps the sample broke, that it did beyond every eps, that it stood."""
    at = verified.broken_at
    return not verified.fooled, math.inf if at is None else at


def _why_not_certified(options: Options, plan: Plan, passed: Mapping[str, bool]) -> str:
    """Why nothing is to be proved in this run, or ''; `passed` are the checks of the model."""
    if options.norm != "linf":
        return "there are bounds in linf only"
    if options.certify is None and not any(attack.points >= LONG for attack in plan.attacks if is_spared(attack)):
        return "no attack of the run is long enough for it to pay; it can be asked for with --certify"
    if options.certify is False:
        return "not asked for"
    if options.draws > 1 or not passed["deterministic"] or not passed["rows independent"]:
        return "the model is random, or mixes the images of a batch"
    return ""


def _certifier(
    module: nn.Module, x: Tensor, y: Tensor, target: int | None, options: Options
) -> tuple[Certifier | None, str]:
    """A certifier, if it proves anything of the first images x, which the module says are y; and in words."""
    try:
        certifier = Certifier(module, options.batch_size)
        some = bool((certifier.certifies(x, y, reach(options.eps[0], "linf", 1), target) & (y != target)).any())
    except NoBounds as reason:
        return None, str(reason)
    return (certifier, "CROWN-IBP") if some else (None, "nothing was proved of the first images")


def _hold_to_proofs(attack: attacks.AnyAttack, clean: Sequence[Clean], verified: Mapping[int, Verified]) -> None:
    for row in clean:
        broken_at = verified[row.position].broken_at if row.position in verified else None
        if broken_at is not None and broken_at < row.certified:
            raise RuntimeError(
                f"{attack.name} broke sample {row.position} where it was proved that nothing does; this is a bug, "
                "and certify=False a way around it"
            )


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


def _components(attack: attacks.AnyAttack, broken: Iterable[Verified]) -> dict[str, int]:
    """How many of the samples that an ensemble broke each of its parts did."""
    if not isinstance(attack, attacks.Ensemble):
        return {}
    counts = Counter(v.outcome.component for v in broken)
    return {stage.name: counts[stage.name] for stage in attack.stages}
