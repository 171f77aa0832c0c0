"""What an audit plants in a training."""

from dataclasses import replace

import numpy as np

from fedmi.data.dataset import DataError
from fedmi.data.records import Ints, Records, Split
from fedmi.deployments.base import Planted
from fedmi.exposure.seeding import Seed
from fedmi.protections.base import Setting, TrainingProtection, UpdateProtection


def plant(split: Split, count: int, seed: Seed) -> tuple[Records, Planted]:
    """The private records with wrong labels on `count` of them, and a fair coin for each.

    DataError if that leaves fewer than half of the records untouched.
    """
    private = split.private
    if not count:
        return private, Planted()
    if count > len(private) // 2:
        raise DataError(
            f"audit_records = {count} of {len(private)} private records; "
            f"at most {len(private) // 2} would be right"
        )
    rng = seed.numpy()
    rows = np.sort(rng.choice(len(private), count, replace=False))
    shift = rng.integers(1, split.classes, count)
    wrong = (private.labels[rows] + shift) % split.classes
    labels = private.labels.copy()
    labels[rows] = wrong
    coins = rng.integers(0, 2, count)
    return replace(private, labels=labels), Planted(rows=rows, labels=wrong, coins=coins)


def kept(part: Ints, planted: Planted) -> Ints:
    """A client's rows without those that a coin leaves out."""
    return part[~np.isin(part, planted.rows[planted.coins == 0])]


def with_gradients(planted: Planted, setting: Setting) -> Planted:
    """With the gradients planted at each client, and the updates of clients added to them."""
    training = [p for p in setting.protections if isinstance(p, TrainingProtection)]
    found = {
        client: canaries
        for protection in training
        for client in range(setting.clients)
        if (canaries := protection.canaries(setting, client)) is not None
    }
    users = (p.canaries(setting) for p in setting.protections if isinstance(p, UpdateProtection))
    return replace(planted, gradients=found, users=next(filter(None, users), None))
