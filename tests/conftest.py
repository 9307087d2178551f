import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from reports import REPORTS
from toys import conv_net, images

# Small tensors gain nothing from threads, and test processes run side by side; this is for those that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton asks for this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes most of the time of a small run: only tests that are marked `pictures` have them drawn."""
    if request.node.get_closest_marker("pictures") is None:
        for name in [name for name in REPORTS if name.startswith("figures/")]:
            monkeypatch.delitem(REPORTS, name)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A command that was interrupted ignores a second Ctrl-C; the tests do not."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project of the networks and images that docs/performance.md names; skips without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models" / "architectures.py").is_file():
        pytest.skip("needs ../shared, which the project does not ship")
    return folder


@pytest.fixture
def model() -> nn.Module:
    return conv_net()


@pytest.fixture
def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    """40 images with the model's own predictions as labels, but for the first five, which are wrong."""
    x = images(40)
    y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 5
    return x, y
