"""What a run was asked to do: options read, checked and given their defaults. No torch here."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import index
from typing import Any

from robust.errors import InputError, unknown
from robust.units import same_eps

CONVS = ("torch", "scratch")  # what computes the model's convolutions
NORMS = ("linf", "l2", "l1", "l0")
# Of each norm: what is quick and tells most, with the control.
DEFAULT_ATTACKS = {
    "linf": ("fgsm", "pgd", "noise"),
    "l2": ("fgsm", "pgd", "noise"),
    "l1": ("apgd-ce", "fmn", "noise"),
    "l0": ("sigma-zero", "fmn", "noise"),
}
RAND_DRAWS = 20  # of autoattack-rand, whose standard they are
MOST_ROWS = 2**20  # of a batch
MOST = 10**7  # of what else is counted

# The budgets that people compare at (largest last), after a few smaller ones that show the fall:
# CIFAR 8/255, 0.5 and 12, ImageNet 4/255, 3 and 60, MNIST 0.3 and 10 (linf, l2, l1). l0 counts values.
_PHOTO_EPS = {
    "linf": (0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255),
    "l2": (0.25, 0.5, 1.0, 2.0, 3.0),
    "l1": (5.0, 15.0, 30.0, 60.0),
    "l0": (30.0, 100.0, 300.0),
}
_THUMBNAIL_EPS = {
    "linf": (0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255),
    "l2": (0.05, 0.1, 0.25, 0.5),
    "l1": (1.5, 3.0, 6.0, 12.0),
    "l0": (3.0, 12.0, 24.0, 48.0),
}
_DIGIT_EPS = {
    "linf": (0.05, 0.1, 0.2, 0.3),
    "l2": (0.5, 1.0, 1.5, 2.0),
    "l1": (2.5, 5.0, 10.0),
    "l0": (3.0, 6.0, 12.0, 24.0),
}


@dataclass(frozen=True)
class Options:
    """Everything besides model and data that decides the numbers of a run; see `robust.run` for each.

    No eps stands for those that suit the images; see `suited_to`.
    """

    attacks: tuple[str, ...]
    norm: str
    eps: tuple[float, ...]
    steps: int | None = None
    step_size: float | None = None
    restarts: int = 1
    random_start: bool | None = None
    queries: int | None = None
    eot: int | None = None
    surrogate: str | None = None
    target: str | None = None
    batch_size: int = 64
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    conv: str = "torch"
    save_adversarials: bool = False
    certify: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "queries", "eot", "batch_size", "limit", "seed"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if self.norm not in NORMS:
            raise unknown("norm", str(self.norm), NORMS)
        for name in ("random_start", "save_adversarials", "certify"):
            value = getattr(self, name)
            if value is None and name != "save_adversarials":
                continue
            if value not in (True, False):
                raise InputError(f"{name} must be True or False, not {value!r}")
            object.__setattr__(self, name, bool(value))  # whatever library it comes from
        if self.conv not in CONVS:
            raise unknown("conv", str(self.conv), CONVS)
        if not self.attacks:
            raise InputError("no attack named; name one, such as pgd")
        if repeated := sorted({name for name in self.attacks if self.attacks.count(name) > 1}):
            raise InputError(f"attack {repeated[0]} is named twice; name it once")
        for value in self.eps:
            _check_eps(value, self.norm)
        check_between(
            1, MOST, steps=self.steps, restarts=self.restarts, queries=self.queries, eot=self.eot, limit=self.limit
        )
        check_between(1, MOST_ROWS, batch_size=self.batch_size)
        rand = "autoattack-rand" in self.attacks
        if rand and self.eot not in (None, RAND_DRAWS):
            raise InputError(f"autoattack-rand is the vote of {RAND_DRAWS} draws, by its standard; leave eot out")
        of = "autoattack-rand" if rand else "--eot"
        if self.draws > 1 and (foreign := [name for name in self.attacks if name.startswith("foolbox:")]):
            raise InputError(f"{foreign[0]} knows no votes over several draws; leave it out of a run with {of}")
        if self.draws > 1 and "autoattack" in self.attacks:
            raise InputError(
                f"autoattack is a standard, which takes one draw of each point; in a run with {of} name its parts, "
                "apgd-ce,apgd-t,fab-t,square"
            )
        if self.surrogate is None and "transfer" in self.attacks:
            raise InputError("attack transfer crafts on another network; name it with --surrogate")
        if self.surrogate is not None and "transfer" not in self.attacks:
            raise InputError("a surrogate is for attack transfer only; add --attack transfer")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must lie in 0 .. 2^64 - 1, not {self.seed}")
        if self.step_size is not None and not 0 < self.step_size <= 2:
            raise InputError(f"step_size must be above 0 and at most 2, not {self.step_size:g}; try 0.1")

    @property
    def draws(self) -> int:
        """Evaluations of each point, of which the verdict is the vote."""
        return max(self.eot or 1, RAND_DRAWS if "autoattack-rand" in self.attacks else 1)

    def suited_to(self, shape: Sequence[int], device: str) -> "Options":
        """These options for images of `shape` (C, H, W) on `device`: eps rising, each once, defaults filled in."""
        channels, height, _ = shape
        # The farthest corner of the box; people who think in 0 .. 255 ask for more.
        farthest = math.sqrt(math.prod(shape)) if self.norm == "l2" else math.prod(shape)
        if self.norm != "linf" and self.eps and max(self.eps) > farthest:
            hint = "" if self.norm == "l0" else f"; did you mean {max(self.eps):g}/255?"
            raise InputError(
                f"eps {max(self.eps):g} is larger than any change of an image of {math.prod(shape)} values in [0, 1]"
                + hint
            )
        digits, thumbnails = channels == 1 and height <= 32, height <= 64
        table = _DIGIT_EPS if digits else _THUMBNAIL_EPS if thumbnails else _PHOTO_EPS
        eps: list[float] = []
        for radius in sorted(self.eps or table[self.norm]):
            if not eps or not same_eps(radius, eps[-1]):
                eps.append(radius)
        return replace(self, eps=tuple(eps), device=device)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; tuples as lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def default_attacks(norm: str) -> tuple[str, ...]:
    """Those of the norm; of one that there is not, any, for `Options` to refuse the norm."""
    return DEFAULT_ATTACKS.get(norm, ("noise",))


def parse_eps(text: str) -> tuple[float, ...]:
    """'1/255,4/255' or '0.1,0.3' as numbers, in the order given."""
    eps = tuple(parse_number(part, "eps") for part in text.split(",") if part.strip())
    if not eps:
        raise InputError("eps is empty; write it like 8/255 or 1/255,4/255")
    return eps


def parse_number(text: str, what: str) -> float:
    """A number, or a fraction such as 8/255."""
    numerator, slash, denominator = text.strip().partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{what} {text.strip()!r} is no number; write it like 8/255 or 0.03") from None


def parse_names(values: Iterable[str]) -> tuple[str, ...]:
    """Repeated options, each of which may be a comma list, as one tuple of names."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def whole(name: str, value: Any) -> int | None:
    """The number as an int, whatever library it comes from."""
    if value is None and name not in ("restarts", "batch_size", "seed"):
        return None
    try:
        if isinstance(value, bool):  # which would count as 1
            raise TypeError
        return index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, not {value!r}") from None


def _check_eps(eps: float, norm: str) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise InputError(f"eps must be a positive number, not {eps:g} (the accuracy at 0 is always reported)")
    if norm == "linf" and eps > 1:
        raise InputError(
            f"eps {eps:g} is larger than the whole range of pixels, which is [0, 1]; did you mean {eps:g}/255?"
        )
    if norm == "l0" and eps != int(eps):
        raise InputError(f"eps in l0 counts the values that may change, so it is a whole number, not {eps:g}")


def check_between(least: int, most: int, **values: int | None) -> None:
    """InputError, which names the option, for a count below or above; None is no count."""
    for name, value in values.items():
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, not {value}")
        if value is not None and value > most:
            raise InputError(f"{name} must be at most {most}, not {value}")
