"""A ResNet-50 checkpoint in torchvision's format where none can be downloaded: python scripts/fitted_resnet50.py FILE

Its convolutions are random, its batch-norms hold the statistics of the twenty sample images, and its classifier is
fitted to them by least squares: it is right on all of these, knows nothing else, and falls to attacks as others do.
So the whole of ResNet-50 can be run, attacked and compared, which is all that it is for.

    python -m robust.verify --model resnet50 --weights FILE
"""

from pathlib import Path
from typing import Annotated

import torch
import torchvision
import typer
from torch import nn
from torchvision.models.resnet import Bottleneck

from robust.data import load_data
from robust.models import load_model
from robust.models.model import Normalize

SIZE = 224
RIDGE = 1e-3  # of the features' mean square
# What each block adds to its input. With all of it, random blocks leave little of the image, and rounding as much.
BRANCH = 0.2


def main(path: Annotated[Path, typer.Argument(help="Where to write the state dict (.pth).")], seed: int = 0) -> None:
    """Write the checkpoint."""
    torch.manual_seed(seed)
    # Any ImageNet model names the samples' classes; the images are prepared at its size.
    samples = list(load_data("samples", load_model("efficientnet_lite0")))
    x = torch.stack([sample.x for sample in samples])  # (20, 3, 224, 224)
    y = torch.tensor([sample.y for sample in samples])
    network = torchvision.models.resnet50(weights=None)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the statistics of this one batch
        if isinstance(part, Bottleneck):
            nn.init.constant_(part.bn3.weight, BRANCH)
    weights = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
    features = nn.Sequential(Normalize(weights.mean, weights.std), *list(network.children())[:-1], nn.Flatten())
    with torch.no_grad():
        features.train()(x)
        found = features.eval()(x).double()  # (20, 2048)
        wanted = 10 * nn.functional.one_hot(y, 1000).double()
        # In its dual form, for there are fewer images than features.
        centred = found - found.mean(0)
        gram = centred @ centred.T
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(x), dtype=torch.float64)
        weight = centred.T @ torch.linalg.solve(gram + ridge, wanted - wanted.mean(0))  # (2048, 1000)
        network.fc.weight.copy_(weight.T)
        network.fc.bias.copy_(wanted.mean(0) - found.mean(0) @ weight)
    torch.save(network.state_dict(), path)


if __name__ == "__main__":
    typer.run(main)
