"""The search for all records behind one low-rank gradient."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmi.attacks.engine.low_rank import (
    Mixture,
    agreement,
    agreement_of,
    columns,
    determined,
    distinct,
    exchanged,
    peeled,
    pooled,
    quotients,
    refined,
    sampled,
    selected,
    shown_alike,
)

POOL = 100
"""Directions kept to choose from."""
GUESS = 0.5
"""What the lambda of a record counts for that is not proven."""
NEAR = 0.05
"""Relative distance below which two guesses are of one record."""
PATIENCE = 4
"""Batches of draws for something better, once lambda is enough but not 1 for all records."""
WIDEST = 48
"""Records missing beyond which a draw has no chance, at any budget."""


@dataclass(frozen=True)
class Search:
    """submatrices: how many are drawn at most, `batch` at a time. threshold: the filter's tau.
    share: lambda from which a record is taken for recovered. peel, guided: see `Spear`."""

    submatrices: int
    batch: int
    threshold: float
    share: float
    peel: bool
    guided: bool


@dataclass(frozen=True)
class Unmixed:
    """inputs [c, n], c <= b, best first; matched [c]: their lambda. drawn: submatrices used.
    complete: every record's lambda reached what was asked for. unique: no other choice of columns
    has the same zeros, as far as it is complete."""

    inputs: Tensor
    matched: Tensor
    drawn: int
    complete: bool
    unique: bool


@dataclass(frozen=True)
class _State:
    """mixed: what is proven. sure: columns of Q that a guess at its record led to, with guesses:
    its dual. pool: other sparse directions. best: the best full set of columns, and its lambdas."""

    mixed: Mixture
    sure: Tensor
    guesses: Tensor
    pool: Tensor
    best: Tensor
    matched: Tensor

    @property
    def worth(self) -> float:
        return float(self.matched.mean()) if len(self.matched) else -1.0


def unmixed(mixed: Mixture, search: Search, rng: torch.Generator) -> Unmixed:
    """The records behind the gradient, as many as can be told within the search."""
    none = mixed.duals
    state = _State(mixed, none, none, none, none, none[:, 0])
    if search.peel:
        state = replace(state, mixed=peeled(mixed, search.share))
        state = _guessed(state, quotients(state.mixed)[0], search)
    state = _settled(state, search)
    drawn, due = 0, 4 * search.batch
    hopeless = mixed.narrow or mixed.records - state.mixed.found > WIDEST
    budget = 0 if hopeless else search.submatrices
    limit = PATIENCE * search.batch if _complete(state, search) else budget
    while drawn < budget and not _perfect(state) and drawn < limit:
        fresh = sampled(state.mixed, _centres(state.mixed), search.batch, search.guided, rng)
        pool = pooled(state.mixed, state.pool, fresh, search.threshold, POOL)
        drawn += search.batch
        if pool.shape != state.pool.shape or bool((pool != state.pool).any()):
            pool = distinct(refined(state.mixed, pool))
            state = _settled(replace(state, pool=pool), search)
        if drawn - search.batch < search.submatrices / 2 <= drawn:
            state = _doubted(state, mixed)
        if drawn >= due:
            state, due = _exchanged(state, search), 2 * drawn
        if _complete(state, search):
            limit = min(limit, drawn + PATIENCE * search.batch)
    return _answer(state, search, drawn)


def _settled(state: _State, search: Search) -> _State:
    """With the best choice among the directions known, and what follows from it.

    Where all other columns of Q are right, Q^-1 gives a record right though its own is wrong; and
    a record gives its own column. So a nearly right choice mends itself.
    """
    while True:
        chosen = selected(state.mixed, torch.cat([state.sure, state.pool]))
        if len(chosen) < state.mixed.records:
            return state
        duals = torch.linalg.inv(chosen.T)
        matched = _matched(state.mixed, chosen, duals)
        if matched.mean() > state.worth:
            state = replace(state, best=chosen, matched=matched)
        known = len(state.sure)
        if _perfect(state) or not search.peel:
            return state
        state = _guessed(state, duals[state.mixed.found :], search)
        if len(state.sure) == known:
            return state


def _doubted(state: _State, mixed: Mixture) -> _State:
    """With nothing taken for proven, as one false proof bars the way to the rest."""
    sure = torch.cat([state.mixed.directions, state.sure])
    guesses = torch.cat([state.mixed.duals, state.guesses])
    return replace(state, mixed=mixed, sure=sure, guesses=guesses, pool=state.pool[:0])


def _exchanged(state: _State, search: Search) -> _State:
    """With the best choice improved by swaps, and what follows from it."""
    if not len(state.best) or _perfect(state):
        return state
    chosen = exchanged(state.mixed, state.best, torch.cat([state.sure, state.pool]))
    matched = agreement_of(state.mixed, chosen)
    if matched.mean() <= state.worth:
        return state
    state = replace(state, best=chosen, matched=matched)
    if _perfect(state) or not search.peel:
        return state
    known = len(state.sure)
    state = _guessed(state, torch.linalg.inv(chosen.T)[state.mixed.found :], search)
    return _settled(state, search) if len(state.sure) > known else state


def _guessed(state: _State, duals: Tensor, search: Search) -> _State:
    """With the columns that these guesses of records lead to."""
    directions, which = columns(state.mixed, duals, search.share)
    sure, guesses = state.sure, state.guesses
    for direction, dual in zip(directions, duals[which], strict=True):
        if not len(sure) or len(distinct(torch.cat([sure, direction[None]]))) > len(sure):
            sure, guesses = torch.cat([sure, direction[None]]), torch.cat([guesses, dual[None]])
    return replace(state, sure=sure, guesses=guesses)


def _matched(mixed: Mixture, directions: Tensor, duals: Tensor) -> Tensor:
    return agreement(mixed, mixed.zeros(directions), mixed.reach(mixed.inputs(duals)))


def _complete(state: _State, search: Search) -> bool:
    return len(state.matched) > 0 and float(state.matched.min()) >= search.share


def _perfect(state: _State) -> bool:
    return len(state.matched) > 0 and float(state.matched.min()) == 1


def _centres(mixed: Mixture) -> Tensor:
    """Pre-activations [c, m] at guesses of a record: what each neuron shows, as an image."""
    return mixed.reach(mixed.inputs(quotients(mixed)[0]).clamp(0, 1))


def _answer(state: _State, search: Search, drawn: int) -> Unmixed:
    """All records of a complete choice; else what is proven, then the best of the guesses."""
    mixed = state.mixed
    if _complete(state, search):
        inputs = mixed.inputs(torch.linalg.inv(state.best.T))
        return Unmixed(inputs, state.matched, drawn, True, determined(mixed, state.best))
    directions = torch.cat([mixed.directions, state.sure])
    duals = torch.cat([mixed.duals, state.guesses])
    sure = agreement(mixed, mixed.zeros(directions), mixed.reach(mixed.inputs(duals)))
    sure[mixed.found :] *= GUESS
    parts = [(duals, sure)]
    if len(state.best):
        right = state.matched >= search.share
        parts.append((torch.linalg.inv(state.best.T)[right], GUESS * state.matched[right]))
    alike = shown_alike(mixed)
    parts.append((alike, sure.new_zeros(len(alike))))
    inputs = mixed.inputs(torch.cat([dual for dual, _ in parts]))
    sure = torch.cat([score for _, score in parts])
    gap = torch.cdist(inputs, inputs) / inputs.norm(dim=1).clamp_min(1e-300)
    kept = torch.nonzero(~torch.triu(gap < NEAR, 1).any(0)).flatten()[: mixed.records]
    return Unmixed(inputs[kept], sure[kept], drawn, False, True)
