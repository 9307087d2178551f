"""One image file, whose label is given."""

import hashlib
from pathlib import Path

from robust.data.images import BadImage, decode, is_image_name, read_file
from robust.data.labels import label_of
from robust.data.source import Request, Source
from robust.errors import InputError


def accepts(spec: str) -> bool:
    return is_image_name(spec) and Path(spec).is_file()


def load(request: Request) -> Source:
    path = Path(request.spec)
    if request.label is None:
        raise InputError(f"what does {path} show? Name its class with --label")
    label = label_of(request.label, request.model)
    try:
        raw = read_file(path)
        x = decode(raw, str(path), request.model)
    except BadImage as error:  # of one image, none can be left out
        raise InputError(f"{error.fault}; mend it, or give another image") from error
    return Source([path.name], [label], lambda _: (x, hashlib.sha256(raw).hexdigest()))
