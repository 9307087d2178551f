"""Certified robustness: which images no change within eps can take from their class, proved by bounds on the logits.

CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316) in linf. Interval arithmetic carries the box around an image through
the layers; then, from the logits back to the image, each ReLU is put between two lines, and what is left is a linear
function, whose least value over the box is known. It tells something of networks that were trained for it
(arXiv 1805.12514), and of others at small eps only.

A copy of the module runs its own code, on a tensor that knows its bounds and refuses every operation without a rule.
Bounds are in float64, on what float32 makes of the network: each operation adds the most that rounding can change
there, n·u times the absolute values of the n that are summed (Higham, Accuracy and Stability of Numerical Algorithms,
2002, section 3.1) and what underflow loses, which is traced back like any other change.
"""

from robust.certify.bounds import NoBounds
from robust.certify.certifier import Certifier, Contradiction

__all__ = ["Certifier", "Contradiction", "NoBounds"]
