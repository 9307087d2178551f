"""The command line: what it writes, what it prints, how it ends."""

import csv
import errno
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import attacks
import robust.evaluate
from robust import cli
from robust.statistics import SUMMARY_COLUMNS
from robust.store import FILENAME, SAMPLE_COLUMNS, Store
from toys import images

ROOT = Path(__file__).resolve().parents[1]

FACTORY = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
from toys import conv_net

torch.set_num_threads(1)

def net():
    return conv_net()

def slow():
    net = conv_net()
    net.register_forward_hook(lambda *_: time.sleep(0.01))
    return net

def broken():
    raise ZeroDivisionError("no luck")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a model file and an .npz of 40 images, and the place to run in."""
    import torch

    from toys import conv_net

    x = (images(40) * 255).round() / 255
    with torch.no_grad():
        y = conv_net()(x).argmax(1)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    (tmp_path / "model.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Odd(BaseException):
    """Of a user's own."""


COMMON = "--model model.py:net --data data.npz --eps 0.01,0.03 --steps 4"


def run(line: str, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["robust.evaluate", *shlex.split(line)])
        cli.main(robust.evaluate.evaluate)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def start(line: str, folder: Path, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "robust.evaluate", *shlex.split(line)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs ignore SIGINT, and so would what they start.
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=interruptible, **pipes, **options)


@pytest.mark.pictures
def test_a_run_leaves_what_the_contract_says(project, capsys):
    code, out, err = run(f"{COMMON} --output out --save-adversarials", capsys)
    assert (code, err) == (0, "")
    produced = {path.name for path in (project / "out").iterdir()}
    assert produced >= {
        FILENAME, "samples.csv", "summary.csv", "report.json", "report.html", "figures", "adversarials.npz",
    }  # fmt: skip
    with (project / "out" / "samples.csv").open() as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == SAMPLE_COLUMNS
    assert len(rows) == 1 + 40 * 3 * 2
    with (project / "out" / "summary.csv").open() as file:
        assert tuple(next(csv.reader(file))) == SUMMARY_COLUMNS
    report = json.loads((project / "out" / "report.json").read_text())
    assert report["options"]["attacks"] == ["fgsm", "pgd", "noise"]
    assert report["options"]["eps"] == [0.01, 0.03]
    # The same answer, last but for the report's path; no control characters where stdout is no terminal.
    assert out.splitlines()[-1] == f"Report: {Path('out') / 'report.html'}"
    assert out.splitlines()[-2] == report["answer"]
    assert "\x1b" not in out and "\r" not in out


def test_the_reports_command_runs_it_again(project, capsys):
    run(f"{COMMON} --output out --attack pgd", capsys)
    command = json.loads((project / "out" / "report.json").read_text())["command"]
    prefix = "python -m robust.evaluate "
    assert command.startswith(prefix)
    assert "--output" not in command
    run(command.removeprefix(prefix), capsys)
    (again,) = (project / "runs").iterdir()
    assert (again / "samples.csv").read_bytes() == (project / "out" / "samples.csv").read_bytes()


def test_quiet_says_nothing(project, capsys):
    assert run(f"{COMMON} --attack pgd --quiet --output out", capsys) == (0, "", "")


def test_without_output_each_run_has_a_folder_of_its_own(project, capsys):
    run(f"{COMMON} --attack pgd --quiet", capsys)
    (folder,) = (project / "runs").iterdir()
    assert folder.name.startswith("model.py-net-")
    assert (folder / "report.html").exists()


def test_the_bundled_network_and_images_need_no_option_but_time(project, capsys):
    code, out, _ = run("--limit 3 --attack fgsm --eps 4/255 --output out", capsys)
    assert code == 0
    assert "efficientnet_lite0 classifies" in out
    assert json.loads((project / "out" / "report.json").read_text())["data"]["name"] == "samples"


def test_help_needs_neither_torch_nor_pandas():
    code = (
        "import sys; sys.argv = ['robust.evaluate', '--help']\n"
        "from robust import cli, evaluate\n"
        "try: cli.main(evaluate.evaluate)\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--model", "--eps", "--resume", "--save-adversarials"):
        assert option in done.stdout


def test_threads_of_a_command_do_not_spin_for_long(monkeypatch):
    """As torch's own OpenMP says that it was told; what the user has settled stands."""
    told = dict(os.environ, OMP_DISPLAY_ENV="verbose")
    done = subprocess.run(
        [sys.executable, "-m", "robust.evaluate", "--list-models"], cwd=ROOT, env=told, capture_output=True, text=True
    )
    if "GOMP_" not in done.stderr:
        pytest.skip("this torch computes with another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{cli.SPINS}'" in done.stderr
    for given, spins in (({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
        monkeypatch.setattr(os, "environ", dict(given))
        cli._wait_briefly()
        assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_the_line_on_the_way_counts_pairs_and_what_stands(project, capsys, monkeypatch):
    """Not of how many: images that are wrong unattacked are done first, then those that break."""
    monkeypatch.setattr("robust.progress.SECONDS_BETWEEN_LINES", -1)
    _, out, _ = run(f"{COMMON} --attack pgd --output out", capsys)
    lines = [line for line in out.splitlines() if "pairs" in line]
    assert len(lines) > 1 and all(
        re.fullmatch(r"\d+ of 40 pairs of image and attack done, [\d,.]+ images/s; pgd: \d+ stand so far", line)
        for line in lines
    )
    largest = pd.read_csv(project / "out" / "summary.csv").query("attack == 'pgd'").iloc[-1]
    assert lines[-1].startswith("40 of 40 ")
    assert lines[-1].endswith(f"pgd: {round(largest.n * largest.robust_accuracy)} stand so far")


def test_the_list_of_attacks_says_how_each_can_be_run(capsys):
    code, out, _ = run("--list-attacks", capsys)
    rows = {line.split()[0]: re.split(r"  +", line.strip())[1:] for line in out.splitlines() if line}
    assert code == 0 and rows["pgd"][:2] == ["linf l2", "gradients, fixed eps"]
    assert rows["foolbox:L2DeepFoolAttack"] == ["l2", "least distance", "steps restarts"]
    assert rows["foolbox:GaussianBlurAttack"][:2] == ["linf l2 l1 l0", "least distance"]
    assert rows["foolbox:GenAttack"][:2] == ["linf", "fixed eps, with a target only"]
    assert rows["foolbox:VirtualAdversarialAttack"][1] == "fixed eps, without a target only, needs steps"
    assert rows["foolbox:PointwiseAttack"][0] == "-" and rows["foolbox:PointwiseAttack"][1].startswith("cannot be used")


@pytest.mark.parametrize("option", ["--list-attacks", "--help"])
def test_nobody_reads_on(option):
    """As a program ends that SIGPIPE kills: no traceback, and no code that is a verdict."""
    command = [sys.executable, "-m", "robust.evaluate", option]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--model nonsense 2>&1 | true", 2),
        ("--list-attacks >&-", 0),
        ("--model nonsense >/dev/full 2>&1", 2),
        ("--list-attacks >/dev/full 2>&1", 2),
    ],
)
def test_streams_that_are_closed_change_no_exit_code(line, code):
    command = f"{shlex.quote(sys.executable)} -m robust.evaluate {line}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_network_that_ends_the_program_is_named(project, capsys):
    (project / "quits.py").write_text(
        "import sys\nfrom torch import nn\n\nclass Quits(nn.Module):\n    def forward(self, x):\n        sys.exit(0)\n"
    )
    code, out, err = run("--model quits.py:Quits --data data.npz --output out", capsys)
    assert (code, out) == (2, "") and "called sys.exit(0)" in err and err.count("\n") == 1
    assert "kept" not in err and not (project / "out").exists()


@pytest.mark.parametrize(
    ("raised", "did"),
    [(SystemExit(3), r"called sys\.exit\(3\)"), (GeneratorExit(), "raised GeneratorExit"), (Odd(), "raised Odd")],
)
def test_whatever_ends_a_run_is_one_line_with_the_way_to_go_on(project, capsys, monkeypatch, raised, did):
    add_unit = Store.add_unit

    def ending(self, start, attack, *args, **kwargs):
        if attack == "pgd":
            raise raised
        add_unit(self, start, attack, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_unit", ending)
        code, _, err = run(f"{COMMON} --output 'a  b'", capsys)
    go_on = re.escape(f"python -m robust.evaluate {COMMON} --output 'a  b' --resume")
    said = f"error: code of the model or the data {did}: mend it, .*; what is done is kept. To go on: {go_on}\n"
    assert code == 2 and re.fullmatch(said, err)
    assert run(f"{COMMON} --output 'a  b' --resume", capsys)[0] == 0


def test_lists(project, capsys):
    _, models, _ = run("--list-models", capsys)
    assert {"efficientnet_lite0", "resnet50"} <= {line.strip() for line in models.splitlines()}
    _, known, _ = run("--list-attacks", capsys)
    named = {line.split()[0]: line for line in known.splitlines()}
    assert named.keys() == {"name", *attacks.names()}
    assert named["fmn"].split() == (
        "fmn linf l2 l1 l0 gradients, least distance 1 forward, 1 gradient steps step-size restarts "
        "arXiv 2102.12827".split()
    )


def test_every_attack_is_documented():
    text = (ROOT / "docs" / "attacks.md").read_text()
    named = set(re.findall(r"\*\*([a-z-]+)\*\*", text))
    assert named == {*attacks.ATTACKS, *attacks.ENSEMBLES}


def test_the_docs_say_which_attack_takes_which_option():
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.*) \|$", (ROOT / "docs" / "attacks.md").read_text(), re.M)
    said = {
        option.removeprefix("no-").replace("-", "_"): set(re.findall("`([a-z-]+)`", named)) for option, named in rows
    }
    assert said == {
        option: {name for name in attacks.ATTACKS if option in attacks.takes(name)} for option in attacks.OPTIONS
    }


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--model resnet5", "did you mean resnet50"),
        (f"{COMMON} --attack pdg", "did you mean pgd"),
        ("--model resnet5 --attack pdg", "did you mean pgd"),  # before the model is loaded
        ("--attack foolbox:VirtualAdversarialAttack --norm l2", "needs steps: foolbox has no default"),
        (f"{COMMON} --norm l_inf", "did you mean linf"),
        ("--eps 8", "did you mean 8/255"),
        ("--eps=-8/255", "must be a positive number"),
        ("--eps nan", "must be a positive number"),
        ("--eps ,", "eps is empty"),
        ("--steps 0", "steps must be at least 1"),
        ("--steps many", "--steps"),
        ("--stepps 3", "--stepps"),
        ("--attack pgd --attack pgd", "named twice"),
        (f"{COMMON} --attack square", "steps means nothing to square"),
        (f"{COMMON} --queries 10", "queries means nothing to fgsm or pgd or noise"),
        (f"{COMMON} --no-random-start --restarts 3 --attack pgd", "restarts means nothing to pgd without"),
        ("--resume", "--resume needs the --output"),
        ("--model model.py:broken", "ZeroDivisionError: no luck"),
        ("--model model.py:nett", "did you mean net"),
        ("--model nowhere.py:net", "nowhere.py"),
        ("--model model.py:net --weights nowhere.pth", "nowhere.pth"),
        ("--model model.py:net --data nowhere", "nowhere"),
        ("--model model.py:net --data empty", "empty"),
        ("--model model.py:net --data words.npz", "no array x and no y"),
        (f"{COMMON} --device warp", "device 'warp' cannot be used"),
        (f"{COMMON} --target gibbon", "it is a number, 0 .. 4"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(project, capsys, line, says):
    (project / "empty").mkdir()
    np.savez(project / "words.npz", z=np.zeros(3))
    before = sorted(project.rglob("*"))
    code, out, err = run(f"{line} --output out" if "--resume" not in line else line, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert says in err
    after = [path for path in sorted(project.rglob("*")) if "__pycache__" not in path.parts]
    assert after == before


@pytest.mark.parametrize("name", ["samples.csv", "report.html", "adversarials.npz"])
@pytest.mark.parametrize("resume", ["", " --resume"])
def test_files_that_belong_to_no_run_are_kept(project, capsys, name, resume):
    own = project / "mine" / name
    own.parent.mkdir()
    own.write_text("of my own")
    code, _, err = run(f"{COMMON} --attack pgd --output mine{resume}", capsys)
    assert code == 2 and err == f"error: mine/{name} is there already, and belongs to no run: name another --output\n"
    assert [path.name for path in own.parent.iterdir()] == [name] and own.read_text() == "of my own"


def test_what_cannot_be_written_is_told_with_the_way_to_go_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate"])

    def failing(output: str = "") -> None:
        error = OSError(5, "Input/output error", "out/samples.csv")
        error.add_note("to go on: --output 'a  b' --resume")
        raise error

    def without() -> None:
        raise OSError(5, "Input/output error", "out/samples.csv")

    for command, way, noted in (
        (failing, ", or name another --output,", "; to go on: --output 'a  b' --resume"),
        (without, "", ""),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(command)
        assert left.value.code == 2
        said = f"[Errno 5] Input/output error: 'out/samples.csv'; mend that{way} and repeat the command{noted}"
        assert capsys.readouterr().err == f"error: {said}\n"


def test_a_full_disk_is_told_without_options_that_the_command_lacks(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare"])

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SystemExit) as left:
        cli.main(full)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full: make room, and repeat the command\n"


def test_an_output_that_holds_another_run_is_kept(project, capsys):
    line = COMMON.replace(" --steps 4", "")
    run(f"{line} --attack fgsm --output out", capsys)
    before = {path: path.read_bytes() for path in (project / "out").iterdir() if path.is_file()}
    code, _, err = run(f"{line} --attack fgsm --output out", capsys)
    assert code == 2 and "out already holds a run: continue it with --resume" in err
    code, _, err = run(f"{line} --attack pgd --output out --resume", capsys)
    assert code == 2 and "options attacks (['fgsm'] there, ['pgd'] here)" in err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM meta", "UPDATE meta SET value = '{' WHERE key = 'identity'", "DROP TABLE result"],
)
def test_a_damaged_store_is_not_resumed(project, capsys, statement):
    assert run(f"{COMMON} --attack pgd --output out --quiet", capsys)[0] == 0
    with closing(sqlite3.connect(project / "out" / FILENAME)) as store, store:
        store.execute(statement)
    code, _, err = run(f"{COMMON} --attack pgd --output out --resume", capsys)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: out/run.sqlite is damaged") and err.endswith(": name another --output\n")


def test_a_bad_image_stops_the_run_or_is_counted(project, capsys):
    from PIL import Image

    for k in range(5):
        folder = project / "pictures" / str(k)
        folder.mkdir(parents=True)
        Image.new("RGB", (12, 12), (40 * k, 90, 200)).save(folder / "a.png")
    (project / "pictures" / "3" / "bad.png").write_bytes(b"no image")
    line = "--model model.py:net --data pictures --attack fgsm --eps 0.1 --output out"
    code, _, err = run(line, capsys)
    assert code == 2 and "bad.png" in err and "--skip-bad-images" in err
    assert not (project / "out").exists()
    code, out, _ = run(f"{line} --skip-bad-images", capsys)
    assert code == 0 and "Unreadable images left out: 1, the first 3/bad.png\n" in out
    findings = {f["name"]: f for f in json.loads((project / "out" / "report.json").read_text())["findings"]}
    assert "1 unreadable" in findings["images read"]["message"] and "bad.png" in findings["images read"]["message"]


def test_a_fault_of_ours_is_no_verdict(project, capsys, monkeypatch):
    monkeypatch.setattr("robust.api.evaluate", lambda *args: 1 / 0)
    code, _, err = run(f"{COMMON} --output out", capsys)
    assert code == 3
    assert "Traceback" in err and err.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_full_disk_keeps_what_is_done(project, capsys, monkeypatch):
    add_unit = Store.add_unit

    def limited(self, *args, **kwargs):
        # SQLite says of a database that may not grow what it says of a disk that is full.
        pages = self._db.execute("PRAGMA page_count").fetchone()[0]
        self._db.execute(f"PRAGMA max_page_count = {pages}")
        return add_unit(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "add_unit", limited)
        code, _, err = run(f"{COMMON} --output out", capsys)
    assert code == 2
    # Before there was any unit: nothing is there to go on with.
    assert err == "error: the disk is full: make room, and repeat the command\n"
    assert not (project / "out").exists()

    def later(self, start, attack, *args, **kwargs):
        return (limited if attack == "pgd" else add_unit)(self, start, attack, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "add_unit", later)
        code, _, err = run(COMMON, capsys)
    (folder,) = Path("runs").iterdir()
    said = "error: the disk is full: make room, and repeat the command; what is done is kept. To go on: "
    command = f"python -m robust.evaluate {COMMON} --output {folder} --resume"
    assert (code, err) == (2, f"{said}{command}\n")
    folder.rename("out")
    assert run(f"{COMMON} --output out --resume", capsys)[0] == 0
    run(f"{COMMON} --output whole", capsys)
    assert (project / "out" / "samples.csv").read_bytes() == (project / "whole" / "samples.csv").read_bytes()


@pytest.mark.pictures
def test_what_stands_in_the_way_of_a_report_is_named(project, capsys):
    (project / "out").mkdir()
    (project / "out" / "figures").write_text("a file")
    code, _, err = run(f"{COMMON} --output out", capsys)
    assert code == 2 and "figures" in err and err.count("\n") == 1
    assert err.endswith(f"what is done is kept. To go on: python -m robust.evaluate {COMMON} --output out --resume\n")
    (project / "out" / "figures").unlink()
    assert run(f"{COMMON} --output out --resume", capsys)[0] == 0


def test_the_command_to_repeat_has_what_it_took_to_finish(project, capsys):
    run(f"{COMMON} --output out", capsys)
    run(f"{COMMON} --skip-bad-images --output out --resume", capsys)
    assert json.loads((project / "out" / "report.json").read_text())["command"].endswith("--steps 4 --skip-bad-images")


def test_a_terminal_that_knows_no_dash_is_no_failure(project, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start(f"{COMMON} --attack fgsm,noise --output out".replace(" --steps 4", ""), project)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and "Report: out/report.html" in out


SLOW = "--model model.py:slow --data data.npz --eps 0.01,0.03 --steps 3 --batch-size 2 --attack pgd,noise"


def units(folder: Path) -> int:
    try:
        connection = sqlite3.connect(f"file:{folder / FILENAME}?mode=ro", uri=True)
        return connection.execute("SELECT count(*) FROM unit").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_killed_and_resumed_equals_uninterrupted(project, capsys):
    killed = []
    for enough in (1, 3):
        process = start(f"{SLOW} --output out --resume", project)
        wait_for(lambda enough=enough: units(project / "out") >= enough)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.append(units(project / "out"))
    assert killed == sorted(killed) and killed[-1] < 6  # 3 windows of 16 images, 2 attacks
    code, _, _ = run(f"{SLOW} --output out --resume", capsys)
    assert code == 0
    run(f"{SLOW} --output whole", capsys)
    assert (project / "out" / "samples.csv").read_bytes() == (project / "whole" / "samples.csv").read_bytes()
    whole, resumed = (pd.read_csv(project / name / "summary.csv") for name in ("whole", "out"))
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), whole.drop(columns="seconds"))


def test_a_run_begun_before_there_was_an_option_is_continued(project, capsys):
    line = f"{COMMON} --attack pgd,noise --output"
    run(f"{line} whole", capsys)
    run(f"{line} out", capsys)
    with closing(sqlite3.connect(project / "out" / FILENAME)) as store, store:
        identity = json.loads(store.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()[0])
        del identity["options"]["conv"], identity["options"]["eot"]
        store.execute("UPDATE meta SET value = ? WHERE key = 'identity'", (json.dumps(identity),))
        for table in ("unit", "result", "picture"):
            store.execute(f"DELETE FROM {table} WHERE attack = 'noise'")
    code, _, err = run(f"{line} out --resume --conv scratch", capsys)
    assert code == 2 and "options conv (torch there, scratch here)" in err
    assert run(f"{line} out --resume", capsys)[::2] == (0, "")
    assert (project / "out" / "samples.csv").read_bytes() == (project / "whole" / "samples.csv").read_bytes()


def test_ctrl_c_before_there_is_anything_to_keep(project, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("robust.models.load_model", interrupted)
    assert run(f"{COMMON} --output out", capsys) == (130, "", "interrupted\n")
    assert not (project / "out").exists()


def test_ctrl_c_while_a_run_that_is_resumed_is_loaded(project, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    assert run(f"{COMMON} --output out --quiet", capsys)[0] == 0
    monkeypatch.setattr("robust.models.load_model", interrupted)
    code, _, err = run(f"{COMMON} --output out --resume", capsys)
    go_on = f"python -m robust.evaluate {COMMON} --output out --resume"
    assert (code, err) == (130, f"interrupted; what is done is kept. To go on: {go_on}\n")


def test_a_second_ctrl_c_changes_nothing(project, capsys, monkeypatch):
    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)

    def again(path):
        signal.raise_signal(signal.SIGINT)
        return False

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("robust.models.load_model", interrupted)
    with monkeypatch.context() as patch:
        patch.setattr("robust.store.require_no_run", lambda path: patch.setattr("robust.store.holds_run", again))
        assert run(f"{COMMON} --output out", capsys) == (130, "", "interrupted\n")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # to the process's end


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(project):
    process = start(f"{SLOW} --output out", project)
    wait_for(lambda: units(project / "out") >= 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = err.splitlines()
    assert (
        line == f"interrupted; what is done is kept. To go on: python -m robust.evaluate {SLOW} --output out --resume"
    )
    assert units(project / "out") >= 1
