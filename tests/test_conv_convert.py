import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import robust
from attacks.generators import seeded
from robust import cli
from robust.conv import im2col
from robust.conv.convert import FUSED, LEFT, REPLACED, NotConverted, convert
from robust.conv.frozen import FrozenConv2d
from robust.data import load_data
from robust.evaluate import evaluate
from robust.models import load_model
from toys import conv_net, images

NETWORKS = [
    "resnet18", "resnet50", "vgg11_bn", "densenet121", "googlenet", "mobilenet_v2", "efficientnet_b0", "convnext_tiny",
    "inception_v3", "timm:resnet18d", "timm:tf_efficientnet_lite0", "timm:densenet121", "timm:seresnet50",
    "timm:mobilenetv3_small_100",
]  # fmt: skip


def network(name: str, seed: int = 0) -> nn.Module:
    """With batch-norm statistics that are not trivial, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith("timm:"):
            net = timm.create_model(name[5:], pretrained=False)
        else:
            # Their auxiliary heads serve training only.
            heads = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
            net = torchvision.models.get_model(name, weights=None, **heads)
            if name.startswith("vgg"):  # nine tenths of the parameters, of a layer like any other
                net.classifier = nn.Sequential(nn.Linear(512 * 49, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 1000))
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, 0, 0.1)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.1)
    return net.double().eval()


def agree(net: nn.Module, converted: nn.Module, x: torch.Tensor) -> None:
    """Logits, with gradients and without, and input gradient, by a random cotangent, up to float64's rounding."""
    results = []
    for module in (net, converted):
        with torch.no_grad():
            unwatched = module(x)
        query = x.clone().requires_grad_()
        y = module(query)
        g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad(y, query, g)
        results.append((unwatched, y.detach(), gradient))
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_compute_the_same(name):
    net = network(name)
    x = images(2, (3, 80, 80) if "inception" in name else (3, 40, 48)).double()
    converted = convert(net, x, strict=True, check=False)  # what it would check is seen here
    assert not converted.missed and not converted.faults
    agree(net, converted.module, x)


def test_resnet50_layer_by_layer():
    """53 convolutions, 1 max pooling, 1 average pooling, 1 linear layer; all else is fused."""
    converted = convert(network("resnet50"), torch.zeros(1, 3, 32, 32).double())
    fates = {layer.name: (layer.fate, layer.reason) for layer in converted.layers}
    assert converted.summary() == "126 layers: 56 replaced, 70 fused, 0 left"
    assert fates["conv1"] == (REPLACED, "by Conv2d")
    assert fates["layer3.2.bn2"] == (FUSED, "into layer3.2.conv2")
    # The residual is added by the convolution that comes last: the downsampling one, where there is one.
    assert fates["layer1.0.relu"][0] == FUSED and fates["maxpool"] == (REPLACED, "by MaxPool2d")
    frozen = [part for part in converted.module.modules() if isinstance(part, FrozenConv2d)]
    assert len(frozen) == 53
    assert sum(part.relu for part in frozen) == 49  # the four that downsample have none but in the residual's sum


def test_without_an_example_residuals_are_not_fused():
    net, x = network("resnet18"), images(2, (3, 40, 40)).double()
    with_x, without = convert(net, x), convert(net)
    assert "8 left" not in without.summary() and len(with_x.layers) == len(without.layers)
    agree(net, without.module, x)


def test_the_network_is_left_as_it_was():
    net = conv_net()
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    text, x = str(net), images(2)
    converted = convert(net, x)
    assert str(net) == text and net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not converted.module.training and not any(p.requires_grad for p in converted.module.parameters())
    agree(net.eval().double(), convert(net.double(), x.double()).module, x.double())


class Untraceable(nn.Module):
    """The code wants to know a value."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y if y.sum() > 1e9 else y.relu()


def test_a_part_that_cannot_be_traced_is_replaced_inside():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Untraceable(), nn.Flatten(), nn.Linear(4 * 36, 2))
    net, x = net.double().eval(), images(2, (3, 8, 8)).double()
    converted = convert(net, x)
    assert list(converted.faults) == ["2"] and "control flow" in converted.faults["2"] and not converted.missed
    with pytest.raises(NotConverted, match=r"^2 cannot be traced: .*control flow"):
        convert(net, x, strict=True)
    assert {layer.name: layer.fate for layer in converted.layers} == {
        "0": REPLACED, "1": FUSED, "2.conv": REPLACED, "2.norm": REPLACED, "3": LEFT, "4": REPLACED
    }  # fmt: skip
    agree(net, converted.module, x)


def test_a_network_that_cannot_be_traced_at_all():
    net, x = Untraceable().double().eval(), images(2, (3, 8, 8)).double()
    converted = convert(net, x)
    assert list(converted.faults) == [""] and not converted.missed
    agree(net, converted.module, x)
    with pytest.raises(NotConverted, match=r"^the network cannot be traced: "):
        convert(net, x, strict=True)


class Calls(nn.Module):
    """Functions in the place of layers."""

    def __init__(self, hidden: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
        self.hidden = hidden

    def forward(self, x):
        if self.hidden and x.sum() < -1e9:  # cannot be traced
            return x
        y = F.max_pool2d(F.relu(F.conv2d(x, self.weight, padding=1)), 2)
        return F.adaptive_avg_pool2d(F.avg_pool2d(y, 2), 1).flatten(1)


def test_functions_are_replaced():
    net, x = Calls().double(), images(2, (3, 8, 8)).double()
    converted = convert(net, x, strict=True)
    assert [(layer.kind, layer.fate) for layer in converted.layers] == [
        ("conv2d", REPLACED), ("max_pool2d", REPLACED), ("avg_pool2d", REPLACED), ("adaptive_avg_pool2d", REPLACED)
    ]  # fmt: skip
    agree(net, converted.module, x)


def test_what_torch_computes_all_the_same_is_seen():
    net, x = nn.Sequential(nn.ReLU(), Calls(hidden=True)), images(2, (3, 8, 8))
    converted = convert(net, x)
    assert {(layer.name, layer.kind) for layer in converted.missed} >= {("1", "convolution")}
    with pytest.raises(NotConverted, match=r"1 \(convolution: called by code .*1 cannot be traced: .*control flow"):
        convert(net, x, strict=True)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, 2 * self.weight, self.bias)


@pytest.mark.parametrize(
    "layer, reason",
    [
        (Scaled(3, 3, 1), "Scaled is a Conv2d that may compute something else"),
        (nn.ConvTranspose2d(3, 3, 1), "no ConvTranspose2d here"),
        (nn.AdaptiveMaxPool2d(2), "no AdaptiveMaxPool2d here"),
        (nn.LPPool2d(2, 2), "no LPPool2d here"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_is_none_of_ours_is_named(layer, reason):
    net, x = nn.Sequential(nn.Conv2d(3, 3, 1), layer).double(), images(2, (3, 8, 8)).double()
    (missed, *_) = convert(net, x).missed
    assert (missed.name, missed.fate, missed.reason) == ("1", LEFT, reason)
    with pytest.raises(NotConverted, match=rf"^torch would still compute 1 \({missed.kind}: {reason}\)"):
        convert(net, x, strict=True)
    agree(net, convert(net, x).module, x)


def test_hooks_are_not_thrown_away():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert [layer.reason for layer in convert(net).missed] == ["it has hooks, or a forward of its own"]


def test_a_layer_called_twice_is_not_fused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x))))

    net, x = Twice().double().eval(), images(2).double()
    nn.init.uniform_(net.norm.running_mean)
    converted = convert(net, x, strict=True)
    assert converted.summary() == "2 layers: 2 replaced, 0 fused, 0 left"
    agree(net, converted.module, x)


def test_a_sum_that_broadcasts_is_not_a_residual():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 12)

        def forward(self, x):
            return F.relu(self.conv(x) + self.gate(x))

    net, x = Broadcast().double(), images(2).double()
    agree(net, convert(net, x, strict=True).module, x)


class Coded(nn.Module):
    """Layers, and a forward of one's own."""

    def __init__(self, code, hidden=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.hidden = hidden or Untraceable(3)
        nn.init.uniform_(self.norm.running_mean)
        self.code = code

    def forward(self, x):
        return self.code(self, x)


def _and_then(statement, result):
    return result


CODES = {
    "a view, as LeNet has it": lambda m, x: m.pool(F.relu(m.conv(x))).view(x.size(0), -1),
    "an activation in place, behind a pool": lambda m, x: m.relu(m.pool(m.conv(x))),
    "a convolution read twice": lambda m, x: m.norm(y := m.conv(x)) + y,
    "its weight read too": lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1),
    "a sum with a factor": lambda m, x: torch.add(m.conv(x), x, alpha=2),
    "a statement in place, before what cannot be traced": lambda m, x: _and_then((y := m.conv(x)).add_(1), m.hidden(y)),
    "an activation as a statement": lambda m, x: _and_then(m.relu(y := m.conv(x)), m.hidden(y)),
    "a linear function": lambda m, x: F.linear(m.conv(x).flatten(1), torch.ones(4, 432, dtype=x.dtype)),
    "arguments by name": lambda m, x: F.avg_pool2d(input=m.conv(x), kernel_size=2),
    "a branch on what is traced": lambda m, x: m.conv(x) * (1 if isinstance(x, torch.Tensor) else 2),
}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_whatever_the_code_does(code):
    net, x = Coded(code).double().eval(), images(2).double()
    converted = convert(net, x)
    assert not converted.missed
    agree(net, converted.module, x)


def test_tracing_that_changes_what_is_computed_is_given_up():
    net, x = Coded(CODES["a branch on what is traced"]).double().eval(), images(2).double()
    converted = convert(net, x)
    assert converted.faults[""].startswith("traced and fused, it computes something else: its output is off by 1")
    assert not converted.missed


def test_padding_by_name_in_a_function_is_left():
    net, x = Coded(lambda m, x: F.conv2d(x, m.conv.weight, padding="same")).double().eval(), images(2).double()
    with pytest.raises(NotConverted, match="convolution: called by code"):
        convert(net, x, strict=True)
    agree(net, convert(net, x).module, x)


@pytest.mark.parametrize(
    "chance",
    [lambda x: x + torch.rand_like(x), lambda x: x.flip(3) if torch.rand(1) < 0.5 else x,
     lambda x: x * random.choice([1, 2]), lambda x: x + np.random.rand()],
)  # fmt: skip
def test_a_random_network_stays_random(chance):
    """Tracing would run Python's part of it once and for all."""
    net, x = Coded(lambda m, x: m.conv(chance(x))), images(2)
    converted = convert(net, x)
    assert converted.faults[""] == "it draws random numbers"
    assert len({float(converted.module(x).sum()) for _ in range(20)}) > 1
    for seed in range(5):
        with seeded(seed):
            expected = net(x)
        with seeded(seed):
            torch.testing.assert_close(converted.module(x), expected)


def test_code_that_asks_whether_gradients_are_wanted_is_not_traced():
    net, x = Coded(lambda m, x: m.conv(x if torch.is_grad_enabled() else (x * 4).round() / 4)), images(2)
    converted = convert(net, x)
    assert "output without gradients is off by" in converted.faults[""]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(converted.module(x), net(x))


def test_a_parametrised_layer_is_missed():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), weight_norm(nn.Linear(400, 3)))
    with pytest.raises(NotConverted, match=r"torch would still compute 2 \(ParametrizedLinear"):
        convert(net, images(2), strict=True)


def test_a_wrong_gradient_alone_is_seen(monkeypatch):
    """A planted fault that no output shows: an attack would walk the wrong way, and the network look robust."""
    pack = im2col.pack_input_grad
    monkeypatch.setattr(im2col, "pack_input_grad", lambda *given: [-tensor for tensor in pack(*given)])
    # An odd number of convolutions: two of these would come out right.
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)), images(4)
    with pytest.raises(NotConverted, match="its input gradient is off by 2"):
        convert(net, x)
    monkeypatch.setattr("robust.conv.convert._difference", lambda *given, **options: None)
    with pytest.raises(robust.InputError, match=r"input gradient points elsewhere \(cosine -1\)"):
        robust.run(net, [(x, net(x).argmax(1))], attacks="pgd", eps=0.1, conv="scratch")


def test_a_norm_without_running_statistics_is_not_folded():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).double()
    x = images(2).double()
    converted = convert(net, x, strict=True)
    assert converted.summary() == "2 layers: 2 replaced, 0 fused, 0 left"
    agree(net.eval(), converted.module, x)


def test_strict_needs_an_example():
    with pytest.raises(ValueError, match="strict needs x"):
        convert(conv_net(), strict=True)


def test_a_layer_by_two_names():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    net, x = nn.Sequential(conv, nn.ReLU(), conv).double(), images(2).double()
    converted = convert(net, x, strict=True)
    assert not any(isinstance(part, nn.Conv2d) for part in converted.module.modules())
    agree(net, converted.module, x)


def test_the_copy_is_its_own():
    net, x = conv_net().double(), images(2).double()
    module, expected = convert(net, x).module, net(x)
    state = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    assert torch.equal(net(x), expected)  # the original is not written to
    packed = module(x)
    for part in module.modules():
        if isinstance(part, FrozenConv2d):
            part._pack()
    assert torch.equal(module(x), packed)  # and the packed weights are the loaded ones


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_of_another_dtype_are_refused(dtype):
    module = convert(nn.Conv2d(4, 4, 3, groups=4)).module
    with pytest.raises(ValueError, match=rf"the weight is torch.float32 on cpu, and x is {dtype} on cpu"):
        module(images(2, (4, 5, 5)).to(dtype))


def test_a_bare_layer():
    net, x = nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect").double(), images(2).double()
    converted = convert(net, x, strict=True)
    assert [(layer.name, layer.fate) for layer in converted.layers] == [("", REPLACED)]
    agree(net, converted.module, x)


@pytest.mark.parametrize("algorithm", ["im2col", "direct", "toeplitz"])
def test_every_algorithm_carries_a_network(algorithm):
    net, x = conv_net().double(), images(2, (3, 7, 7)).double()
    converted = convert(net, x, algorithm=algorithm, strict=True)
    assert {part.chosen for part in converted.module.modules() if isinstance(part, FrozenConv2d)} == {algorithm}
    agree(net, converted.module, x)


def test_another_dtype_is_packed_anew():
    net, x = conv_net(), images(2)
    module = convert(net, x).module.double()
    module(x.double())
    with pytest.raises(ValueError, match="winograd2 loses too much accuracy"):
        convert(nn.Conv2d(8, 8, 3), algorithm="winograd2").module.half()


def test_compiles_whole():
    net, x = conv_net().double(), images(2).double()
    compiled = torch.compile(convert(net, x).module, fullgraph=True, backend="aot_eager")
    agree(net, compiled, x)


def batch_of(n):
    """Images, and what conv_net says of them, for them to be right to begin with."""
    x = images(n)
    return x, conv_net()(x).argmax(1)


@pytest.fixture
def batch():
    return batch_of(12)


def test_a_run_reaches_the_same_verdicts(batch):
    options = {"attacks": ["pgd"], "eps": [2 / 255, 8 / 255], "steps": 5}
    torchs, ours = (robust.run(conv_net(), [batch], conv=conv, **options) for conv in ("torch", "scratch"))
    columns = ["sample_id", "label", "clean_pred", "eps", "success", "robust", "adv_pred"]
    assert ours.samples[columns].equals(torchs.samples[columns])
    assert 0 < ours.summary.robust_accuracy.iloc[-1] < 1  # else nothing would be said
    source = "a module in memory; on the project's own convolution (8 layers: 4 replaced, 4 fused, 0 left)"
    assert ours.store.identity["model"]["source"] == source


def test_a_run_refuses_what_it_cannot_replace(batch):
    net = nn.Sequential(Scaled(3, 3, 1), conv_net())
    with pytest.raises(
        robust.InputError, match=r"cannot run on the project's convolution: .* 0 \(Scaled: .*use conv torch$"
    ):
        robust.run(net, [batch], attacks="pgd", eps=0.1, conv="scratch")


def test_a_run_refuses_what_comes_out_different(batch, monkeypatch):
    """A planted fault in every layer; and one in fusing, without which it goes."""
    with monkeypatch.context() as patch:
        patch.setattr("robust.conv.frozen.scale_and_shift", lambda norm: (torch.ones(()), torch.zeros(())))
        assert convert(conv_net(), batch[0]).faults[""].startswith("traced and fused, it computes something else")
    packed = im2col._packed
    monkeypatch.setattr(im2col, "_packed", lambda weight, groups: packed(weight.roll(1, 3), groups))
    with pytest.raises(robust.InputError, match=r"on the project's layers the network computes something else"):
        robust.run(conv_net(), [batch], attacks="pgd", eps=0.1, conv="scratch")


def test_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text("from toys import conv_net as make")
    x, y = batch_of(12)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    line = "--model net.py:make --data data.npz --attack fgsm --eps 1/255 --quiet --output run --conv"
    monkeypatch.chdir(tmp_path)
    for conv, code in (("scrach", 2), ("scratch", 0)):
        monkeypatch.setattr("sys.argv", ["robust.evaluate", *line.split(), conv])
        with pytest.raises(SystemExit) as ended:
            cli.main(evaluate)
        assert ended.value.code == code
    assert "own convolution (8 layers: 4 replaced, 4 fused, 0 left)" in (tmp_path / "run/report.html").read_text()


def test_the_bundled_network_on_photographs():
    """EfficientNet-Lite0: depthwise convolutions, padding that depends on the image, ReLU6; real weights."""
    model = load_model("efficientnet_lite0")
    x = torch.stack([sample.x for sample in load_data("samples", model, limit=4)])
    converted = convert(model.module, x[:1], strict=True)
    assert converted.summary() == "100 layers: 51 replaced, 49 fused, 0 left"
    gradients = []
    for module in (model.module, converted.module):
        query = x.clone().requires_grad_()
        logits = module(query)
        gradients.append(torch.autograd.grad(logits.logsumexp(1).sum(), query)[0])
        assert torch.equal(logits.argmax(1), model.module(x).argmax(1))
    torchs, ours = gradients
    # Where rounding takes a value over 0 or 6, ReLU6 passes another gradient: torch in float32 is as far from float64.
    assert (ours - torchs).norm() < 0.02 * torchs.norm()
    assert (ours.sign() == torchs.sign()).float().mean() > 0.999
