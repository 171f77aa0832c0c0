"""Outcomes on disk: safetensors and JSON, paths relative to their directory, no pickle.

model.safetensors   the finished model
transcripts.json    every observation; its payload is a safetensors file in the directory
confided.json       what each client could tell as a colluder; payloads likewise
canaries.json       what an audit planted, and its coins: for metrics only
outcome.json        utility, cost, claims, flags, and what MPC took
noticed.json        what careful clients measured, where they did
truth.json          the rows behind each (round, client): for metrics only
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedmi.deployments.base import Cost, Noticed, Outcome, Planted, Utility
from fedmi.exposure.claim import PrivacyClaim
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.opening import Confided
from fedmi.exposure.payload import StoredTensors, store
from fedmi.exposure.words import Channel, Position
from fedmi.mpc.cost import MPCCost
from fedmi.protections.audit.canaries import GradientCanaries

MODEL, TRANSCRIPTS = "model.safetensors", "transcripts.json"
CONFIDED, PLANTED = "confided.json", "canaries.json"
OUTCOME, TRUTH = "outcome.json", "truth.json"
NOTICED = "noticed.json"


def save(outcome: Outcome, directory: Path) -> None:
    """Write the outcome; payloads that are files in `directory` stay where they are.

    What serving it showed is kept by `saved_service`, beside and not in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    store(outcome.state, directory / MODEL)
    files = Payloads(directory)
    write(
        directory / TRANSCRIPTS,
        {
            position: [observation_out(seen, files.path(seen.payload)) for seen in t.observations]
            for position, t in outcome.transcripts.items()
        },
    )
    write(
        directory / CONFIDED,
        [confided_out(c, files.path(c.tensors)) for c in outcome.confided],
    )
    write(directory / PLANTED, _planted_out(outcome.planted))
    if outcome.noticed:
        write(directory / NOTICED, [asdict(one) for one in outcome.noticed])
    write(
        directory / OUTCOME,
        {
            "utility": asdict(outcome.utility),
            "cost": asdict(outcome.cost),
            "claims": [asdict(claim) for claim in outcome.claims],
            "flags": sorted(outcome.flags),
            "mpc": outcome.mpc.as_json() if outcome.mpc else None,
        },
    )
    write(
        directory / TRUTH,
        [
            {
                "round": at[0],
                "client": at[1],
                "rows": rows.tolist(),
                "steps": outcome.order.get(at, ()),
            }
            for at, rows in outcome.used.items()
        ],
    )


def load(directory: Path) -> Outcome:
    """The outcome saved in `directory`; payloads are read when they are asked for."""
    outcome = read(directory / OUTCOME)
    transcripts = {
        Position(position): Transcript(
            Position(position),
            tuple(observation_in(item, Position(position), directory) for item in seen),
        )
        for position, seen in read(directory / TRANSCRIPTS).items()
    }
    truth = {(item["round"], item["client"]): item for item in read(directory / TRUTH)}
    return Outcome(
        state=load_file(directory / MODEL),
        transcripts=transcripts,
        used={at: np.array(item["rows"], dtype=np.int64) for at, item in truth.items()},
        order={at: tuple(map(tuple, item["steps"])) for at, item in truth.items()},
        utility=Utility(**outcome["utility"]),
        cost=Cost(**outcome["cost"]),
        claims=tuple(_claim(claim) for claim in outcome["claims"]),
        flags=frozenset(outcome["flags"]),
        confided=tuple(confided_in(item, directory) for item in read(directory / CONFIDED)),
        planted=_planted_in(read(directory / PLANTED)),
        mpc=computed_in(outcome["mpc"]),
        noticed=_noticed_in(directory / NOTICED),
    )


def _noticed_in(path: Path) -> tuple[Noticed, ...]:
    return tuple(Noticed(**item) for item in read(path)) if path.is_file() else ()


def confided_out(told: Confided, payload: str) -> dict[str, object]:
    return {
        "client": told.client,
        "round": told.round,
        "payload": payload,
        "position": told.position,
        "about": list(told.about),
    }


def confided_in(item: dict[str, Any], directory: Path) -> Confided:
    return Confided(
        client=item["client"],
        round=item["round"],
        tensors=StoredTensors(directory / item["payload"]),
        position=Position(item["position"]),
        about=tuple(item["about"]),
    )


def computed_in(item: dict[str, Any] | None) -> MPCCost | None:
    return MPCCost.from_json(item) if item else None


def _planted_out(planted: Planted) -> dict[str, object]:
    gradients = {str(client): _canaries_out(found) for client, found in planted.gradients.items()}
    users = _canaries_out(planted.users) if planted.users is not None else None
    records = {name: getattr(planted, name).tolist() for name in ("rows", "labels", "coins")}
    return {"gradients": gradients, "users": users, **records}


def _planted_in(item: dict[str, Any]) -> Planted:
    gradients = {int(client): _canaries_in(one) for client, one in item["gradients"].items()}
    users = _canaries_in(item["users"]) if item.get("users") else None
    records = {n: np.array(item[n], dtype=np.int64) for n in ("rows", "labels", "coins")}
    return Planted(gradients, users, **records)


def _canaries_out(canaries: GradientCanaries) -> dict[str, object]:
    return {
        "places": {name: found.tolist() for name, found in canaries.places.items()},
        "coins": canaries.coins.int().tolist(),
        "norm": canaries.norm,
    }


def _canaries_in(item: dict[str, Any]) -> GradientCanaries:
    places = {name: torch.tensor(found) for name, found in item["places"].items()}
    return GradientCanaries(places, torch.tensor(item["coins"]).bool(), item["norm"])


def _claim(item: dict[str, Any]) -> PrivacyClaim:
    return PrivacyClaim(**{**item, "against": tuple(map(Position, item["against"]))})


class Payloads:
    """Where each payload lies, relative to the directory; one in memory is written, once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._written: dict[int, str] = {}

    def path(self, payload: Mapping[str, Tensor]) -> str:
        if isinstance(payload, StoredTensors):
            path = payload.path.resolve()
            if path.is_relative_to(self._directory):
                return path.relative_to(self._directory).as_posix()
        if id(payload) not in self._written:
            name = f"payloads/{len(self._written):06d}.safetensors"
            store(payload, self._directory / name)
            self._written[id(payload)] = name
        return self._written[id(payload)]


def observation_out(seen: Observation, payload: str) -> dict[str, object]:
    return {
        "channel": seen.channel,
        "round": seen.round,
        "clients": list(seen.clients),
        "payload": payload,
        "wire_bytes": seen.wire_bytes,
        "clear": dict(seen.clear),
        "averages": seen.averages,
    }


def observation_in(item: dict[str, Any], position: Position, directory: Path) -> Observation:
    return Observation(
        position=position,
        channel=Channel(item["channel"]),
        round=item["round"],
        clients=tuple(item["clients"]),
        payload=StoredTensors(directory / item["payload"]),
        wire_bytes=item["wire_bytes"],
        clear=item["clear"],
        averages=Channel(item["averages"]) if item["averages"] else None,
    )


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=True), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
