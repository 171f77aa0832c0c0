"""What a connected party does: its engine, its shares, its programs, its relay."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedmi.mpc import engine
from fedmi.mpc.counters import EngineLog
from fedmi.mpc.engine import Piece, Runtime, Settings
from fedmi.mpc.lines import Frame
from fedmi.mpc.passage import Passage
from fedmi.mpc.relay import Relay
from fedmi.mpc.signature import input_shapes
from fedmi.mpc.vault import Vault

Reply = tuple[dict[str, object], list[bytes]]


class Workshop:
    """Commands by name; each returns the reply's header and blobs."""

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings,
        relay: Relay,
        vault: Vault,
        log: EngineLog,
        dealing: Passage | None,
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._relay = relay
        self._vault = vault
        self._log = log
        self._dealing = dealing
        self._code: dict[str, bytes] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._input_bytes = 0
        self._commands: dict[str, Callable[[Mapping[str, object], Sequence[bytes]], Reply]] = {
            "put": self._put,
            "select": self._select,
            "load": self._load,
            "run": self._run,
            "get": self._get,
            "delete": self._delete,
            "record": self._record,
            "traffic": self._traffic,
            "stop": self._stop,
        }

    def do(self, frame: Frame) -> Reply:
        """ValueError for a command that there is none of."""
        command = str(frame.header.get("do"))
        if command not in self._commands:
            raise ValueError(f"no command {command!r}; there are {sorted(self._commands)}")
        return self._commands[command](frame.header, frame.blobs)

    def _put(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        name = str(header["name"])
        piece = Piece.gathered(blobs[0], blobs[1:]).checked(name, self._settings)
        self._input_bytes += len(piece.content)
        self._vault.put(name, piece)
        return {}, []

    def _select(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        sources, rows = _names(header, "sources"), _rows(header["rows"])
        parts = list(zip(sources, rows, strict=True))
        self._vault.select(str(header["name"]), parts, self._runtime)
        return {}, []

    def _load(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        name = str(header["program"])
        self._code[name], self._shapes[name] = blobs[0], input_shapes(blobs[0])
        return {}, []

    def _run(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        name, inputs, outputs = (
            str(header["program"]),
            _names(header, "inputs"),
            _names(header, "outputs"),
        )
        code = self._code.get(name)
        if code is None:
            raise ValueError(f"no program {name!r}; there are {sorted(self._code)}")
        self._fit(name, inputs)
        self._vault.install(inputs, self._runtime)
        started = time.perf_counter()
        self._runtime.Run(
            engine.library().Executable(
                name=name, input_names=inputs, output_names=outputs, code=code
            )
        )
        seconds = time.perf_counter() - started
        self._vault.written(outputs)
        return {"seconds": seconds}, []

    def _fit(self, name: str, inputs: Sequence[str]) -> None:
        shapes = self._shapes[name]
        if len(shapes) != len(inputs):
            raise ValueError(f"program {name} takes {len(shapes)} inputs, not {len(inputs)}")
        for variable, right in zip(inputs, shapes, strict=True):
            shape = self._vault.shape(variable, self._runtime)
            if shape != right:
                raise ValueError(
                    f"{variable}: the share has shape {list(shape)}, "
                    f"but program {name} takes {list(right)}"
                )

    def _get(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        piece = self._vault.get(str(header["name"]), self._runtime)
        return {}, [piece.meta, piece.content]

    def _delete(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        self._vault.delete(_names(header, "names"), self._runtime)
        return {}, []

    def _record(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        """Keep the messages that come in the file `path`, what the dealer sends in `dealt`; null:
        no more of either."""
        self._relay.ledger.record(_path(header["path"]))
        if self._dealing is not None:
            self._dealing.record(_path(header["dealt"]))
        return {}, []

    def _traffic(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        tally = self._relay.ledger.settle()
        return {
            "input_bytes": self._input_bytes,
            "received_bytes": tally.received_bytes,
            "wire_bytes": tally.wire_bytes,
            "engine_bytes": self._log.counters().received_bytes,
            "messages": tally.messages,
            "rounds": tally.rounds,
            "dealer_bytes": self._dealing.bytes if self._dealing else 0,
        }, []

    def _stop(self, header: Mapping[str, object], blobs: Sequence[bytes]) -> Reply:
        self._record({"path": None, "dealt": None}, ())
        os._exit(0)  # the engine's own farewell waits for peers, who stop as well


def _path(value: object) -> Path | None:
    return None if value is None else Path(str(value))


def _names(header: Mapping[str, object], key: str) -> list[str]:
    names = header[key]
    if not isinstance(names, list):
        raise TypeError(f"{key}: a list of names, not {names!r}")
    return [str(name) for name in names]


def _rows(value: object) -> list[list[int]]:
    if not isinstance(value, list) or not all(isinstance(rows, list) for rows in value):
        raise TypeError(f"rows: lists of row numbers, not {value!r}")
    return value
