"""The shares that one party holds, outside its engine and inside."""

from collections.abc import Sequence

from fedmi.mpc import engine
from fedmi.mpc.engine import Piece, Runtime


class Vault:
    """Shares by the names of their variables.

    What owners sent stays beside the engine, so that rows can be selected without asking it for the
    whole; it goes into the engine when a program first reads it. What programs wrote is there only.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, Piece] = {}
        self._inside: set[str] = set()

    def put(self, name: str, piece: Piece) -> None:
        """A new share under this name, in place of what was there."""
        self._pieces[name] = piece
        self._inside.discard(name)

    def written(self, names: Sequence[str]) -> None:
        """A program wrote these in the engine."""
        for name in names:
            self._pieces.pop(name, None)
            self._inside.add(name)

    def get(self, name: str, runtime: Runtime) -> Piece:
        """The share of a variable, wherever it is; ValueError where there is none."""
        if name in self._pieces:
            return self._pieces[name]
        if name not in self._inside:
            raise ValueError(f"no shared variable {name!r}; there are {self.names()}")
        return Piece.of(runtime.GetVar(name))

    def shape(self, name: str, runtime: Runtime) -> tuple[int, ...]:
        """Without fetching the share."""
        if name in self._pieces:
            return self._pieces[name].shape
        if name not in self._inside:
            raise ValueError(f"no shared variable {name!r}; there are {self.names()}")
        return tuple(runtime.GetVarMeta(name).shape.dims)

    def install(self, names: Sequence[str], runtime: Runtime) -> None:
        """See that the engine has these."""
        for name in names:
            if name not in self._inside:
                runtime.SetVar(name, self.get(name, runtime).share())
                self._inside.add(name)

    def select(
        self, name: str, parts: Sequence[tuple[str, Sequence[int]]], runtime: Runtime
    ) -> None:
        """`name` becomes these rows of these variables."""
        self.put(
            name, engine.selected([(self.get(source, runtime), rows) for source, rows in parts])
        )

    def delete(self, names: Sequence[str], runtime: Runtime) -> None:
        """Forget these; ValueError where one is not there."""
        for name in names:
            if name not in self._pieces and name not in self._inside:
                raise ValueError(f"no shared variable {name!r}; there are {self.names()}")
            self._pieces.pop(name, None)
            if name in self._inside:
                self._inside.discard(name)
                runtime.DelVar(name)

    def names(self) -> list[str]:
        return sorted(self._pieces.keys() | self._inside)
