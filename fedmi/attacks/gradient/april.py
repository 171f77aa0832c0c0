"""APRIL: the patches behind one update of a vision transformer, in closed form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedmi.attacks.base import Case, Reconstruction
from fedmi.attacks.engine.adaptive import SIGNS, SOTERIA
from fedmi.attacks.engine.closed_form import ClosedForm
from fedmi.attacks.engine.evidence import AttackError, Evidence, blind
from fedmi.attacks.engine.protected import NOT_ADAPTIVE, PRUNING, names
from fedmi.models.vit import VisionTransformer

SEVERAL_RECORDS = "several_records"
SEVERAL_STEPS = "several_steps"
RANK_DEFICIENT = "rank_deficient"
GREY, SPREAD = 0.5, 0.25
"""Mean and standard deviation of a pixel of which the update says nothing."""
FLOAT32 = 2.0**-24
"""Relative rounding error of what crosses."""
TOLD = 0.9
"""Share of its variance below which a direction of the image counts as not told."""


@dataclass(frozen=True)
class _System:
    """slopes^T X = right for X [patches, pixels], and what else is wrong with it.

    slopes: [patches, dim], the gradient by each embedded patch. right: [dim, pixels].
    noise: standard deviation of an entry of `right` by the error that the bias shows.
    """

    slopes: Tensor
    right: Tensor
    noise: Tensor
    flags: frozenset[str] = frozenset()


class April(ClosedForm[tuple[str, VisionTransformer]]):
    """Every patch of one record, from a linear system whose matrix the positions' gradient gives.

    With z_i = W_e p_i + b_e + E_i the tokens, dL/dE_i = dL/dz_i =: g_i is part of the update: the
    gradient by each token, for all of them. Two products with them are part of it too.

    `attention`, the paper's: where the first attention reads z itself (no LayerNorm, no residual),
    sum_i g_i z_i^T = W_q^T dL/dW_q + W_k^T dL/dW_k + W_v^T dL/dW_v. Solved for z; the patches
    follow by inverting the embedding, which takes dim >= pixels of a patch. The class token's
    z_0 is known and taken off first.
    `embedding`, the same argument one layer earlier: sum_i g_i p_i^T = dL/dW_e, whatever follows
    the embedding, so it also holds for the standard transformer (LayerNorm and residual), and
    over any number of local steps on the same single record.

    Either is exact if patches <= dim and the g_i are linearly independent, up to rounding times
    the condition number. It is solved in float64 by ridge regression towards grey, its strength
    from the noise that the update itself shows, in dim - patches equations too many a pixel and
    in dL/db_e = sum_i g_i: what the update does not tell stays grey. Confidence: the share of the
    unknowns that it does tell.

    Flags. "rank_deficient": it tells not all of them (more patches than dim; a plain transformer
    of one block, where attention spans 2 heads directions; nearly uniform attention in an
    untrained one; noise). "several_records": both sides are sums over records and the solution a
    mixture, exact only if one record has all the gradient; it is returned for each record.
    "several_steps": `attention` took the weights to stand still during local training.
    "zero_gradients_in_read_layer": the positions have no gradient; answered blind.
    "not_adaptive": entries were pruned and count as zero.

    Threat model: honest-but-curious, sees one update and the model it started from. Raises
    AttackError if the model is no vision transformer with learnt positions, or, for `attention`,
    has LayerNorm and a residual before it.
    """

    kind: Literal["april"] = "april"
    paper: ClassVar[str] = (
        "Lu, Zhang, Zhao, He, Cheng: APRIL: Finding the Achilles' Heel on Privacy for Vision "
        "Transformers, CVPR 2022"
    )
    system: Literal["attention", "embedding"] = Field(
        default="attention",
        description="the equation solved: of the first attention (the paper's, for "
        "arrangement = 'plain') or of the patch embedding (any arrangement)",
    )

    def readable(self, network: nn.Module) -> tuple[str, VisionTransformer]:
        """The transformer and its name prefix; AttackError if this attack cannot read it."""
        for name, part in network.named_modules():
            if isinstance(part, VisionTransformer):
                if self.system == "attention" and part.arrangement != "plain":
                    raise AttackError(_NOT_PLAIN.format(arrangement=part.arrangement))
                return (f"{name}." if name else ""), part
        layers = [m for m in network.modules() if any(True for _ in m.parameters(recurse=False))]
        first = type(layers[0]).__name__ if layers else "no layer with parameters"
        raise AttackError(
            "april reads the gradient of learnt positions, so it needs a vision transformer "
            f"(model 'vit'); this model starts with {first}: use 'inverting_gradients'"
        )

    def evidence(self, case: Case) -> Sequence[Evidence]:
        pruned = any(names(case, kind) for kind in (PRUNING, SOTERIA, SIGNS))
        return [
            replace(item, flags=item.flags | {NOT_ADAPTIVE})
            if pruned or item.support is not None
            else item
            for item in super().evidence(case)
        ]

    def invert(
        self, case: Case, evidence: Evidence, source: tuple[str, VisionTransformer]
    ) -> Reconstruction:
        prefix, network = source
        gradient = _own(evidence.gradient, prefix)
        if not gradient["tokens.position"][1:].any():
            silent = evidence.flags | {"zero_gradients_in_read_layer"}
            return blind(case, replace(evidence, flags=silent))
        if self.system == "attention":
            system = _of_attention(gradient, _own(evidence.base, prefix))
            steps = sum(len(steps) for steps in evidence.plan.parties)
            flags = system.flags | ({SEVERAL_STEPS} if steps > 1 else set())
        else:
            system = _of_embedding(gradient)
            flags = system.flags
        patches, told = _solve(system)
        count = evidence.records
        if told.min() < TOLD:
            flags |= {RANK_DEFICIENT}
        if count > 1:
            flags |= {SEVERAL_RECORDS}
        image = network.patches.images((patches + GREY).clamp(0, 1)[None]).float()
        return Reconstruction(
            target=evidence.target,
            samples=image.expand(count, -1, -1, -1).clone(),
            labels=None,
            confidence=told.mean().float().expand(count).clone(),
            flags=evidence.flags | flags,
        )


_NOT_PLAIN = (
    "the closed form of the first attention needs an attention that reads the embedded patches "
    "themselves; in arrangement '{arrangement}' a LayerNorm stands before it and a residual leads "
    'around it, so the positions\' gradient is not that of its input: use system = "embedding", '
    "or 'inverting_gradients', which matches the positions' gradient with all others"
)


def _own(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The transformer's own entries, in float64, by its own names."""
    return {
        name.removeprefix(prefix): value.double()
        for name, value in state.items()
        if name.startswith(prefix)
    }


def _of_embedding(gradient: Mapping[str, Tensor]) -> _System:
    """G^T (X - grey) = dL/dW_e - G^T grey."""
    slopes = gradient["tokens.position"][1:]
    right = gradient["embedding.weight"] - GREY * slopes.sum(0)[:, None]
    return _System(slopes, right, _bias_error(gradient))


def _of_attention(gradient: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> _System:
    """G^T (X - grey) = (sum_m W_m^T dW_m - g_0 z_0^T - G^T Z_grey) W_e^+^T; m: query, key, value.

    Z_grey: the tokens of a grey image.
    """
    layers = [f"blocks.0.attention.{part}.weight" for part in ("query", "key", "value")]
    product = torch.stack([base[name].T @ gradient[name] for name in layers]).sum(0)
    every, embedding = gradient["tokens.position"], base["embedding.weight"]
    grey = (GREY * embedding.sum(1) + base["embedding.bias"]).expand(len(every) - 1, -1)
    tokens = torch.cat([base["tokens.class_token"][None], grey]) + base["tokens.position"]
    inverse = torch.linalg.pinv(embedding)
    right = (product - every.T @ tokens) @ inverse.T
    # an error of the slopes goes into `product` by the tokens, and on through the inverse
    noise = _bias_error(gradient) * _rms(tokens) * _rms(inverse) * len(tokens.T) ** 0.5
    whole = int(torch.linalg.matrix_rank(embedding)) == embedding.shape[1]
    flags = frozenset[str]() if whole else frozenset({RANK_DEFICIENT})
    return _System(every[1:], right, noise, flags)


def _bias_error(gradient: Mapping[str, Tensor]) -> Tensor:
    """How far dL/db_e is from the sum of the slopes: rounding, or noise, and nothing else."""
    return _rms(gradient["embedding.bias"] - gradient["tokens.position"][1:].sum(0))


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _solve(system: _System) -> tuple[Tensor, Tensor]:
    """(X - grey [patches, pixels], share [patches] told of each direction of it, 0 to 1).

    Ridge regression for pixels of deviation `SPREAD` and noise of the residual's: direction k,
    of singular value s, is told to s^2 / (s^2 + noise^2 / spread^2).
    """
    patches, dim = system.slopes.shape
    left, values, directions = torch.linalg.svd(system.slopes.T, full_matrices=False)
    inside = left.T @ system.right
    noise = torch.maximum(FLOAT32 * values[0] * SPREAD, system.noise)
    if dim > patches:
        excess = system.right - left @ inside
        freedom = (dim - patches) * excess.shape[1]
        noise = torch.maximum(noise, (excess.square().sum() / freedom).sqrt())
    told = values.square() / (values.square() + (noise / SPREAD).square())
    solution = directions.T @ ((told / values.clamp_min(1e-300))[:, None] * inside)
    missing = told.new_zeros(patches - len(told))
    return solution, torch.cat([told, missing])
