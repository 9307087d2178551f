"""Python iterables as data."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from robust.data.batches import from_batches
from robust.errors import InputError

X = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 0, 2])


class Mapped(Dataset):
    """A map-style data set that never raises IndexError, as torch allows."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return X[index % 5], int(Y[index % 5])


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(X, Y)])


@pytest.mark.parametrize(
    ("data", "size"),
    [
        pytest.param((X, Y), 5, id="one pair of tensors"),
        pytest.param((X.numpy(), Y.numpy().astype(np.uint8)), 5, id="one pair of arrays"),
        pytest.param((X, pd.Series(Y.numpy())), 5, id="labels of pandas"),
        pytest.param([(X[:3], Y[:3]), (X[3:], Y[3:])], 5, id="batches"),
        pytest.param([(X[:3], Y[:3]), (X[3], Y[3]), (X[4], 2)], 5, id="batches and single samples"),
        pytest.param([(x, list(y)) for x, y in [(X, Y)]], 5, id="labels in a list"),
        pytest.param(list(zip(X, Y, strict=True)), 5, id="single samples"),
        pytest.param(TensorDataset(X, Y), 5, id="TensorDataset"),
        pytest.param(Mapped(), 5, id="a data set without __iter__"),
        pytest.param(DataLoader(TensorDataset(X, Y), batch_size=2), 5, id="DataLoader"),
        pytest.param(Endless(), None, id="IterableDataset"),
        pytest.param(((x, y) for x, y in zip(X, Y, strict=True)), None, id="a generator"),
        pytest.param((X.double(), Y), 5, id="float64"),
        pytest.param((X.numpy().astype(">f8"), Y.numpy()), 5, id="big-endian array"),
        pytest.param((X.clone().requires_grad_(), Y), 5, id="with gradients"),
        pytest.param((X.contiguous(memory_format=torch.channels_last), Y), 5, id="channels_last"),
    ],
)
def test_every_form_gives_the_same_samples(data, size):
    dataset = from_batches(data, num_classes=3)
    assert dataset.size == size
    samples = list(dataset)
    assert [sample.id for sample in samples] == ["00000", "00001", "00002", "00003", "00004"]
    assert [sample.y for sample in samples] == Y.tolist()
    assert all(type(sample.y) is int for sample in samples)
    for sample, x in zip(samples, X, strict=True):
        assert sample.x.dtype == torch.float32 and not sample.x.requires_grad and sample.x.is_contiguous()
        assert torch.equal(sample.x, x)
        assert sample.sha256 == hashlib.sha256(x.numpy().tobytes()).hexdigest()
    assert dataset.skipped == []


def test_two_pairs_are_two_samples_and_not_one_pair():
    assert len(list(from_batches([(X[0], 0), (X[1], 1)]))) == 2


def test_items_are_read_as_they_are_asked_for():
    read = []

    def stream():
        for k in range(5):
            read.append(k)
            yield X[k], Y[k]

    samples = iter(from_batches(stream()))
    assert read == []
    next(samples)
    assert read == [0]


def test_an_iterator_is_read_once():
    iterator = iter([(X, Y)])
    data = from_batches(iterator)
    list(data)
    for again in (data, from_batches(iterator)):  # as two calls share a generator
        with pytest.raises(InputError, match="read once: give a list or a DataLoader"):
            list(again)


def test_other_data_can_be_read_again():
    data = from_batches([(X, Y)])
    assert len(list(data)) == len(list(data)) == 5


def test_a_buffer_that_is_used_again_changes_no_earlier_sample():
    def stream():
        buffer = torch.empty(1, 3, 4, 4)
        for k in range(5):
            buffer.copy_(X[k : k + 1])
            yield buffer, Y[k : k + 1]

    assert torch.equal(torch.stack([sample.x for sample in from_batches(stream())]), X)


def test_a_read_only_array_is_taken():
    x = X.numpy().copy()
    x.flags.writeable = False
    assert len(list(from_batches((x, Y)))) == 5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([(X * 4.7 - 2.1, Y)], r"pixels must be in \[0, 1\]; found -[\d.]+ \.\. 2\.\d+ .*put the normalisation inside"),
        ([(X * 255, Y)], r"found .* \.\. 2\d\d\.\d+ in sample 00000 of data: divide by 255"),
        ([(X * float("nan"), Y)], "sample 00000 of data holds NaN"),
        ([(X.double() * 1e300, Y)], "NaN or infinity"),
        ([(X.double().numpy() * 1e300, Y)], "NaN or infinity"),
        ([((X * 255).byte(), Y)], "x of item 0 of data is torch.uint8: give floats .*divided by 255"),
        ([((X * 255).byte().numpy(), Y)], "x of item 0 of data is uint8: give floats"),
        ([(X, Y.float())], r"y of item 0 of data is float32 \(5,\).*y must be integers \(5,\)"),
        ([(X, Y == 1)], "y of item 0 of data is bool"),
        ([(X, Y[:4])], r"is int64 \(4,\) and x is \(5, 3, 4, 4\)"),
        ([(X, 1)], r"is int64 \(\)"),
        ([(X[0], Y[:1])], "y must be one integer$"),
        (
            [(X[:, 0], Y)],
            r"must be one integer; or is x a batch\? It needs a channel axis, \(N, C, H, W\): x\.unsqueeze",
        ),
        ((X[:, 0].numpy(), Y), r"It needs a channel axis, \(N, C, H, W\): .* or x\[:, None\]"),
        ([(X[:, 0, 0], Y)], r"x of item 0 of data has shape \(5, 4\): give batches \(N, C, H, W\)"),
        ([(X[..., :0], Y)], r"has shape \(5, 3, 4, 0\)"),
        ([(X, Y, Y)], r"item 0 of data is a tuple of 3 parts, not a pair \(x, y\): pick these, \(\(item"),
        ([{"x": X, "y": Y}], r"item 0 of data is a dict of x, y, not a pair \(x, y\): pick these"),
        (X, r"item 0 of data is a Tensor, not a pair \(x, y\): give images with their labels"),
        ([(X, one_hot(Y, 5))], r"y must be integers \(5,\), such as y\.argmax\(1\)"),
        ([(Image.new("RGB", (4, 4)), 0)], r"x of item 0 of data is a Image: .*transforms\.ToTensor\(\)"),
        ([(X, Y), (X[..., :3], Y)], "00005 is 3 x 4 x 3 .* and 00000 is 3 x 4 x 4"),
        ([(X, Y + 1)], "label 3 of 00001 is outside the model's 3 classes"),
        ([(X, Y - 1)], "label -1 of 00000 is outside"),
        (7, r"data must be an iterable of \(x, y\), not int$"),
        (Path("images"), r"not \w+Path: give a folder or file by its name, str\(path\)"),
    ],
)
def test_refusals(data, reason):
    with pytest.raises(InputError, match=reason) as refusal:
        list(from_batches(data, num_classes=3))
    assert "\n" not in str(refusal.value)


def test_an_empty_iterable_is_empty():
    assert list(from_batches([])) == [] and from_batches([]).size == 0
