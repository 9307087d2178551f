"""Models by spec: every source, every way to give weights, and everything that a user can get wrong."""

import email.message
import hashlib
import http.client
import io
import re
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from data_files import pattern
from robust.data.images import pixels as prepared
from robust.errors import InputError
from robust.models import imagenet, list_models, load_model
from robust.models.download import from_hugging_face, from_torch_hub
from robust.models.model import Model, Preprocess, fingerprint
from robust.models.timm import as_model

SMALL = "shufflenet_v2_x0_5"  # of torchvision: 5 MB, and a linear classifier


def check_refused(*arguments: Any) -> str:
    """The message that `load_model` refuses the arguments with, which is always one line."""
    with pytest.raises(InputError) as caught:
        load_model(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def pixels(model: Model) -> Tensor:
    assert model.input_size is not None
    return torch.rand(2, *model.input_size, generator=torch.Generator().manual_seed(1))


def logits(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode; its batch-norms have seen a batch, without which a deep one answers alike whatever it is shown."""
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches, of which there is one
    if norms:
        net.train()(torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and empty download caches: nothing is downloaded, wherever the tests run."""

    def no_network(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    return tmp_path


def cache_for_torch(caches: Path, entry: Any, state: dict[str, Tensor]) -> Path:
    path = caches / "torch" / "checkpoints" / entry.url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


# Names


def test_importing_robust_models_does_not_import_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import robust.models, sys; sys.exit('torch' in sys.modules)"],
        check=True,
        cwd=Path(__file__).parents[1],
    )


def test_list_models_names_what_can_be_loaded() -> None:
    catalogue = list_models()
    assert set(catalogue) == {"bundled", "torchvision", "timm"}
    assert "efficientnet_lite0" in catalogue["bundled"]
    assert {"resnet50", "vit_b_16"} < set(catalogue["torchvision"])
    assert "fasterrcnn_resnet50_fpn" not in catalogue["torchvision"]  # a detector, not a classifier
    assert "convnext_tiny" in catalogue["timm"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnett50", "did you mean resnet50"),
        ("ResNet50", "did you mean resnet50"),
        ("efficientnet_lite", "did you mean efficientnet_lite0"),
        ("convnext_femto", "did you mean timm:convnext_femto"),
        ("qqqqqqqq", "known: efficientnet_lite0, mnist_cnn, mnist_cnn_robust, alexnet"),
        ("", "unknown model ''"),
        ("weights.pth", "a file of weights goes to --weights"),
        ("resnet50@IMAGENET1K_V3", "did you mean IMAGENET1K_V2 or IMAGENET1K_V1"),
        ("torchvision:resnet50@nonsense", "known: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("torchvision:resnet5", "did you mean resnet50"),
        ("fcn_resnet50", "--list-models lists all classifiers"),  # which it is none of
        ("torchvision:fcn_resnet50", "unknown torchvision classifier"),
        ("vgg16@IMAGENET1K_FEATURES", "unknown weights"),  # has no classifier
        ("timm:hf-hub:someone/resnet50", "hf-hub:someone/resnet50 is none of timm's own networks: write a function"),
        ("timm:convnext_tinyy", "did you mean convnext_tiny"),
        ("timm:test_vit.nonsense", "did you mean test_vit.r160_in1k"),
        ("timm:efficientnet_b6.nonsense", "unknown weights of timm efficientnet_b6"),
        ("timm:efficientnet_b6", "timm has no pretrained weights for efficientnet_b6"),
        ("bundled:resnet50", "known: efficientnet_lite0"),
        ("torchvison:resnet50", "torchvision:NAME"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known(spec: str, says: str) -> None:
    assert says in check_refused(spec)


@pytest.mark.parametrize("side", [0, -1])
def test_an_impossible_input_size_is_refused(side: int) -> None:
    assert f"not {side}" in check_refused("efficientnet_lite0", None, side)


def test_an_input_size_that_no_memory_holds_is_refused() -> None:
    message = check_refused("efficientnet_lite0", None, 10**8)
    assert message.startswith("the model fails on 3x100000000x100000000 images: RuntimeError")


def test_loading_leaves_the_random_numbers_as_they_were() -> None:
    state = torch.get_rng_state()
    load_model("efficientnet_lite0")
    assert torch.equal(torch.get_rng_state(), state)


# ImageNet


def test_class_names_and_wnids_are_in_the_same_order() -> None:
    """torchvision's names and WordNet's lemmas come from different places, and agree class by class."""
    lemmas = timm.data.ImageNetInfo().label_descriptions()
    differing = [
        name
        for name, lemma in zip(imagenet.class_names(), lemmas, strict=True)
        if name.lower() not in lemma.lower().split(", ")
    ]
    assert differing == ["crane bird", "maillot tank suit"]  # made unique by torchvision
    assert len(set(imagenet.class_names())) == len(set(imagenet.wnids())) == 1000
    assert (imagenet.class_names()[388], imagenet.wnids()[388]) == ("giant panda", "n02510455")


def accuracy(model: Model, files: list[Path], labels: list[int], crop: float) -> float:
    images = []
    for file in files:
        image = Image.open(file).convert("RGB")
        side = crop * min(image.size)
        x, y = ((length - side) / 2 for length in image.size)
        box = (x, y, x + side, y + side)
        images.append(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box), np.float32))
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    return (logits(model.module, batch).argmax(dim=1) == torch.tensor(labels)).float().mean().item()


def test_the_bundled_model_on_foolboxs_imagenet_images() -> None:
    model = load_model("efficientnet_lite0")
    spec = find_spec("foolbox")
    assert spec is not None and spec.submodule_search_locations
    files = sorted(Path(spec.submodule_search_locations[0], "data").glob("imagenet_*"))
    assert len(files) == 20
    assert accuracy(model, files, [int(re.split(r"[_.]", file.name)[2]) for file in files], crop=1) >= 0.8
    assert model.num_classes == 1000 and model.input_size == (3, 224, 224)
    assert model.preprocess == Preprocess(256, 224, "bicubic")
    assert model.class_names == imagenet.class_names() and model.wnids == imagenet.wnids()
    assert not any(part.training for part in model.module.modules())


def test_the_bundled_model_on_imagenet(shared: Path) -> None:
    """88 of these 100; 81 with ImageNet's usual mean and std, and 79 with timm's other padding."""
    folders = sorted((shared / "data" / "imagenet_sample").iterdir())[::5]
    files = [file for folder in folders for file in folder.iterdir()]
    labels = [imagenet.wnids().index(file.parent.name) for file in files]
    assert len(files) == 100
    assert accuracy(load_model("efficientnet_lite0"), files, labels, crop=224 / 256) >= 0.86


def test_the_bundled_model_takes_no_other_weights(tmp_path: Path) -> None:
    assert "timm:tf_efficientnet_lite0 --weights" in check_refused("efficientnet_lite0", tmp_path / "a.pth")


def test_the_fingerprint_tells_weights_apart_and_nothing_else(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.pth", "b.pth")):
        torch.save(trained(torchvision.models.get_model(SMALL), seed).state_dict(), tmp_path / name)
    first, again = (load_model(SMALL, tmp_path / "a.pth") for _ in range(2))
    other = load_model(SMALL, tmp_path / "b.pth")
    assert first.fingerprint == again.fingerprint != other.fingerprint


class Scaled(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def small_net(
    stride: int = 1, eps: float = 1e-5, scale: float = 1.0, activation: type[nn.Module] = nn.ReLU
) -> nn.Module:
    parts = nn.Conv2d(3, 4, 3, stride), nn.BatchNorm2d(4, eps), activation(), Scaled(scale)
    net = nn.Sequential(*parts)
    for tensor in net.state_dict().values():
        tensor.fill_(1)
    return net


def test_the_fingerprint_sees_what_no_weight_shows() -> None:
    nets = small_net(), small_net(stride=2), small_net(eps=1e-3), small_net(scale=2.0), small_net(activation=nn.ReLU6)
    assert len({fingerprint(net) for net in nets}) == len(nets)


def test_the_fingerprint_is_that_of_every_version_of_torch() -> None:
    """A baseline outlives the torch that it was made with."""
    assert fingerprint(small_net())[:16] == "05531a34cb290601"


# torchvision


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    torch.manual_seed(0)
    return trained(torchvision.models.resnet50(weights=None))


def expected_of_resnet50(resnet50: nn.Module, x: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return logits(resnet50, (x - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def test_resnet50_from_a_checkpoint_file_in_torchvisions_format(resnet50: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "resnet50.pth"
    torch.save(resnet50.state_dict(), file)
    model = load_model("resnet50", file)
    x = pixels(model)
    assert torch.equal(logits(model.module, x), expected_of_resnet50(resnet50, x))
    assert model.name == "resnet50" and model.source == f"torchvision resnet50, weights {file}"
    assert model.preprocess == Preprocess(232, 224, "bilinear")  # those of IMAGENET1K_V2, the default
    assert model.class_names == imagenet.class_names() and model.wnids == imagenet.wnids()


@pytest.mark.parametrize(
    ("spec", "entry", "resize"),
    [("resnet50", "IMAGENET1K_V2", 232), ("torchvision:resnet50@IMAGENET1K_V1", "IMAGENET1K_V1", 256)],
)
def test_resnet50_from_the_torch_cache(spec: str, entry: str, resize: int, resnet50: nn.Module, caches: Path) -> None:
    cache_for_torch(caches, torchvision.models.ResNet50_Weights[entry], resnet50.state_dict())
    model = load_model(spec)
    x = pixels(model)
    assert torch.equal(logits(model.module, x), expected_of_resnet50(resnet50, x))
    assert model.name == spec and model.source == f"torchvision resnet50, weights {entry}"
    assert model.preprocess == Preprocess(resize, 224, "bilinear")


@pytest.mark.parametrize("arch", ["googlenet", "densenet121", "mnasnet0_5"])
def test_published_checkpoints_of_awkward_networks_load_as_in_torchvision(arch: str, caches: Path) -> None:
    """GoogLeNet has auxiliary heads, DenseNet names of the past, MNASNet a version that must not get lost."""
    options: dict[str, Any] = {"aux_logits": True, "init_weights": False} if arch == "googlenet" else {}
    state = trained(torchvision.models.get_model(arch, weights=None, **options)).state_dict()
    if arch == "densenet121":
        old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): t for name, t in state.items()}
        state = OrderedDict((name, t) for name, t in old.items() if "num_batches" not in name)
    entry = torchvision.models.get_model_weights(arch).DEFAULT
    cache_for_torch(caches, entry, state)
    theirs = torchvision.models.get_model(arch, weights=entry).eval()
    model = load_model(arch)
    x = pixels(model)
    transform = entry.transforms()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    assert torch.equal(logits(model.module, x), logits(theirs, (x - mean) / std))


def test_where_the_download_is_impossible_the_three_ways_on_are_named(caches: Path) -> None:
    message = check_refused("resnet50")
    assert "with --weights" in message
    assert str(caches / "torch" / "checkpoints" / "resnet50-11ad3fa6.pth") in message
    assert "--model efficientnet_lite0" in message
    assert not [path for path in caches.rglob("*") if path.is_file()]


class Response(io.BytesIO):
    """What urlopen gives: some bytes, then perhaps an error."""

    def __init__(self, content: bytes, error: Exception | None = None) -> None:
        super().__init__(content)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        if not content and self.error:
            raise self.error
        return content

    def info(self) -> email.message.Message:
        return email.message.Message()


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (lambda: Response(b"<html>log in first</html>"), "invalid hash value"),
        (lambda: Response(b"half of", TimeoutError("timed out")), "timed out"),
        (lambda: Response(b"half of", http.client.IncompleteRead(b"half of", 7)), "IncompleteRead"),
    ],
)
def test_a_download_that_goes_wrong_leaves_no_file(
    response: Callable[[], Response], says: str, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: response())
    message = check_refused("resnet50")
    assert says in message and "with --weights" in message
    assert not [path for path in caches.rglob("*") if path.is_file()]
    assert socket.getdefaulttimeout() is None


def test_a_download_is_kept_in_the_torch_cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"https://example.org/net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    requests: list[Any] = []
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: requests.append(request) or Response(b"weights"))
    path = from_torch_hub(url)
    assert path.parent == caches / "torch" / "checkpoints" and path.read_bytes() == b"weights"
    assert from_torch_hub(url) == path
    assert len(requests) == 1


def test_a_corrupt_file_in_the_torch_cache_is_named(caches: Path) -> None:
    path = cache_for_torch(caches, torchvision.models.ResNet50_Weights.DEFAULT, {})
    path.write_bytes(b"cut off")
    assert str(path) in (message := check_refused("resnet50")) and "corrupt" in message


@pytest.mark.parametrize(("input_size", "resize"), [(None, 256), (224, 256), (96, 110)])
def test_input_size_scales_the_preprocessing(input_size: int | None, resize: int, tmp_path: Path) -> None:
    torch.save(trained(torchvision.models.get_model(SMALL)).state_dict(), tmp_path / "a.pth")
    model = load_model(SMALL, tmp_path / "a.pth", input_size)
    side = input_size or 224
    assert (model.input_size, model.preprocess) == ((3, side, side), Preprocess(resize, side))


# Weights from files


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return trained(torchvision.models.get_model(SMALL))


SaveAs = Callable[[dict[str, Tensor], Path], None]


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file(state, path)


def save_in(*keys: str, prefix: str = "", **beside: Any) -> SaveAs:
    """Saves {key: {"module.name": tensor, ...}, **beside}."""

    def save(state: dict[str, Tensor], path: Path) -> None:
        saved: Any = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        for key in keys:
            saved = {key: saved, **beside}
        torch.save(saved, path)

    return save


@pytest.mark.parametrize(
    ("filename", "save"),
    [
        ("a.pth", save_in()),
        ("a.pt", save_in("state_dict", epoch=3, optimizer={"lr": 0.1})),
        ("a.bin", save_in("model")),
        ("a.pth.tar", save_in("model_state_dict")),
        ("a.pth", save_in("net", acc=91.7, epoch=3)),
        ("a.pth", save_in("state_dict", prefix="module.", best=91.7)),
        ("a.pth", save_in(prefix="_orig_mod.")),
        ("a.ckpt", save_in("state_dict", prefix="model.", epoch=3)),
        ("a.ckpt", save_in("state_dict", prefix="model._orig_mod.module.")),
        ("a.safetensors", save_safetensors),
    ],
)
def test_weights_are_found_however_they_were_saved(
    filename: str, save: SaveAs, small: nn.Module, tmp_path: Path
) -> None:
    save(small.state_dict(), tmp_path / filename)
    model = load_model(SMALL, tmp_path / filename)
    for name, tensor in small.state_dict().items():
        assert torch.equal(model.module.state_dict()[f"1.{name}"], tensor)


@pytest.mark.parametrize(
    ("key", "average", "prefix"), [("state_dict", "state_dict_ema", ""), ("model", "model_ema", "module.")]
)
def test_two_sets_of_weights_are_refused(key: str, average: str, prefix: str, small: nn.Module, tmp_path: Path) -> None:
    """As timm and torchvision save them: the average is what they report, the first is what was found so far."""
    state = small.state_dict()
    averaged = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    averaged |= {"n_averaged": torch.tensor(3)} if prefix else {}
    torch.save({key: state, average: averaged, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    words = f"two sets of weights, {key} and {average}, .*: save the one that is meant"
    with pytest.raises(InputError, match=words):
        load_model(SMALL, tmp_path / "a.pth")
    torch.save(torch.load(tmp_path / "a.pth", weights_only=True)[average], tmp_path / "b.pth")  # as the error says
    loaded = load_model(SMALL, tmp_path / "b.pth").module.state_dict()
    assert all(torch.equal(loaded[f"1.{name}"], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("spec", [SMALL, "squeezenet1_1", "timm:test_efficientnet"])
def test_a_checkpoint_with_other_classes_makes_a_network_with_them(spec: str, tmp_path: Path) -> None:
    make = timm.create_model if spec.startswith("timm") else torchvision.models.get_model
    torch.save(trained(make(spec.removeprefix("timm:"), num_classes=7)).state_dict(), tmp_path / "a.pth")
    model = load_model(spec, tmp_path / "a.pth")
    assert logits(model.module, pixels(model)).shape == (2, 7)
    assert (model.num_classes, model.class_names, model.wnids) == (7, None, None)


class Pickled(nn.Linear):
    """A class that no reader knows."""


def write_unfit(kind: str, state: dict[str, Tensor], path: Path) -> None:
    match kind:
        case "missing":
            for name in list(state)[-5:]:
                del state[name]
            torch.save(state, path)
        case "unexpected":
            torch.save({**state, "head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}, path)
        case "beside":  # as a trainer's module that holds the network and a loss with weights
            wrapped = {f"model.module.{name}": tensor for name, tensor in state.items()}
            torch.save({"state_dict": {**wrapped, "loss.weight": torch.ones(3)}}, path)
        case "twice":
            torch.save({f"{prefix}{name}": tensor for prefix in ("", "ema.") for name, tensor in state.items()}, path)
        case "reshaped":
            torch.save({**state, "conv1.0.weight": torch.zeros(8, 3, 5, 5)}, path)
        case "pickled":
            torch.save(Pickled(2, 2), path)
        case "malicious":
            path.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
        case "numpy":
            torch.save({"state_dict": state, "accuracy": np.float64(91.7)}, path)
        case "torchscript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates it, but users have such files
                torch.jit.script(nn.Linear(2, 2)).save(str(path))
        case "list":
            torch.save(list(state.values()), path)
        case "damaged":
            torch.save(state, path)
            raw = bytearray(path.read_bytes())
            middle = len(raw) // 2
            raw[middle : middle + 64] = bytes(64)
            path.write_bytes(raw)
        case "newer protocol":
            torch.save(state, path, pickle_protocol=5)
        case "complex":
            torch.save({**state, "fc.bias": state["fc.bias"] * 1j}, path)
        case "numbered":
            torch.save(dict(enumerate(state.values())), path)
        case "empty":
            torch.save({}, path)
        case "truncated":
            torch.save(state, path)
            path.write_bytes(path.read_bytes()[:1000])
        case "text":
            path.write_text("hello")
        case "git-lfs":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        case "elsewhere":
            torch.save({"student": state, "epoch": 3}, path)
        case "nothing":
            path.write_bytes(b"")
        case "folder":
            path.mkdir()
        case "nan":
            torch.save({**state, "fc.bias": torch.full_like(state["fc.bias"], torch.nan)}, path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", ["and 1 more missing", "conv5.1.running_var"]),
        ("unexpected", ["head.weight, head.bias unexpected"]),
        ("beside", ["ShuffleNetV2: loss.weight unexpected;"]),
        ("twice", ["ema.conv1.0.weight", "unexpected"]),
        ("reshaped", ["conv1.0.weight (8, 3, 5, 5) instead of (24, 3, 3, 3)", "wrong shape"]),
        ("pickled", ["needs unpickling", "Pickled", "run code from the file", "safetensors"]),
        ("malicious", ["needs unpickling", "posix.system"]),
        ("numpy", ["needs unpickling", "numpy"]),
        ("torchscript", ["TorchScript"]),
        ("list", ["no state dict"]),
        ("numbered", ["no state dict"]),
        ("damaged", ["corrupt"]),
        ("newer protocol", ["its default pickle_protocol"]),
        ("complex", ["fc.bias complex on one side only"]),
        ("empty", ["no state dict"]),
        ("truncated", ["corrupt"]),
        ("text", ["corrupt", "begins with b'hello'"]),
        ("git-lfs", ["corrupt or no checkpoint (it begins with b'version https://git-lfs.github.com", "download"]),
        ("elsewhere", ["no state dict (names to tensors) but 'student', 'epoch': save"]),
        ("nothing", ["corrupt"]),
        ("folder", ["no file of weights"]),
        ("absent", ["no file of weights"]),
        ("nan", ["NaN"]),
    ],
)
def test_files_that_are_no_weights_for_the_model_are_refused(
    kind: str, says: list[str], small: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    write_unfit(kind, dict(small.state_dict()), path)
    message = check_refused(SMALL, path)
    for words in says:
        assert words in message
    if kind != "nan":
        assert str(path) in message


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_corrupt_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "corrupt" in check_refused(SMALL, tmp_path / "a.safetensors")


# timm


def cache_for_timm(caches: Path, name: str, content: bytes) -> None:
    folder = caches / "huggingface" / f"models--timm--{name}"
    for file, text in (("refs/main", b"0123"), ("snapshots/0123/model.safetensors", content)):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_bytes(text)


@pytest.mark.parametrize(
    "spec",
    [
        "timm:test_resnet",
        "timm:test_resnet.r160_in1k",
        "timm:timm/test_resnet",
        "timm:hf-hub:timm/test_resnet.r160_in1k",
    ],
)
def test_timm_from_the_hugging_face_cache_with_its_own_preprocessing(spec: str, caches: Path) -> None:
    net = trained(timm.create_model("test_resnet"))
    cache_for_timm(caches, "test_resnet.r160_in1k", safetensors.torch.save(net.state_dict()))
    model = load_model(spec)
    assert model.source == "timm test_resnet, weights r160_in1k"
    assert model.input_size == (3, 160, 160)
    assert model.preprocess == Preprocess(168, 160, "bilinear")  # crop_pct 0.95
    assert model.class_names == imagenet.class_names() and model.wnids == imagenet.wnids()
    x = pixels(model)
    assert torch.equal(logits(model.module, x), logits(net, (x - 0.5) / 0.5))


def of_timm(**config: Any) -> nn.Module:
    """A network that says of itself what timm's do."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.num_classes, net.pretrained_cfg = 3, {"crop_pct": 0.875, "interpolation": "bicubic"} | config  # type: ignore
    return net


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_images_are_prepared_as_timm_does(mode: str) -> None:
    net = of_timm(input_size=(3, 96, 96), crop_mode=mode, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    model = as_model("net", "timm", net, None)
    assert model.preprocess == Preprocess(109, 96, "bicubic", squash=mode == "squash")
    image = Image.fromarray(pattern(150, 200))
    theirs = create_transform(**resolve_data_config({}, model=net))(image)
    assert torch.equal(model.module[0](prepared(image, "image", model)), theirs)  # type: ignore


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"input_size": (3, 96, 96), "crop_mode": "border"}, "crop mode border"),
        ({"input_size": (3, 96, 128)}, "images of 96 x 128 pixels"),
    ],
)
def test_images_that_timm_prepares_otherwise_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        as_model("net", "timm", of_timm(**config), None)


def test_timm_from_a_file_of_weights(tmp_path: Path) -> None:
    net = trained(timm.create_model("test_vit"))
    safetensors.torch.save_file(net.state_dict(), tmp_path / "a.safetensors")
    model = load_model("timm:test_vit", tmp_path / "a.safetensors")
    x = pixels(model)
    assert torch.equal(logits(model.module, x), logits(net, (x - 0.5) / 0.5))


def test_an_input_size_that_the_network_does_not_take_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "a.pth")
    assert "fails on 3x128x128 images" in check_refused("timm:vit_tiny_patch16_224", tmp_path / "a.pth", 128)


@pytest.mark.parametrize(
    ("spec", "cache"),
    [
        ("timm:test_vit", "huggingface/models--timm--test_vit.r160_in1k"),
        ("timm:legacy_seresnet18", "torch/checkpoints/seresnet18-4bb0ce65.pth"),  # not on Hugging Face
    ],
)
def test_where_timms_download_is_impossible_it_is_tried_only_once(
    spec: str, cache: str, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # what the hub's client does between its attempts
    message = check_refused(spec)
    assert waits == []
    assert "with --weights" in message and "--model efficientnet_lite0" in message
    assert str(caches / cache) in message


def test_the_file_that_timms_repository_has_is_downloaded(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model_info(repository: str, timeout: float) -> object:
        files = [SimpleNamespace(rfilename=name) for name in ("README.md", "pytorch_model.bin")]
        return SimpleNamespace(siblings=files)

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments: "/".join(arguments))
    path = from_hugging_face("timm/net", ["model.safetensors", "pytorch_model.bin"])
    assert path == Path("timm/net/pytorch_model.bin")


def test_a_corrupt_file_in_the_hugging_face_cache_is_named(caches: Path) -> None:
    cache_for_timm(caches, "test_vit.r160_in1k", b"cut off")
    message = check_refused("timm:test_vit")
    assert "model.safetensors does not load" in message and "delete it" in message


def test_a_feature_extractor_of_timm_is_no_classifier(tmp_path: Path) -> None:
    net = timm.create_model("vit_pe_spatial_tiny_patch16_512")
    torch.save(net.state_dict(), tmp_path / "a.pth")
    assert "feature extractor" in check_refused("timm:vit_pe_spatial_tiny_patch16_512", tmp_path / "a.pth")


# A user's own network

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes net.py, which has a small network `Net(channels, classes)`, and gives the spec of its `make`."""

    def write(make: str, name: str = "net.py") -> str:
        source = """
            import torch
            from torch import nn

            class Net(nn.Module):
                def __init__(self, channels=3, classes=10):
                    super().__init__()
                    torch.manual_seed(0)
                    self.conv, self.linear = nn.Conv2d(channels, 4, 3), nn.Linear(4, classes)

                def forward(self, x):
                    return self.linear(self.conv(x).relu().mean((2, 3)))

            class Fixed(nn.Sequential):
                def __init__(self, channels, side, classes):
                    super().__init__(nn.AvgPool2d(side // 4), nn.Flatten(), nn.Linear(channels * 16, classes))
        """
        (tmp_path / name).write_text(textwrap.dedent(source) + textwrap.dedent(make))
        return f"{tmp_path / name}:make"

    return write


@pytest.mark.parametrize(
    ("make", "classes", "input_size"),
    [
        ("Net()", 10, (3, 32, 32)),
        ("Net(3, 100)", 100, (3, 32, 32)),
        ("Net(3, 43)", 43, None),
        ("Net(3, 1000)", 1000, (3, 224, 224)),
        ("Fixed(3, 32, 1000)", 1000, None),
        ("Fixed(3, 224, 1000)", 1000, (3, 224, 224)),
        ("Fixed(3, 224, 5)", 5, None),
        ("Net(1, 10)", 10, (1, 28, 28)),
        ("Fixed(1, 28, 47)", 47, (1, 28, 28)),
    ],
)
def test_a_network_gives_its_classes_and_usual_input_size_away(
    make: str, classes: int, input_size: tuple[int, int, int] | None, write: Write
) -> None:
    model = load_model(write(f"def make(): return {make}.eval()"))
    assert (model.num_classes, model.input_size) == (classes, input_size)
    is_imagenet = classes == 1000
    assert (model.class_names == imagenet.class_names()) is (model.wnids == imagenet.wnids()) is is_imagenet
    # A guess is no reason to resize the user's images, unless it is ImageNet's.
    assert model.preprocess == (Preprocess(256, 224) if input_size == (3, 224, 224) else None)
    assert not model.was_training


def test_a_module_may_declare_its_input_size_and_class_names(write: Write) -> None:
    spec = write("""
        def make():
            net = Fixed(3, 48, 3).eval()
            net.input_size, net.class_names = (3, 48, 48), ["a", "b", "c"]
            return net
    """)
    model = load_model(spec)
    assert (model.input_size, model.preprocess) == ((3, 48, 48), Preprocess(48, 48))
    assert (model.class_names, model.wnids) == (("a", "b", "c"), None)


def test_a_declared_size_that_is_not_square_is_not_resized_to(write: Write) -> None:
    model = load_model(write("def make():\n    net = Net()\n    net.input_size = (3, 20, 30)\n    return net"))
    assert (model.input_size, model.preprocess) == ((3, 20, 30), None)


@pytest.mark.parametrize(("channels", "classes", "side"), [(3, 10, 40), (1, 10, 40), (3, 1000, 224), (3, 1000, 140)])
def test_input_size_is_obeyed_with_the_networks_channels(channels: int, classes: int, side: int, write: Write) -> None:
    spec = write(f"def make(): return Net({channels}, {classes})")
    model = load_model(spec, None, side)
    assert (model.input_size, model.preprocess) == (
        (channels, side, side),
        Preprocess(side * 256 // 224 if classes == 1000 else side, side),  # with ImageNet's margin
    )
    assert side != 224 or model.preprocess == load_model(spec).preprocess, "its own size changes nothing"


def test_a_network_of_imagenet_may_name_its_classes(write: Write) -> None:
    """In torchvision's spelling or another: wnids and preprocessing are those of one that says nothing."""
    info = timm.data.ImageNetInfo()
    for names in (imagenet.class_names(), [info.index_to_description(k, detailed=False) for k in range(1000)]):
        named = load_model(write(f"def make():\n net = Net(3, 1000)\n net.class_names = {list(names)!r}\n return net"))
        assert (named.class_names, named.wnids, named.preprocess) == (
            tuple(names),
            imagenet.wnids(),
            Preprocess(256, 224),
        )
    other = [f"person {k}" for k in range(1000)][::-1]
    strange = load_model(write(f"def make():\n net = Net(3, 1000)\n net.class_names = {other!r}\n return net"))
    assert (strange.wnids, strange.preprocess) == (None, None)


@pytest.mark.parametrize(("cast", "dtype"), [("double", "float64"), ("half", "float16")])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_of_another_dtype_are_named(cast: str, dtype: str, channels: int, write: Write) -> None:
    """Images are float32; another size would not help."""
    says = rf"weights are {dtype} .* images, which are float32; call \.float\(\) .* x = x\.to\(torch\.{dtype}\)$"
    with pytest.raises(InputError, match=says):
        load_model(write(f"def make(): return Net({channels}).{cast}()"))


def test_a_module_in_train_mode_is_put_in_eval_mode_and_reported(write: Write) -> None:
    model = load_model(write("def make(): return Net()"))
    assert model.was_training
    assert not any(part.training for part in model.module.modules())


def test_a_file_may_import_its_siblings_even_late_and_sys_path_is_left_alone(tmp_path: Path, write: Write) -> None:
    (tmp_path / "robust_test_sibling.py").write_text("CLASSES = 6")
    path = list(sys.path)
    spec = write("def make():\n    from robust_test_sibling import CLASSES\n    return Net(3, CLASSES)")
    assert load_model(spec).num_classes == 6
    assert sys.path == path


def test_a_file_takes_no_other_modules_place(write: Write) -> None:
    json = sys.modules["json"]
    specs = [write("def make(): return Net(3, 4)", "json.py"), write("def make(): return Net(3, 5)", "json.v2.py")]
    assert [load_model(spec).num_classes for spec in specs] == [4, 5]
    assert sys.modules["json"] is json


def test_the_fingerprint_covers_the_source(write: Write) -> None:
    """forward() may change without any change of the weights."""
    first = load_model(write("def make(): return Net()", "a.py"))
    again = load_model(write("def make(): return Net()", "b.py"))
    other = load_model(write("def make(): return Net()  # ", "c.py"))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_module_by_its_dotted_name() -> None:
    model = load_model("torchvision.models:resnet18")
    assert (model.num_classes, model.input_size, model.was_training) == (1000, (3, 224, 224), True)
    assert model.preprocess == Preprocess(256, 224)


def test_weights_for_a_factory(tmp_path: Path, write: Write) -> None:
    spec = write("def make(): return Net()")
    state = {"conv.weight": torch.ones(4, 3, 3, 3), "conv.bias": torch.ones(4)}
    linear = {"linear.weight": torch.ones(10, 4), "linear.bias": torch.arange(10.0)}
    torch.save({**state, **linear}, tmp_path / "whole.pth")
    model = load_model(spec, tmp_path / "whole.pth")
    assert torch.equal(model.module.state_dict()["linear.bias"], torch.arange(10.0))
    torch.save(state, tmp_path / "part.pth")
    assert "does not fit Net: linear.weight, linear.bias missing" in check_refused(spec, tmp_path / "part.pth")
    torch.save({**state, **linear, "linear.weight": torch.ones(10, 4, dtype=torch.int64)}, tmp_path / "whole.pth")
    assert "does not fit Net: linear.weight of integers" in check_refused(spec, tmp_path / "whole.pth")


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = Path(write("def make(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))"))
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).state_dict(), tmp_path / "net.pth")
    assert str(tmp_path) in load_model(f"~/{spec.relative_to(tmp_path)}", Path("~/net.pth")).source


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ("def made(): return Net()", "unknown function in .*net.py 'make'; did you mean made"),
        ("def make(): 1 / 0", "net.py:make raised ZeroDivisionError: division by zero"),
        ("def make(): raise ValueError('two\\nlines')", "raised ValueError: two lines$"),
        ("def make(): raise SystemExit(3)", "raised SystemExit: 3"),
        ("def make(size): return Net()", "raised TypeError: make.. missing 1 required positional argument: 'size'"),
        ("def make(): return 3", "returned a int; it must return a torch.nn.Module"),
        ("def make(): return Net", "returned a type; it must return a torch.nn.Module"),
        ("def make(:", "importing .*net.py raised SyntaxError"),
        ("1 / 0", "importing .*net.py raised ZeroDivisionError"),
        ("import sys; sys.exit()", "importing .*net.py raised SystemExit"),
        ("import robust_no_such_package", "raised ModuleNotFoundError: No module named 'robust_no_such_package'"),
        ("def make(): return nn.Conv2d(3, 10, 3)", r"returns shape \(2, 10, 30, 30\) for 2 images"),
        ("def make(): return nn.Sequential(Net(3, 1))", r"returns shape \(2, 1\) for 2 images"),
        ("def make(): return nn.Sequential(Net(), nn.Flatten(0))", r"returns shape \(20,\) for 2 images"),
        (
            "class Two(Net):\n    def forward(self, x): return super().forward(x), x\ndef make(): return Two()",
            "returns a tuple, not one tensor of logits",
        ),
        (
            "class Whole(Net):\n    def forward(self, x): return super().forward(x).long()\ndef make(): return Whole()",
            "returns int64, not logits",
        ),
        ("def make():\n    net = Net()\n    net.linear.bias.data[0] = torch.nan\n    return net", "returns NaN"),
        ("def make():\n    net = Net()\n    net.input_size = 32\n    return net", "input_size is 32; it must be"),
        ("def make():\n    net = Net()\n    net.input_size = (3, 0, 4)\n    return net", "must be .channels, height"),
        ("def make():\n    net = Net()\n    net.class_names = 'ab'\n    return net", "class_names must be a list"),
        ("def make():\n    net = Net()\n    net.class_names = ['a']\n    return net", "class_names must be a list"),
        ("def make():\n    net = Net(1)\n    net.input_size = (3, 32, 32)\n    return net", "on 3x32x32 images"),
        ("def make(): return Fixed(3, 48, 4)", "3x32x32.*1x28x28.*3x224x224.*--input-size.*input_size"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_factory_is_said(make: str, says: str, write: Write) -> None:
    assert re.search(says, check_refused(write(make)))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("absent.py:make", "no Python file at absent.py"),
        ("absent.py", "write absent.py:FUNCTION"),
        ("absent.py:", "write absent.py:FUNCTION"),
        ("robust_no_such_package.net:make", "there is no Python module 'robust_no_such_package.net'"),
        ("robust.no_such_module:make", "importing robust.no_such_module raised ModuleNotFoundError"),
        ("torchvision.models:resnet188", "did you mean resnet18"),
        ("torchvision.models:get_model", "raised TypeError"),
    ],
)
def test_specs_of_python_that_lead_nowhere_are_refused(spec: str, says: str) -> None:
    assert says in check_refused(spec)


def test_the_shared_networks(shared: Path) -> None:
    file = shared / "models" / "architectures.py"
    for factory, input_size in [
        ("cifar10_resnet20", (3, 32, 32)),
        ("cifar10_robust_8px", (3, 32, 32)),
        ("mnist_robust_03", (1, 28, 28)),
    ]:
        model = load_model(f"{file}:{factory}")
        assert (model.num_classes, model.input_size, model.preprocess) == (10, input_size, None)
        assert model.source == f"{factory} of {file}"
