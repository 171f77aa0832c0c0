"""Whether what a party holds and receives looks as shares must: uniform, and nothing else."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from torch import Tensor

from fedmi.mpc.opening import is_shared
from fedmi.mpc.pairs import Words, pairs
from fedmi.mpc.scheme import RING_BITS
from fedmi.mpc.shares import Ring, as_ring, total

MESSAGE = "message/"
ALARM = 1e-6
"""Payloads less likely than this under uniformity are flagged."""
EXPECTED = 16
"""Fewest occurrences expected of each symbol; below, chi-square's tail is no measure."""
FEWEST_BITS = 2 * EXPECTED
TELLING = 32
"""A bit that is zero in so many words is taken to be unused; by chance it is once in 2^32."""
SEAL_HEADER = b"\x5e\xa1\x10"
"""Begins a ciphertext or key of Microsoft SEAL: magic 0xA15E little-endian, header of 16 bytes."""
SMALLEST = float(np.finfo(np.float64).tiny)
"""No p-value is given as less; chi-square's tail runs out of exponents below."""


def p_value(payload: Mapping[str, Tensor]) -> float:
    """p-value of all tensors of one party being uniform: `p_value_of` that payload alone."""
    return p_value_of([payload])


def p_value_of(payloads: Iterable[Mapping[str, Tensor]]) -> float:
    """p-value of all that parties have, a payload each, being uniform: the smallest of any test x
    how many there were in all (Bonferroni), at most 1 and never 0; 1 where nothing can be tested
    (see `untested`).

    Each test is Pearson's chi-square over the values of the bytes, one histogram for each of the
    8 bytes of a word; half bytes, bits, and at last all places of a word together, where there are
    too few words. Tested are

    - ring elements (int64): all of them, over all 64 bits; of records and models [..., k] also the
      sum of the k elements that the party holds of a number, and the difference between a row and
      the next (a mask used twice);
    - messages (`message/...`, uint8): as little-endian words of 64 bits if they are whole ones,
      else as bytes; over the bits that any word uses.
      The engine sends boolean shares of narrow integers one a word or one a byte and leaves the
      rest zero (SEMI2K: 36 bits of 64 in the exponentials of softmax, and with three parties single
      bits, one a byte); how many follows from the public program. Not tested are the
      messages of a run that sends ciphertexts (CHEETAH: of SEAL, compressed, beside oblivious
      transfers of public, falling widths filled up with zeros): they hide by a computational
      assumption and are not uniform bytes;
    - other bytes (seeds): all bits;
    - pairs of equally many words of one payload, of own elements (and their sum) and messages:
      difference, sum and exclusive or (`fedmi.mpc.pairs`, which says how many). Recorded runs of
      aby3 and semi2k (inference and a training step, all pairs) have none that is related by
      design, so none is excepted.

    What this cannot see: a relation of three and more tensors, or of some words of one tensor to
    others than the same words of another (a message that holds two tensors one behind the other);
    anything that is not linear, as a product of two secrets that is opened, masked or not; a mask
    drawn from few seeds; and what several parties would see together.
    """
    tests = [found for payload in payloads for found in _all(payload)]
    return _worst(tests)


def flags(payloads: Iterable[Mapping[str, Tensor]]) -> frozenset[str]:
    """ "shares_not_uniform: p = .." if all the payloads together are that unlikely."""
    found = p_value_of(payloads)
    return frozenset({f"shares_not_uniform: p = {found:.1e}"} if found < ALARM else ())


def untested(payload: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of tensors that say nothing: too short (handshakes), or beside ciphertexts."""
    return tuple(n for n, found in _tests(payload).items() if all(p is None for p in found))


def _tests(payload: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """p-values by tensor; None where one cannot be tested."""
    mute = MESSAGE if _encrypted(payload) else None
    return {
        name: [] if mute and name.startswith(mute) else [_p(w) for w in _words(name, payload[name])]
        for name in payload
    }


def _all(payload: Mapping[str, Tensor]) -> Iterator[float | None]:
    """Of each tensor, then of pairs."""
    for found in _tests(payload).values():
        yield from found
    own = [words for name in payload for words in _own(name, payload[name])]
    heard = [] if _encrypted(payload) else [n for n in payload if n.startswith(MESSAGE)]
    for words in pairs(own, [_message(payload[name].numpy()) for name in heard]):
        yield _p(words)


def _worst(found: Sequence[float | None]) -> float:
    tested = [p for p in found if p is not None]
    return min(1.0, len(tested) * max(min(tested), SMALLEST)) if tested else 1.0


def _own(name: str, tensor: Tensor) -> Iterator[Words]:
    """The ring elements that a party holds, and their sum; nothing of messages and seeds."""
    if tensor.dtype != torch.int64:
        return
    held = as_ring(tensor.detach().cpu().numpy())
    elements = list(np.moveaxis(held, -1, 0)) if is_shared(name) else [held]
    together = [total(elements)] if len(elements) > 1 else []
    for words in (*elements, *together):
        yield words.ravel(), RING_BITS


def _words(name: str, tensor: Tensor) -> Iterator[Words]:
    """What of a tensor must be uniform."""
    values = tensor.detach().cpu().numpy()
    if name.startswith(MESSAGE):
        yield _message(values)
    elif values.dtype == np.uint8:
        yield values.ravel().astype(np.uint64), 8
    else:
        yield from _ring(as_ring(values), named=is_shared(name))


def _ring(held: Ring, *, named: bool) -> Iterator[Words]:
    """named: the last axis is that of the elements that a party holds of one number."""
    yield held.ravel(), RING_BITS
    if not named:
        return
    if held.shape[-1] > 1:
        yield total(list(np.moveaxis(held, -1, 0))).ravel(), RING_BITS
    if held.ndim > 1 and len(held) > 1:
        yield (held[1:] - held[:-1]).ravel(), RING_BITS


def _message(values: NDArray[np.uint8]) -> Words:
    data = np.ascontiguousarray(values.ravel())
    words = (data if len(data) % 8 else data.view("<u8")).astype(np.uint64)
    return _packed(words, _used(words, data))


def _used(words: Ring, data: NDArray[np.uint8]) -> int:
    """Mask of the bits in use. In a few words a bit may be zero by chance: there all are taken to
    be, up to the highest; so few bytes, or so few narrow boolean shares, say nothing: 0.
    """
    seen, in_bytes = (int(np.bitwise_or.reduce(part, initial=0)) for part in (words, data))
    if len(words) >= TELLING:
        return seen
    narrow = in_bytes != 0xFF or len(data) < TELLING // 2
    return 0 if narrow else int(2 ** seen.bit_length() - 1)


def _packed(words: Ring, used: int) -> Words:
    """The words with the bits that are not in use taken out."""
    bits = used.bit_length()
    if used == 2**bits - 1:  # also 0: nothing to test
        return words, bits
    places = [place for place in range(bits) if used >> place & 1]
    kept = np.zeros_like(words)
    for number, place in enumerate(places):
        kept |= (words >> np.uint64(place) & np.uint64(1)) << np.uint64(number)
    return kept, len(places)


def _encrypted(payload: Mapping[str, Tensor]) -> bool:
    """Whether the messages are those of a protocol that sends ciphertexts."""
    starts = (payload[n][: len(SEAL_HEADER)] for n in payload if n.startswith(MESSAGE))
    return any(bytes(start.tolist()) == SEAL_HEADER for start in starts)


def _p(words: Words) -> float | None:
    """p-value of uniformity of the used bits of the words; None where there are too few."""
    values, bits = words
    if len(values) * bits < FEWEST_BITS:
        return None
    apart = len(values) >= 2 * EXPECTED
    size = _symbol_bits(len(values) if apart else len(values) * bits, bits, apart)
    counts = _counts(values, bits, size)
    counts = counts if apart else counts.sum(0, keepdims=True)
    expected = counts[0].sum() / counts.shape[1]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(chi2.sf(statistic, counts.shape[0] * (counts.shape[1] - 1)))


def _symbol_bits(many: int, bits: int, apart: bool) -> int:
    """Bits of a symbol: the most of 8, 4, 2, 1 that divide a word and occur often enough.

    many: words, if each place in a word is tested apart; else bits of all words together.
    """
    for size in (8, 4, 2):
        occurring = many if apart else many // size
        if bits % size == 0 and occurring >= EXPECTED * 2**size:
            return size
    return 1


def _counts(values: Ring, bits: int, size: int) -> NDArray[np.int64]:
    """How often each symbol occurs at each place of a word; [places, 2^size]."""
    mask, places = np.uint64(2**size - 1), range(0, bits, size)
    columns = [((values >> np.uint64(at)) & mask).astype(np.int64) for at in places]
    return np.stack([np.bincount(column, minlength=2**size) for column in columns])
