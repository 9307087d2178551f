"""What classes are called: names looked up among a model's, and those of published data sets in label order."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl",
    "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair",
    "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin",
    "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp",
    "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck",
    "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
    "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
    "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger",
    "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip

MNIST = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# What people call them besides.
ALSO = {
    "airplane": "plane", "automobile": "car", "T-shirt/top": "T-shirt", "Ankle boot": "boot",
    "0": "zero", "1": "one", "2": "two", "3": "three", "4": "four",
    "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
}  # fmt: skip

MANY = 1000  # classes, of which half are enough to know a set by


class ClassIndex:
    """Looks names up among a model's classes.

    Case, hyphens and underscores do not matter unless they tell two classes apart (ImageNet has a "Cardigan", a
    dog, and a "cardigan"). A name may be a list of synonyms, "giant panda, panda, coon bear"; the whole of one
    class's name goes before a synonym of another's.
    """

    def __init__(self, names: Sequence[str] | None, wnids: Sequence[str] | None = None):
        self._exact: defaultdict[str, set[int]] = defaultdict(set)
        self._folded: defaultdict[str, set[int]] = defaultdict(set)
        self._synonyms: defaultdict[str, set[int]] = defaultdict(set)
        for index, name in enumerate(names or ()):
            self._exact[name].add(index)
            self._folded[folded(name)].add(index)
            for synonym in name.split(","):
                self._synonyms[folded(synonym)].add(index)
        self._wnids = {wnid: index for index, wnid in enumerate(wnids or ())}

    def find(self, name: str) -> list[int]:
        """Every class that the name can mean: none, one, or (an ambiguous name) several."""
        if name in self._exact:
            return sorted(self._exact[name])
        if name.lower() in self._wnids:
            return [self._wnids[name.lower()]]
        return sorted(self._folded.get(folded(name)) or self._synonyms.get(folded(name)) or ())


def counterparts(known: Sequence[str] | None, names: Sequence[str] | None) -> list[int | None] | None:
    """For each class of a published data set, `known` by these names, the model's; None where it has none, or several.

    None altogether where the classes are the same, in the same order: where the model's `names` are unknown or their
    numbers ("class 0"), or most are those of the set's class of the same index and hardly any is another's.
    """
    if known is None or names is None:
        return None
    if all(re.sub(r"\D", "", name) == str(label) for label, name in enumerate(names)):
        return None
    index = ClassIndex(names)
    found = [[index.find(name) for name in _called(name)] for name in known]
    same = [any(label in matches for matches in by_name) for label, by_name in enumerate(found)]
    # By the first of its names that one class has: "giant panda" before "panda", which is the red one too.
    theirs = [next((matches[0] for matches in by_name if len(matches) == 1), None) for by_name in found]
    moved = {label: match for label, match in enumerate(theirs) if match is not None and not same[label]}
    # Spellings of ImageNet's differ: for some "crane" is the bird, for others the machine. But where a class moved to
    # the place of one that moved too, the order is another. Few classes are spelled alike throughout.
    many, alike = len(known) >= MANY, sum(same) / len(known)
    spelling = moved.keys().isdisjoint(moved.values()) and 10 * len(moved) <= len(known) if many else not moved
    return None if spelling and alike >= (1 / 2 if many else 3 / 4) else theirs


def folded(name: str) -> str:
    """The name without what does not matter in it: case, hyphens, underscores, how accents are composed."""
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFC", name).strip().casefold()))


def _called(name: str) -> list[str]:
    """All that a class is called whose name may be a list of synonyms."""
    return [name, *name.split(","), ALSO.get(name, name)]
