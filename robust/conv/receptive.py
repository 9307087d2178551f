"""The receptive field of every layer of a network: which pixels the cells of its output see.

One image goes through the network as it is, whatever Python its forward is made of, and with every tensor on its way
go the fields of its rows and columns, which each function of torch changes by its rule in `robust.conv.fields`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robust.conv.fields import Axes, Axis, Call, Field, believed_axes, changed, has_window, output_axes, tensors
from robust.conv.geometry import Pair
from robust.errors import InputError
from robust.models.prepare import frozen
from robust.models.probe import device_of


def receptive_fields(module: nn.Module, size: tuple[int, int, int]) -> dict[str, tuple[Field, Field]]:
    """Layer -> fields of its output's (rows, columns), in the order in which they run, for images of `size` (C, H, W).

    Layers are the submodules by name ("layer1.0.conv1"; "layer1.0" is what the block as a whole returns) and the
    functions called between them ("layer1.0.add"); of one that runs again, the name gets "_1", "_2" ... The network is
    run once, in eval mode, on a black image.

    InputError names the layer that calls a function whose rule is not known. A module without submodules that is not
    torch's own, but says its `kernel_size`, `stride`, `padding` and `dilation`, or its `output_size`, is believed.
    """
    parameter = next(module.parameters(), torch.empty(0))
    watch = _Watch(size[1:])
    image = torch.zeros(1, *size, dtype=parameter.dtype, device=device_of(module))
    watched = watch.over(image, (Axis(2, Field(size[1])), Axis(3, Field(size[2]))))
    with frozen(module), torch.no_grad(), watch.hooks(module):
        module(watched)
    return watch.fields


class _Watched(Tensor):
    """A tensor that was computed from the image."""

    axes: Axes
    watch: "_Watch"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        name = func.__name__.strip("_")  # add, for add_ and __add__ too
        if name == "get":  # a property
            name = func.__self__.__name__  # type: ignore[attr-defined]
        outputs = list(tensors(result))
        if outputs or name == "setitem":  # else a size, a device ...
            with torch._C.DisableTorchFunctionSubclass():
                if name.startswith("new_") or name.endswith("_like"):
                    return result.as_subclass(Tensor)  # has an image's shape, but nothing of its pixels
                inputs = [tensor for tensor in tensors((args, kwargs)) if isinstance(tensor, cls)]
                inputs[0].watch.follow(name, func, args, kwargs or {}, inputs, outputs)
        return result


def _is_part(tensor: Tensor) -> bool:
    """Whether there is a larger tensor behind it, or one of another shape."""
    return tensor._base is not None and tensor._base.shape != tensor.shape


def _is_believed(part: nn.Module, inputs: list[_Watched]) -> bool:
    """Whether what a module says of its window is taken: not where a second input tells the window where to look."""
    return len(inputs) == 1 and has_window(part)


class _Watch:
    """One run of a network."""

    def __init__(self, size: Pair):
        self.size = size
        self.fields: dict[str, tuple[Field, Field]] = {}
        self.running: list[tuple[str, nn.Module, list[_Watched]]] = []  # modules within each other, and their inputs

    def over(self, tensor: Tensor, axes: Axes) -> _Watched:
        watched = tensor.as_subclass(_Watched)
        watched.axes, watched.watch = axes, self
        return watched

    @contextmanager
    def hooks(self, module: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        for name, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(partial(self.enter, name), with_kwargs=True))
            handles.append(part.register_forward_hook(self.leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, name: str, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        inputs = [tensor for tensor in tensors((args, kwargs)) if isinstance(tensor, _Watched)]
        self.running.append((name, part, inputs))
        if not _is_believed(part, inputs):
            return None
        with torch._C.DisableTorchFunctionSubclass():
            return changed((args, kwargs), lambda tensor: tensor.as_subclass(Tensor))

    def leave(self, part: nn.Module, args: tuple, output: Any) -> Any:
        layer = self.layer
        name, _, inputs = self.running.pop()
        if _is_believed(part, inputs) and isinstance(output, Tensor):
            call = Call("", part, (), {}, list(inputs), [x.axes for x in inputs], [output], self.size, layer)
            output = self.over(output, believed_axes(part, call))
        if inputs and not all(isinstance(tensor, _Watched) for tensor in tensors(output)):
            raise InputError(f"{layer}: what it returns was not computed by functions of torch")
        if isinstance(output, _Watched) and name:
            self.record(name, output.axes)
        return output

    def follow(
        self, name: str, func: Callable, args: tuple, kwargs: dict, inputs: list[_Watched], outputs: list[Any]
    ) -> None:
        """Give the outputs of a function their axes."""
        axes = [x.axes for x in inputs]
        call = Call(name, func, args, kwargs, list(inputs), axes, outputs, self.size, self.layer)
        for output, found in zip(outputs, output_axes(call), strict=True):
            written = next((k for k, x in enumerate(inputs) if x is output), None)  # in place
            if written is not None and found != axes[written] and _is_part(output):
                raise InputError(f"{self.layer}: {name} writes into a part of a tensor, whose other parts see less")
            output.axes, output.watch = found, self
        within, part, _ = self.running[-1]
        if len(outputs) == 1 and (not within or any(part.children())):
            self.record(f"{within}.{name}" if within else name, outputs[0].axes)

    def record(self, name: str, axes: Axes) -> None:
        again = (f"{name}_{i}" for i in range(1, len(self.fields) + 1))
        unique = next(candidate for candidate in (name, *again) if candidate not in self.fields)
        self.fields[unique] = (axes[0].field, axes[1].field)

    @property
    def layer(self) -> str:
        """What is running, in words."""
        name, part, _ = self.running[-1]
        return f"layer {name} ({type(part).__name__})" if name else type(part).__name__
