"""Sentences of a batch told apart: tokens exchanged until each explains its own slopes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedmi.attacks.base import Case
from fedmi.attacks.engine.assembled import Assembled
from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.exposure.schema import END, PADDING
from fedmi.exposure.seeding import Seed
from fedmi.models.text import TextClassifier

EXACT = 3e-5
"""Misfit of a sentence that explains its slopes, computed in float32."""
NEAR = 1e-2
"""Misfit above which sentences that were searched for are no better than those it began with."""
COVERED = 0.5
"""Share of a sentence's tokens whose slopes must be known before it counts as explained."""
BETTER = 1e-6
KICKS = 3
"""Exchanges at random before a search begins again."""


@dataclass(eq=False)
class Exchanges:
    """A search among ways to deal the tokens at each place to the sentences.

    The misfit of a sentence is the mean over its places of |c - g|^2 / (|c|^2 + |g|^2), in [0, 2],
    of the slopes c it has itself, with the label that suits it best, and those g of its tokens in
    the update. Moves, taken when the sum over sentences falls: two exchange what stands at a place,
    or all from a place on; a place whose token is not sure takes another of the batch's tokens. It
    ends when a turn of all moves brings nothing, or when `trials` sentences have been computed.
    """

    module: TextClassifier
    classes: int
    records: int
    words: Tensor
    trials: int
    seed: Seed
    labels: Tensor = field(init=False)
    misfits: Tensor = field(init=False)

    @classmethod
    def of(
        cls, case: Case, evidence: Evidence, words: Tensor, trials: int, seed: Seed
    ) -> "Exchanges":
        assert case.knowledge.build is not None
        module = case.knowledge.build()
        if not isinstance(module, TextClassifier):
            raise AttackError("reads classifiers of text")
        module.load_state_dict(dict(evidence.base))
        module = module.eval().requires_grad_(False)
        return cls(module, case.knowledge.classes, evidence.records, words, trials, seed)

    def searched(self, start: Assembled) -> Assembled:
        """The sentences in the end; `labels` and `misfits` [n] are then theirs.

        A search that ends short of the mark is begun again from its best with a few tokens at
        random exchanged. One that never comes near is dropped: while a token is wrong, others are
        exchanged to make up for it.
        """
        rng, best = self.seed.torch(), self._descended(start)
        kept = self.misfits
        while self.trials > 0 and len(start.ids) > 1 and bool((kept > EXACT).any()):
            found = self._descended(self._kicked(best, kept, rng))
            if float(self.misfits.sum()) < float(kept.sum()) - BETTER:
                best, kept = found, self.misfits
        best = best if float(kept.max()) < NEAR else start
        self.misfits, self.labels = self._fitted(best)
        return best

    def _descended(self, best: Assembled) -> Assembled:
        turn = True
        self.misfits, self.labels = self._fitted(best)
        while turn and self.trials > 0 and bool((self.misfits > EXACT).any()):
            before = float(self.misfits.sum())
            for place in range(1, int((best.ids != PADDING).sum(1).max())):
                best = self._exchanged(best, place)
            best = self._replaced(best)
            turn = float(self.misfits.sum()) < before - BETTER
        return best

    def _kicked(self, best: Assembled, misfits: Tensor, rng: torch.Generator) -> Assembled:
        """Some exchanges among sentences that do not fit yet."""
        for _ in range(KICKS):
            place = 1 + int(torch.randint(best.ids.shape[1] - 2, (), generator=rng))
            moves = [move for move in _swaps(best, place) if (misfits[[*move[0]]] > EXACT).any()]
            if moves:
                pair, swapped = moves[int(torch.randint(len(moves), (), generator=rng))]
                order = torch.arange(best.ids.numel()).view_as(best.ids)
                order[[*pair]] = swapped
                best = best.of(order)
        return best

    def _fitted(self, some: Assembled) -> tuple[Tensor, Tensor]:
        """(misfits [m], the labels that suit best [m])."""
        every = torch.arange(self.classes).repeat_interleave(len(some.ids))
        rows = torch.arange(len(some.ids)).repeat(self.classes)
        found = self.misfit(_rows(some, rows), every).view(self.classes, -1).min(0)
        return found.values, found.indices

    def _exchanged(self, best: Assembled, place: int) -> Assembled:
        """The best of all exchanges at a place, while any is better."""
        moves = [*_swaps(best, place)]
        if not moves or self.trials <= 0:
            return best
        pairs = torch.tensor([pair for pair, _ in moves])
        tried = best.of(torch.cat([order for _, order in moves]))
        misfits, labels = self._fitted(tried)
        found, labels = misfits.view(-1, 2), labels.view(-1, 2)
        gains = self.misfits[pairs].sum(1) - found.sum(1)
        move = int(gains.argmax())
        if gains[move] <= BETTER:
            return best
        order = torch.arange(best.ids.numel()).view_as(best.ids)
        order[pairs[move]] = moves[move][1]
        self.misfits[pairs[move]], self.labels[pairs[move]] = found[move], labels[move]
        return best.of(order)

    def _replaced(self, best: Assembled) -> Assembled:
        """Tokens that are not sure, each as the one of the batch's that fits best."""
        for row, place in torch.nonzero(~(best.sure | best.known)).tolist():
            if self.trials <= 0 or self.misfits[row] <= EXACT:
                continue
            tried = _rows(best, torch.full((len(self.words),), row))
            tried.ids[:, place] = self.words
            found = self.misfit(tried, self.labels[row].repeat(len(self.words)))
            word = int(found.argmin())
            if found[word] < self.misfits[row] - BETTER:
                best = best.of(torch.arange(best.ids.numel()).view_as(best.ids))
                best.ids[row, place], self.misfits[row] = self.words[word], found[word]
        return best

    @torch.enable_grad()
    def misfit(self, some: Assembled, labels: Tensor) -> Tensor:
        """Of each of m sentences with these labels, [m]."""
        self.trials -= len(labels)
        most = max(2, int((some.ids != PADDING).sum(1).max()))
        ids, known = some.ids[:, :most], some.known[:, :most]
        embedded = self.module.embed(ids).detach().requires_grad_()
        logits = self.module.classify(embedded, ids != PADDING)
        loss = cross_entropy(logits, labels, reduction="sum") / self.records
        (found,) = torch.autograd.grad(loss, [embedded])
        wanted = some.slopes[:, :most].float()
        scale = wanted.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
        found, wanted = found / scale, wanted / scale
        sizes = (found.square() + wanted.square()).sum(2).clamp_min(1e-20)
        gaps = (found - wanted).square().sum(2) / sizes * known
        result: Tensor = gaps.sum(1) / known.sum(1).clamp_min(1)
        # A sentence of which hardly any slope is known is unseen, not explained.
        seen = known.sum(1) >= COVERED * (ids > END).sum(1)
        return torch.where(seen & (known.sum(1) > 0), result, torch.ones_like(result))


def _rows(some: Assembled, rows: Tensor) -> Assembled:
    parts = (some.ids, some.sure, some.slopes, some.known)
    return replace(
        some,
        **dict(
            zip(("ids", "sure", "slopes", "known"), (part[rows] for part in parts), strict=True)
        ),
    )


def _swaps(some: Assembled, place: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """(two sentences, the places that they are made of after an exchange [2, length])."""
    room = some.ids.shape[1]
    order = torch.arange(some.ids.numel()).view_as(some.ids)
    inner = (some.ids != PADDING).sum(1) - 1
    for pair in combinations(range(len(some.ids)), 2):
        both = [*pair]
        if int(inner[both].max()) < place:
            continue
        for until in (place + 1, room):
            if until > place + 1 or int(inner[both].min()) > place:
                swapped = order[both]
                swapped[:, place:until] = swapped[:, place:until].flip(0)
                yield pair, swapped
