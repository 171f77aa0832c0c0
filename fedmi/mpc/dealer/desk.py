"""The dealer's work on one request, and its log; no sockets here."""

import json
from pathlib import Path
from threading import Lock

from fedmi.mpc.dealer import messages
from fedmi.mpc.dealer.messages import Input, Request, RequestError, read_request
from fedmi.mpc.dealer.prg import SEED_BYTES
from fedmi.mpc.dealer.sm2 import DecryptError, KeyPair
from fedmi.mpc.dealer.triples import Source, Task, adjust


class Desk:
    """Decrypts seeds, computes corrections, and writes down what it saw, a JSON object a line."""

    def __init__(self, keys: KeyPair, log: Path) -> None:
        self._keys = keys
        self._seeds: dict[bytes, bytes] = {}
        self._lock = Lock()
        self._log = log.open("a", encoding="utf-8")

    def answer(self, path: str, body: bytes) -> list[bytes | memoryview]:
        """The body of the answer; a request that cannot be met is answered with its reason."""
        try:
            request = read_request(path, body)
            task = self._task(request)
            pieces = messages.data(adjust(request.operation, task))
        except DecryptError as error:
            self._write({"error": str(error), "bytes_in": len(body)})
            return messages.failure(messages.DECRYPT_ERROR, str(error))
        except RequestError as error:
            self._write({"error": str(error), "bytes_in": len(body)})
            return messages.failure(messages.OPERATION_ERROR, str(error))
        self._write(_entry(request, task, len(body), sum(len(piece) for piece in pieces)))
        return pieces

    def _task(self, request: Request) -> Task:
        sources = tuple(map(self._source, request.inputs))
        order = self._source(request.order) if request.order else None
        return Task(sources, request.word, request.shape, request.shift, order)

    def _source(self, each: Input) -> Source:
        seeds = tuple(map(self._seed, each.ciphertexts))
        return Source(seeds, each.counter, each.size, each.transposed)

    def _seed(self, ciphertext: bytes) -> bytes:
        """Decrypted once; parties send the same ciphertexts with every request."""
        with self._lock:
            if ciphertext not in self._seeds:
                seed = self._keys.decrypt(ciphertext)
                if len(seed) != SEED_BYTES:
                    raise DecryptError(f"a seed of {len(seed)} bytes, not {SEED_BYTES}")
                self._seeds[ciphertext] = seed
            return self._seeds[ciphertext]

    def _write(self, entry: dict[str, object]) -> None:
        line = json.dumps(entry)
        with self._lock:
            self._log.write(line + "\n")
            self._log.flush()


def _entry(request: Request, task: Task, bytes_in: int, bytes_out: int) -> dict[str, object]:
    inputs = [
        {
            "prg_count": source.counter,
            "buffer_len": source.size,
            "transposed": source.transposed,
            "seeds": [seed.hex() for seed in source.seeds],
        }
        for source in task.sources
    ]
    return {
        "operation": request.operation,
        "field_size": request.word,
        "shape": list(request.shape),
        "bits": request.shift,
        "inputs": inputs,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
    }
