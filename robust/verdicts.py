"""What the gate compares: which samples a run judged, and its verdict on each. Arrays only: no file, no torch."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from robust.errors import InputError
from robust.options import NORMS
from robust.statistics import WORST_CASE
from robust.store import Finding
from robust.text import visible
from robust.units import format_eps, same_eps

CLEAN = "clean"


class Row(NamedTuple):
    """What an accuracy belongs to: an attack, `WORST_CASE` over all of them, or `CLEAN`, unchanged images (eps 0)."""

    attack: str
    norm: str
    eps: float

    @property
    def label(self) -> str:
        """What the attack is called before people."""
        return {CLEAN: "no attack", WORST_CASE: "worst case"}.get(self.attack, visible(self.attack))

    def __str__(self) -> str:
        """In words: 'worst case at linf 8/255'."""
        if self.attack == CLEAN:
            return "clean accuracy"
        return f"{self.label} at {self.norm} {format_eps(self.eps, self.norm)}"


def worst_cases(robust: Mapping[Row, np.ndarray]) -> dict[Row, np.ndarray]:
    """For each (norm, eps), which samples stand against every attack, (n,) bool: sample by sample, where neither the
    mean nor the least of the attacks' accuracies would do (auto-attack#45)."""
    worst: dict[Row, np.ndarray] = {}
    for row, stands in sorted(robust.items(), key=lambda item: item[0][1:]):
        key = Row(WORST_CASE, row.norm, row.eps)
        worst[key] = worst[key] & stands if key in worst else stands
    return worst


def among(eps: float, others: Iterable[float]) -> bool:
    """Whether one of `others` is the same eps."""
    return any(same_eps(eps, other) for other in others)


def known_norm(norm: str) -> str:
    """`norm` as a file has it; ValueError for one that there is not. Reports print it as it is."""
    if norm not in NORMS:
        raise ValueError(f"there is no norm {norm!r}")
    return norm


@dataclass(frozen=True)
class Samples:
    """Which samples were judged, ordered by the SHA-256 of their ids, so that equal sets pair by position.

    A file meant to be small keeps only tags and digests: enough to tell that two sets are equal, and to count where
    they differ, but not to name a sample.

    id_tags: (n,) uint32, the first four bytes of the SHA-256 of each id, rising.
    content_tags: (n,) uint16, a checksum of each content hash; None where no content hash is known (samples.csv).
    digest: SHA-256 over ids and labels.
    content_digest: SHA-256 over the content hashes, or None.
    ids, labels: (n,), or None.
    """

    id_tags: np.ndarray
    content_tags: np.ndarray | None
    digest: str
    content_digest: str | None
    ids: Sequence[str] | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.id_tags)

    @classmethod
    def of(
        cls, ids: Sequence[str], labels: Sequence[int] | np.ndarray, sha256: Sequence[str] | None = None
    ) -> tuple["Samples", np.ndarray]:
        """The samples, and the order (n,) that brings what belongs to `ids` into theirs.

        InputError for an id that is there twice.
        """
        if len(set(ids)) < len(ids):
            twice, count = Counter(ids).most_common(1)[0]
            raise InputError(f"{count} samples have the id {visible(twice)!r}; ids have to be unique")
        keys = np.frombuffer(b"".join(hashlib.sha256(id.encode()).digest()[:8] for id in ids), ">u8")
        order = np.argsort(keys)
        sorted_ids, sorted_labels = [ids[k] for k in order], np.asarray(labels, np.int64)[order]
        pairs = "".join(f"{id}\0{label}\n" for id, label in zip(sorted_ids, sorted_labels.tolist(), strict=True))
        hashes = None if sha256 is None else [sha256[k] for k in order]
        samples = cls(
            id_tags=(keys[order] >> 32).astype(np.uint32),
            content_tags=None if hashes is None else np.array([crc32(h.encode()) & 0xFFFF for h in hashes], np.uint16),
            digest=hashlib.sha256(pairs.encode()).hexdigest(),
            content_digest=None if hashes is None else hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
            ids=sorted_ids,
            labels=sorted_labels,
        )
        return samples, order

    def name(self, position: int) -> str:
        """The sample's id, or its tag where the ids are not known."""
        return self.ids[position] if self.ids is not None else f"sample {self.id_tags[position]:08x}"

    def equal(self, other: "Samples") -> bool:
        """Whether these are the same samples: ids, labels and, where both know them, contents."""
        contents = {self.content_digest, other.content_digest} - {None}
        return len(self) == len(other) and self.digest == other.digest and len(contents) < 2

    def difference(self, other: "Samples") -> str:
        """How another set of samples differs from this one, in words, with the id of the first of each kind."""
        missing = ~np.isin(self.id_tags, other.id_tags)
        new = ~np.isin(other.id_tags, self.id_tags)
        if missing.all():
            return f"the two have no sample in common ({len(self):,} there, {len(other):,} here)"
        found = []
        if missing.any():
            found.append(f"{missing.sum():,} of {len(self):,} samples missing{self._first(missing)}")
        if new.any():
            found.append(f"{new.sum():,} new{other._first(new)}")
        # Where each sample that is not new lies in this set.
        match = np.searchsorted(self.id_tags, other.id_tags[~new])
        for what, here, there in (
            ("content", self.content_tags, other.content_tags),
            ("label", self.labels, other.labels),
        ):
            if here is not None and there is not None:
                changed = np.zeros(len(other), bool)
                changed[~new] = here[match] != there[~new]
                if changed.any():
                    found.append(f"{changed.sum():,} with another {what}{other._first(changed)}")
                    if what == "content" and np.array_equal(np.sort(here), np.sort(there)):
                        found.append("they are the same images in another order: give them unshuffled")
        return "; ".join(found) or "the labels of some samples differ"

    def _first(self, mask: np.ndarray) -> str:
        return "" if self.ids is None else f" (the first: {visible(self.ids[int(mask.argmax())])})"


@dataclass(frozen=True)
class Verdicts:
    """A run as the gate sees it. What a file does not say is empty.

    source: what it was read from, as it was named.
    clean: (n,) bool, whether the unchanged image is classified correctly.
    robust: for each (attack, norm, eps) that ran, (n,) bool: correct, and correct on all that the attack found.
    model, data, options, environment: as in report.json. attacks: name -> parameters.
    """

    source: str
    samples: Samples
    clean: np.ndarray
    robust: Mapping[Row, np.ndarray]
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)
