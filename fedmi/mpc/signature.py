"""The shapes that a compiled program takes, from its text."""

import re

_MAIN = re.compile(rb"func\.func @main\((.*?)\)(?: ->|\s*\{)", re.DOTALL)
_TENSOR = re.compile(rb"%arg\d+: tensor<((?:\d+x)*)")


def input_shapes(code: bytes) -> tuple[tuple[int, ...], ...]:
    """Of each input, in order; ValueError where the code has no main function to read."""
    main = _MAIN.search(code)
    if main is None:
        raise ValueError("the program has no function main; is it compiled for the engine?")
    return tuple(
        tuple(int(size) for size in dims.split(b"x") if size)
        for dims in _TENSOR.findall(main.group(1))
    )
