"""Every layer against torch's own in float64: values, gradients by a random cotangent, state, and bad input."""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import timm.layers
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from conv_cases import Called
from robust.conv import layers
from robust.conv.algorithm import algorithm
from robust.conv.frozen import FrozenConv2d
from robust.conv.geometry import Geometry
from robust.conv.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d

Function = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tied(*shape: int, seed: int = 0) -> Tensor:
    """Of few different values, so that many windows hold their maximum more than once."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def results(f: Function, x: Tensor) -> list[Tensor]:
    """The output, the gradient at the input, and those at the parameters if f is a module."""
    parameters = list(f.parameters()) if isinstance(f, nn.Module) else []
    x = x.detach().clone().requires_grad_()
    y = f(x)
    cotangent = normal(*y.shape, seed=1).to(y)
    return [y, *torch.autograd.grad(y, [x, *parameters], cotangent)]


def check(ours: Function, theirs: Function, x: Tensor, **tolerance: float) -> None:
    for found, expected in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Convolution


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1), "groups": 2},
        {"kernel_size": 5, "stride": 3, "padding": 2, "bias": False},
        {"kernel_size": 3, "groups": 4},
        {"kernel_size": (3, 5), "padding": "same"},
        {"kernel_size": (4, 2), "dilation": (1, 3), "padding": "same"},
        {"kernel_size": (2, 3), "stride": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
        {"kernel_size": (4, 3), "padding": "same", "padding_mode": "replicate"},
        {"kernel_size": 3, "stride": 2, "padding": (1, 3), "padding_mode": "circular"},
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's
def test_convolution(how: dict[str, Any]) -> None:
    theirs = nn.Conv2d(4, 8, **how).double()
    ours = layers.Conv2d(4, 8, **how).double()
    ours.load_state_dict(theirs.state_dict())
    for x in (normal(3, 4, 9, 7), channels_last(normal(3, 4, 9, 7)), normal(3, 4, 7, 18)[..., ::2].mT):
        check(ours, theirs, x)
    check(layers.Conv2d.from_torch(theirs), theirs, normal(2, 4, 9, 7))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)), kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 4), dilation=st.integers(1, 3),
)  # fmt: skip
def test_convolution_with_tensorflows_padding(size, kernel, stride, dilation):
    theirs = timm.layers.Conv2dSame(2, 3, kernel, stride, dilation=dilation).double()
    ours = layers.Conv2dSame.from_torch(theirs)
    x = normal(2, 2, *size)
    assert ours(x).shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
    check(ours, theirs, x)


def test_a_named_algorithm_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    conv2d = layers.conv2d
    monkeypatch.setattr(layers, "conv2d", lambda *arguments: asked.append(arguments[-1]) or conv2d(*arguments))
    theirs = nn.Conv2d(2, 3, 3).double()
    check(layers.Conv2d.from_torch(theirs, algorithm="toeplitz"), theirs, normal(1, 2, 5, 4))
    layers.Conv2d(2, 3, 3, algorithm="direct").double()(normal(1, 2, 3, 4))
    layers.Conv2d(2, 3, 3)(torch.zeros(1, 2, 3, 4))
    assert asked == ["toeplitz", "direct", "auto"]


# Pooling

EXTENT = st.integers(1, 4)
PADDING = st.integers(0, 3)
SIZE = st.tuples(st.integers(1, 11), st.integers(1, 11))


def pool(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], x: Tensor, *how: Any) -> None:
    """Both give the same, or both refuse."""
    try:
        expected = theirs(x, *how)
    except RuntimeError:
        with pytest.raises(ValueError):
            ours(x, *how)
        return
    assert ours(x, *how).shape == expected.shape
    check(lambda x: ours(x, *how), lambda x: theirs(x, *how), x)
    check(lambda x: ours(channels_last(x), *how), lambda x: theirs(x, *how), x)


@settings(max_examples=200, deadline=None)
@given(
    size=SIZE, kernel=st.tuples(EXTENT, EXTENT), stride=st.none() | st.tuples(EXTENT, EXTENT),
    padding=st.tuples(PADDING, PADDING), dilation=st.tuples(EXTENT, EXTENT), ceil=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_max_pooling(size, kernel, stride, padding, dilation, ceil, seed):
    x = tied(2, 3, *size, seed=seed)
    with suppress(RuntimeError):  # torch's gradient of a window without pixels goes out of bounds
        assume(F.max_pool2d(x, kernel, stride, padding, dilation, ceil).isfinite().all())
    pool(max_pool2d, F.max_pool2d, x, kernel, stride, padding, dilation, ceil)
    x[x == 2] = -torch.inf  # more than the padding has, of which there must be no trace
    pool(max_pool2d, F.max_pool2d, x, kernel, stride, padding, dilation, ceil)


@pytest.mark.parametrize("ceil", [False, True])
def test_max_pooling_by_the_kernel(ceil, monkeypatch):
    """On a GPU, or in Triton's interpreter."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := algorithm("triton").misfit(Geometry((1, 1)), torch.float32, device):
        pytest.skip(f"triton {reason}")
    monkeypatch.setattr("robust.conv.pooling._suits_gpu", lambda x, geometry: True)
    x = tied(2, 3, 7, 8).to(device, torch.float32)
    pool(max_pool2d, F.max_pool2d, x, (3, 2), 2, 1, 1, ceil)


@settings(max_examples=200, deadline=None)
@given(
    size=SIZE, kernel=st.tuples(EXTENT, EXTENT), stride=st.none() | st.tuples(EXTENT, EXTENT),
    padding=st.tuples(PADDING, PADDING), ceil=st.booleans(), count_padding=st.booleans(),
    divisor=st.none() | st.sampled_from([1, 7, -2]),
)  # fmt: skip
def test_average_pooling(size, kernel, stride, padding, ceil, count_padding, divisor):
    x = normal(2, 3, *size)
    pool(avg_pool2d, F.avg_pool2d, x, kernel, stride, padding, ceil, count_padding, divisor)


@settings(max_examples=100, deadline=None)
@given(size=SIZE, rows=st.integers(1, 13), columns=st.none() | st.integers(1, 13))
def test_adaptive_average_pooling(size, rows, columns):
    x = normal(2, 3, *size)
    check(lambda x: adaptive_avg_pool2d(x, (rows, columns)), nn.AdaptiveAvgPool2d((rows, columns)), x)
    check(lambda x: adaptive_avg_pool2d(x, (columns, rows)), nn.AdaptiveAvgPool2d((columns, rows)), x)
    check(lambda x: adaptive_avg_pool2d(channels_last(x), rows), nn.AdaptiveAvgPool2d(rows), x)
    assert adaptive_avg_pool2d(x, (0, columns)).shape == F.adaptive_avg_pool2d(x, (0, columns)).shape


def test_a_window_between_the_pixels_is_empty() -> None:
    y, grad = results(lambda x: max_pool2d(x, 2, 1, 1, 2), normal(1, 1, 1, 1))
    assert y.item() == -torch.inf and grad.item() == 0


def test_nan_is_the_maximum_of_its_windows() -> None:
    x = normal(1, 2, 6, 6)
    x[0, 0, 2, 3] = x[0, 1, 5, 5] = torch.nan
    assert F.max_pool2d(x, 3, 1, 1).isnan().sum() == 9 + 4
    torch.testing.assert_close(max_pool2d(x, 3, 1, 1), F.max_pool2d(x, 3, 1, 1), equal_nan=True)
    y, grad = results(lambda x: max_pool2d(x, 2), x)
    windows = y.isnan().nonzero().tolist()
    assert windows == [[0, 0, 1, 1], [0, 1, 2, 2]]
    # No gradient is lost or invented: each window's goes to one of its pixels, here to the first.
    torch.testing.assert_close(avg_pool2d(grad, 2) * 4, normal(*y.shape, seed=1))
    for n, c, p, q in windows:
        assert grad[n, c, 2 * p, 2 * q] != 0


def test_the_first_of_equal_values_gets_the_gradient_even_if_it_is_infinite() -> None:
    x = torch.tensor([[[[0.0, 3.0, 1.0], [3.0, 2.0, 3.0], [0.0, 3.0, 0.0]]]], requires_grad=True)
    (grad,) = torch.autograd.grad(max_pool2d(x, 3), x, torch.tensor([[[[torch.inf]]]]))
    assert grad.flatten().tolist() == [0, torch.inf, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """So that the result is the exact one, rounded once; twice where adaptive windows are uneven, in float32 first."""
    x = (1 + normal(2, 3, 28, 15)).to(dtype)
    for ours, theirs in (
        (lambda x: avg_pool2d(x, 7, 2, 3), lambda x: F.avg_pool2d(x, 7, 2, 3)),
        (lambda x: adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, 1)),
        (lambda x: adaptive_avg_pool2d(x, (5, 4)), lambda x: F.adaptive_avg_pool2d(x, (5, 4))),
    ):
        found, expected = ours(x), theirs(x.double())
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)
    x = tied(2, 3, 9, 9).to(dtype).requires_grad_()
    y = max_pool2d(x, 5, 1, 2)
    cotangent = normal(*y.shape).to(dtype)
    exact = x.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(y, x, cotangent)
    (expected,) = torch.autograd.grad(F.max_pool2d(exact, 5, 1, 2), exact, cotangent.double())
    assert y.dtype == found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    "module",
    [
        layers.MaxPool2d(3, 2, 1),
        layers.AvgPool2d(2),
        layers.AdaptiveAvgPool2d((3, None)),
        layers.AdaptiveAvgPool2d((4, 2)),
    ],
)
def test_pooling_of_single_images_empty_batches_and_other_memory(module: nn.Module) -> None:
    x = normal(4, 3, 8, 10)
    expected = module(x)
    assert torch.equal(module(x[1]), expected[1])
    assert module(x[:0]).shape == expected[:0].shape
    assert torch.equal(module(x.mT.contiguous().mT), expected)
    assert torch.equal(module(x[::2]), expected[::2])
    assert module(channels_last(x)).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module(channels_last(x)), expected)


# Batch-norm


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_train_mode_then_in_eval_mode(momentum: float | None, affine: bool) -> None:
    theirs = nn.BatchNorm2d(3, eps=1e-3, momentum=momentum, affine=affine).double()
    ours = layers.BatchNorm2d(3, eps=1e-3, momentum=momentum, affine=affine).double()
    if affine:
        nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    for seed in range(3):
        check(ours, theirs, channels_last(3 + 2 * normal(4, 3, 5, 6, seed=seed)))
    ours(normal(0, 3, 5, 6)), theirs(normal(0, 3, 5, 6))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    check(ours.eval(), theirs.eval(), normal(4, 3, 5, 6))
    check(ours.eval(), theirs.eval(), normal(1, 3, 1, 1))
    check(ours.eval(), theirs.eval(), normal(0, 3, 2, 2))
    assert torch.equal(ours.num_batches_tracked, torch.tensor(4))


def test_batch_norm_without_running_statistics_uses_the_batch_in_eval_mode_too() -> None:
    theirs = nn.BatchNorm2d(3, track_running_stats=False).double()
    ours = layers.BatchNorm2d.from_torch(theirs)
    for mode in (True, False):
        check(ours.train(mode), theirs.train(mode), normal(4, 3, 5, 6))


def test_a_batch_norm_shares_its_statistics_with_the_one_it_was_made_from() -> None:
    theirs = nn.BatchNorm2d(3).double()
    ours = layers.BatchNorm2d.from_torch(theirs)
    twin = copy.deepcopy(theirs)
    ours(normal(4, 3, 5, 6)), twin(normal(4, 3, 5, 6))
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], tensor)
    theirs.track_running_stats = False  # from now on they are used, and not changed
    before, frozen = theirs.running_mean.clone(), layers.BatchNorm2d.from_torch(theirs)
    frozen(normal(4, 3, 5, 6))
    assert torch.equal(theirs.running_mean, before)
    check(frozen.eval(), theirs.eval(), normal(4, 3, 5, 6))


def test_batch_norm_without_a_bias() -> None:
    theirs = nn.BatchNorm2d(3).double()
    theirs.bias = None
    check(layers.BatchNorm2d.from_torch(theirs), theirs, normal(4, 3, 5, 6))


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_batch_norm_of_half_precision(parameters: torch.dtype) -> None:
    x = (5 + normal(8, 3, 9, 9)).bfloat16()
    ours, theirs = (kind(3).to(parameters) for kind in (layers.BatchNorm2d, nn.BatchNorm2d))
    exact = nn.BatchNorm2d(3).double()
    for mode in (True, False):
        found, expected = ours.train(mode)(x), theirs.train(mode)(x)
        reference = exact.train(mode)(x.double())
        assert found.dtype == expected.dtype == torch.bfloat16
        assert (found - reference).norm() <= 2 * (expected - reference).norm()


def test_batch_norm_with_its_activation() -> None:
    theirs = timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU).double()
    ours = layers.BatchNormAct2d.from_torch(theirs)
    for mode in (True, False):
        check(ours.train(mode), theirs.train(mode), normal(4, 3, 5, 6))


# Linear and ReLU


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    theirs = nn.Linear(5, 3, bias=bias).double()
    ours = layers.Linear(5, 3, bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    for x in (normal(4, 5), normal(5), normal(2, 3, 5), normal(0, 5), normal(5, 4).t()):
        check(ours, theirs, x)


@pytest.mark.parametrize("inplace", [True, False])
def test_relu(inplace: bool) -> None:
    values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1e-300, 2.0, torch.inf, torch.nan], dtype=torch.float64)
    ours = layers.ReLU.from_torch(nn.ReLU(inplace))
    y, grad = results(lambda x: ours(x * 1), values)
    torch.testing.assert_close(y, F.relu(values), equal_nan=True)
    assert (grad != 0).tolist() == [False] * 4 + [True] * 4
    x = values.clone()
    assert (ours(x) is x) == inplace


# What all have in common


def pairs() -> list[tuple[nn.Module, nn.Module]]:
    """A layer of torch's or timm's, and its twin."""
    makers: list[tuple[Any, nn.Module]] = [
        (layers.Conv2d, nn.Conv2d(4, 6, 3, groups=2)),
        (layers.Conv2d, nn.Conv2d(4, 6, 3, bias=False, padding="same", padding_mode="reflect")),
        (layers.Conv2dSame, timm.layers.Conv2dSame(4, 6, 3)),
        (layers.BatchNorm2d, nn.BatchNorm2d(3)),
        (layers.BatchNorm2d, nn.BatchNorm2d(3, affine=False, track_running_stats=False)),
        (layers.BatchNormAct2d, timm.layers.BatchNormAct2d(3)),
        (layers.MaxPool2d, nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        (layers.AvgPool2d, nn.AvgPool2d(3, 2, 1, True, False, 5)),
        (layers.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d((None, 3))),
        (layers.Linear, nn.Linear(4, 3)),
        (layers.Linear, nn.Linear(4, 3, bias=False)),
        (layers.ReLU, nn.ReLU(inplace=True)),
    ]
    return [(theirs, kind.from_torch(theirs.eval())) for kind, theirs in makers]


@pytest.mark.parametrize(("theirs", "ours"), pairs(), ids=lambda layer: str(layer).partition("(")[0])
def test_from_torch_shares_every_tensor_the_mode_and_what_the_layer_says_of_itself(theirs, ours) -> None:
    tensors = theirs.state_dict(keep_vars=True)
    assert list(ours.state_dict()) == list(tensors)
    for name, tensor in ours.state_dict(keep_vars=True).items():
        assert tensor is tensors[name]
    assert not ours.training and type(ours).from_torch(theirs.train()).training
    for name, value in vars(theirs).items():
        if not name.startswith("_") and hasattr(ours, name) and name != "training":
            assert getattr(ours, name) == value
    assert type(ours).__name__ in str(ours) and str(ours) == str(copy.deepcopy(ours))


@pytest.mark.parametrize(
    ("kind", "theirs", "arguments"),
    [
        (layers.Conv2d, nn.Conv2d, (4, 6, 3)), (layers.Linear, nn.Linear, (7, 5)),
        (layers.BatchNorm2d, nn.BatchNorm2d, (3,)),
    ],
)  # fmt: skip
def test_the_initial_values_are_torchs(kind, theirs, arguments) -> None:
    states = []
    for make in (kind, theirs):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            states.append(make(*arguments).state_dict())
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor)


def weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Conv2d(2, 2, 1))


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def image(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(*shape, **how)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.Conv2d(4, 6, 3, groups=3), "groups 3 must divide in_channels 4 and out_channels 6"),
        (lambda: layers.Conv2d(4, 6, 3, groups=0), "groups 0 must divide"),
        (lambda: layers.Conv2d(4, 6, (3, 3, 3)), r"kernel_size must be one or two .* not \(3, 3, 3\)"),
        (lambda: layers.Conv2d(4, 6, 3, stride=0), "stride must be one or two whole numbers from 1 on, not 0"),
        (lambda: layers.Conv2d(4, 6, 3, padding=-1), "padding must be one or two whole numbers from 0 on, not -1"),
        (lambda: layers.Conv2d(4, 6, 3, padding="full"), "padding must be numbers, 'same' or 'valid', not 'full'"),
        (lambda: layers.Conv2d(4, 6, 3, 2, padding="same"), r"padding 'same' needs stride \(1, 1\), not \(2, 2\)"),
        (lambda: layers.Conv2d(4, 6, 3, padding_mode="mirror"), "padding_mode must be one of .* not 'mirror'"),
        (lambda: layers.Conv2d(4, 6, 3)(image(2, 3, 9, 9)), r"x \(2, 3, 9, 9\) has 3 channels.*weight \(6, 4, 3, 3\)"),
        (lambda: layers.Conv2d(4, 6, 3)(image(2, 4, 9, 2)), r"x \(2, 4, 9, 2\) .* smaller than the window"),
        (lambda: layers.Conv2d(4, 6, 3)(image(2, 4, 9, 9).double()), "weight is torch.float32 .* x is torch.float64"),
        (lambda: layers.Conv2d(4, 6, 3, algorithm="fft")(image(2, 4, 9, 9)), "algorithm 'fft' is none of"),
        (lambda: layers.BatchNorm2d(3)(image(2, 4, 5, 5)), r"x must be \(N, 3, H, W\).* not \(2, 4, 5, 5\)"),
        (lambda: layers.BatchNorm2d(3)(image(3, 5, 5)), r"x must be \(N, 3, H, W\).* not \(3, 5, 5\)"),
        (lambda: layers.BatchNorm2d(3)(image(1, 3, 1, 1)), r"\(1, 3, 1, 1\) has one value a channel"),
        (lambda: layers.BatchNorm2d(3)(image(2, 3, 5, 5).double()), "weight is torch.float32 .* x is torch.float64"),
        (lambda: layers.BatchNorm2d(3)(image(2, 3, 5, 5, device="meta")), "weight is .* on cpu, and x is .* on meta"),
        (
            lambda: layers.Linear(5, 3)(image(2, 4)),
            r"x of shape \(2, 4\) must end in the 5 features of weight \(3, 5\)",
        ),
        (lambda: layers.Linear(5, 3)(image(2, 5).double()), "weight is torch.float32 on cpu, and x is torch.float64"),
        (lambda: layers.Linear(5, 3)(image(2, 5, device="meta")), "weight is .* on cpu, and x is .* on meta"),
        (
            lambda: layers.MaxPool2d(3)(image(2, 3, 5, 2)),
            r"kernel_size \(3, 3\).* x of shape \(2, 3, 5, 2\).* \(1, 0\)",
        ),
        (
            lambda: layers.MaxPool2d(3, padding=2)(image(2, 3, 5, 5)),
            r"padding \(2, 2\) .* half of kernel_size \(3, 3\)",
        ),
        (lambda: layers.MaxPool2d(3)(image(5, 5)), r"x must be \(N, C, H, W\) or \(C, H, W\).* not \(5, 5\)"),
        (lambda: layers.MaxPool2d(3)(image(2, 3, 5, 5).long()), "x must have a floating-point dtype, not torch.int64"),
        (lambda: layers.MaxPool2d(3, 1.5)(image(2, 3, 5, 5)), "stride must be one or two whole numbers from 1 on"),
        (lambda: layers.AvgPool2d(3)(image(2, 0, 5, 5)), r"C, H, W of at least 1, not \(2, 0, 5, 5\)"),
        (lambda: layers.AvgPool2d(3, divisor_override=0)(image(2, 3, 5, 5)), "divisor_override is 0"),
        (lambda: layers.AdaptiveAvgPool2d(-1)(image(2, 3, 5, 5)), "output_size must be .* not -1"),
        (lambda: layers.AdaptiveAvgPool2d((1, 2, 3))(image(2, 3, 5, 5)), r"output_size must be .* not \(1, 2, 3\)"),
        (lambda: layers.Conv2d.from_torch(Doubled(2, 2, 1)), "module must be a torch.nn.*Conv2d .* not .*Doubled"),
        (lambda: layers.Conv2d.from_torch(timm.layers.Conv2dSame(2, 2, 1)), "not timm.*Conv2dSame"),
        (lambda: layers.Conv2dSame.from_torch(nn.Conv2d(2, 2, 1)), "module must be a timm.*Conv2dSame"),
        (lambda: layers.BatchNorm2d.from_torch(timm.layers.BatchNormAct2d(3)), "not timm.*BatchNormAct2d"),
        (lambda: layers.BatchNormAct2d.from_torch(nn.BatchNorm2d(3)), "module must be a timm.*BatchNormAct2d"),
        (lambda: layers.Conv2d.from_torch(weight_norm()), "parameters and buffers .*'weight_g', 'weight_v'"),
        (lambda: layers.MaxPool2d.from_torch(nn.MaxPool2d(2, return_indices=True)), "return_indices"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            layers.Conv2d(3, 8, 3, padding="same"), layers.BatchNorm2d(8), layers.ReLU(), layers.MaxPool2d(3, 2, 1),
            layers.Conv2dSame(8, 4, 2, 3), layers.AvgPool2d(2, 1, 1, count_include_pad=False),
            layers.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), layers.Linear(24, 5),
        ).double()  # fmt: skip


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (4, 2), (5, 3), (3, 1)])
def test_frozen_with_tensorflows_padding_on_images_of_any_size(kernel: int, stride: int, groups: int) -> None:
    """Its weights are packed once, while the padding changes with the image."""
    conv = layers.Conv2dSame(8, 4, kernel, stride, groups=groups).double()
    frozen = FrozenConv2d(conv)
    for size in [(6, 7), (9, 8), (8, 9), (12, 12), (11, 9), (13, 5)]:
        check(lambda x: frozen(x), lambda x: conv(x), normal(2, 8, *size))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch 2.11's own compiler
def test_a_network_of_them_compiles_into_one_graph() -> None:
    net = network()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    check(lambda x: compiled(x), lambda x: net(x), normal(2, 3, 12, 10))
    for found, expected in zip(
        results(compiled, normal(2, 3, 12, 10)), results(net, normal(2, 3, 12, 10)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_none_of_torchs_own_layers_is_behind_them() -> None:
    """What torch's layers call in this place is named, lest the words be ones that never come up."""

    def called(net: nn.Module) -> set[str]:
        with Called() as mode:
            results(net, normal(2, 3, 12, 10))
        return {name for name in mode.names if any(word in name for word in ("convolution", "pool", "batch_norm"))}

    ours = network()
    theirs = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1),
        nn.AdaptiveAvgPool2d((2, 3)),
    ).double()  # fmt: skip
    assert called(ours) == set()
    assert len(called(theirs)) == 10
