"""Pretrained weights in the caches where every other program keeps them: torch's, and Hugging Face's."""

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch

from robust.errors import InputError
from robust.models.probe import describe

TIMEOUT = 15.0  # seconds without an answer from the server


def from_torch_hub(url: str) -> Path:
    """The file behind `url` in torch's cache, downloaded there with its checksum verified if it is not yet.

    InputError where that is impossible; no partial file is left.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if path.is_file():
        return path
    checksum = torch.hub.HASH_REGEX.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _timeout(TIMEOUT):
            torch.hub.download_url_to_file(url, str(path), checksum and checksum[1], progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the checksum is wrong
        raise _impossible(url, error, f"put it at {path}") from error
    return path


def from_hugging_face(repository: str, filenames: Sequence[str]) -> Path:
    """The first of the files that `repository` has, in Hugging Face's cache, downloaded if it is not yet there.

    The hub's client asks the server even for a cached file, and where there is no server it tries again for
    most of a minute. So the cache is looked at first, and the server is asked once before a download.
    """
    import huggingface_hub

    for filename in filenames:
        path = huggingface_hub.try_to_load_from_cache(repository, filename)
        if isinstance(path, str):
            return Path(path)
    try:
        files = huggingface_hub.model_info(repository, timeout=TIMEOUT).siblings or []
        available = {file.rfilename for file in files}
        filename = next((filename for filename in filenames if filename in available), filenames[0])
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except Exception as error:  # the client's exceptions change with its HTTP library
        cache = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
        raise _impossible(
            f"https://huggingface.co/{repository}", error, f"copy {cache} from a machine that has it"
        ) from error


def _impossible(url: str, error: Exception, remedy: str) -> InputError:
    return InputError(
        f"cannot download {url} ({describe(error)}): give a file of the weights with --weights, {remedy}, "
        "or take the bundled --model efficientnet_lite0"
    )


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """torch waits without limit for a server that never answers, as behind a firewall that drops packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
