"""Data specs: what each source yields, and what is refused, with the reason."""

import gzip
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from data_files import IMAGENET_MODEL, image_bytes, model_of, pattern, write_tree
from robust.data import load_data
from robust.data.labels import label_of, set_labels
from robust.data.source import balanced
from robust.errors import InputError
from robust.models import imagenet
from robust.models.classes import CIFAR10, CIFAR100, FASHION_MNIST, ClassIndex
from robust.models.model import Preprocess

IMAGENET = replace(IMAGENET_MODEL, class_names=imagenet.class_names())
PETS = model_of(class_names=("dog", "giant panda, panda, coon bear", "cat"))


def labels(data) -> dict[str, int]:
    return {sample.id: sample.y for sample in data}


def check_refused(spec, model, reason: str, **options) -> None:
    """Loading or reading fails with one line that holds `reason`."""
    with pytest.raises(InputError, match=reason) as refusal:
        list(load_data(str(spec), model, **options))
    assert "\n" not in str(refusal.value)


def zipped(folder: Path) -> Path:
    """The folder's content as a zip beside it."""
    path = folder.parent / f"{folder.name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(params=["folder", "zip"])
def tree(request, tmp_path):
    """write_tree, into a folder or a zip: one layout, one behaviour."""

    def make(files: dict[str, bytes | int | None]) -> str:
        folder = write_tree(tmp_path / "data", files)
        return str(folder if request.param == "folder" else zipped(folder))

    return make


# Class folders


def test_class_folders_at_the_top(tree):
    data = load_data(tree({"dog/2.png": 2, "dog/1.png": 1, "cat/1.png": 3, "panda/x.PNG": 4}), PETS)
    assert labels(data) == {"cat/1.png": 2, "dog/1.png": 0, "dog/2.png": 0, "panda/x.PNG": 1}
    assert list(labels(data)) == sorted(labels(data))
    assert (data.size, data.class_names, data.skipped) == (4, None, [])
    sample = next(iter(data))
    np.testing.assert_array_equal(sample.x.permute(1, 2, 0).mul(255), pattern(seed=3))
    assert sample.sha256 == hashlib.sha256(image_bytes(pattern(seed=3))).hexdigest()


def test_one_split_folder_changes_nothing(tree):
    data = load_data(tree({"test/cat/1.png": 1, "test/dog/1.png": 2, "README.txt": b"about"}), PETS)
    assert labels(data) == {"cat/1.png": 2, "dog/1.png": 0}


def test_a_wrapped_split_folder_with_what_macos_adds(tree):
    files = {"pets/val/cat/1.png": 1, "__MACOSX/pets/._x": b"", ".DS_Store": b"", "pets/val/cat/.DS_Store": b""}
    assert labels(load_data(tree(files), PETS)) == {"cat/1.png": 2}


def test_two_split_folders_are_ambiguous(tmp_path):
    folder = write_tree(tmp_path / "d", {"train/cat/1.png": 1, "test/cat/1.png": 2})
    check_refused(folder, PETS, rf"ambiguous: test/, train/ hold folders.*Name one of them: {folder}/test$")
    check_refused(zipped(folder), PETS, "ambiguous: test/, train/ hold folders.*Zip one of them alone$")
    assert labels(load_data(f"{folder}/test", PETS)) == {"cat/1.png": 2}


def test_class_folders_beside_a_folder_of_folders_are_ambiguous(tree):
    check_refused(tree({"cat/1.png": 1, "test/cat/1.png": 2}), PETS, "ambiguous: test/ hold")


def test_a_class_may_be_called_train(tree):
    model = model_of(100, class_names=CIFAR100)
    assert labels(load_data(tree({"train/1.png": 1}), model)) == {"train/1.png": 90}


def test_images_outside_class_folders_are_refused(tree):
    check_refused(tree({"cat/1.png": 1, "lost.jpg": 2}), PETS, "lost.jpg lies in no class folder.*--label")


def test_names_match_in_any_case_by_synonym_and_with_separators(tree):
    files = {"Giant_Panda/1.png": 1, "coon-bear/1.png": 2, "DOG/1.png": 3}
    assert sorted(labels(load_data(tree(files), PETS)).values()) == [0, 1, 1]


def test_folders_that_are_no_class_are_named(tree):
    files = {"cat/1.png": 1, "axolotl/1.png": 1, "okapi/1.png": 1}
    check_refused(tree(files), PETS, r"2 of the 3 folders of .* are no class of net: axolotl, okapi;")


def test_a_folder_that_maps_to_no_class(tree):
    check_refused(tree({"okapi/1.png": 1}), PETS, "1 of the 1 folders of .* are no class of net: okapi")


def test_a_name_that_two_classes_have_is_ambiguous(tree):
    cranes = model_of(class_names=("crane", "gull", "crane"))
    check_refused(tree({"crane/1.png": 1}), cranes, "folder crane of .* is ambiguous: the classes 0, 2 of net")


def test_a_whole_name_goes_before_a_synonym_and_the_exact_case_before_both():
    index = ClassIndex(("maillot", "maillot, tank suit", "Cardigan", "cardigan"))
    assert index.find("maillot") == [0]
    assert index.find("tank suit") == [1]
    assert index.find("cardigan") == [3]
    assert index.find("CARDIGAN") == [2, 3]


def test_without_class_names_alphabetical_folders_are_the_classes(tree):
    data = load_data(tree({"b/1.png": 1, "a/1.png": 2, "c": None}), model_of(3))
    assert labels(data) == {"a/1.png": 0, "b/1.png": 1}
    assert data.class_names == ("a", "b", "c")


def test_without_class_names_there_must_be_a_folder_for_each_class(tree):
    check_refused(tree({"a/1.png": 1, "b/1.png": 1}), model_of(3), "2 class folders and net has 3 classes")


def test_numbers_whose_alphabetical_order_is_another_are_refused(tree):
    check_refused(tree({f"{k}/1.png": k for k in range(11)}), model_of(11), r"\(0, 1, 10, 2, \.\.\.\).*leading zeros")


def test_numbers_with_leading_zeros_are_in_order(tree):
    data = load_data(tree({f"{k:02d}/1.png": k for k in range(11)}), model_of(11))
    assert list(labels(data).values()) == list(range(11))


def test_numbers_within_names_are_numbers_too(tree):
    check_refused(tree({f"class_{k}/1.png": k for k in range(11)}), model_of(11), "class_0, class_1, class_10, class_2")


@pytest.mark.parametrize(
    "names", [["v1.2", "v1.3", "v2.1"], ["C-130", "C-47", "DC-3"], ["class (other)", "class 1", "class 2"]]
)
def test_numbers_that_are_in_order_or_in_names_that_differ_in_more(names, tree):
    """Of the latter a network was trained in the order of the alphabet."""
    data = load_data(tree({f"{name}/1.png": 1 for name in names}), model_of(3))
    assert list(labels(data).values()) == [0, 1, 2] and data.class_names == tuple(names)


def test_names_may_be_composed_otherwise(tree):
    """macOS takes the accent of a file's name apart."""
    data = load_data(tree({"cafe\u0301/1.png": 1, "dog/1.png": 2}), model_of(2, class_names=("dog", "caf\u00e9")))
    assert sorted(labels(data).values()) == [0, 1]


class Unsaid(zipfile.ZipInfo):
    """A member whose name is UTF-8, as most archivers write it, without the flag that says so."""

    def _encodeFilenameFlags(self):
        return self.filename.encode(), self.flag_bits


def test_what_a_zip_says_of_its_names(tmp_path):
    def written(*members: str | zipfile.ZipInfo) -> Path:
        with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            warnings.simplefilter("ignore")  # of a name that is there already
            for k, member in enumerate(members):
                archive.writestr(member, image_bytes(pattern(seed=k)))
        return tmp_path / "data.zip"

    utf8 = written(Unsaid("\u00c2me/1.png"), Unsaid("\u00c1bel/2.png"), "\u0394/3.png")
    data = load_data(str(utf8), model_of(3))
    assert labels(data) == {"\u00c1bel/2.png": 0, "\u00c2me/1.png": 1, "\u0394/3.png": 2}
    assert data.class_names == ("\u00c1bel", "\u00c2me", "\u0394")
    assert labels(load_data(str(written("./a/1.png", "b//2.png")), model_of(2))) == {"a/1.png": 0, "b/2.png": 1}
    check_refused(written("a/1.png", "../b/2.png"), model_of(2), r"holds \.\./b/2.png, which lies outside of it")
    check_refused(written("a/1.png", "b/2.png", "a/1.png"), model_of(2), "holds a/1.png twice")


def test_a_class_folder_that_is_a_link_to_nothing(tmp_path):
    folder = write_tree(tmp_path / "data", {"cat/1.png": 1})
    (folder / "latest.log").symlink_to(tmp_path / "unmounted")
    assert labels(load_data(str(folder), PETS)) == {"cat/1.png": 2}
    (folder / "dog").symlink_to(tmp_path / "unmounted")
    check_refused(folder, PETS, "dog is a link to nothing: mend or remove it")


WNID_FILES = {"n02510455/panda.png": 1, "n01440764/tench.png": 2, "n15075141/paper.png": 3}


def test_wnids_give_imagenets_indices_however_few_folders_exist(tree):
    """388 is the giant panda; the first and the last class are n01440764 and n15075141."""
    by_wnid = {"n01440764/tench.png": 0, "n02510455/panda.png": 388, "n15075141/paper.png": 999}
    spec = tree(WNID_FILES)
    assert labels(load_data(spec, IMAGENET_MODEL)) == by_wnid, "a model of 1000 classes that says nothing of them"
    few = model_of(class_names=("x", "y", "z"), wnids=("n15075141", "n02510455", "n01440764"))
    assert [*labels(load_data(spec, few)).values()] == [2, 1, 0], "the model's own wnids"


def test_wnids_are_no_indices_of_a_model_that_names_its_classes_in_another_order(tree):
    wnids, names = imagenet.wnids(), imagenet.class_names()
    folder = tree({"n02510455/1.png": 1, "n01440764/1.png": 1})
    by_wnid = model_of(1000, (3, 8, 8), class_names=wnids[::-1])
    assert list(labels(load_data(folder, by_wnid)).values()) == [999, 999 - 388]
    assert label_of("n02510455", by_wnid) == 999 - 388
    check_refused(folder, model_of(1000, (3, 8, 8), class_names=tuple(sorted(names))), "2 of the 2 folders .* no class")
    # Its own spelling of ImageNet's names is no other order.
    alike = ("tench, Tinca tinca", *names[1:134], "crane", *names[135:])
    assert list(labels(load_data(folder, model_of(1000, (3, 8, 8), class_names=alike))).values()) == [0, 388]


def test_wnids_need_a_model_of_imagenet(tree):
    check_refused(tree(WNID_FILES), model_of(3), "named by ImageNet wnids, and the 3 classes of net are not ImageNet's")


def test_an_unknown_wnid_is_named(tree):
    check_refused(tree({**WNID_FILES, "n99999999/1.png": 4}), IMAGENET_MODEL, "1 of the 4 .*: n99999999;.*or by wnids")


def test_empty_folders_are_refused(tree):
    check_refused(tree({"cat": None}), PETS, "holds no images")


@pytest.mark.parametrize("files", [{}, {"README.txt": b"about"}])
def test_a_folder_without_class_folders_is_refused(tmp_path, files):
    (tmp_path / "data").mkdir()
    check_refused(write_tree(tmp_path / "data", files), PETS, "data/ is empty: give a folder that holds class folders")


# Bad images

BAD = {"cat/1.png": 1, "cat/2.png": b"no image", "cat/3.png": image_bytes(pattern())[:100], "dog/1.png": 4}


def test_a_corrupt_image_is_named(tree):
    check_refused(tree(BAD), PETS, r"cat/2\.png is not an image; .*--skip-bad-images$")


def test_bad_images_are_skipped_and_named_where_asked_for(tree):
    data = load_data(tree({**BAD, "dog/Thumbs.db": b""}), PETS, skip_bad_images=True)
    for _ in range(2):
        assert list(labels(data)) == ["cat/1.png", "dog/1.png"]
        assert data.skipped == ["dog/Thumbs.db", "cat/2.png", "cat/3.png"]


def test_a_file_that_is_no_image_is_found_before_anything_is_read(tree):
    spec = tree({"cat/1.png": 1, "dog/notes.txt": b"x"})
    with pytest.raises(InputError, match=r"dog/notes\.txt is not an image"):
        load_data(spec, PETS)


def test_nothing_left_after_skipping_is_refused(tree):
    check_refused(tree({"cat/1.png": b""}), PETS, "no image of .* can be used", skip_bad_images=True)


def test_skipping_does_not_hide_images_of_another_size(tree):
    wide = image_bytes(pattern(8, 9))
    check_refused(tree({"cat/1.png": 1, "cat/2.png": wide}), PETS, "cat/2.png is 3 x 8 x 9", skip_bad_images=True)


def test_where_the_models_size_is_unknown_all_images_share_one(tree):
    spec = tree({"cat/1.png": 1, "cat/2.png": image_bytes(pattern(8, 9))})
    check_refused(spec, replace(PETS, input_size=None), r"^cat/2\.png is 3 x 8 x 9 .*cat/1\.png is 3 x 8 x 8 ")


def test_a_file_that_vanishes_is_named(tmp_path):
    folder = write_tree(tmp_path, {"cat/1.png": 1})
    data = load_data(str(folder), PETS)
    (folder / "cat/1.png").unlink()
    with pytest.raises(InputError, match=r"cat/1\.png cannot be read \(No such file"):
        list(data)


# Names of files that are no text, or no line of it


def test_an_id_is_one_line_and_other_text_as_it_is(tree):
    usual = ["a b.png", "é.png", "猫\u3000\xa0.png", "👩\u200d🔬.png"]
    odd = {
        "a\rb.png": r"a\rb.png",
        "a\n.png": r"a\n.png",
        "\x1b.png": r"\x1b.png",
        "\x85\u2028.png": r"\u0085\u2028.png",
    }
    names = {**dict(zip(usual, usual, strict=True)), **odd, r"a\rb.png": r"a\\rb.png"}
    spec = tree({f"cat/{name}": seed for seed, name in enumerate(names)})
    by_id = {sample.id: sample.sha256 for sample in load_data(spec, PETS)}
    hashes = [hashlib.sha256(image_bytes(pattern(seed=seed))).hexdigest() for seed in range(len(names))]
    assert by_id == dict(zip([f"cat/{id}" for id in names.values()], hashes, strict=True))


def test_a_name_that_is_not_utf_8_is_an_id_nevertheless(tmp_path):
    names = {b"\xff\xfe.png": r"\xff\xfe.png", b"\x85.png": r"\x85.png", "\x85.png".encode(): r"\u0085.png"}
    folder = write_tree(tmp_path, {f"cat/{os.fsdecode(name)}": seed for seed, name in enumerate(names)})
    data = load_data(str(folder), PETS)
    assert {sample.id: sample.sha256 for sample in data} == {
        f"cat/{id}": hashlib.sha256(image_bytes(pattern(seed=seed))).hexdigest()
        for seed, id in enumerate(names.values())
    }
    assert labels(load_data(str(folder), PETS, limit=2)).items() < labels(data).items()


def test_a_folder_and_classes_whose_names_are_not_utf_8(tmp_path):
    odd = os.fsdecode(b"\xff\n")
    folder = write_tree(tmp_path / odd, {f"z{odd}/{odd}.png": 1, "a/1.png": 2, "z/notes.txt": b""})
    data = load_data(str(folder), model_of(3), skip_bad_images=True)
    assert data.name == rf"{tmp_path}/\xff\n"
    assert data.class_names == ("a", "z", r"z\xff\n")
    assert labels(data) == {"a/1.png": 0, r"z\xff\n/\xff\n.png": 2}
    check_refused(folder, PETS, r"3 of the 3 folders of .*/\\xff\\n are no class of net: a, z, z\\xff\\n;")


def test_bad_images_are_named_in_valid_text(tmp_path):
    odd = os.fsdecode(b"\xff\n")
    folder = write_tree(tmp_path, {f"cat/{odd}.png": b"no image", f"cat/{odd}.txt": b"", "dog/1.png": 1})
    data = load_data(str(folder), PETS, skip_bad_images=True)
    assert labels(data) == {"dog/1.png": 0}
    assert data.skipped == [r"cat/\xff\n.txt", r"cat/\xff\n.png"]
    check_refused(folder, PETS, r"cat/\\xff\\n\.txt is not an image")
    (folder / f"cat/{odd}.txt").unlink()
    check_refused(folder, PETS, r"cat/\\xff\\n\.png is not an image")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_among_the_images_is_named_and_not_waited_for(tmp_path):
    folder = write_tree(tmp_path, {"cat/1.png": 1, "dog/1.png": 2})
    os.mkfifo(folder / "dog" / "2.png")
    check_refused(folder, PETS, "dog/2.png is not a file; mend or remove it")
    assert list(labels(load_data(str(folder), PETS, skip_bad_images=True))) == ["cat/1.png", "dog/1.png"]


# Zips


def test_what_is_no_zip_is_refused(tmp_path):
    path = tmp_path / "data.zip"
    path.write_bytes(b"PK but not really")
    check_refused(path, PETS, r"data\.zip cannot be read as a zip \(")


def test_a_damaged_member_is_a_bad_image(tmp_path):
    path = zipped(write_tree(tmp_path / "data", {"cat/1.png": 1, "cat/2.png": 2}))
    raw = bytearray(path.read_bytes())
    raw[raw.index(image_bytes(pattern(seed=1))) + 60] ^= 255
    path.write_bytes(raw)
    check_refused(path, PETS, r"cat/1\.png cannot be read \(Bad CRC-32")
    assert list(labels(load_data(str(path), PETS, skip_bad_images=True))) == ["cat/2.png"]


# Arrays


def npz(folder: Path, **arrays) -> str:
    path = folder / "data.npz"
    np.savez_compressed(path, **arrays)
    return str(path)


Y = np.array([0, 2, 1, 0])
UINT8 = np.stack([pattern(seed=seed) for seed in range(4)])  # (4, 8, 8, 3)
FLOAT = UINT8.transpose(0, 3, 1, 2).astype(np.float32) / 255  # (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("x", "channels"),
    [
        (UINT8, 3), (FLOAT, 3), (FLOAT.astype(np.float64), 3), (FLOAT.astype(">f4"), 3),
        (UINT8[..., 0], 1), (UINT8[..., :1], 1), (FLOAT[:, :1], 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, x, channels, known, save):
    save(tmp_path / "data.npz", x=x, y=Y.astype(np.uint8), other=np.zeros(3))
    model = model_of(3, (channels, 8, 8) if known else None)
    data = load_data(str(tmp_path / "data.npz"), model)
    for _ in range(2):
        samples = list(data)
        assert [sample.id for sample in samples] == ["00000", "00001", "00002", "00003"]
        assert [sample.y for sample in samples] == list(Y)
        torch.testing.assert_close(
            torch.stack([sample.x for sample in samples]), torch.from_numpy(FLOAT[:, :channels].copy()), rtol=0, atol=0
        )
        assert samples[1].sha256 == hashlib.sha256(x[1].tobytes()).hexdigest()


NAN = np.where(np.arange(FLOAT.size).reshape(FLOAT.shape) == 300, np.nan, FLOAT)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": UINT8, "y": Y}, r"no array x \(it holds images, y\)"),
        ({"x": UINT8}, "no array y"),
        ({}, r"no array x and no y \(it holds none\)"),
        ({"train/x": UINT8, "train/y": Y}, r"no array x and no y \(it holds train/x, train/y\)"),
        ({"x.1": UINT8, "y\n": Y}, r"no array x and no y \(it holds x\.1, y\\n\)"),
        ({"x": UINT8.astype(np.int64), "y": Y}, "x of .* is int64 .*give uint8"),
        ({"x": UINT8 > 9, "y": Y}, "x of .* is bool"),
        ({"x": UINT8.astype(object), "y": Y}, "x of .* is object"),
        ({"x": UINT8, "y": Y.astype(object)}, "y of .* is object"),
        ({"x": UINT8, "y": Y.astype(float)}, r"y of .* is float64 \(4,\): give integers \(N,\)"),
        ({"x": UINT8, "y": np.eye(4, dtype=int)}, r"y of .* is int64 \(4, 4\)"),
        ({"x": UINT8[0, 0], "y": Y[:1]}, r"x of .* is uint8 \(8, 3\)"),
        ({"x": FLOAT[:, 0], "y": Y}, r"x of .* is float32 \(4, 8, 8\): give .*\(N, C, H, W\)"),
        ({"x": UINT8, "y": Y[:3]}, "has 4 rows and y has 3"),
        ({"x": UINT8[:0], "y": Y[:0]}, "holds no image"),
        ({"x": UINT8.transpose(0, 3, 1, 2), "y": Y}, r"3, 8, 8\), so its images are 8 x 3 x 8.*uint8 is \(N, H, W\)"),
        ({"x": FLOAT.transpose(0, 2, 3, 1), "y": Y}, r"so its images are 8 x 8 x 3 .*float is \(N, C, H, W\)"),
        ({"x": UINT8[..., 0], "y": Y}, "so its images are 1 x 8 x 8 .* and net takes 3 x 8 x 8"),
        ({"x": UINT8[:, :7], "y": Y}, "so its images are 3 x 7 x 8"),
        ({"x": FLOAT * 255, "y": Y}, r"must be in \[0, 1\]; found \d+ \.\. 2\d\d in x\[0\] of .*: divide by 255"),
        ({"x": FLOAT * 2 - 1, "y": Y}, r"found -1 \.\. 0\.9\d+ in x\[0\] .*put the normalisation inside the model"),
        ({"x": FLOAT + np.float32(1e-6), "y": Y}, r"found .* \.\. 1\.00000095 in .*: clip .* x\.clip\(0, 1\)"),
        ({"x": np.nextafter(FLOAT, np.float32(2)), "y": Y}, r"found .* \.\. 1\.00000012 in"),
        ({"x": FLOAT - np.float32(1e-6), "y": Y}, r"found -.*e-07 \.\. .*: clip"),
        ({"x": FLOAT + np.float32(3e-6), "y": Y}, "put the normalisation inside the model"),
        ({"x": NAN, "y": Y}, r"x\[1\] of .* holds NaN"),
        ({"x": FLOAT.astype(float) * 1e300, "y": Y}, "holds NaN or infinity"),
        ({"x": np.asfortranarray(UINT8), "y": Y}, r"Fortran order: save numpy\.ascontiguousarray\(x\)"),
        ({"x": UINT8, "y": Y + 1}, r"label 3 of 00001 is outside the model's 3 classes, 0 \.\. 2"),
        ({"x": UINT8, "y": Y - 1}, "label -1 of 00000 is outside"),
    ],
)
def test_npz_refusals(tmp_path, arrays, reason):
    with pytest.raises(InputError, match=reason) as refusal:
        load_data(npz(tmp_path, **arrays), model_of(3))
    assert "\n" not in str(refusal.value)


def test_npz_layout_is_checked_where_the_size_is_unknown(tmp_path):
    spec = npz(tmp_path, x=FLOAT.transpose(0, 2, 3, 1), y=Y)
    check_refused(spec, model_of(3, None), "so it has 8 channels: float is")


def test_what_is_no_npz_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    path.write_bytes(b"not a zip")
    check_refused(path, model_of(), r"data\.npz cannot be read as an \.npz \(File is not a zip file\)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no array")
        archive.writestr("y.npy", b"no array")
    check_refused(path, model_of(), "cannot be read as an .npz")


def test_members_of_an_npz_that_numpy_does_not_name_so_are_no_arrays(tmp_path):
    npz(tmp_path, x=UINT8, y=Y)
    with zipfile.ZipFile(tmp_path / "data.npz") as archive, zipfile.ZipFile(tmp_path / "bare.npz", "w") as bare:
        for name in ("x", "y"):
            bare.writestr(name, archive.read(f"{name}.npy"))
    check_refused(tmp_path / "bare.npz", model_of(), r"no array x and no y \(it holds none\)")


def test_an_npz_that_ends_early_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", UINT8)
    np.save(tmp_path / "y.npy", Y)
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-1])
        archive.write(tmp_path / "y.npy", "y.npy")
    check_refused(tmp_path / "data.npz", model_of(), "it ends early")


def test_npz_rows_of_a_subset_are_the_same_rows(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    y = np.arange(60) % 3
    data = load_data(npz(tmp_path, x=x, y=y), model_of(3, (1, 8, 8)), limit=9)
    for sample in data:
        row = int(sample.id)
        assert sample.y == y[row]
        np.testing.assert_array_equal(sample.x[0] * 255, x[row])


# One image


@pytest.mark.parametrize(
    ("label", "y"), [("panda", 1), ("Giant-Panda", 1), ("giant panda, panda, coon bear", 1), ("2", 2), ("cat", 2)]
)
def test_one_image(tmp_path, label, y):
    (tmp_path / "panda.png").write_bytes(image_bytes(pattern()))
    data = load_data(str(tmp_path / "panda.png"), PETS, label=label)
    assert labels(data) == {"panda.png": y}
    assert data.size == 1


def test_two_names_of_imagenet_are_ambiguous_and_no_others():
    others = [
        name
        for label, name in enumerate(imagenet.class_names())
        if name in imagenet.wordnet_names()[:label] + imagenet.wordnet_names()[label + 1 :]
    ]
    assert others == ["crane", "maillot"]
    for label in (0, 134, 264, 474, 639, 999):
        assert label_of(imagenet.class_names()[label], IMAGENET) == label


@pytest.mark.parametrize("skip_bad_images", [False, True])
def test_one_image_that_cannot_be_used(tmp_path, skip_bad_images):
    (tmp_path / "panda.png").write_bytes(b"no image")
    options = {"label": "panda", "skip_bad_images": skip_bad_images}
    check_refused(tmp_path / "panda.png", PETS, "is not an image; mend it, or give another image$", **options)


def test_one_image_labelled_by_wnid(tmp_path):
    (tmp_path / "panda.jpg").write_bytes(image_bytes(pattern(300, 400), "JPEG"))
    (sample,) = load_data(str(tmp_path / "panda.jpg"), IMAGENET_MODEL, label="n02510455")
    assert (sample.y, sample.x.shape) == (388, (3, 224, 224))


@pytest.mark.parametrize(
    ("model", "label", "reason"),
    [
        (PETS, None, r"what does .*panda\.png show\? Name its class with --label"),
        (PETS, "pandda", "unknown label 'pandda'; did you mean panda"),
        (model_of(class_names=("sandal", "giant panda", "gull")), "PANDA", r"did you mean giant panda\?$"),
        (PETS, "3", r"label 3 is outside the model's classes, 0 \.\. 2$"),
        (PETS, "-1", r"label -1 is outside"),
        (model_of(), "panda", r"label 'panda' is no class: net has no class names, so it is a number, 0 \.\. 2"),
        (model_of(class_names=("crane", "gull", "crane")), "crane", r"classes 0 \(crane\), 2 \(crane\): give"),
        (IMAGENET, "crane", r"names the classes 134 \(crane bird\), 517 \(crane\): give the number of one"),
        (IMAGENET, "Crane", r"names the classes 134 \(crane bird\), 517 \(crane\)"),
        (IMAGENET, "CARDIGAN", r"names the classes 264 \(Cardigan\), 474 \(cardigan\)"),
    ],
)
def test_one_image_with_a_label_that_is_not_clear(tmp_path, model, label, reason):
    (tmp_path / "panda.png").write_bytes(image_bytes(pattern()))
    check_refused(tmp_path / "panda.png", model, reason, label=label)


def test_a_number_is_a_name_where_classes_are_called_by_numbers():
    limits = model_of(class_names=("10", "30", "1"))
    assert [label_of(name, limits) for name in ("10", "1")] == [0, 2]
    with pytest.raises(InputError, match="unknown label '0'"):
        label_of("0", limits)
    assert [label_of(str(digit), model_of(10, class_names=tuple("0123456789"))) for digit in range(10)] == list(
        range(10)
    )


# foolbox's samples


@pytest.mark.parametrize(
    ("spec", "model", "first"),
    [
        ("samples", IMAGENET_MODEL, ("imagenet_00_243.jpg", 243)),
        ("samples", model_of(10, (3, 32, 32)), ("cifar10_00_3.png", 3)),
        ("samples", model_of(100, (3, 32, 32)), ("cifar100_00_49.png", 49)),
        ("samples", model_of(10, (1, 28, 28)), ("mnist_00_7.png", 7)),
        ("samples:fashionmnist", model_of(10, (1, 28, 28)), ("fashionMNIST_00_9.png", 9)),
        ("Samples:CIFAR10", model_of(10, None), ("cifar10_00_3.png", 3)),
    ],
)
def test_samples_suit_the_model(spec, model, first):
    data = load_data(spec, model)
    samples = list(data)
    assert (samples[0].id, samples[0].y) == first
    assert len(samples) == data.size == 20
    assert data.class_names is not None and len(data.class_names) == model.num_classes


SHUFFLED = ("truck", "ship", "horse", "frog", "dog", "deer", "cat", "bird", "car", "plane")


@pytest.mark.parametrize(
    ("names", "channels", "first"),
    [
        (SHUFFLED, 3, ("cifar10_00_3.png", 6)),
        (("plane", "car", *CIFAR10[2:]), 3, ("cifar10_00_3.png", 3)),
        (("airplane", "x", "bird", "y", *CIFAR10[4:]), 3, ("cifar10_00_3.png", 3)),
        (("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), 1, ("mnist_00_7.png", 7)),
        (tuple("9876543210"), 1, ("mnist_00_7.png", 2)),
        (tuple(f"class {k}" for k in range(10)), 3, ("cifar10_00_3.png", 3)),
        (tuple(f"{k} - digit" for k in range(10)), 1, ("mnist_00_7.png", 7)),
        (tuple(name.lower() for name in FASHION_MNIST), 1, ("fashionMNIST_00_9.png", 9)),
    ],
)
def test_samples_are_those_of_the_models_class_names(names, channels, first):
    data = load_data("samples", model_of(10, (channels, 32, 32), class_names=names, preprocess=Preprocess(32, 32)))
    assert (next(iter(data)).id, next(iter(data)).y) == first
    assert data.class_names == names


@pytest.mark.parametrize(
    ("spec", "names", "reason"),
    [
        ("samples", ("tench", "church", *"abcdefgh"), "no samples are of the classes of net: name data with --data"),
        ("samples:cifar10", ("tench", "church", *"abcdefgh"),
         "the classes of the cifar10 samples are not those of net, which has none, or several, called cat, ship, "
         r"airplane, frog, \.\.\., but tench, church, a, b, \.\.\.: give data of its classes"),
        ("samples:cifar10", (*"abcdefgh", "cat", "cat"), "several, called cat, ship"),
    ],
)  # fmt: skip
def test_samples_of_other_classes_are_refused(spec, names, reason):
    check_refused(spec, model_of(10, (3, 32, 32), class_names=names), reason)


def test_samples_are_resized_to_the_models_input_and_not_cropped():
    """As foolbox gives them, but for the filter; its images are square, 512 pixels a side."""
    model = model_of(1000, (3, 64, 64), preprocess=Preprocess(80, 64, "bicubic"))
    sample = next(iter(load_data("samples", model)))
    import foolbox

    with Image.open(Path(foolbox.__file__).parent / "data" / sample.id) as image:
        theirs = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(sample.x.permute(1, 2, 0).mul(255).round(), theirs)


def test_the_labels_of_samples_are_the_usual_indices():
    """Seen by eye: the first images are a boxer, a frog with label 6 and a mountain."""
    names = load_data("samples", IMAGENET_MODEL).class_names
    assert names is not None and names[243] == "bull mastiff"
    assert CIFAR10[6] == "frog" and CIFAR100[49] == "mountain"
    assert list(CIFAR10) == sorted(CIFAR10) and list(CIFAR100) == sorted(CIFAR100)


@pytest.mark.parametrize(
    ("spec", "model", "reason"),
    [
        ("samples", model_of(7), "no samples suit the 7 classes of net: name data with --data"),
        ("samples", model_of(10, None), "Name them, as in --data samples:cifar10"),
        ("samples", model_of(1000, None), "--input-size"),
        ("samples:cifar10", IMAGENET_MODEL, "the cifar10 samples have 10 classes and net has 1000"),
        ("samples:cifar", IMAGENET_MODEL, "unknown samples 'cifar'; did you mean cifar10"),
    ],
)
def test_samples_that_do_not_suit_are_refused(spec, model, reason):
    check_refused(spec, model, reason)


@pytest.mark.parametrize("spelled", ["torchvision's", "WordNet's", "wnids"])
@pytest.mark.parametrize("theirs", ["torchvision's", "WordNet's"])
def test_spellings_of_imagenets_names_are_no_other_order(spelled, theirs):
    """WordNet calls two classes crane and two maillot, and what is a "cardigan" to one is a dog to the other."""
    info = ImageNetInfo()
    names = {
        "torchvision's": imagenet.class_names(), "wnids": imagenet.wnids(),
        "WordNet's": tuple(info.index_to_description(k, detailed=False) for k in range(1000)),
    }  # fmt: skip
    model = model_of(1000, (3, 8, 8), class_names=names[spelled])
    known = [f"{name}, {wnid}" for name, wnid in zip(names[theirs], imagenet.wnids(), strict=True)]
    assert set_labels(range(1000), known, model, "ImageNet") == list(range(1000))
    assert imagenet.wnids_of(1000, model.class_names) == imagenet.wnids()
    reversed_order = replace(model, class_names=names[spelled][::-1])
    moved = set_labels([0, 388, 281], known, reversed_order, "ImageNet")
    assert moved == [999, 999 - 388, 999 - 281]


def test_classes_that_changed_places_are_another_order():
    """Few as they are; and of few classes, half are not enough to know them by."""
    pairs = {0: 1, 1: 0, 40: 81, 81: 40}
    names = tuple(CIFAR100[pairs.get(label, label)] for label in range(100))
    moved = set_labels([0, 1, 2, 40, 81], CIFAR100, model_of(100, class_names=names), "CIFAR-100")
    assert moved == [1, 0, 2, 81, 40]
    swapped = ("goldfish", "tench", *imagenet.class_names()[2:])
    assert imagenet.wnids_of(1000, swapped) is None
    one = model_of(100, class_names=("x", *CIFAR100[1:40], "apple", *CIFAR100[41:]))
    assert set_labels([0, 1], CIFAR100, one, "CIFAR-100") == [40, 1]
    half = model_of(10, class_names=(*CIFAR10[:5], "apple", "lamp", "plate", "chair", "bus"))
    with pytest.raises(InputError, match="none, or several, called frog, ship, but"):
        set_labels([0, 6, 8], CIFAR10, half, "CIFAR-10")


# torchvision's sets, in its own formats on disk


IMAGENETTE = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
              "n03394916", "n03417042", "n03425413", "n03445777", "n03888257")  # fmt: skip


@pytest.fixture
def integrity_unchecked(monkeypatch):
    """The files written here are not those whose MD5 torchvision knows."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())


def test_cifar10_of_torchvision(tmp_path, integrity_unchecked):
    x = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps({"data": x.reshape(6, -1), "labels": [3, 8, 8, 0, 6, 1]}))
    for batch in range(1, 6):  # only looked at for being there
        (folder / f"data_batch_{batch}").write_bytes(b"")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}))
    data = load_data("CIFAR10", model_of(10, (3, 32, 32)), data_root=tmp_path)
    samples = list(data)
    assert labels(data) == dict(zip([f"{row:05d}" for row in range(6)], [3, 8, 8, 0, 6, 1], strict=True))
    assert data.class_names == CIFAR10
    np.testing.assert_array_equal(torch.stack([sample.x for sample in samples]).mul(255).round(), x)
    assert samples[2].sha256 == hashlib.sha256(x[2].transpose(1, 2, 0).tobytes()).hexdigest()


def test_torchvision_sets_are_labelled_by_the_models_class_names(tmp_path):
    jpeg = image_bytes(pattern(40, 60), "JPEG")
    root = write_tree(tmp_path, {f"imagenette2/val/{wnid}/1.JPEG": jpeg for wnid in IMAGENETTE})
    names = ("tench", "English springer", "cassette player", "chain saw", "church",
             "French horn", "garbage truck", "gas pump", "golf ball", "parachute")  # fmt: skip
    model = model_of(10, (3, 32, 32), preprocess=Preprocess(36, 32))
    for order in (list(range(10)), list(range(9, -1, -1))):
        named = replace(model, class_names=tuple(names[label] for label in order))
        assert list(labels(load_data("imagenette", named, data_root=root)).values()) == order
    check_refused("imagenette", replace(model, class_names=CIFAR10), "the classes of Imagenette are not those of net",
                  data_root=root)  # fmt: skip


PHOTO = image_bytes(pattern(40, 60), "JPEG")


def test_imagenette_is_labelled_by_wnids_for_a_network_of_imagenet(tmp_path):
    """However many of its folders are there; torchvision's labels are their ranks."""
    there = [wnid for wnid in IMAGENETTE if wnid != "n03000684"]
    root = write_tree(tmp_path, {f"imagenette2/val/{wnid}/1.JPEG": PHOTO for wnid in there})
    data = load_data("imagenette", IMAGENET_MODEL, data_root=root)
    assert list(labels(data).values()) == [imagenet.wnids().index(wnid) for wnid in there]
    check_refused("imagenette", model_of(10, None), "has 9 of its 10 class folders, .* by their order", data_root=root)


@pytest.mark.parametrize("missing", [(100,), (905,), ()], ids=str)
def test_imagenet_is_labelled_by_wnids(missing, tmp_path):
    """With folders left out, and of classes that share a name: two cranes and two maillots."""
    there = [index for index in (134, 517, 638, 639, 900, 999, *range(120)) if index not in missing]
    wnids = imagenet.wnids()
    root = write_tree(tmp_path, {f"val/{wnids[index]}/1.JPEG": PHOTO for index in there})
    info = ImageNetInfo()
    names = [info.index_to_description(index, detailed=False) for index in range(1000)]
    torch.save((dict(zip(wnids, map(tuple, (name.split(", ") for name in names)), strict=True)), []), root / "meta.bin")
    data = load_data("imagenet", IMAGENET_MODEL, data_root=root)
    assert sorted(labels(data).values()) == sorted(there)
    check_refused("imagenet", model_of(1000, class_names=names[::-1]), "of its 1000 class folders", data_root=root)


def test_mnist_of_torchvision(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = np.array([0x803, 4, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(np.array([0x801, 4], ">i4").tobytes() + bytes([7, 2, 1, 0]))
        (raw / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b""))
    data = load_data("mnist", model_of(10, (1, 28, 28)), data_root=tmp_path)
    assert list(labels(data).values()) == [7, 2, 1, 0]
    np.testing.assert_array_equal(torch.stack([sample.x[0] for sample in data]).mul(255).round(), x)


def test_files_of_torchvision_are_decoded_here(tmp_path):
    """Imagenette's layout; a file that torchvision's loader would convert in silence is refused."""
    jpeg = image_bytes(pattern(40, 60), "JPEG")
    cmyk = image_bytes(pattern(40, 60, 4), "PNG")
    root = write_tree(tmp_path, {f"imagenette2/val/{wnid}/1.JPEG": jpeg for wnid in IMAGENETTE})
    data = load_data("imagenette", model_of(10, (3, 32, 32), preprocess=Preprocess(36, 32)), data_root=root)
    assert labels(data) == {f"imagenette2/val/{wnid}/1.JPEG": label for label, wnid in enumerate(IMAGENETTE)}
    assert data.class_names is not None and data.class_names[0] == "tench, Tinca tinca"
    assert next(iter(data)).sha256 == hashlib.sha256(jpeg).hexdigest()
    (root / "imagenette2/val" / IMAGENETTE[0] / "1.JPEG").write_bytes(cmyk)
    with pytest.raises(InputError, match=r"n01440764/1\.JPEG has transparent pixels"):
        list(data)


@pytest.mark.parametrize(
    ("spec", "model", "root", "reason"),
    [
        ("cifar10", model_of(10), None, r"with --data-root \(an image folder of this name is \./cifar10\)"),
        (
            "cifar10",
            model_of(10),
            ".",
            r"there is no readable CIFAR10 under --data-root .*Dataset not found.*download=True\) fetches",
        ),
        ("mnist", model_of(10), ".", "there is no readable MNIST under"),
        ("svhn", model_of(10), ".", "there is no readable SVHN under"),
        ("stl10", model_of(10), ".", "there is no readable STL10 under"),
        ("usps", model_of(10), ".", r"there is no readable USPS under .*No such file"),
        ("dtd", model_of(47), ".", "there is no readable DTD under"),
        ("food101", model_of(101), ".", "there is no readable Food101 under"),
        ("flowers102", model_of(102), ".", "there is no readable Flowers102 under"),
        ("fgvcaircraft", model_of(100), ".", "there is no readable FGVCAircraft under"),
        ("country211", model_of(211), ".", "there is no readable Country211 under"),
        ("places365", model_of(365), ".", "there is no readable Places365 under"),
        (
            "imagenet",
            IMAGENET_MODEL,
            ".",
            r"there is no readable ImageNet under .*devkit.*see torchvision's documentation",
        ),
        ("cifar10", IMAGENET_MODEL, ".", "cifar10 has 10 classes and net has 1000"),
        ("cifar10", model_of(10), "~nobody-of-that-name", "under --data-root ~nobody-of-that-name"),
    ],
)
def test_torchvision_sets_that_are_not_there(tmp_path, spec, model, root, reason):
    check_refused(spec, model, reason, data_root=root and (tmp_path if root == "." else Path(root)))
    assert list(tmp_path.iterdir()) == [], "nothing is downloaded, nothing made"


# Specs


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("cifar11", r"unknown data 'cifar11'; did you mean cifar10 .*\(and there is no such file or folder\)"),
        ("no/such/folder", "^no/such/folder is no file or folder: give an image folder, a .zip"),
        ("missing.zip", "^missing.zip is no file or folder"),
        ("missing.npz", "is no file or folder"),
        ("missing.jpg", "is no file or folder"),
        ("~nobody-of-that-name/val", "^~nobody-of-that-name/val is no file or folder"),
    ],
)
def test_unknown_specs(spec, reason):
    check_refused(spec, PETS, reason)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tree(tmp_path / "pets", {"cat/1.png": 1})
    assert labels(load_data("~/pets", PETS)) == {"cat/1.png": 2}


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    check_refused(tmp_path / "data.csv", PETS, r"data\.csv is not data: give an image folder, a \.zip")


def test_a_label_is_for_one_image():
    check_refused("samples", IMAGENET_MODEL, "--label is for a single image", label="panda")


# --limit


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(limit):
    check_refused("samples", IMAGENET_MODEL, "limit must be at least 1", limit=limit)


IDS = [f"{row:05d}" for row in range(200)]
FOUR = [row % 3 if row < 180 else 3 for row in range(200)]  # 60, 60, 60 and 20


@pytest.mark.parametrize("limit", [1, 2, 4, 7, 30, 80])
def test_the_subset_is_balanced_within_one(limit):
    counts = Counter(FOUR[position] for position in balanced(IDS, FOUR, limit, 0))
    shares = [counts[label] for label in range(4)]
    assert sum(shares) == limit and max(shares) - min(shares) <= 1


def test_a_class_that_runs_out_leaves_its_share_to_the_others():
    counts = Counter(FOUR[position] for position in balanced(IDS, FOUR, 110, 0))
    assert [counts[label] for label in range(4)] == [30, 30, 30, 20]


def test_the_subset_is_in_data_order_and_depends_on_the_seed_alone():
    chosen = balanced(IDS, FOUR, 40, 0)
    assert all(one < other for one, other in pairwise(chosen))
    assert chosen == balanced(IDS, FOUR, 40, 0) != balanced(IDS, FOUR, 40, 1)
    backwards = balanced(IDS[::-1], FOUR[::-1], 40, 0)
    assert {IDS[::-1][position] for position in backwards} == {IDS[position] for position in chosen}
    assert set(chosen) < set(balanced(IDS, FOUR, 41, 0))


def test_a_limit_above_the_size_takes_everything():
    assert balanced(IDS, FOUR, 200, 0) == balanced(IDS, FOUR, 10**9, 0) == list(range(200))


def test_the_subset_is_fixed_for_good():
    """Numbers of earlier releases stay comparable only while this does not change."""
    assert balanced(IDS, FOUR, 4, 0) == [19, 54, 116, 182]


def test_a_subset_of_a_folder(tree):
    spec = tree({f"{name}/{k}.png": k for name in ("cat", "dog", "panda") for k in range(5)})
    data = load_data(spec, PETS, limit=6, seed=3)
    assert data.size == 6
    assert Counter(labels(data).values()) == {0: 2, 1: 2, 2: 2}
    assert labels(data) == labels(load_data(spec, PETS, limit=6, seed=3))
    assert labels(data) != labels(load_data(spec, PETS, limit=6, seed=4))


# Memory


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Peak Python memory while streaming; the ids and labels of 1,800 more samples are all that is added."""
    import tracemalloc

    x = np.random.default_rng(0).integers(0, 256, (2_000, 32, 32, 3), np.uint8)
    y = np.arange(2_000) % 10
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for row in range(2_000):
            archive.writestr(f"{y[row]}/{row}.bmp", image_bytes(x[row], "BMP"))
    model = model_of(10, (3, 32, 32))

    def peak(spec: str, limit: int) -> int:
        tracemalloc.start()
        assert sum(1 for _ in load_data(spec, model, limit=limit)) == limit
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    for spec in (npz(tmp_path, x=x, y=y), str(tmp_path / "data.zip")):
        peak(spec, 10)  # imports
        assert peak(spec, 2_000) - peak(spec, 200) < 400_000, spec  # the images are 5.5 MB, 22 as floats


# Real data


def test_the_shared_cifar10_zip(shared):
    data = load_data(str(shared / "data" / "cifar10_test.zip"), model_of(10, (3, 32, 32)), limit=50)
    assert Counter(sample.id.split("/")[0] for sample in data) == dict.fromkeys(CIFAR10, 5)
    assert all(CIFAR10[sample.y] == sample.id.split("/")[0] for sample in data)
    assert data.class_names == CIFAR10


def test_the_shared_mnist_npz(shared):
    path = shared / "data" / "mnist_test.npz"
    arrays = np.load(path)
    for sample in load_data(str(path), model_of(10, (1, 28, 28)), limit=100):
        np.testing.assert_array_equal(sample.x[0] * 255, arrays["x"][int(sample.id)])
        assert sample.y == arrays["y"][int(sample.id)]


def test_the_shared_imagenet_folder(shared):
    """Every second class is there, so the k-th folder is not class k; the panda's is 388."""
    data = load_data(str(shared / "data" / "imagenet_sample"), IMAGENET_MODEL)
    assert data.size == 500
    by_id = dict(zip(data._source.ids, data._source.labels, strict=True))  # type: ignore[attr-defined]
    assert by_id["n02510455/n02510455_giant_panda.jpg"] == 388
    assert len(set(by_id.values())) == 500 and all(re.fullmatch(r"n\d{8}/.*", id) for id in by_id)
