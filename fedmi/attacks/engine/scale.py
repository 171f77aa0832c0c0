"""What a last linear layer's gradient says of one record: its features and dL/dlogits."""

from dataclasses import dataclass, replace

import torch
from scipy.optimize import brentq
from torch import Tensor

RANK_ONE = 1e-2
"""Second singular value, relative to the first, from which a gradient is not one record's."""
SAME_FIT = 1e-3
"""Misfit up to which a further scale explains the gradient just as well."""
POOR_FIT = 0.05
"""Misfit from which no scale explains the gradient."""
RIVAL = 0.9
"""Size, relative to the largest entry of dL/dlogits, from which an entry may be the label's."""
GRID = 4000


@dataclass(frozen=True)
class Top:
    """features [d]: input of the last layer; slope [classes]: dL/dlogits = p - onehot(label)."""

    features: Tensor
    slope: Tensor
    label: int
    flags: frozenset[str] = frozenset()


def top(weight: Tensor, bias: Tensor | None, gradient: Tensor, bias_gradient: Tensor | None) -> Top:
    """Reads G = dL/dW = (p - y) h^T, in float64; weight, gradient: [classes, d].

    With a bias its gradient is p - y. Without one, G = sigma u v^T gives h = s v and
    p - y = (sigma / s) u up to s > 0, the root of s (1 - p_y(s)) = sigma |u_y| with
    p(s) = softmax(s W v) at which all of p - y fits best. Flags: `not_one_record` (G is not of
    rank one), `twin_data` (a second scale gives the very same gradient; the smaller is taken),
    `scale_not_found` (no scale explains G).
    """
    if bias_gradient is not None:
        flags = _rank_flags(torch.linalg.svdvals(gradient))
        features = gradient.T @ bias_gradient / bias_gradient.square().sum()
        return Top(features, bias_gradient, int(bias_gradient.argmin()), flags)
    left, sizes, right = torch.linalg.svd(gradient, full_matrices=False)
    flags = _rank_flags(sizes)
    # The entry of the label is minus the sum of the others; a sure network leaves it nearly the
    # same size as the runner-up's, and only the fit tells the two apart.
    size = left[:, 0].abs()
    found = [
        _with_label(weight, sizes[0] * left[:, 0], right[0], int(label))
        for label in torch.nonzero(size >= RIVAL * size.max()).flatten()
    ]
    best, misfit = min(found, key=lambda pair: pair[1])
    flags |= frozenset({"scale_not_found"}) if misfit > POOR_FIT else frozenset()
    return replace(best, flags=best.flags | flags)


def _with_label(weight: Tensor, slope: Tensor, features: Tensor, label: int) -> tuple[Top, float]:
    """(what G says if this is the label, misfit); slope, features: G's factors, in either sign."""
    if slope[label] > 0:
        slope, features = -slope, -features
    scale, misfit, twin = _scale(weight @ features, slope, label)
    flags = frozenset({"twin_data"}) if twin else frozenset()
    return Top(scale * features, slope / scale, label, flags), misfit


def _scale(logits: Tensor, product: Tensor, label: int) -> tuple[float, float, bool]:
    """(s, its misfit, whether another fits as well): softmax(s logits) - onehot = product / s.

    As 1 - p_y <= 1, s is at least |product_y|.
    """
    least = float(product[label].abs())

    def excess(scale: float) -> float:
        return scale * float(1 - (scale * logits).softmax(0)[label]) - least

    grid = (least * torch.logspace(0, 12, GRID, dtype=torch.float64)).tolist()
    values = [excess(scale) for scale in grid]
    roots = [
        float(brentq(excess, low, high, xtol=1e-300, rtol=1e-15))
        for low, high, before, after in zip(grid, grid[1:], values, values[1:], strict=False)
        if (before < 0) != (after < 0)
    ] or grid
    fits = [_misfit(scale, logits, product, label) for scale in roots]
    fit = [scale for scale, misfit in zip(roots, fits, strict=True) if misfit < SAME_FIT]
    if len(fit) > 1 and len(roots) < GRID:
        return fit[0], fits[roots.index(fit[0])], True
    return roots[fits.index(min(fits))], min(fits), False


def _misfit(scale: float, logits: Tensor, product: Tensor, label: int) -> float:
    found = (scale * logits).softmax(0)
    found[label] -= 1
    return float((found - product / scale).norm() / found.norm().clamp_min(1e-300))


def _rank_flags(sizes: Tensor) -> frozenset[str]:
    alone = len(sizes) < 2 or bool(sizes[1] <= RANK_ONE * sizes[0])
    return frozenset() if alone else frozenset({"not_one_record"})
