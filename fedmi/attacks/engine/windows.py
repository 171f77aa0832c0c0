"""The input of a convolution from its output and its weight gradient: linear least squares."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor
from torch.nn.functional import conv_transpose2d, unfold

Pair = tuple[int, int]

REFINEMENTS = 4
POWER_STEPS = 12
INVERSE_STEPS = 5
OPEN_RIDGE = 1e-10
"""Ridge, relative to the largest eigenvalue, where some directions are open."""
EASY = 1e-6
"""Ratio of eigenvalues of K^T K from which the gradient constraints alone do, and fast."""


@dataclass(frozen=True)
class Solved:
    """inputs: of the layer, in float64. rank: of the stacked system, None where it was not
    computed, of so many unknowns."""

    inputs: Tensor
    unknowns: int
    rank: int | None

    @property
    def deficient(self) -> bool:
        return self.rank is not None and self.rank < self.unknowns


@dataclass(frozen=True)
class Convolution:
    """The stacked system A x = b for the input x [C, H, W] of one convolution, in float64.

    Weight constraints, one a known output: W x = z. Gradient constraints, one a weight: the
    gradient dL/dW[o, c, k] is the product of slope[o] with the pixels that tap k of channel c
    meets, K x = dL/dW; K is the same for every channel. weight, gradient: [O, C, k, k]; output
    z (bias taken off), slope dL/dz and known (1, or 0 where z was lost): [O, oh, ow].
    """

    weight: Tensor
    gradient: Tensor
    output: Tensor
    slope: Tensor
    known: Tensor
    shape: tuple[int, int, int]
    stride: Pair
    padding: Pair
    dilation: Pair
    emphasis: float = 1.0

    @property
    def unknowns(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def _share(self) -> float:
        """What squared gradient constraints are multiplied by: rows of both kinds weigh alike."""
        size = self.slope.square().mean() * self.slope[0].numel()
        rows = self.weight.square().mean() * self.weight[0].numel()
        return float(self.emphasis * rows / size.clamp_min(1e-300))

    def _place(self, weight: Tensor, slope: Tensor) -> Tensor:
        space = (self.stride, self.padding, self.dilation)
        return transposed(weight, slope, self.shape, *space)

    def _normal(self, output: Tensor, gradient: Tensor) -> Tensor:
        """A^T (output; gradient), weighted."""
        weights = self._place(self.weight, output * self.known)
        return weights + self._share * self._place(gradient, self.slope)

    def _apply(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """A x in its two parts."""
        kernel = (self.weight.shape[2], self.weight.shape[3])
        seen = unfold(inputs[None], kernel, self.dilation, self.padding, self.stride)[0]
        output = self.weight.flatten(1) @ seen
        gradient = self.slope.flatten(1) @ seen.T
        return output.view_as(self.output), gradient.view_as(self.gradient)

    def descent(self, inputs: Tensor) -> Tensor:
        """A^T (b - A x): zero at the least squares solution. [C, H, W]"""
        output, gradient = self._apply(inputs)
        return self._normal(self.output - output, self.gradient - gradient)

    @cached_property
    def _met(self) -> Tensor:
        """[taps, windows]: which pixel a tap meets in a window, counted from 1; 0 = padding."""
        _, height, width = self.shape
        kernel = (self.weight.shape[2], self.weight.shape[3])
        number = torch.arange(1, height * width + 1).double().view(1, 1, height, width)
        return unfold(number, kernel, self.dilation, self.padding, self.stride)[0].long()

    def curved(self, inputs: Tensor) -> Tensor:
        """A^T A x. [C, H, W]"""
        return self._normal(*self._apply(inputs))

    def gram(self) -> Tensor:
        """A^T A, dense [unknowns, unknowns], window by window."""
        channels, pixels = self.shape[0], self.shape[1] * self.shape[2]
        found = torch.zeros(self.unknowns, self.unknowns, dtype=torch.float64)
        rows = self.weight.flatten(1)
        offsets = torch.arange(channels)[:, None] * pixels - 1
        alike, whole = bool(self.known.all()), rows.T @ rows
        for window, known in enumerate(self.known.flatten(1).T):
            taps = self._met[:, window]
            inside = (taps > 0).repeat(channels)
            places = (offsets + taps).flatten()[inside]
            block = whole if alike else rows.T @ (rows * known[:, None])
            found[places[:, None], places] += block[inside][:, inside]
        each = self._share * self.slopes()
        for start in range(0, self.unknowns, pixels):
            found[start : start + pixels, start : start + pixels] += each
        return found

    def slopes(self) -> Tensor:
        """K^T K of one channel, [pixels, pixels]; the same for all."""
        maps, taps, pixels = len(self.slope), len(self._met), self.shape[1] * self.shape[2]
        rows = torch.zeros(maps, taps, pixels + 1, dtype=torch.float64)
        slope = self.slope.flatten(1)[:, None].expand(-1, taps, -1)
        rows.scatter_(2, self._met[None].expand(maps, -1, -1), slope)
        flat = rows[..., 1:].flatten(0, 1)
        return flat.T @ flat


def transposed(
    weight: Tensor,
    slope: Tensor,
    shape: tuple[int, int, int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """The gradient with respect to a convolution's input, from that of its output."""
    reached = [
        (slope.shape[1 + axis] - 1) * stride[axis]
        - 2 * padding[axis]
        + dilation[axis] * (weight.shape[2 + axis] - 1)
        + 1
        for axis in (0, 1)
    ]
    left = (shape[1] - reached[0], shape[2] - reached[1])
    return conv_transpose2d(slope[None], weight, None, stride, padding, left, 1, dilation)[0]


def solve(system: Convolution, tolerance: float, largest: int) -> Solved:
    """The least squares solution; the smallest one where the system leaves directions open.

    Conjugate gradients where the gradient constraints alone have full rank with room to spare.
    Else the normal equations, factored: they lose digits with the square of the condition number
    k, but eps64 k^2 stays below what the float32 rounding of an observed gradient costs, eps32 k,
    up to a k of 5e8. A ridge at `tolerance` (relative singular value) bars directions of which
    nothing is known, and refinement takes its bias off the others. Above `largest` unknowns:
    conjugate gradients, rank not computed.
    """
    easy = _easy(system)
    if easy or system.unknowns > largest:
        inputs, converged = conjugate_gradients(system)
        if converged or system.unknowns > largest:
            return Solved(inputs, system.unknowns, system.unknowns if easy else None)
    ridge = tolerance**2 * _largest(system)
    if not 0 < ridge < math.inf:
        return Solved(torch.zeros(system.shape, dtype=torch.float64), system.unknowns, 0)
    gram = system.gram()
    inputs, smallest = _refined(system, gram, ridge)
    if math.isnan(smallest):
        return Solved(conjugate_gradients(system)[0], system.unknowns, None)
    if smallest >= 2 * ridge:
        return Solved(inputs, system.unknowns, system.unknowns)
    # A ridge this low lets rounding through in the open directions: a higher one for the answer.
    if tolerance**2 < OPEN_RIDGE:
        inputs, _ = _refined(system, gram, ridge * OPEN_RIDGE / tolerance**2)
    return Solved(inputs, system.unknowns, int(dpstrf(gram.numpy(), tol=ridge)[2]))


def _refined(system: Convolution, gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(solution by the factored A^T A + ridge, smallest eigenvalue of that); NaN if it failed."""
    inputs = torch.zeros(system.shape, dtype=torch.float64)
    raised = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(raised)
    if int(failed):
        return inputs, math.nan
    for _ in range(REFINEMENTS):
        step = torch.cholesky_solve(system.descent(inputs).flatten()[:, None], factor)
        inputs = inputs + step.view(system.shape)
    return inputs, _smallest(factor)


def conjugate_gradients(
    system: Convolution, steps: int = 1000, least: float = 1e-12
) -> tuple[Tensor, bool]:
    """The solution without a matrix, and whether A^T (b - A x) fell to `least` of A^T b."""
    inputs = torch.zeros(system.shape, dtype=torch.float64)
    slope = residual = system.descent(inputs)
    start = size = float(residual.square().sum())
    for _ in range(steps):
        if size <= least**2 * start:
            break
        curved = system.curved(slope)
        pace = size / float((slope * curved).sum())
        inputs = inputs + pace * slope
        residual = residual - pace * curved
        previous, size = size, float(residual.square().sum())
        slope = residual + size / previous * slope
    return inputs, size <= least**2 * start


def _easy(system: Convolution) -> bool:
    """Whether K alone has full rank; not asked where there are more pixels than constraints."""
    pixels = system.shape[1] * system.shape[2]
    rows = system.weight.shape[0] * system.weight.shape[2] * system.weight.shape[3]
    if rows < pixels or not bool(torch.isfinite(system.slope).all()):
        return False
    spread = torch.linalg.eigvalsh(system.slopes())
    return bool(spread[0] > EASY * spread[-1])


def _largest(system: Convolution) -> float:
    """Largest eigenvalue of A^T A, by power iteration."""
    start = torch.Generator().manual_seed(0)
    vector, found = torch.randn(system.shape, dtype=torch.float64, generator=start), 0.0
    for _ in range(POWER_STEPS):
        vector = system.curved(vector / vector.norm().clamp_min(1e-300))
        found = float(vector.norm())
    return found


def _smallest(factor: Tensor) -> float:
    """Smallest eigenvalue of a factored matrix, by inverse iteration: from above."""
    start = torch.Generator().manual_seed(0)
    vector = torch.randn(len(factor), 1, dtype=torch.float64, generator=start)
    found = math.inf
    for _ in range(INVERSE_STEPS):
        vector = torch.cholesky_solve(vector / vector.norm(), factor)
        found = 1 / float(vector.norm())
    return found
