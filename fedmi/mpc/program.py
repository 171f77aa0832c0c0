"""A public program: every party runs the same one, on its shares."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """Compiled for the engine; nothing in it is secret.

    code: what the engine executes. inputs, outputs: names of shared variables, in order.
    """

    name: str
    code: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
