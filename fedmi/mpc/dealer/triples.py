"""What the dealer adds so that the parties' random numbers become correlated (Beaver, CRYPTO 1991).

Every party draws its shares of a, b and c from a stream of its own; the dealer, who knows all
streams, tells one party by how much the sum of the c-s misses a * b. With r = the sum over parties:

    mul       ra rb - rc                 square    ra^2 - rb            dot   ra @ rb - rc
    and       (ra & rb) ^ rc             trunc     (ra >> s) - rb       eqz   ra ^ rb
    trunc_pr  ((ra << 1) >> (s + 1)) - rb and (ra >> (k - 1)) - rc      mul_priv  a b - rc
    rand_bit  random bits - ra           perm      ra in another order - rb

where `and` and the second of `eqz` are shared by exclusive or, `trunc` shifts arithmetically, and
`mul_priv` takes its a from party 0's stream and its b from party 1's, and `perm` moves element i to
place p(i) of a permutation that one party draws. Source: the formulas in SPU's
`ttp_server/service.proto`.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmi.mpc.dealer.messages import RequestError
from fedmi.mpc.dealer.prg import Bytes, Ring, Word, added, permutation, stream, xored
from fedmi.mpc.dealer.ring import matmul

WORDS: Mapping[int, Word] = {4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
"""By the bytes of an element; the engine uses the small ring for the carry of a truncation."""
Corrections = Sequence[Ring | Bytes]


@dataclass(frozen=True)
class Source:
    """One array by its generator: every party's seed, the first block, the size in bytes."""

    seeds: tuple[bytes, ...]
    counter: int
    size: int
    transposed: bool = False


@dataclass(frozen=True)
class Task:
    """A request, its seeds decrypted. word: bytes of an element; shape: (m, n, k); shift: bits.

    order: the generator of a permutation, its size in elements; None unless one is asked for.
    """

    sources: tuple[Source, ...]
    word: int
    shape: tuple[int, ...] = ()
    shift: int = 0
    order: Source | None = None

    @property
    def dtype(self) -> Word:
        return WORDS[self.word]

    def sum(self, index: int) -> Ring:
        """The ring elements [numel] that all parties together hold."""
        source = self.sources[index]
        return added(source.seeds, source.counter, source.size, self.dtype)

    def xor(self, index: int) -> Bytes:
        source = self.sources[index]
        return xored(source.seeds, source.counter, source.size)


def _mul(task: Task) -> Corrections:
    return [task.sum(0) * task.sum(1) - task.sum(2)]


def _mul_priv(task: Task) -> Corrections:
    source = task.sources[0]
    if len(source.seeds) != 2:
        raise RequestError(f"a private product is for 2 parties, not {len(source.seeds)}")
    left, right = (
        stream(seed, source.counter, source.size).view(task.dtype) for seed in source.seeds
    )
    return [left * right - task.sum(1)]


def _square(task: Task) -> Corrections:
    root = task.sum(0)
    return [root * root - task.sum(1)]


def _dot(task: Task) -> Corrections:
    m, n, k = task.shape
    left, right = _matrix(task, 0, (m, k)), _matrix(task, 1, (k, n))
    product = matmul(left.astype(np.uint64), right.astype(np.uint64)).astype(task.dtype)
    return [product - _matrix(task, 2, (m, n))]


def _matrix(task: Task, index: int, shape: tuple[int, int]) -> Ring:
    """As it enters the product; a transposed one was drawn with its sides exchanged."""
    numbers = task.sum(index)
    if numbers.size != shape[0] * shape[1]:
        raise RequestError(f"prg_inputs[{index}] has {numbers.size} elements, not {shape}")
    if task.sources[index].transposed:
        return numbers.reshape(shape[::-1]).T
    return numbers.reshape(shape)


def _and(task: Task) -> Corrections:
    return [(task.xor(0) & task.xor(1)) ^ task.xor(2)]


def _trunc(task: Task) -> Corrections:
    signed = np.dtype(f"i{task.word}")
    shifted = task.sum(0).view(signed) >> task.shift
    return [shifted.view(task.dtype) - task.sum(1)]


def _trunc_pr(task: Task) -> Corrections:
    number, word = task.sum(0), task.dtype.type
    below = number << word(1) >> word(task.shift + 1)
    top = number >> word(8 * task.word - 1)
    return [below - task.sum(1), top - task.sum(2)]


def _rand_bit(task: Task) -> Corrections:
    """The bits come from the operating system's cryptographic generator."""
    number = task.sum(0)
    drawn = np.frombuffer(secrets.token_bytes(number.size), dtype=np.uint8) & 1
    return [drawn.astype(number.dtype) - number]


def _eqz(task: Task) -> Corrections:
    return [task.sum(0).view(np.uint8) ^ task.xor(1)]


def _perm(task: Task) -> Corrections:
    numbers, order = task.sum(0), task.order
    if order is None or order.size != numbers.size:
        raise RequestError(f"perm: a permutation of {numbers.size} elements is needed")
    moved = np.empty_like(numbers)
    moved[permutation(order.seeds[0], order.counter, order.size)] = numbers
    return [moved - task.sum(1)]


Rule = Callable[[Task], Corrections]
RULES: Mapping[str, tuple[int, Rule]] = {
    "AdjustMul": (3, _mul),
    "AdjustMulPriv": (2, _mul_priv),
    "AdjustSquare": (2, _square),
    "AdjustDot": (3, _dot),
    "AdjustAnd": (3, _and),
    "AdjustTrunc": (2, _trunc),
    "AdjustTruncPr": (3, _trunc_pr),
    "AdjustRandBit": (1, _rand_bit),
    "AdjustEqz": (2, _eqz),
    "AdjustPerm": (2, _perm),
}
"""By operation: how many arrays it takes, and how it is computed."""


def adjust(operation: str, task: Task) -> list[memoryview]:
    """The corrections, each as its bytes; RequestError where the request does not add up."""
    if operation not in RULES:
        raise RequestError(f"{operation} is not dealt, only {', '.join(RULES)}")
    count, rule = RULES[operation]
    _check(operation, task, count)
    corrections = rule(task)
    return [np.ascontiguousarray(each).data.cast("B") for each in corrections]


def _check(operation: str, task: Task, count: int) -> None:
    bits = operation == "AdjustAnd"
    if len(task.sources) != count:
        raise RequestError(f"{operation}: {count} prg_inputs are needed, {len(task.sources)} given")
    if not bits and task.word not in WORDS:
        raise RequestError(f"{operation}: field_size {task.word}, must be one of {list(WORDS)}")
    if len({len(source.seeds) for source in task.sources}) != 1:
        raise RequestError(f"{operation}: prg_inputs differ in how many parties' seeds they name")
    sizes = sorted({source.size for source in task.sources})
    alike = operation == "AdjustDot" or len(sizes) == 1
    whole = bits or not any(size % task.word for size in sizes)
    if not (all(sizes) and alike and whole):
        raise RequestError(
            f"{operation}: buffer_len {sizes}; one positive multiple of {task.word} is needed"
        )
    if task.shift >= 8 * task.word - 1:
        raise RequestError(f"{operation}: bits = {task.shift} shifts everything out")
