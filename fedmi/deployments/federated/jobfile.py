"""A job and its deployment as files, for the processes that Flower starts: npz and JSON."""

import json
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from flwr.app import Context
from numpy.typing import NDArray
from pydantic import TypeAdapter

from fedmi.data.records import Records, Split
from fedmi.deployments.base import Job
from fedmi.deployments.federated.deployment import Federated
from fedmi.deployments.federated.plan import Plan
from fedmi.exposure.component import OneOf
from fedmi.exposure.payload import StoredTensors, store
from fedmi.exposure.recipe import Recipe
from fedmi.exposure.schema import Schema
from fedmi.exposure.seeding import Seed
from fedmi.models.base import ModelSpec

SETTINGS, RECORDS, START = "job.json", "records.npz", "start.safetensors"
SIDES = ("private", "held_out", "public", "basis")
ARRAYS = tuple(field.name for field in fields(Records) if field.name != "schema")


def write_job(deployment: Federated, job: Job, directory: Path) -> None:
    """The job without its progress callback; private records in clear, so remove it after use."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {}
    for side in SIDES:
        records = getattr(job.split, side)
        if records is not None:
            arrays |= {f"{side}.{name}": getattr(records, name) for name in ARRAYS}
    np.savez(directory / RECORDS, allow_pickle=False, **arrays)
    if job.start is not None:
        store(job.start, directory / START)
    settings = {
        "deployment": deployment.model_dump(mode="json"),
        "model": job.model.model_dump(mode="json"),
        "recipe": job.recipe.model_dump(mode="json"),
        "seed": job.seed.path,
        "record": sorted(job.record),
        "confide": job.confide,
        "workers": job.workers,
        "classes": job.split.classes,
        "schema": job.split.private.schema.model_dump(mode="json"),
        "identity_disjoint": job.split.identity_disjoint,
        "shared_classes": job.split.shared_classes,
    }
    (directory / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def read_job(directory: Path) -> tuple[Federated, Job]:
    """What `write_job` wrote; the job works in `directory`."""
    settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    schema: Schema = TypeAdapter(Schema).validate_python(settings["schema"])
    with np.load(directory / RECORDS, allow_pickle=False) as arrays:
        sides = {
            side: Records(**{name: arrays[f"{side}.{name}"] for name in ARRAYS}, schema=schema)
            for side in SIDES
            if f"{side}.labels" in arrays
        }
    split = Split(
        private=sides["private"],
        held_out=sides["held_out"],
        public=sides["public"],
        classes=settings["classes"],
        identity_disjoint=settings["identity_disjoint"],
        shared_classes=settings["shared_classes"],
        basis=sides.get("basis"),
    )
    models: TypeAdapter[ModelSpec] = TypeAdapter(Annotated[ModelSpec, OneOf("fedmi.models")])
    job = Job(
        split=split,
        model=models.validate_python(settings["model"]),
        recipe=Recipe.model_validate(settings["recipe"]),
        seed=Seed(tuple(settings["seed"])),
        directory=directory,
        record=frozenset(settings["record"]),
        confide=settings["confide"],
        workers=settings["workers"],
        start=dict(StoredTensors(start)) if (start := directory / START).is_file() else None,
    )
    return Federated.model_validate(settings["deployment"]), job


def remove_job(directory: Path) -> None:
    for name in (SETTINGS, RECORDS, START):
        (directory / name).unlink(missing_ok=True)


def load_plan(directory: str, _: Context) -> Plan:
    """The plan of the job in `directory`, for any node."""
    return stored_plan(directory)


@lru_cache(maxsize=2)
def stored_plan(directory: str) -> Plan:
    """The plan of the job in `directory`, read once a process."""
    deployment, job = read_job(Path(directory))
    return deployment.plan(job)
