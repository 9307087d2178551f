"""python -m robust.verify: what it says and writes of a network that is right, and of one with a fault planted."""

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import robust.verify
from data_files import image_bytes, pattern, write_tree
from reports.verify import COLUMNS, shape_rows
from reports.verifyterminal import print_tables
from robust import cli, verification
from robust.conv import convert, frozen, im2col, kernels
from robust.conv.gates import Gate
from robust.conv.geometry import Geometry
from robust.conv.kernels.launch import INTERPRETED
from robust.conv.ladder import Measurement
from robust.data import load_data
from robust.models import load_model
from test_reports import Reader
from toys import images

ROOT = Path(__file__).resolve().parents[1]
TRITON_RUNS = kernels.misfit(Geometry((1, 1)), torch.float32, torch.device("cpu")) is None

FACTORIES = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    input_size = (3, 12, 10)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.deep(torch.relu(self.down(x))) + 1)
        return self.head(x.mean((2, 3)))

def seeded(kind):
    torch.manual_seed(0)
    net = kind()
    net.norm.train()(torch.randn(64, 8, 4, 4) * 3)
    net.eval()
    with torch.no_grad():  # images in the middle of all classes, near their boundaries
        net.head.bias -= net(torch.rand(64, 3, 12, 10)).mean(0)
    return net

def net():
    return seeded(Net)

def ten():
    net = seeded(Net)
    net.head = nn.Linear(8, 10)
    return net

class Undecided(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

def undecided():
    return seeded(Undecided)

class Odd(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2

Odd.__name__ = "<b>Odd</b>"

class Named(Net):
    def __init__(self):
        super().__init__()
        self.add_module("=<script>alert(1)</script>\\x1b[31m", Odd(3, 3, 1))

    def forward(self, x):
        return super().forward(getattr(self, "=<script>alert(1)</script>\\x1b[31m")(x))

def named():
    return seeded(Named)

class Detached(Net):
    def forward(self, x):
        return super().forward(x.detach())

def detached():
    return seeded(Detached)

class Training(Net):
    def eval(self):
        return self

def training():
    net = seeded(Training)
    net.norm.train()
    return net

class Dropping(Net):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, training=True))

def dropping():
    return seeded(Dropping)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks and an .npz of 12 images that `net` mostly gets right, and the place to run in."""
    (tmp_path / "model.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    # Triton's interpreter takes most of a verification's time; it has its part in the first test.
    monkeypatch.setattr("robust.conv.kernels.algorithm.INTERPRETED", False)
    x = images(12, (3, 12, 10))
    with torch.no_grad():
        y = load_model("model.py:net").module(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    return tmp_path


COMMON = "--data data.npz --steps 4 --eps 0.03 --device cpu"


def run(line: str, capsys: pytest.CaptureFixture[str], model: str = "net") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    arguments = ["robust.verify", "--model", f"model.py:{model}", *shlex.split(f"{COMMON} {line}")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", arguments)
        cli.main(robust.verify.verify)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verify.json").read_text())


# A network that is right


def test_a_right_network_passes_all_gates_and_leaves_three_reports(
    project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robust.conv.kernels.algorithm.INTERPRETED", INTERPRETED)
    code, out, err = run("--output out", capsys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1].startswith("PASS: net on the project's own convolution is the same network: it meets all ")
    assert lines[-2] == f"Report: {Path('out') / 'verify.html'}"
    assert "\x1b" not in out and "FAIL" not in out
    assert "ok   3 → 8, 3×3 at 12×10 by im2col: " in out
    assert any("512 channels on" in line for line in lines)  # how Winograd's ratio is to be read
    assert {path.name for path in (project / "out").iterdir()} == {"verify.csv", "verify.json", "verify.html"}

    written = report(project / "out")
    assert (written["schema_version"], written["passed"], written["answer"]) == (1, True, lines[-1])
    assert written["model"]["name"] == "net" and len(written["model"]["fingerprint"]) == 64
    assert written["data"] == {"name": "data.npz", "images": 12, "correct": 11}
    assert written["options"] == {
        "dtype": "float32", "algorithm": "auto", "batch_size": 2, "eps": 0.03, "steps": 4, "seed": 0,
    }  # fmt: skip
    fates = {layer["name"]: (layer["fate"], layer["reason"]) for layer in written["conversion"]["layers"]}
    assert fates["norm"] == ("fused", "into stem") and fates["down"][0] == "replaced"
    assert [(shape["shape"], shape["layers"]) for shape in written["shapes"]] == [
        ("3 → 8, 3×3 at 12×10", ["stem"]),
        ("8 → 8, 3×3/2 at 12×10", ["down"]),
        ("8 → 8, 3×3 depthwise at 6×5", ["deep"]),
    ]
    assert {gate["part"] for gate in written["gates"]} == {"ladder", "shapes", "network", "verdicts"}
    assert all(gate["passed"] for gate in written["gates"])
    fell = {attack["attack"]: sum(attack["converted_fell"]) for attack in written["attacks"]}
    assert 0 < fell["fgsm"] <= fell["pgd"]

    with (project / "out" / "verify.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(written["gates"])
    assert {row["limit"] for row in rows if row["gate"] == "error"} == {"", "1e-08"}
    assert ("triton" in {row["algorithm"] for row in rows}) == TRITON_RUNS


def test_a_single_image_with_its_label(project: Path, capsys: Any) -> None:
    write_tree(project, {"panda.png": image_bytes(pattern(12, 10))})
    model = load_model("model.py:net")
    (sample,) = load_data("panda.png", model, label="0")
    label = model.module(sample.x[None]).argmax().item()
    assert run(f"--data panda.png --label {label} --output out", capsys)[0] == 0
    assert report(project / "out")["data"] == {"name": "panda.png", "images": 1, "correct": 1}


def test_unreadable_images_are_left_out_and_counted(project: Path, capsys: Any) -> None:
    photos = {f"photos/{label}/a.png": image_bytes(pattern(12, 10, seed=label)) for label in range(5)}
    write_tree(project, photos | {"photos/3/b.png": b"no image"})
    code, _, err = run("--data photos", capsys)
    assert code == 2 and "photos/3/b.png" in err and "--skip-bad-images" in err
    code, out, _ = run("--data photos --skip-bad-images --output out", capsys)
    assert code == 0 and "Note: Unreadable images left out: 1, the first 3/b.png" in out
    assert report(project / "out")["data"]["images"] == 5


def test_the_page_says_it_in_order_and_refers_to_nothing_outside(project: Path, capsys: Any) -> None:
    run("--output out", capsys)
    page = (project / "out" / "verify.html").read_text()
    read = Reader(page)
    headings = [unescape(text) for text in page.split("<h2>")[1:]]
    assert [heading.partition("<")[0] for heading in headings] == [
        "The answer", "The ladder", "The layers", "The network", "The verdicts", "What was run",
    ]  # fmt: skip
    assert not any({"src", "href"} & set(attributes) for name, attributes in read.tags if name != "link")
    text = " ".join("".join(read.text).split())
    assert "net on the project's own convolution is the same network" in text
    assert "3 → 8, 3×3 at 12×10" in text and "into stem" in text and "12 of 12" in text
    assert "512 channels on" in text


def test_the_reports_command_runs_it_again(project: Path, capsys: Any) -> None:
    run("--output out --seed 3", capsys)
    command = report(project / "out")["command"]
    assert command == f"python -m robust.verify --model model.py:net {COMMON} --seed 3"
    first = (project / "out" / "verify.csv").read_bytes()
    assert run("--output again --seed 3", capsys)[0] == 0
    assert (project / "again" / "verify.csv").read_bytes() == first


def test_quiet_says_nothing_and_without_output_there_is_a_folder_of_its_own(project: Path, capsys: Any) -> None:
    assert run("--quiet", capsys) == (0, "", "")
    (folder,) = (project / "runs").iterdir()
    assert folder.name.startswith("verify-model.py-net-")
    assert (folder / "verify.html").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_held_to_their_own_bounds(project: Path, capsys: Any, dtype: str) -> None:
    run(f"--output out --dtype {dtype}", capsys)  # so small a network may miss gate 3 by a few flipped ReLUs
    gates = report(project / "out")["gates"]
    assert all(gate["passed"] for gate in gates if gate["part"] != "network")
    u = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    limits = {gate["limit"] for gate in gates if (gate["part"], gate["gate"]) == ("shapes", "bound")}
    assert all(u < limit < 1.2 * u for limit in limits)


def test_another_algorithm_is_asked_of_what_it_suits(project: Path, capsys: Any) -> None:
    code, out, _ = run("--output out --algorithm winograd2", capsys)
    assert code == 0
    assert "Note: The whole network is computed by what auto picks, as winograd2 computes 3 x 3 windows" in out
    used = {gate["subject"]: gate["algorithm"] for gate in report(project / "out")["gates"] if gate["part"] == "shapes"}
    assert list(used.values()) == ["winograd2", "im2col", "im2col"]


def test_on_a_terminal_there_are_tables_of_80_columns(project: Path) -> None:
    model = load_model("model.py:named")
    verified = verification.verify(model, load_data("data.npz", model), device="cpu", steps=1)
    console = Console(width=80, record=True, force_terminal=True, file=open("/dev/null", "w"))
    with console.file:
        print_tables(console, verified)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for said in ("3 → 8, 3×3 at 12×10", "fgsm at 8/255", "signs that are not float64's", "convolution"):
        assert said in text


def test_the_model_is_left_as_it_was(project: Path) -> None:
    model = load_model("model.py:net")
    state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    model.module.train()
    verification.verify(model, load_data("data.npz", model), device="cpu", steps=1, precision="bfloat16")
    assert model.module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.module.parameters())
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype


# Faults


def shift_a_tap(patch: pytest.MonkeyPatch) -> None:
    right = im2col.pack
    patch.setattr(im2col, "pack", lambda weight, geometry: right(weight.roll(1, 3), geometry))


def drop_a_channel(patch: pytest.MonkeyPatch) -> None:
    right = im2col.pack

    def wrong(weight: Tensor, geometry: Geometry) -> list[Tensor]:
        kept = torch.arange(weight.shape[1]) < max(1, weight.shape[1] - 1)  # not of depthwise ones, which have one
        return right(weight * kept.view(-1, 1, 1).to(weight), geometry)

    patch.setattr(im2col, "pack", wrong)


def shift_a_phase(patch: pytest.MonkeyPatch) -> None:
    """Of the input gradient with a stride: the pixels of one phase are computed by the taps of the next."""
    right = im2col.pack_input_grad

    def wrong(weight: Tensor, geometry: Geometry) -> list[Tensor]:
        packed = right(weight, geometry)
        return packed if len(packed) == 1 else [packed[0], packed[2], packed[1], packed[3]]

    patch.setattr(im2col, "pack_input_grad", wrong)


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (shift_a_tap, "by im2col, forward: "),
        (drop_a_channel, "by im2col, forward: "),
        (shift_a_phase, "by im2col, input gradient: "),
    ],
)
def test_a_planted_fault_makes_it_fail_and_is_named(
    project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], named: str
) -> None:
    plant(monkeypatch)
    code, out, err = run("--output out", capsys)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[-1].startswith("FAIL: net on the project's own convolution misses ")
    assert named in lines[-1] and " values differ, at most 0" in lines[-1]
    failing = [gate for gate in report(project / "out")["gates"] if not gate["passed"]]
    assert len(failing) == sum(line.startswith("✕ ") for line in lines)
    assert {gate["part"] for gate in failing} >= {"ladder", "shapes", "network"}
    page = (project / "out" / "verify.html").read_text()
    assert named in unescape(page) and 'class="fails"' in page


def test_quiet_names_failing_gates_on_stderr(project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shift_a_tap(monkeypatch)
    code, out, err = run("--quiet", capsys)
    assert (code, out) == (1, "")
    assert err.startswith("FAIL: net ")


def test_a_fault_of_the_conversion_alone_is_seen_in_the_network(
    project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch-norm folded with a wrong eps: every convolution is right, and the network is not."""
    right = frozen.scale_and_shift

    def wrong(norm: Any) -> Any:
        norm.eps = 1.0
        return right(norm)

    monkeypatch.setattr(frozen, "scale_and_shift", wrong)
    assert run("--output out", capsys)[0] == 1
    failing = {(gate["part"], gate["gate"]) for gate in report(project / "out")["gates"] if not gate["passed"]}
    assert failing >= {("network", "relative"), ("network", "signs")}
    assert not any(part in ("ladder", "shapes") for part, _ in failing)


def test_a_lost_relu_in_the_gradient_is_seen_by_its_signs_and_by_attacks(
    project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen convolution's own path: logits are right, what attackers follow is not."""
    monkeypatch.setattr(im2col, "masked", lambda g, mask: g)
    assert run("--output out", capsys)[0] == 1
    failing = {(gate["part"], gate["result"]) for gate in report(project / "out")["gates"] if not gate["passed"]}
    assert failing >= {("network", "input gradient")}
    assert ("network", "logits") not in failing


def test_nan_is_no_pass_and_is_null_in_json(project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = im2col.forward

    def wrong(*arguments: Any) -> Tensor:
        y = right(*arguments)
        y[..., -1] = torch.nan
        return y

    monkeypatch.setattr(im2col, "forward", wrong)
    code, out, _ = run("--output out --limit 2", capsys)
    assert code == 1
    gates = report(project / "out")["gates"]
    bound = next(gate for gate in gates if (gate["part"], gate["gate"]) == ("shapes", "bound"))
    assert (bound["value"], bound["passed"]) == (None, False)
    assert "nan" in out.splitlines()[-1].lower() or "NaN" in out


# What it cannot replace


def test_a_network_that_cannot_be_traced_is_verified_and_the_reason_given(project: Path, capsys: Any) -> None:
    code, out, _ = run("--output out", capsys, "undecided")
    assert code == 0
    (note,) = report(project / "out")["notes"]
    assert note.startswith("The network cannot be traced, so its layers are replaced but not fused: ")
    assert "control flow" in note
    assert f"Note: {note}" in out


def test_layers_that_are_still_torchs_are_named_and_their_names_escaped(project: Path, capsys: Any) -> None:
    code, out, _ = run("--output out", capsys, "named")
    assert code == 1 and "are left to torch" in out
    assert "torch still computes =<script>alert(1)</script>␛[31m (<b>Odd</b>: " in out
    assert "\x1b" not in out
    page = (project / "out" / "verify.html").read_text()
    assert "<script>alert" not in page and "<b>Odd" not in page and "\x1b" not in page
    assert "=<script>alert(1)</script>␛[31m" in "".join(Reader(page).text)
    with (project / "out" / "verify.csv").open() as file:
        layers = {row["layers"] for row in csv.DictReader(file)}
    assert any(name.startswith("'=<script>") for name in layers)  # no formula for a spreadsheet


# Bad input


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--dtype int8", "unknown dtype 'int8'; known: float32, tf32, bfloat16, float16"),
        ("--dtype bf16", "did you mean bfloat16"),
        ("--dtype tf32", "tf32 is computed by a GPU's tensor cores alone"),
        ("--device cuda:7", "device 'cuda:7' cannot be used"),
        ("--device meta", "device 'meta' cannot be used (Tensor.item() cannot be called on meta tensors)"),
        ("--algorithm fft", "unknown algorithm 'fft'; known: auto, direct, toeplitz, im2col"),
        ("--algorithm winograd", "did you mean winograd"),
        ("--algorithm direct", "direct takes too long at full size"),
        ("--batch-size 0", "batch_size must be at least 1, not 0"),
        ("--steps 0", "steps must be at least 1, not 0"),
        ("--limit 0", "limit must be at least 1, not 0"),
        ("--eps 4", "did you mean 4/255?"),
        ("--eps four", "eps 'four' is no number"),
        ("--data nowhere.npz", "nowhere.npz"),
        (
            "--data cifar10 --data-root full --model model.py:ten",
            "no readable CIFAR10 under --data-root full (",
        ),
        ("--model model.py:nothing", "nothing"),
        ("--model mnist_cnn --data samples:mnist", "on the project's own layers as it is"),
        ("--model model.py:detached", "the model passes no gradient back to its input"),
        ("--model model.py:training", "training cannot be verified: an image's logits depend on its batch"),
        ("--model model.py:dropping", "dropping cannot be verified: two passes over the same image differ"),
        ("--output full", "full holds a verification already; name another --output"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(project: Path, capsys: Any, line: str, says: str) -> None:
    (project / "full").mkdir()
    (project / "full" / "verify.json").touch()
    if torch.cuda.is_available() and "tf32" in line:
        line += " --device cpu"
    code, out, err = run(line, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and says in err
    assert not (project / "runs").exists()


def test_a_network_that_convert_chokes_on_is_wrong_input(
    project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chokes(*arguments: Any) -> None:
        raise TypeError("no luck")

    monkeypatch.setattr(convert, "_trace", chokes)
    code, _, err = run("--output out", capsys)
    assert (code, err) == (2, "error: net cannot be converted: TypeError: no luck\n")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def net():\n    return torch.jit.script(Net())\n", "cannot be copied and frozen: .*; name a plain module"),
        (
            "class net(Net):\n    def forward(self, x):\n        return super().forward(x.clamp_(0.2, 0.8))\n",
            "x.clone()",
        ),
        ("class net(Net):\n    def forward(self, x):\n        return super().forward(x.detach())\n", "no gradient"),
        (
            "class net(Net):\n    def forward(self, x):\n        assert not x.requires_grad, 'no'\n"
            "        return super().forward(x)\n",
            "fails where its images want gradients: .*no",
        ),
    ],
    ids=["scripted", "in place", "detached", "gradients refused"],
)
def test_networks_that_cannot_be_verified_are_wrong_input(
    source: str, message: str, project: Path, capsys: Any
) -> None:
    (project / "other.py").write_text(FACTORIES + source)
    code, _, err = run("--output out --model other.py:net", capsys)
    assert code == 2 and err.count("\n") == 1 and re.search(message, err), err


def test_an_output_that_is_a_file_is_found_before_anything_is_loaded(project: Path, capsys: Any) -> None:
    (project / "file").touch()
    code, _, err = run("--output file --model nonsense", capsys)
    assert (code, err) == (2, "error: file is a file; name a folder with --output\n")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['robust.verify', '--help']\n"
        "from robust import cli, verify\n"
        "try: cli.main(verify.verify)\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--model", "--label", "--data-root", "--skip-bad-images", "--dtype", "--algorithm", "--batch-size"):
        assert option in done.stdout
    assert "efficientnet_lite0" in done.stdout and "mnist_cnn" not in done.stdout  # which it refuses


def test_a_share_of_a_bound_that_is_missed_is_shown_as_it_is(project: Path) -> None:
    model = load_model("model.py:net")
    verified = verification.verify(model, load_data("data.npz", model), device="cpu", steps=1)
    wrong = Measurement("shapes", "3 → 8, 3×3 at 12×10", "im2col", "forward", Gate("bound", 0.75, 0.5))
    rows = [
        wrong if (row.part, row.subject, row.result, row.gate.name) == (*key(wrong), "bound") else row
        for row in verified.measurements
    ]
    first = next(shape_rows(type(verified)(**{**vars(verified), "measurements": tuple(rows)})))
    assert not first["passed"] and not first["cells"][0]["passed"] and first["cells"][1]["passed"]
    assert first["share"] == first["cells"][0]["share"] == 1.5


def key(row: Measurement) -> tuple[str, str, str]:
    return row.part, row.subject, row.result
