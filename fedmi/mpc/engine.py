"""The one door to SPU: its configuration, its link and the form of its shares.

A party loads the engine's extension alone: `import spu` would load JAX too, 130 MB and half a
second that only the compiler of programs needs.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ELEMENT_BYTES = 8


def load_alone() -> None:
    """Let `spu.libspu` be imported without the package around it; for a party's process only."""
    spec = find_spec("spu")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("the MPC engine is not installed: pip install 'fedmi[smpc]'")
    package = ModuleType("spu")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["spu"] = package
    library()._check_cpu_features()


def library() -> ModuleType:
    """SPU's extension module."""
    return import_module("spu.libspu")


@dataclass(frozen=True)
class Settings:
    """How a computation is done. dealer: the engine's options for its trusted third party."""

    protocol: str
    fraction_bits: int
    elements: int
    dealer: Mapping[str, object] | None = None

    @property
    def storage(self) -> str:
        """The engine's name for an additively shared number."""
        return f"{self.protocol}.AShr<FM64>"

    def config(self) -> object:
        """As the engine takes it. semi2k without a dealer is refused: the engine's own default has
        party 0 deal the triples, who could then unmask everything."""
        if self.dealer is None and self.protocol == "semi2k":
            raise ValueError("semi2k needs a dealer: without one, party 0 would know all triples")
        options = {
            "protocol": self.protocol.upper(),
            "field": "FM64",
            "fxp_fraction_bits": self.fraction_bits,
            "enable_pphlo_profile": True,
        }
        if self.dealer is not None:
            options["beaver_type"] = "TrustedThirdParty"
            options["ttp_beaver_config"] = dict(self.dealer)
        config = library().RuntimeConfig()
        if not config.ParseFromJsonString(json.dumps(options)):
            raise ValueError(f"the engine does not take {options}")
        return config

    def owner_config(self) -> object:
        """For splitting and adding up alone, which no dealer has a part in."""
        spu = library()
        return spu.RuntimeConfig(
            protocol=getattr(spu.ProtocolKind, self.protocol.upper()),
            field=spu.FieldType.FM64,
            fxp_fraction_bits=self.fraction_bits,
        )


@dataclass(frozen=True)
class Piece:
    """One party's share of one array. meta: as the engine writes it; content: its elements."""

    meta: bytes
    content: bytes

    @classmethod
    def gathered(cls, meta: bytes, share_chunks: Sequence[bytes]) -> "Piece":
        """The engine's share with its chunks put together."""
        chunks = sorted(map(_chunk, share_chunks), key=lambda chunk: chunk.chunk_offset)
        return cls(meta, b"".join(chunk.content for chunk in chunks))

    @classmethod
    def of(cls, share: "Share") -> "Piece":
        return cls.gathered(share.meta, share.share_chunks)

    def share(self) -> "Share":
        """As the engine takes it."""
        spu = library()
        chunk = spu.ValueChunk()
        chunk.total_bytes, chunk.chunk_offset, chunk.content = len(self.content), 0, self.content
        share: Share = spu.Share()
        share.meta = self.meta
        share.share_chunks = [chunk.SerializeToString()] if self.content else []
        return share

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(_described(self.meta).shape.dims)

    @property
    def storage(self) -> str:
        return _described(self.meta).storage_type

    def checked(self, name: str, settings: Settings) -> "Piece":
        """Itself, where it is an additive share of the announced shape; ValueError otherwise."""
        if self.storage != settings.storage:
            raise ValueError(f"{name}: a share of kind {self.storage}, not {settings.storage}")
        right = prod(self.shape) * settings.elements * ELEMENT_BYTES
        if len(self.content) != right:
            raise ValueError(
                f"{name}: a share of shape {list(self.shape)} has {right} bytes, "
                f"but {len(self.content)} came"
            )
        return self

    def ring(self, elements: int) -> NDArray[np.uint64]:
        """[*shape, elements]: the ring elements, little endian, those of one number together."""
        return np.frombuffer(self.content, "<u8").reshape(*self.shape, elements).astype(np.uint64)


def selected(parts: Sequence[tuple[Piece, Sequence[int]]]) -> Piece:
    """These rows (of the first axis) of these shares, one after another.

    ValueError where the shares differ in kind or in the shape of a row; IndexError where a row is
    not there.
    """
    rows = []
    first = _described(parts[0][0].meta)
    for piece, which in parts:
        other = _described(piece.meta)
        if not other.shape.dims or other.shape.dims[1:] != first.shape.dims[1:]:
            raise ValueError(f"rows of {first.shape.dims} and of {other.shape.dims} do not match")
        if (other.storage_type, other.data_type) != (first.storage_type, first.data_type):
            raise ValueError(f"{first.storage_type} and {other.storage_type} do not go together")
        table = np.frombuffer(piece.content, np.uint8).reshape(other.shape.dims[0], -1)
        rows.append(table[np.asarray(which, dtype=np.intp)])
    chosen = np.concatenate(rows)
    first.shape.dims = [len(chosen), *first.shape.dims[1:]]
    return Piece(first.SerializeToString(), chosen.tobytes())


class Share(Protocol):
    """The engine's type: a description, and protobuf chunks of elements."""

    meta: bytes
    share_chunks: list[bytes]


class Runtime(Protocol):
    """The engine's type: executes programs on the variables it has."""

    def Run(self, executable: object) -> None: ...  # noqa: N802
    def SetVar(self, name: str, value: Share) -> None: ...  # noqa: N802
    def GetVar(self, name: str) -> Share: ...  # noqa: N802
    def GetVarMeta(self, name: str) -> "Meta": ...  # noqa: N802
    def DelVar(self, name: str) -> None: ...  # noqa: N802


class _Shape(Protocol):
    dims: list[int]


class Meta(Protocol):
    """The engine's type: what a variable is, without its content."""

    shape: _Shape
    storage_type: str
    data_type: int

    def SerializeToString(self) -> bytes: ...  # noqa: N802


class _Chunk(Protocol):
    chunk_offset: int
    content: bytes


def _described(meta: bytes) -> Meta:
    parsed = library().ValueMeta()
    if not parsed.ParseFromString(meta):
        raise ValueError("a share whose description cannot be read")
    described: Meta = parsed
    return described


def _chunk(data: bytes) -> _Chunk:
    parsed = library().ValueChunk()
    if not parsed.ParseFromString(data):
        raise ValueError("a share whose content cannot be read")
    chunk: _Chunk = parsed
    return chunk
