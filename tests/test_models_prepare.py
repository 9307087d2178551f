"""The fast twin says what the model says, or is not used; and the model never notices."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from attacks.backward import gradient_of_rows
from robust.models.cpu import lanes
from robust.models.frozen_linear import LARGE, FrozenLinear
from robust.models.prepare import _suits_channels_last, fast_twin, frozen, judging_format
from robust.models.thin_conv import ThinConv2d
from toys import conv_net


def seeded(module: nn.Module) -> nn.Module:
    """In eval mode, with batch-norm statistics unlike the identity they begin as."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_var", "running_mean")):
            tensor += 0.5 * torch.rand(tensor.shape, generator=generator)
    return module.eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["AVX2", "AVX512"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the CPU, as far as we ask."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    monkeypatch.setitem(LARGE, 16, 2**16)  # smaller layers will do
    return request.param


def images(side: int = 32, n: int = 4, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def logits_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    query = x.clone().requires_grad_()
    logits = module(query)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), query)
    return logits.detach(), gradient


class Head(nn.Module):
    """Global average pooling and a linear layer, from 8 channels to 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Head())


class Functional(nn.Module):
    """Layers called in another order than they were made in, control flow on values, an odd output shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.head = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3, bias=False), Head()

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 2:  # no symbolic tracer gets past this
            x = x / 255
        return self.head(torch.relu(self.norm(self.conv(x))))


class PreActivation(nn.Module):
    """The shortcut reads the convolution too, so that its batch-norm must stay; the second one may go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        return self.head(out + self.norm2(self.conv2(self.norm1(out).relu())))


class Recurrent(nn.Module):
    """One convolution used twice, with a batch-norm for each time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), Head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv(self.stem(x))).relu()
        return self.head(self.norm2(self.conv(x)).relu())


class Positioned(nn.Module):
    """What one of its convolutions reads is no image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.places = plain(), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.ones(1, 2, *x.shape[2:])
        return self.layers(x + self.places(places))


class Standardised(nn.Conv2d):
    """Scaling its weights changes nothing, so no batch-norm can be folded into it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def standardised() -> nn.Module:
    return nn.Sequential(Standardised(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Head())


def without_statistics() -> nn.Module:
    """In eval mode too it normalises by the batch."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), Head())


def tied() -> nn.Module:
    """Two convolutions share one weight."""
    first, second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    second.weight = first.weight
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU(), Head()
    )


def timms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer=nn.SiLU), Head())


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (plain, 0),
        (Functional, 0),
        (timms, 0),
        (tied, 0),
        (Positioned, 0),
        (PreActivation, 1),
        (Recurrent, 2),
        (standardised, 1),
        (without_statistics, 1),
        (lambda: timm.create_model("test_efficientnet"), 0),
        (lambda: timm.create_model("tf_efficientnet_lite0"), 0),  # the bundled one, with Conv2dSame
        (lambda: torchvision.models.resnet18(weights=None), 0),
        (lambda: torchvision.models.shufflenet_v2_x0_5(weights=None), 0),
    ],
)
def test_batch_norms_are_folded_where_that_changes_nothing(make: Callable[[], nn.Module], left: int) -> None:
    module, x = seeded(make()), images()
    twin, description, _ = fast_twin(module, x)
    assert norms(twin) == left
    assert ("batch-norm folded" in description) == (norms(module) > left) and description.endswith("channels_last")
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    for ours, theirs in zip(logits_and_gradient(twin, x), logits_and_gradient(module, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("make", "on_cpu", "on_gpu"),
    [
        (lambda: nn.Conv2d(3, 8, 3), True, True),
        (lambda: nn.Conv2d(1, 8, 3), True, True),  # one channel in one group
        (lambda: nn.Conv2d(8, 8, 3, groups=4), True, True),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8)), True, False),
        (lambda: nn.Linear(3, 8), False, False),
    ],
)
def test_which_networks_go_to_channels_last(make: Callable[[], nn.Module], on_cpu: bool, on_gpu: bool) -> None:
    found = [_suits_channels_last(make(), torch.device(device)) for device in ("cpu", "cuda")]
    assert found == [on_cpu, on_gpu]


class Viewing(nn.Sequential):
    """Which flattens by `view`, as many do; with the channels last in memory that cannot be."""

    def forward(self, x: Tensor) -> Tensor:
        conv, linear = self
        return linear(conv(x).view(len(x), -1))


class Addressing(nn.Sequential):
    """Which takes it for granted how images lie in memory, as custom operations may."""

    def forward(self, x: Tensor) -> Tensor:
        (layers,) = self
        return layers(x.as_strided(x.shape, torch.empty(x.shape).stride()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    ("make", "last"),
    [
        (plain, True),
        (lambda: torchvision.models.resnet18(weights=None), True),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), False),
        (lambda: Viewing(nn.Conv2d(3, 8, 3, stride=2), nn.Linear(1800, 10)), False),
        (lambda: Addressing(plain()), False),
        (lambda: torch.jit.script(plain()), False),
        (lambda: torch.compile(plain(), backend="eager"), False),
    ],
)  # fmt: skip
def test_how_images_lie_in_memory_for_the_model_itself(make: Callable[[], nn.Module], last: bool) -> None:
    module, x = seeded(make()), images()
    with torch.no_grad():
        logits = module(x)
    assert judging_format(module, x, logits) == (torch.channels_last if last else torch.contiguous_format)
    assert judging_format(module, x, -logits) == torch.contiguous_format


def test_the_model_is_left_exactly_as_it_was() -> None:
    module = seeded(PreActivation())
    module.conv2.train()
    module.norm1.bias.requires_grad_(False)
    module.head.linear.weight.grad = torch.ones(5, 8)
    before = copy.deepcopy(module)
    tensors = {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    twin, description, _ = fast_twin(module, images())
    assert "folded" in description and twin is not module
    assert tensors == {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    assert str(module) == str(before)
    assert [part.training for part in module.modules()] == [part.training for part in before.modules()]
    for ours, theirs in zip(module.parameters(), before.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad
        assert ours.stride() == theirs.stride()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name])
    assert not any(part._forward_hooks for part in module.modules())
    assert torch.equal(module.head.linear.weight.grad, torch.ones(5, 8))


def test_a_model_with_hooks_is_not_folded_and_keeps_them() -> None:
    module = seeded(plain())
    module[1].register_forward_hook(lambda part, inputs, output: output * 2)
    twin, description, _ = fast_twin(module, images())
    assert (description, norms(twin)) == ("channels_last", 1)
    torch.testing.assert_close(twin(images()), module(images()))
    assert len(module[1]._forward_hooks) == 1


def test_a_network_whose_train_returns_nothing_has_a_twin_as_others() -> None:
    class Own(nn.Sequential):
        def train(self, mode: bool = True) -> None:
            super().train(mode)

    module = plain()
    assert fast_twin(Own(*module.children()), images()).description == fast_twin(module, images()).description


def test_where_folding_fails_a_plain_copy_is_taken() -> None:
    class Asks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self[1].weight.mean()  # of the batch-norm, which must be there

    module = seeded(Asks(*plain().children()))
    twin, description, _ = fast_twin(module, images())
    assert description.startswith("frozen copy: AttributeError") and norms(twin) == 1
    assert twin is not module and not any(parameter.requires_grad for parameter in twin.parameters())


class Alone(nn.Sequential):
    def __deepcopy__(self, memo: object) -> "Alone":
        raise TypeError("there can be only one")


class Random(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.5 * torch.randn_like(x))


class Forgetful(nn.Sequential):
    """Whose copies have other weights."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        return seeded(plain())


class Single(nn.Sequential):
    """Whose copies are itself, and would be folded in its place."""

    def __deepcopy__(self, memo: object) -> "Single":
        return self


class Lender(nn.Sequential):
    """Whose copies hold its own layers."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        return nn.Sequential(*self.children())


class Infinite(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x - x).abs().sqrt().sum((1, 2, 3))[:, None]


class Detached(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Alone, "TypeError: there can be only one"),
        (Random, "a copy's logits are off by"),
        (Forgetful, "a copy's logits are off by"),
        (Single, "ValueError: its copy shares parts with it"),
        (Lender, "ValueError: its copy shares parts with it"),
        (Infinite, "the input gradient is not finite"),
        (Detached, "RuntimeError"),
    ],
)
def test_the_model_itself_is_the_last_resort(kind: type[nn.Sequential], reason: str) -> None:
    module = kind(*plain().children()).eval()
    layers = [type(part) for part in module]
    twin, description, _ = fast_twin(module, images())
    assert twin is module and [type(part) for part in module] == layers
    assert description.startswith(f"the model itself: {reason}")
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_an_image_classified_differently_is_noticed() -> None:
    """Two classes a millionth of the scale apart, that the twin swaps: the tolerance alone would let it pass."""

    class Swapped(nn.Module):
        def __init__(self, first: float = 1e-4) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.tensor([first, 0.0, -40.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.first + 0 * x.mean((1, 2, 3))[:, None]

        def __deepcopy__(self, memo: object) -> "Swapped":
            return Swapped(-1e-4)

    module = Swapped().eval()
    assert fast_twin(module, images()) == (module, "the model itself: a copy classifies some images differently", False)


def test_frozen_restores_every_part_even_after_an_error() -> None:
    module = plain().train()
    module[1].eval()
    module[0].bias.requires_grad_(False)
    training = [part.training for part in module.modules()]
    required = [parameter.requires_grad for parameter in module.parameters()]
    with pytest.raises(KeyError), frozen(module) as inside:
        assert inside is module
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        raise KeyError
    assert [part.training for part in module.modules()] == training
    assert [parameter.requires_grad for parameter in module.parameters()] == required


def test_frozen_restores_buffers_that_a_pass_writes_into() -> None:
    module = plain().eval()
    before = [buffer.clone() for buffer in module.buffers()]
    with frozen(module):
        module[1].train()  # as code may do that keeps to the statistics of each batch
        module(images())
        assert not all(map(torch.equal, before, module.buffers()))
    assert all(map(torch.equal, before, module.buffers())) and not module[1].training


def test_frozen_leaves_a_buffer_that_has_grown() -> None:
    module = plain()
    buffer = next(module.buffers())
    with frozen(module):
        buffer.data = torch.ones(len(buffer) + 1)  # as a cache does for larger images
    assert torch.equal(buffer, torch.ones(len(buffer)))


def test_frozen_leaves_a_buffer_whose_values_are_one() -> None:
    module = plain()
    module.register_buffer("unknown", torch.full((1,), torch.nan).expand(3))
    with frozen(module):
        assert module(images()).isfinite().all()


# Gradients by blocks


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 4) | st.integers(5, 16), kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.integers(1, 4),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), size=st.tuples(st.integers(7, 17), st.integers(7, 17)),
    bias=st.booleans(),
)  # fmt: skip
def test_thin_convolution_equals_torchs(channels, kernel, stride, padding, size, bias):
    if channels > 4:  # whole strides only
        stride = max(stride, 2)
        kernel = tuple(max(k // stride, 1) * stride for k in kernel)
    conv = nn.Conv2d(channels, 5, kernel, stride, padding, bias=bias).double()
    assert ThinConv2d.suits(conv) == (channels <= lanes())
    x = torch.rand(2, channels, *size, dtype=torch.float64, requires_grad=True)
    expected, ours = conv(x), ThinConv2d(conv)(x)
    torch.testing.assert_close(ours, expected)
    cotangent = torch.randn_like(expected)
    (reference,) = torch.autograd.grad(expected, x, cotangent)
    (gradient,) = torch.autograd.grad(ours, x, cotangent)
    torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(17, 8, 4, stride=2),
        nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 3, dilation=2),
        nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 8, 3, stride=(1, 2)), nn.Linear(3, 3),
    ],
)  # fmt: skip
def test_other_convolutions_are_left_alone(conv):
    assert not ThinConv2d.suits(conv)


def test_blocks_fill_the_registers_that_there_are(capability):
    suits = [ThinConv2d.suits(nn.Conv2d(channels, 8, 4, stride=2)) for channels in (3, 8, 9, 16, 17)]
    assert suits == [True, True, *[capability == "AVX512"] * 2, False]


def test_the_twin_has_the_gradient_of_the_model():
    model, x = conv_net(), images(12, 6)
    twin, description, _ = fast_twin(model, x)
    assert "input gradients by blocks" in description and any(isinstance(m, ThinConv2d) for m in twin.modules())
    gradients = []
    for net in (model, twin):
        query = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(net(query).logsumexp(1).sum(), query)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(300,), (7, 300), (2, 5, 300), (0, 300)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_layer_is_the_layer(shape, bias, capability):
    linear = nn.Linear(300, 250, bias)
    frozen_linear = FrozenLinear(linear)
    assert frozen_linear.by_onednn == (capability == "AVX512") and FrozenLinear.suits(linear)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    # Also of memory that is not in order, such as what a transposed product leaves.
    for query in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        query = query.clone(memory_format=torch.preserve_format).requires_grad_()
        out = frozen_linear(query)
        torch.testing.assert_close(out, linear(query), atol=1e-5, rtol=1e-5)
        weights = torch.linspace(-1, 1, 250).expand(out.shape)  # a gradient that is a view
        (gradient,) = torch.autograd.grad(out, query, weights)
        torch.testing.assert_close(gradient, weights @ linear.weight.detach(), atol=1e-5, rtol=1e-5)


def test_a_frozen_linear_layer_is_differentiable_once(capability):
    query, slopes = torch.rand(5, 300, requires_grad=True), torch.rand(5, 250, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(FrozenLinear(nn.Linear(300, 250))(query), query, slopes, create_graph=True)


@pytest.mark.parametrize("shape", [(5, 3, 10, 10), (5, 12, 5, 5), (5, 300, 1, 1), (1, 300), (0, 3, 10, 10)])
@pytest.mark.parametrize("permuted", [True, False])
def test_a_frozen_linear_layer_that_flattens_reads_images_however_they_lie(shape, permuted, capability):
    linear = nn.Linear(300, 250)
    flattening = FrozenLinear(linear, flattens=True)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    for query in (x, x * 2):
        if permuted and query.ndim == 4:
            query = query.to(memory_format=torch.channels_last)
        query = query.requires_grad_()
        out = flattening(query)
        torch.testing.assert_close(out, linear(query.flatten(1)), atol=1e-5, rtol=1e-5)
        weights = torch.linspace(-1, 1, 250).expand(out.shape)
        (gradient,) = torch.autograd.grad(out, query, weights)
        expected = (weights @ linear.weight.detach()).view(shape)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries have orders of their own")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 10), (300, 250), (1568, 100)])
def test_a_row_of_a_linear_layer_does_not_depend_on_how_many_there_are(inputs, outputs):
    """To the bit, and MKL's own do, whose order is another for few rows."""
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    ours = FrozenLinear(linear)
    x = torch.rand(64, inputs, generator=torch.Generator().manual_seed(2))
    slopes = torch.linspace(-1, 1, outputs).expand(64, outputs).contiguous()

    def told(n: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """With and without a graph; the gradients of all rows and of some."""
        query = x[:n].clone().requires_grad_()
        out = ours(query)
        gradients = [gradient_of_rows(out, query, torch.arange(some), slopes[:some]) for some in (1, n // 2 + 1, n)]
        return out.detach(), ours(x[:n]), [*torch.autograd.grad(out, query, slopes[:n]), *gradients]

    out, _, (gradient, *_) = told(64)
    for n in [*range(1, 20), 33, 64]:
        graphed, plain, gradients = told(n)
        assert torch.equal(graphed, out[:n]) and torch.equal(plain, out[:n])
        assert all(torch.equal(part, gradient[: len(part)]) for part in gradients)
    assert not torch.equal(linear(x[:1]), linear(x)[:1])


def test_without_convolutions_nothing_is_gained_by_the_order_of_memory():
    twin, description, _ = fast_twin(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval(), images(8))
    assert description == "frozen copy" and [type(layer) for layer in twin] == [nn.Flatten, FrozenLinear]


class Rows(nn.Flatten):
    """Which may do anything."""


@pytest.mark.parametrize(
    "middle",
    [
        [nn.Flatten(2), nn.Flatten()], [Rows()], [softmax := nn.Softmax(1), nn.Flatten(), softmax],
    ],
)  # fmt: skip
def test_only_a_linear_layer_right_behind_a_plain_flatten_reads_images(middle, capability):
    x, front = images(16), [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()]
    net = nn.Sequential(*front, *middle, nn.Linear(392, 200)).eval()
    twin, description, _ = fast_twin(net, x)
    flattens = type(middle[-1]) is nn.Flatten
    done = {"input gradients by blocks", "channels_last"}
    done |= {"flattening in the order of memory"} if flattens else set()
    done |= {"linear layers by oneDNN"} if capability == "AVX512" else set()
    assert set(description.split(", ")) == done
    assert getattr(twin[-1], "flattens", False) == flattens
    torch.testing.assert_close(twin(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", ["AVX512"], indirect=True)
def test_code_may_read_the_weights_of_a_layer_that_the_twin_replaced(capability):
    class Tied(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            flatten, linear = self
            return linear(flatten(x).to(linear.weight.dtype)) @ linear.weight.mT.mT + linear.bias.sum()

    tied = Tied(nn.Flatten(), nn.Linear(300, 300)).eval()
    twin, description, _ = fast_twin(tied, images(10))
    assert description == "linear layers by oneDNN"
    torch.testing.assert_close(twin(images(10)), tied(images(10)), rtol=1e-4, atol=1e-5)


def test_a_thin_convolution_of_nothing_has_a_gradient_of_nothing():
    x = torch.rand(0, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(ThinConv2d(nn.Conv2d(3, 5, 3, stride=2))(x).sum(), x)
    assert gradient.shape == x.shape


class Flattened(nn.Sequential):
    """An nn.Flatten whose output is no longer read by the linear layer behind it alone."""

    def forward(self, x: Tensor) -> Tensor:
        conv, relu, flatten, linear = self
        rows = flatten(relu(conv(x)))
        return linear(rows) + rows[:, :1]


def test_the_twin_reads_images_in_the_order_of_memory(monkeypatch, capability):
    x, made = images(16), []
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 200)).eval()
    other = Flattened(*copy.deepcopy(net)).eval()
    product = FrozenLinear.forward
    monkeypatch.setattr(FrozenLinear, "forward", lambda self, x: made.append(x.shape) or product(self, x))
    twin, _, _ = fast_twin(net, x)
    assert made and all(len(shape) == 4 for shape in made)
    assert list(twin[3].in_order) == [(8, 7, 7)]
    made.clear()
    fast_twin(other, x)
    assert made and all(len(shape) == 2 for shape in made)
    for module in (net, other):
        for ours, theirs in zip(
            logits_and_gradient(fast_twin(module, x)[0], x), logits_and_gradient(module, x), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", ["AVX512"], indirect=True)
@pytest.mark.parametrize("flatten", [nn.Flatten(), nn.Sequential(nn.Flatten())], ids=["of images", "of rows"])
def test_a_linear_layer_by_onednn_may_be_activated_in_place(flatten, capability):
    x = images(16)
    net = nn.Sequential(flatten, nn.Linear(768, 100), nn.ReLU(inplace=True), nn.Linear(100, 10)).eval()
    twin, description, _ = fast_twin(net, x)
    assert "linear layers by oneDNN" in description
    for ours, theirs in zip(logits_and_gradient(twin, x), logits_and_gradient(net, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "inputs"), [("AVX512", 192), ("AVX2", 2**22 // 400 + 1)], indirect=["capability"]
)
def test_large_linear_layers_go_to_onednn(capability, inputs):
    x = torch.rand(4, inputs)
    for width in (400, 300):
        net = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 10)).eval()
        twin, description, _ = fast_twin(net, x)
        assert description == ("linear layers by oneDNN" if width == 400 else "frozen copy")
        assert [layer.by_onednn for layer in (twin[0], twin[2])] == [width == 400, False]
        torch.testing.assert_close(twin(x), net(x), rtol=1e-4, atol=1e-5)
    assert not FrozenLinear.suits(nn.Linear(inputs, 400).double())
    largest, larger = (nn.utils.skip_init(nn.Linear, 2**12, 2**12 + more) for more in (0, 1))
    assert FrozenLinear.suits(largest) and not FrozenLinear.suits(larger)


class Detour(nn.Module):
    """Has a layer that ordinary images do not pass."""

    def __init__(self, detour: nn.Module) -> None:
        super().__init__()
        self.net, self.detour = plain(), detour

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.max() <= 1 else self.net[2:](self.detour(x))


@pytest.mark.parametrize(("detour", "folded"), [(nn.BatchNorm2d(3), 0), (nn.Conv2d(3, 8, 3), 0), (nn.ReLU(), 1)])
def test_nothing_is_folded_where_a_pass_leaves_layers_out(detour: nn.Module, folded: int) -> None:
    """Other images may go through them."""
    net = seeded(Detour(detour))
    twin, description, _ = fast_twin(net, images())
    assert norms(twin) == norms(net) - folded and ("folded" in description) == bool(folded)
