"""Class folders of images, in a directory or inside a zip.

    DIR/cat/0001.jpg            the class folders at the top, or
    DIR/test/cat/0001.jpg       inside the only folder there

A zip is read on demand, without unpacking.
"""

import hashlib
import os
import zlib
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile, ZipInfo

from torch import Tensor

from robust.data.images import BadImage, decode, is_image_name, read_file
from robust.data.labels import folder_labels
from robust.data.source import Request, Source
from robust.data.zips import open_zip
from robust.errors import InputError

HELD_OUT = ("test", "val", "valid", "validation")  # what splits are called that no network is trained on
UTF8 = 0x800  # the flag of a zip's member whose name is UTF-8; zipfile reads others as code page 437


class Tree(Protocol):
    """Folders and files by their path from the root: "test/cat/" and "test/cat/0001.jpg"; the root is ""."""

    name: str

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """The folders and the files in a folder, both sorted, hidden ones left out."""
        ...

    def read(self, file: str) -> bytes: ...


class Directory:
    def __init__(self, path: Path):
        self.name = str(path)
        self._path = path

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        folders, files = [], []
        try:
            with os.scandir(self._path / folder) as entries:
                for entry in entries:
                    if not _hidden(entry.name):
                        path = folder + entry.name
                        if "." not in entry.name and not (self._path / path).exists():  # a class's, by its name
                            raise InputError(f"{self._path / path} is a link to nothing: mend or remove it")
                        folders.append(f"{path}/") if entry.is_dir() else files.append(path)
        except OSError as error:
            raise InputError(f"cannot list {error.filename}: {error.strerror}") from None
        return sorted(folders), sorted(files)

    def read(self, file: str) -> bytes:
        return read_file(self._path / file)


class Archive:
    def __init__(self, path: Path):
        self.name = str(path)
        try:
            self._zip = open_zip(path)
        except (BadZipFile, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path} cannot be read as a zip ({reason})") from None
        self._folders: defaultdict[str, set[str]] = defaultdict(set)
        self._files: defaultdict[str, set[str]] = defaultdict(set)
        self._members: dict[str, ZipInfo] = {}
        for member in self._zip.infolist():
            *folders, file = _name(member).split("/")
            folders = [folder for folder in folders if folder not in ("", ".")]
            if ".." in folders:
                raise InputError(f"{path} holds {member.filename}, which lies outside of it: zip the folder again")
            if any(map(_hidden, (*folders, file))):
                continue
            parent = ""
            for folder in folders:
                self._folders[parent].add(f"{parent}{folder}/")
                parent += f"{folder}/"
            if not file:
                continue
            if self._members.setdefault(parent + file, member) is not member:
                raise InputError(f"{path} holds {parent}{file} twice: zip the folder again")
            self._files[parent].add(parent + file)

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        return sorted(self._folders[folder]), sorted(self._files[folder])

    def read(self, file: str) -> bytes:
        try:
            return self._zip.read(self._members[file])
        except (BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, zlib.error) as error:
            # RuntimeError: encrypted. NotImplementedError: an unknown compression.
            raise BadImage(f"{self.name}/{file}", f"cannot be read ({error})") from None


def is_directory(spec: str) -> bool:
    return Path(spec).is_dir()


def is_zip(spec: str) -> bool:
    return spec.lower().endswith(".zip") and Path(spec).is_file()


def load_directory(request: Request) -> Source:
    return load(Directory(Path(request.spec)), request)


def load_zip(request: Request) -> Source:
    return load(Archive(Path(request.spec)), request)


def load(tree: Tree, request: Request) -> Source:
    """The images of a tree's class folders, sorted by folder and name; an id is "folder/file"."""
    base, classes = _class_folders(tree)
    names = [folder.removeprefix(base).removesuffix("/") for folder in classes]
    folder_label, class_names = folder_labels(names, request.model, tree.name)
    files: list[str] = []
    labels: list[int] = []
    skipped: list[str] = []
    for label, members in zip(folder_label, classes.values(), strict=True):
        for file in members:
            if is_image_name(file):
                files.append(file)
                labels.append(label)
            elif request.skip_bad_images:
                skipped.append(file.removeprefix(base))
            else:
                raise BadImage(f"{tree.name}/{file}", "is not an image")

    def read(position: int) -> tuple[Tensor, str]:
        raw = tree.read(files[position])
        x = decode(raw, f"{tree.name}/{files[position]}", request.model)
        return x, hashlib.sha256(raw).hexdigest()

    ids = [file.removeprefix(base) for file in files]
    return Source(ids, labels, read, class_names, tuple(skipped))


def _class_folders(tree: Tree) -> tuple[str, dict[str, list[str]]]:
    """The folder that holds the class folders, and each of these with its files."""
    base = ""
    while True:
        folders, files = tree.children(base)
        if images := list(filter(is_image_name, files)):
            raise InputError(
                f"{tree.name}/{images[0]} lies in no class folder, so its label is unknown: give a folder of "
                "class folders, or the one image with --label"
            )
        if not folders:
            raise InputError(f"{tree.name}/{base} is empty: give a folder that holds class folders of images")
        inside = {folder: tree.children(folder) for folder in folders}
        nested = [folder for folder in folders if inside[folder][0]]
        if not nested:
            return base, {folder: members for folder, (_, members) in inside.items()}
        if len(folders) > 1:
            held_out = [folder for folder in nested if folder.removesuffix("/").lower() in HELD_OUT] or nested
            one = f"Name one of them: {tree.name}/{held_out[0].removesuffix('/')}"
            raise InputError(
                f"{tree.name} is ambiguous: {', '.join(nested[:4])} hold folders themselves, so which are the "
                f"classes? {'Zip one of them alone' if isinstance(tree, Archive) else one}"
            )
        base = nested[0]


def _name(member: ZipInfo) -> str:
    """As it was written: most archivers write UTF-8, and not all of them say so."""
    if not member.flag_bits & UTF8:
        with suppress(UnicodeError):
            return member.filename.encode("cp437").decode()
    return member.filename


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
