"""A linear layer's gradient taken apart into its records: low rank, and the zeros of a ReLU."""

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

CERTAIN = 60.0
"""Multiple of the rounding noise below which a number counts as zero."""
PROOF = 3
"""Zeros beyond those that the draw itself makes, from which a direction is no accident."""
SAME = 1 - 1e-5
"""Cosine from which two directions are one."""
COPY = 2.0
"""Multiple of the noise of two neurons within which they show the very same record."""
SHARPEST = 3.0
"""Largest weight, in standard deviations of z, by which rows are drawn that are likely zero."""


@dataclass(frozen=True)
class Mixture:
    """The gradient [dL/dW | dL/db] = L R of y = relu(W x + c), and what is known of its records.

    With D = dL/dZ [m, b] and X = [x | 1] [b, n + 1] it is D X, so D = L Q and X = Q^-1 R.
    weight [m, n], bias [m]: W and c. left [m, b]: L, orthonormal columns, zero in dead rows.
    right [b, n + 1]: R. values [b]: singular values. noise [m]: rounding error of a row's entries.
    live [m]: rows with a gradient. rank: of the gradient, above the noise; may exceed b.
    directions [k, b]: columns of Q found for certain, unit length; duals [k, b]: rows of Q^-1.
    """

    weight: Tensor
    bias: Tensor
    left: Tensor
    right: Tensor
    values: Tensor
    noise: Tensor
    live: Tensor
    rank: int
    directions: Tensor
    duals: Tensor

    @property
    def records(self) -> int:
        return len(self.values)

    @property
    def found(self) -> int:
        return len(self.directions)

    @property
    def narrow(self) -> bool:
        """Whether a record that is silent in half of the live neurons has too few zeros to tell."""
        return int(self.live.sum()) < 2 * self.records

    @property
    def open(self) -> Tensor:
        """Orthonormal basis [b, b - k] of where the other directions are: q_j p_i = 0."""
        if not self.found:
            return torch.eye(self.records, dtype=torch.float64)
        complement: Tensor = torch.linalg.svd(self.duals, full_matrices=True).Vh[self.found :].T
        return complement

    def zeros(self, directions: Tensor) -> Tensor:
        """Which entries of L q are zero to within the noise, of live rows; [c, b] -> [c, m]."""
        spread = (directions / self.values).norm(dim=1, keepdim=True)
        small = CERTAIN * self.noise * spread + 1e-10
        zero: Tensor = ((directions @ self.left.T).abs() < small) & self.live
        return zero

    def inputs(self, duals: Tensor) -> Tensor:
        """The records [c, n] with these duals (rows of Q^-1, up to their length)."""
        rows = duals @ self.right
        return rows[:, :-1] / rows[:, -1:]

    def reach(self, inputs: Tensor) -> Tensor:
        """Pre-activations z = W x + c; [c, n] -> [c, m]."""
        return inputs @ self.weight.T + self.bias

    def rest(self) -> Tensor:
        """L without what the records found put into it. [m, b]"""
        if not self.found:
            return self.left
        scale = (self.directions * self.duals).sum(1)
        return self.left - (self.left @ self.directions.T / scale) @ self.duals


def mixture(weight: Tensor, bias: Tensor, slopes: tuple[Tensor, Tensor], records: int) -> Mixture:
    """The mixture behind dL/dW [m, n] and dL/db [m], which is not all zero.

    Fewer records are looked for than there are where the rank is lower, but one at least.
    """
    joint = torch.cat([slopes[0], slopes[1][:, None]], 1).double()
    left, values, right = torch.linalg.svd(joint, full_matrices=False)
    size = joint.norm(dim=1)
    live = size > 1e-9 * size.max()
    rank = _rank(values[: int(live.sum())], records)
    kept = max(1, min(rank, records))
    error = joint - (left[:, :kept] * values[:kept]) @ right[:kept]
    seen = int((joint != 0).any(0).sum())
    noise = error.norm(dim=1) / sqrt(max(1, seen - kept))
    noise = noise.clamp_min(float(noise[live].median()) / 3)
    none = left.new_zeros(0, kept)
    return Mixture(
        weight.double(),
        bias.double(),
        left[:, :kept] * live[:, None],
        values[:kept, None] * right[:kept],
        values[:kept],
        noise,
        live,
        rank,
        none,
        none,
    )


def _rank(values: Tensor, records: int) -> int:
    """The place of the largest gap in the singular values, from all that stand out of what comes
    after the records: lower than `records` where some are missing, higher where there are more."""
    tail = values[records:]
    if not len(tail) or float(tail[0]) <= 1e-12 * float(values[0]):
        return int((values > 1e-12 * values[0]).sum()) if len(values) else 0
    floor = 1e-12 * values[0]
    drops = values[:-1].clamp_min(floor) / values[1:].clamp_min(floor)
    beyond = int(drops[records - 1 :].argmax()) + records
    if beyond > records and drops[beyond - 1] > 10 * drops[records - 1]:
        return beyond
    return int((values[:records] > 3 * tail[0]).sum())


def quotients(mixed: Mixture) -> tuple[Tensor, Tensor]:
    """(duals [c, b], error [c]) of what each live neuron shows of the records not found yet.

    A neuron that fires for one record alone shows the record itself; else a mixture. error: the
    distance to it that the noise may make.
    """
    rest = mixed.rest()
    share = rest @ mixed.right[:, -1]
    size = rest.norm(dim=1)
    told = mixed.live & (size > 1e-6) & (share.abs() > 1e-6 * size)
    error = mixed.noise * sqrt(mixed.right.shape[1]) / share.abs().clamp_min(1e-300)
    order = error[told].argsort()
    return (rest[told] / share[told, None])[order], error[told][order]


def columns(mixed: Mixture, duals: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(q [k, b], which of the duals [k]): the columns of Q that guesses of a record [c, b] lead to.

    Where W x + c < 0 at a guess x close enough to a record, L lacks exactly one dimension: that
    record's q is zero there. Asked as well: that L q is zero just there, in a `share` of neurons.
    """
    basis = mixed.open
    if not len(duals) or not basis.shape[1]:
        return mixed.duals[:0], torch.zeros(0, dtype=torch.long)
    reach = mixed.reach(mixed.inputs(duals))
    margin = 1e-4 * reach.abs().mean(1, keepdim=True)
    silent = (reach < -margin) & mixed.live
    rows = mixed.left @ basis
    gram = torch.einsum("cm,mi,mj->cij", silent.double(), rows, rows)
    directions = torch.linalg.eigh(gram).eigenvectors[:, :, 0] @ basis.T
    zero = mixed.zeros(directions)
    matched = agreement(mixed, zero, reach)
    enough = silent.sum(1) >= basis.shape[1] - 1 + PROOF
    sure = enough & (silent & ~zero).sum(1).eq(0) & (matched >= share)
    which = torch.nonzero(sure).flatten()
    which = which[matched[which].argsort(descending=True, stable=True)]
    return directions[which], which


def peeled(mixed: Mixture, share: float) -> Mixture:
    """With the records that neurons show alone: two neurons give the same one, and its own
    pre-activations its column of Q. Each one found may leave other neurons with one record."""
    while mixed.found < mixed.records:
        duals = shown_alike(mixed)
        directions, which = columns(mixed, duals, share)
        before = mixed.found
        for direction, dual in zip(directions, duals[which], strict=True):
            mixed = _with(mixed, direction, dual)
        if mixed.found == before:
            break
    return mixed


def shown_alike(mixed: Mixture) -> Tensor:
    """Duals [c, b] that another neuron shows too, to within the noise."""
    duals, error = quotients(mixed)
    inputs = duals @ mixed.right
    gap = torch.cdist(inputs, inputs, compute_mode="donot_use_mm_for_euclid_dist")
    same = gap < COPY * (error[:, None] + error) + 1e-9 * inputs.norm(dim=1)
    return duals[(same & ~torch.eye(len(gap), dtype=torch.bool)).any(1)]


def determined(mixed: Mixture, chosen: Tensor) -> bool:
    """Whether the zeros of each direction leave it no freedom: b - 1 dimensions of L."""
    if mixed.records == 1:
        return True
    rows = [mixed.left[zero] for zero in mixed.zeros(chosen)]
    if min(len(part) for part in rows) < mixed.records - 1:
        return False
    return min(float(torch.linalg.svdvals(part)[mixed.records - 2]) for part in rows) > 1e-6


def _with(mixed: Mixture, direction: Tensor, dual: Tensor) -> Mixture:
    """With one more record, unless it is among those found or contradicts them."""
    if mixed.found:
        across = (mixed.duals @ direction).abs() / mixed.duals.norm(dim=1)
        again = (mixed.directions @ direction).abs().max() > SAME
        if again or across.max() > 1e-3 or mixed.found == mixed.records:
            return mixed
    if abs(float(dual @ direction)) < 1e-6 * float(dual.norm()):
        return mixed
    return replace(
        mixed,
        directions=torch.cat([mixed.directions, direction[None]]),
        duals=torch.cat([mixed.duals, dual[None]]),
    )


def agreement(mixed: Mixture, zero: Tensor, reach: Tensor) -> Tensor:
    """lambda of the paper, record by record: the share of neurons where dL/dz is zero just where
    z <= 0. [..., m] -> [...]"""
    return ((zero | ~mixed.live) == (reach <= 0)).double().mean(-1)


def sampled(
    mixed: Mixture, centres: Tensor, count: int, guided: bool, rng: torch.Generator
) -> Tensor:
    """Null vectors [count, b] of random b - k - 1 rows of L: a column of Q whenever all of them
    are zero in that column.

    centres [c, m]: pre-activations at guesses of a record; if `guided`, rows are the likelier
    drawn the lower z is at one of them. Uniformly otherwise, as in the paper.
    """
    basis = mixed.open
    rows = (mixed.left @ basis)[mixed.live]
    centres = centres[:, mixed.live]
    draws = torch.rand(count, len(rows), generator=rng, dtype=torch.float64)
    weights = -(-draws.clamp_min(1e-300).log()).clamp_min(1e-300).log()
    if guided:
        spread = (centres - centres.median(1, keepdim=True).values) / centres.std(1, keepdim=True)
        pick = torch.randint(len(centres), (count,), generator=rng)
        sharp = SHARPEST * torch.rand(count, 1, generator=rng, dtype=torch.float64)
        weights = weights - sharp * spread[pick]
    size = basis.shape[1]
    chosen = rows[weights.topk(size - 1, dim=1).indices]
    random = torch.randn(1, 1, size, generator=rng, dtype=torch.float64).expand(count, 1, size)
    right = rows.new_zeros(count, size, 1)
    right[:, -1] = 1
    found = torch.linalg.solve_ex(torch.cat([chosen, random], 1), right).result[..., 0]
    found = found / found.norm(dim=1, keepdim=True)
    usable: Tensor = found[torch.isfinite(found).all(1)] @ basis.T
    return usable


def pooled(mixed: Mixture, pool: Tensor, fresh: Tensor, threshold: float, most: int) -> Tensor:
    """The `most` sparsest distinct directions of both, sparsest first.

    Kept: zeros in more than a `threshold` of the live rows, and PROOF more than a draw makes.
    """
    fewest = max(mixed.records - mixed.found - 1 + PROOF, threshold * float(mixed.live.sum()))
    fresh = fresh[mixed.zeros(fresh).sum(1) >= fewest]
    both = torch.cat([pool, fresh])
    order = mixed.zeros(both).sum(1).argsort(descending=True, stable=True)
    return distinct(both[order][: 4 * most])[:most]


def distinct(directions: Tensor) -> Tensor:
    """Those that are none of the ones before them; [c, b] of unit length."""
    alike = torch.triu((directions @ directions.T).abs() > SAME, 1).any(0)
    return directions[~alike]


def selected(mixed: Mixture, pool: Tensor) -> Tensor:
    """Q's columns as rows [<= b, b]: those found, then greedily the first independent ones."""
    kept = mixed.directions
    if mixed.records - mixed.found == 1:
        return torch.cat([kept, mixed.open.T])
    for direction in pool:
        if len(kept) == mixed.records:
            break
        basis = torch.linalg.qr(kept.T).Q
        if float((direction - basis @ (basis.T @ direction)).norm()) > 1e-5:
            kept = torch.cat([kept, direction[None]])
    return kept


def refined(mixed: Mixture, directions: Tensor) -> Tensor:
    """Directions by least squares over all rows in which they are zero. [c, b] -> [c, b]"""
    zero = mixed.zeros(directions)
    exact = [torch.linalg.svd(mixed.left[rows]).Vh[-1] for rows in zero]
    return torch.stack(exact) if exact else directions


def exchanged(mixed: Mixture, chosen: Tensor, pool: Tensor) -> Tensor:
    """Greedy: `chosen` [b, b] with the one swap for a direction of the pool that raises the mean
    lambda most, again and again while there is one; those proven stay."""
    worth = float(agreement_of(mixed, chosen).mean())
    while len(pool):
        best = chosen
        for slot in range(mixed.found, mixed.records):
            trial = chosen.expand(len(pool), -1, -1).clone()
            trial[:, slot] = pool
            scores = agreement_of(mixed, trial).mean(1)
            if float(scores.max()) > worth + 1e-9:
                worth, best = float(scores.max()), trial[int(scores.argmax())]
        if best is chosen:
            break
        chosen = best
    return chosen


def agreement_of(mixed: Mixture, chosen: Tensor) -> Tensor:
    """lambda of each record of full choices of columns, [..., b, b] -> [..., b]; -1 where they
    are not independent."""
    duals, failed = torch.linalg.inv_ex(chosen.mT)
    usable = (failed == 0) & torch.isfinite(duals).all((-1, -2))
    duals = torch.where(usable[..., None, None], duals, 1.0)
    pixels = mixed.right[:, :-1] @ mixed.weight.T
    reach = duals @ pixels / (duals @ mixed.right[:, -1:]) + mixed.bias
    zero = mixed.zeros(chosen.reshape(-1, mixed.records)).view(reach.shape)
    matched = agreement(mixed, zero, reach)
    return torch.where(usable[..., None], matched, -1.0)
