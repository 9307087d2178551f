"""`robust.run`: a whole evaluation from Python; and `execute`, which the command line shares with it."""

import inspect
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from attacks import Ensemble
from attacks.generators import put_back
from reports import REPORTS, write_reports
from reports.answer import answer
from robust.data import load_data
from robust.data.batches import from_batches
from robust.data.sample import Dataset, Sample
from robust.device import pick_device, share_of_cores
from robust.environment import environment, now
from robust.errors import InputError
from robust.files import at_home
from robust.harness import Listener, evaluate
from robust.models import load_model, memory
from robust.models.model import Model
from robust.models.probe import device_of
from robust.models.scratch import from_scratch
from robust.models.surrogate import check_surrogate, load_surrogate, wrap_surrogate
from robust.options import Options, default_attacks, parse_eps, parse_names, parse_number, whole
from robust.plan import check_options, make_plan
from robust.precision import undisturbed
from robust.store import FILENAME, Busy, Finding, Store, differences, holds_run, require_no_files
from robust.units import format_size

# Options of the command line that are no parameters of `run` by their own names.
_IN_PYTHON = {
    "attack": "attack",
    "certify": "certify=True",
    "no-certify": "certify=False",
    "resume": "resume=True",
    "skip-bad-images": "skip_bad_images=True",
    "list-attacks": "attacks.takes",
}


@contextmanager
def _in_python() -> Iterator[None]:
    """Errors, most of which the command line may tell as well, call options by the names of `run`'s parameters."""

    def named(option: re.Match[str]) -> str:
        parameter = option[1].replace("-", "_")
        known = parameter in inspect.signature(run).parameters
        return _IN_PYTHON.get(option[1], parameter if known else option[0])

    try:
        yield
    except InputError as error:
        error.args = (re.sub(r"(?<![^\s(])--([a-z][a-z-]*)", named, str(error)),)
        raise


@dataclass(frozen=True)
class Run:
    """A finished run. Its tables are pandas DataFrames."""

    store: Store

    @property
    def samples(self) -> pd.DataFrame:
        """One row a (sample, attack, norm, eps); the columns are `robust.store.SAMPLE_COLUMNS`."""
        return self.store.samples()

    @property
    def summary(self) -> pd.DataFrame:
        """One row an (attack, norm, eps) and one for the worst case; see `robust.store.Store.summary`."""
        return self.store.summary()

    @property
    def findings(self) -> list[Finding]:
        """Reasons to believe the numbers, or not to."""
        return self.store.findings()

    @property
    @_in_python()
    def answer(self) -> str:
        """The result in one sentence."""
        return answer(self.store)

    @_in_python()
    def write(self, output: str | Path) -> Path:
        """Write the run directory, store and all reports, to `output`, and return it."""
        output = at_home(output)
        require_no_files(output, REPORTS)
        self.store.copy_to(output / FILENAME)
        write_reports(self.store, output)
        return output


@_in_python()
@undisturbed()
@put_back()  # a DataLoader draws a seed when it is read, and a random model when it is looked at
def run(
    model: nn.Module | Model | str,
    data: Iterable[Any] | str = "samples",
    attacks: Sequence[str] | str | None = None,
    norm: str = "linf",
    eps: float | str | Sequence[float] | None = None,
    steps: int | None = None,
    *,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool | None = None,
    queries: int | None = None,
    eot: int | None = None,
    surrogate: nn.Module | Model | str | None = None,
    target: str | int | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
    conv: str = "torch",
    weights: str | Path | None = None,
    input_size: int | None = None,
    label: str | None = None,
    data_root: str | Path | None = None,
    skip_bad_images: bool = False,
    class_names: Sequence[str] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    save_adversarials: bool = False,
    certify: bool | None = None,
) -> Run:
    """Attack `model` on `data` and report its accuracy under perturbation.

    model: any nn.Module from pixels (N, C, H, W) in [0, 1] to logits (N, K), its normalisation inside; or a
        spec as on the command line, such as "resnet50". It is evaluated in eval mode and left as it was.
    data: any iterable of (x, y), batches or single samples, x float32 in [0, 1]; or a spec such as "samples".
    attacks: names out of `attacks.names()`, each once; or one such name. None for a few that suit the norm.
    norm: "linf", "l2", "l1", or "l0", which counts the values that change.
    eps: radii in pixel units, such as 8 / 255 or "8/255"; several are one run.
        None for some that suit the images.
    steps, step_size, random_start: of iterative attacks; None for the attack's own. step_size is a fraction of
        eps for pgd; for fmn and sigma-zero see docs/attacks.md.
    queries: of square; None for 5000.
    eot: evaluations of every point, for a randomised model: its verdict is their vote, its gradient their mean.
        None for one, and for the twenty of autoattack-rand.
    surrogate: the network that attack "transfer" crafts on; a module, or a spec.
    restarts: runs from different random starts, on the samples still standing; what is not random runs once.
    target: a class name or index to reach, instead of any wrong class; its own samples are left out.
    batch_size: rows evaluated at once, at most; of images of up to 8,192 values, an even number, if it is not 1.
    limit: with a data spec, a class-balanced subset of that many images drawn from `seed`.
    seed: of every random number, 0 .. 2^64 - 1.
    device: such as "cuda"; None for where the model is.
    conv: "torch", or "scratch" for the same network on the project's own convolution (`robust.conv`).
    weights, input_size: with a model spec, a state dict (.pth or .safetensors), and the side of the square images, a
        surrogate's too.
    label, data_root, skip_bad_images: with a data spec, the class of a single image, the folder of torchvision's data
        sets, and whether to leave unreadable images out.
    class_names: of a module, in label order; specs have their own.
    output: a run directory to write (store and reports); None keeps the run in memory. With `resume`, one that
        was interrupted is continued.
    save_adversarials: keep every adversarial, in `output`'s adversarials.npz.
    certify: whether to prove, in linf, what bounds on the logits can (CROWN-IBP, arXiv 1906.06316); attacks within a
        fixed eps are spared where it is proved that there is no adversarial. None for where one of the attacks is so
        long (autoattack, apgd-t, square, many restarts) that it pays.

    torch.autocast and another default dtype around the call do not reach it, and a compiled model runs as it was
    written. Calls from several threads take turns.

    An option goes to those of the attacks that take it (`attacks.takes`); the others keep their own.

    Raises InputError, whose message is one line, for anything wrong with the arguments; so for an option that none
    of the attacks takes.
    """
    if not isinstance(model, nn.Module | Model | str):
        raise InputError(f"model must be an nn.Module or a spec, not a {type(model).__name__}; wrap it in a module")
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode() is on, and attacks need gradients; call it outside")
    options = Options(
        attacks=default_attacks(norm) if attacks is None else parse_names(_listed(attacks)),
        norm=norm,
        eps=_radii(eps),
        steps=steps,
        step_size=None if step_size is None else _number("step_size", step_size),
        restarts=restarts,
        random_start=random_start,
        queries=queries,
        eot=eot,
        surrogate=_name_of(surrogate),
        target=target if isinstance(target, str | None) else str(whole("target", target)),
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        device=device or _its_device(model),
        conv=conv,
        save_adversarials=save_adversarials,
        certify=certify,
    )
    if not isinstance(output, str | Path | None):
        raise InputError(f"output must be a folder's path, not {output!r}")
    if resume and output is None:
        raise InputError("resume needs the output of the run to continue")
    if class_names is not None and not isinstance(model, nn.Module):
        raise InputError("class_names go with a module; a model by its spec has names of its own")
    if not isinstance(model, str) and not (weights is None and input_size is None):
        raise InputError("weights and input_size go with a model spec, such as 'resnet50'")
    if not isinstance(data, str) and (label is not None or data_root is not None or skip_bad_images):
        raise InputError("label, data_root and skip_bad_images go with a data spec, such as a folder's path")
    if not isinstance(surrogate, nn.Module | Model | str | None):
        raise InputError(f"surrogate must be an nn.Module or a spec, not a {type(surrogate).__name__}")
    check_options(options)
    if isinstance(model, str):
        model = load_model(model, None if weights is None else Path(weights), input_size)
    if isinstance(data, str):
        if isinstance(model, nn.Module):
            raise InputError("a data spec needs a model spec that knows its classes; pass batches of (x, y)")
        root = None if data_root is None else Path(data_root)
        dataset = load_data(
            data, model, limit=limit, seed=seed, label=label, data_root=root, skip_bad_images=skip_bad_images
        )
    elif limit is not None:
        raise InputError("limit needs a data spec; shorten the iterable instead")
    else:
        dataset = data if isinstance(data, Dataset) else from_batches(data)
        if isinstance(model, Model):
            first, dataset = _peek(dataset)
            _check_size(model, first)
    if isinstance(model, nn.Module):
        first, dataset = _peek(dataset)
        model = memory.wrap(model, first.shape, class_names)
    if isinstance(surrogate, nn.Module):
        first, dataset = _peek(dataset)
        surrogate = wrap_surrogate(surrogate, first.shape)
    elif isinstance(surrogate, str):
        surrogate = load_surrogate(surrogate, input_size)
    folder = None if output is None else at_home(output)
    done = execute(model, dataset, options, folder, resume, surrogate=surrogate)
    if folder is not None:
        write_reports(done.store, folder)
    return done


@_in_python()
def load(folder: str | Path) -> Run:
    """The run in `folder`, with its tables; `write(folder)` makes its reports anew. InputError where there is none."""
    return Run(Store.open(at_home(folder)))


@undisturbed()  # by what a model's file has set
@share_of_cores()
def execute(
    model: Model,
    data: Dataset,
    options: Options,
    output: Path | None = None,
    resume: bool = False,
    command: str | None = None,
    listener: Listener = lambda attack, n, robust: None,
    surrogate: Model | None = None,
) -> Run:
    """Evaluate into a new run at `output` (None: in memory), or continue the one there with `resume`.

    InputError where `output` holds a run that is not to be resumed, or that differs in model, data or options.
    """
    first, data = _peek(data)
    options = options.suited_to(first.shape, str(pick_device(options.device)))
    class_names = model.class_names or data.class_names
    if options.conv == "scratch":
        model = from_scratch(model, first.x.unsqueeze(0), pick_device(options.device))
    if surrogate is not None:
        check_surrogate(surrogate, first.shape)
    planned = make_plan(options, model, class_names, surrogate)
    identity = {
        "model": {
            "name": model.name,
            "source": model.source,
            "fingerprint": model.fingerprint,
            "num_classes": model.num_classes,
            "input_size": list(first.shape),
        },
        **({} if surrogate is None else {"surrogate": {"name": surrogate.name, "fingerprint": surrogate.fingerprint}}),
        **({} if planned.target is None else {"target": {"index": planned.target}}),
        "data": {"name": data.name, "size": data.size},
        "options": options.as_dict(),
    }
    details = {
        "command": command,
        "environment": environment(planned.device, "torchvision", "timm", "foolbox", "numpy"),
        "class_names": list(class_names) if class_names else None,
        "attacks": [_describe(attack, surrogate) for attack in planned.attacks],
        "started": now(),
    }
    resumed = resume and output is not None and holds_run(output / FILENAME)
    store = _open_store(output, resume, identity, details)
    try:
        evaluate(model, data, options, planned, store, listener)
    except Exception as error:
        begun = bool(store.seconds())
        if resumed or isinstance(error, Busy):  # it may be another process's, which has just begun
            store.close()
        else:
            store.close_and_discard_if_empty()
        if isinstance(error, InputError) and begun and output is not None and not resume:
            go_on = f"with --output {shlex.quote(str(output))} --resume, if the model's file is as it was"
            raise InputError(f"{error}; what is done is kept: go on {go_on}") from error
        raise
    store.set(finished=now())
    return Run(store)


def _open_store(output: Path | None, resume: bool, identity: dict[str, Any], details: dict[str, Any]) -> Store:
    path = None if output is None else output / FILENAME
    if resume and path is not None and holds_run(path):
        store = Store.open(path, to_resume=True)
        # The same options may be other parameters to another version of an attack.
        parameters = [{"attacks": _parameters(each["attacks"])} for each in (store.details, details)]
        if differ := differences(store.identity, identity) or differences(*parameters):
            raise InputError(
                f"{output} holds another run: it differs in {'; '.join(differ)}; "
                "repeat the options it was begun with, or name another --output"
            )
        # What it takes to finish it, such as leaving bad images out, it takes to repeat it.
        command = details["command"] or store.details.get("command")
        store.set(environment=details["environment"], command=command)
        return store
    if output is not None:
        require_no_files(output, REPORTS)
    return Store.create(path, identity, details)


def _peek(data: Dataset) -> tuple[Sample, Dataset]:
    """The first sample, and the data with it, to be read once. InputError where there is none."""
    samples = iter(data)
    first = next(samples, None)
    if first is None:
        raise InputError(f"no image to evaluate in {data.name}")
    return first, _ReadOnce(data, chain([first], samples))


def _check_size(model: Model, first: Sample) -> None:
    """InputError where a model by its spec takes other images: another size it might read, and see less in it."""
    if model.input_size is not None and first.shape != model.input_size:
        raise InputError(
            f"the images are {format_size(first.shape)}, and {model.name} takes {format_size(model.input_size)}: "
            "prepare them at that size, or name another by input_size"
        )


@dataclass(frozen=True)
class _ReadOnce:
    """A data set whose reading has begun."""

    data: Dataset
    samples: Iterator[Sample]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __iter__(self) -> Iterator[Sample]:
        return self.samples


def _listed(names: Sequence[str] | str) -> Sequence[str]:
    names = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if unnamed := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"attacks are given by their names, such as 'pgd', not as a {type(unnamed[0]).__name__}")
    return names


def _name_of(model: nn.Module | Model | str | None) -> str | None:
    if model is None or isinstance(model, str):
        return model
    return model.name if isinstance(model, Model) else type(model).__name__


def _radii(eps: float | str | Sequence[float] | torch.Tensor | np.ndarray | None) -> tuple[float, ...]:
    if eps is None:
        return ()
    if isinstance(eps, str):
        return parse_eps(eps)
    if isinstance(eps, torch.Tensor | np.ndarray):
        eps = eps.tolist()
    radii = tuple(_number("eps", value) for value in (eps if isinstance(eps, Iterable) else [eps]))
    if not radii:
        raise InputError("eps is empty: give radii, or None for some that suit the images")
    return radii


def _number(name: str, value: Any) -> float:
    """A number of any library, or text such as "8/255"."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return parse_number(value, name) if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, not {value!r}") from None


def _its_device(model: nn.Module | Model | str) -> str:
    if isinstance(model, str):
        return "auto"
    return str(device_of(model.module if isinstance(model, Model) else model))


def _describe(attack: Any, surrogate: Model | None) -> dict[str, Any]:
    if isinstance(attack, Ensemble):
        return {
            "name": attack.name,
            "description": f"{', then '.join(stage.name for stage in attack.stages)}, each on what still stands",
            "source": attack.source,
            "parameters": {"draws": attack.draws} if attack.draws > 1 else {},
            "left_out": list(attack.left_out),
            "components": [_describe(stage, surrogate) for stage in attack.stages],
        }
    parameters = dict(vars(attack))
    if surrogate is not None and "surrogate" in parameters:
        parameters["surrogate"] = f"{surrogate.name} ({surrogate.fingerprint[:12]})"
    name = parameters.pop("name", None) or attack.name
    summary = " ".join(inspect.cleandoc(type(attack).__doc__ or "").split("\n\n")[0].split())
    # `steps` becomes their number.
    described = re.sub("`(.+?)`", lambda named: str(parameters.get(named[1], named[1])), summary)
    return {"name": name, "description": described, "source": attack.source, "parameters": parameters}


def _parameters(described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each attack that `_describe` has described, an ensemble's parts included, by name."""
    parts = [part for attack in described for part in (attack, *attack.get("components", ()))]
    return {part["name"]: json.loads(json.dumps(part["parameters"])) for part in parts}
