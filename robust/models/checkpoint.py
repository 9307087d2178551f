"""State dicts from files: read without running any code from them, and loaded strictly."""

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from robust.errors import InputError
from robust.models.probe import describe

CONTAINERS = ("state_dict", "model_state_dict", "model", "net")  # under which training scripts keep the state dict


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth, .pt or .bin read with weights_only=True.

    InputError for a file that is missing, corrupt or no state dict, and for one that needs unpickling.
    """
    if not path.is_file():
        raise InputError(f"no file of weights at {path}")
    try:
        state = _read(path)
    except Exception as error:  # the readers raise KeyError, EOFError, struct.error, ... for corrupt files
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path} needs unpickling ({wanted[1]}) and is refused, as that can run code from the file: "
                "save the model's state_dict() with torch.save, or as .safetensors"
            ) from error
        with path.open("rb") as file:
            beginning = file.read(40)
        is_pickle = beginning.startswith((b"PK", b"\x80"))
        if is_pickle and ("pickle protocol" in str(error) or "Unsupported operand" in str(error)):
            raise InputError(
                f"{path} cannot be read without unpickling, which is refused, as that can run code from the file: "
                "save the model's state_dict() with torch.save and its default pickle_protocol, or as .safetensors"
            ) from error
        if "TorchScript" in str(error):
            raise InputError(f"{path} is a TorchScript program: save the model's state_dict()") from error
        # A page of a web server, or what git-lfs leaves in a file's place.
        seen = f" (it begins with {beginning!r})" if beginning and not is_pickle else ""
        raise InputError(f"{path} is corrupt or no checkpoint{seen}: download or save it again") from error
    for key in CONTAINERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            if other := _like(state, key):
                raise InputError(
                    f"{path} holds two sets of weights, {key} and {other}, as training with a moving average does: "
                    f"save the one that is meant, torch.save(torch.load(FILE, weights_only=True)[{other!r}], OTHER)"
                )
            state = state[key]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        others = state if isinstance(state, dict) else {}
        listed = ", ".join([repr(key) for key, value in others.items() if not isinstance(value, Tensor)][:8])
        besides = f" but {listed}" if listed else ""
        raise InputError(f"{path} holds no state dict (names to tensors){besides}: save the model's state_dict()")
    if any(name.startswith("module.") for name in state):
        state.pop("n_averaged", None)  # how many weights torch's AveragedModel is the mean of
    return state


def _like(container: dict[str, Any], key: str) -> str | None:
    """What else in the container has tensors of all the names that are under the key."""
    names = {name.removeprefix("module.") for name in container[key] if isinstance(name, str)}
    for other, value in container.items():
        if other != key and isinstance(value, dict) and names:
            if names <= {name.removeprefix("module.") for name, tensor in value.items() if isinstance(tensor, Tensor)}:
                return str(other)
    return None


def load_into(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state`, read from `path`, all of it; InputError names the first few tensors that do not fit."""
    _unwrap(state, module)
    wrong = [
        f"{name} {_shape(state[name])} instead of {_shape(tensor)}"
        for name, tensor in module.state_dict().items()
        if name in state and _shape(state[name]) != _shape(tensor)
    ]
    both = [
        (name, state[name], tensor)
        for name, tensor in module.state_dict().items()
        if name in state and isinstance(tensor, Tensor)
    ]
    turned = [name for name, given, tensor in both if given.is_complex() != tensor.is_complex()]
    # Which torch would copy into floats without a word.
    whole = [name for name, given, tensor in both if tensor.is_floating_point() and _is_whole(given)]
    if wrong or turned or whole:
        faults = {"of the wrong shape": wrong, "complex on one side only": turned, "of integers": whole}
        raise _misfit(module, path, faults)
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:  # some layers check more, such as their version
        raise InputError(f"{path} does not fit {type(module).__name__}: {describe(error)}") from error
    if missing or unexpected:
        raise _misfit(module, path, {"missing": missing, "unexpected": unexpected})


def _unwrap(state: dict[str, Tensor], module: nn.Module) -> None:
    """Take from the names what DataParallel ("module."), torch.compile or a trainer's own module put before them.

    That is what most of the module's own names stand behind.
    """
    own = module.state_dict().keys()
    starts = ((name, dot.end()) for name in state for dot in re.finditer(r"\.", name))
    behind = Counter(name[:start] for name, start in starts if name[start:] in own)
    behind[""] = len(own & state.keys())
    ((prefix, count),) = behind.most_common(1)
    clash = any(name.removeprefix(prefix) in state for name in state if name.startswith(prefix))
    if prefix and 2 * count > len(own) and not clash:
        consume_prefix_in_state_dict_if_present(state, prefix)


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def build_with(build: Callable[[int | None], nn.Module], state: dict[str, Tensor], path: Path) -> nn.Module:
    """`build(None)`, or `build(num_classes)` where the state's last layer has other classes, loaded.

    That layer is linear, or in SqueezeNet and others a convolution.
    """
    net = build(None)
    _unwrap(state, net)
    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if layers:
        name, layer = layers[-1]
        shape, own = _shape(state.get(f"{name}.weight")), _shape(layer.weight)
        if shape and own and shape[1:] == own[1:] and shape != own:
            net = build(shape[0])
    load_into(net, state, path)
    return net


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look
                raise ValueError(f"{damaged} is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here is refused anyway
        return torch.load(path, map_location="cpu", weights_only=True)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _misfit(module: nn.Module, path: Path, faults: dict[str, list[str]]) -> InputError:
    parts = [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} {fault}"
        for fault, names in faults.items()
        if names
    ]
    return InputError(
        f"{path} does not fit {type(module).__name__}: {'; '.join(parts)}; give the state dict of this network"
    )
