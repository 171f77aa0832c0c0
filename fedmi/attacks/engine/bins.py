"""Tokens out of the bins of a rewired transformer: sparse sums of embeddings, taken apart."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmi.attacks.engine.evidence import AttackError, Evidence
from fedmi.models.attention import Block
from fedmi.models.text_transformer import TransformerNet

EMPTY = 1e-4
"""Of the fullest bin; below it, a bin is rounding."""
FIRST = 8
"""Candidates tried as the first token of a bin of several."""


@dataclass(frozen=True)
class Layout:
    """A rewired model: kept [entries] of an embedding, of which `identity` a head before them are
    the sentence's; `view` [heads, identity, dim]: what head h tells of the token at place h + 1,
    times `scale`."""

    kept: Tensor
    identity: int
    view: Tensor
    scale: float

    @property
    def heads(self) -> int:
        return len(self.view)


@dataclass(frozen=True)
class Atoms:
    """Candidates. token, place [c]; stream [c, dim]: what block 0 adds identities to; shape
    [c, kept]: its kept entries, centred, of unit length."""

    token: Tensor
    place: Tensor
    stream: Tensor
    shape: Tensor


@dataclass(frozen=True)
class Read:
    """One token read: its atom, the identity [heads * identity] beside it, how well the bin it
    was in is explained (0 to 1), and its weight there. A token that shared the bin has no
    identity."""

    atom: int
    identity: Tensor | None
    explained: float
    weight: float


def layout(network: TransformerNet) -> Layout:
    """What a rewired model reads where; AttackError if it is no such model."""
    kept = torch.nonzero(network.tokens.weight.abs().sum(0) > 0).flatten()
    block = network.blocks[0]
    assert isinstance(block, Block)
    attention = block.attention
    heads, dim = attention.heads, network.tokens.embedding_dim
    before = int(kept[0]) if len(kept) else 0
    if not before or before % heads or before // heads < 2:
        raise AttackError("the model that clients were sent is not rewired: no entries are lost")
    identity = before // heads - 1
    rows = attention.value.weight.view(heads, dim // heads, dim)[:, :identity]
    scale = float(attention.output.weight[0, 0])
    return Layout(kept, identity, rows, scale)


def atoms(network: TransformerNet, where: Layout, tokens: Tensor, places: int) -> Atoms:
    """Every one of the tokens at every place from 1 on."""
    token = tokens.repeat(places - 1)
    place = torch.arange(1, places).repeat_interleave(len(tokens))
    stream = network.tokens.weight[token] + network.positions[place]
    stream = network.norm(stream) if network.normed_first else stream
    shape = stream[:, where.kept]
    shape = shape - shape.mean(1, keepdim=True)
    return Atoms(token, place, stream, shape / shape.norm(dim=1, keepdim=True))


def bins(evidence: Evidence, measuring: int) -> Tensor:
    """[bins, dim]: sums over the tokens of each bin that holds any, of all measuring blocks."""
    found = []
    for block in range(measuring):
        rows = evidence.gradient[f"blocks.{block}.mlp.0.weight"].double()
        signs = evidence.base[f"blocks.{block}.mlp.2.weight"][-1].double().sign()
        turned = rows * signs[:, None]
        found.append(turned[:-1] - turned[1:])
        if block == measuring - 1:
            found.append(turned[-1:])
    everything = torch.cat(found)
    sizes = everything.norm(dim=1)
    return everything[sizes > EMPTY * sizes.max()]


def taken_apart(sums: Tensor, known: Atoms, where: Layout, most: int, fit: float) -> list[Read]:
    """The tokens of every bin, up to `most` in one; those that leave more than 1 - fit of a bin
    unexplained are left out."""
    kept = sums[:, where.kept]
    kept = kept - kept.mean(1, keepdim=True)
    found: list[Read] = []
    for whole, part in zip(sums, kept, strict=True):
        chosen, weights, left = _fewest(part, known.shape, most, 1 - fit)
        if 1 - left < fit:
            continue
        identity = _identity(whole, known, where, chosen[0]) if len(chosen) == 1 else None
        scale = float(weights.abs().max())
        found += [
            Read(index, identity, 1 - left, abs(float(weight)))
            for index, weight in zip(chosen, weights, strict=True)
            if abs(float(weight)) > 0.02 * scale
        ]
    return found


def _fewest(
    part: Tensor, shapes: Tensor, most: int, enough: float
) -> tuple[list[int], Tensor, float]:
    """(atoms, weights, share of the length left over): the fewest atoms that explain it."""
    best: tuple[list[int], Tensor, float] = ([], part.new_zeros(0), 1.0)
    first = (shapes @ part).abs().topk(min(FIRST, len(shapes))).indices.tolist()
    for start in first:
        chosen, rest = [start], part
        for _ in range(most):
            basis = shapes[chosen].T
            weights = torch.linalg.lstsq(basis, part[:, None]).solution[:, 0]
            rest = part - basis @ weights
            left = float(rest.norm() / part.norm().clamp_min(1e-300))
            if left < best[2] - 1e-9:
                best = (list(chosen), weights, left)
            if left < enough or len(chosen) == most:
                break
            chosen.append(int((shapes @ rest).abs().argmax()))
        if best[2] < enough:
            break
    return best


def _identity(whole: Tensor, known: Atoms, where: Layout, atom: int) -> Tensor:
    """The identity beside a lone token: what is left once w (a x + b) is fitted to its entries."""
    stream = known.stream[atom]
    entries = torch.stack([stream[where.kept], torch.ones(len(where.kept)).double()], 1)
    fitted = torch.linalg.lstsq(entries, whole[where.kept][:, None]).solution[:, 0]
    lost = where.heads * where.identity
    found: Tensor = (whole[:lost] - fitted[1]) / fitted[0] - stream[:lost]
    return found


def state(network: TransformerNet, weights: Mapping[str, Tensor]) -> TransformerNet:
    """The network in double precision with these weights."""
    network.load_state_dict(dict(weights))
    return network.double().eval().requires_grad_(False)
