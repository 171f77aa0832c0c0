"""The vocabulary of a threat model: channels, positions and facts."""

import re
from enum import StrEnum


class Channel(StrEnum):
    """Where information crosses a trust boundary."""

    GRADIENT = "gradient"
    CLIENT_UPDATE = "client_update"
    MASKED_UPDATE = "masked_update"
    CIPHERTEXT = "ciphertext"
    SHARE = "share"
    AGGREGATE = "aggregate"
    GLOBAL_MODEL = "global_model"
    PREDICTIONS = "predictions"
    LABELS = "labels"
    FAULTY_READOUT = "faulty_readout"


SERVED = frozenset({Channel.PREDICTIONS, Channel.LABELS})
"""Channels of a model's answers."""


class Position(StrEnum):
    """Who observes a channel."""

    API_USER = "api_user"
    MODEL_HOLDER = "model_holder"
    EAVESDROPPER = "eavesdropper"
    CLIENT = "client"
    MALICIOUS_CLIENT = "malicious_client"
    CURIOUS_SERVER = "curious_server"
    MALICIOUS_SERVER = "malicious_server"
    KEY_HOLDER = "key_holder"
    COMPUTE_PARTY = "compute_party"
    DEALER = "dealer"


class Fact(StrEnum):
    """One thing an adversary may be given besides its channel.

    A position holds some facts by nature (a server wrote the training configuration);
    every other one is a grant that the scenario declares and the leakage table prints.
    """

    ARCHITECTURE = "architecture"
    LOCAL_TRAINING = "local_training"
    NUM_EXAMPLES = "num_examples"
    LABELS = "labels"
    BATCH_ORDER = "batch_order"
    BN_STATISTICS = "bn_statistics"
    PUBLIC_DATA = "public_data"
    CANARIES = "canaries"
    FAULT_MODEL = "fault_model"
    EXACT_MODEL = "exact_model"


PER_ROUND = frozenset(
    {
        Channel.GRADIENT,
        Channel.CLIENT_UPDATE,
        Channel.MASKED_UPDATE,
        Channel.CIPHERTEXT,
        Channel.SHARE,
        Channel.AGGREGATE,
    }
)
"""Channels that carry one observation a round; the target is the batch behind that observation."""


def in_coalition(attack: str, colluders: int) -> str:
    """The title of an attack by an adversary with so many colluding clients."""
    return f"{attack}, {colluders} colluder{'s' * (colluders > 1)}" if colluders else attack


def colluders_in(attack: str) -> int:
    """How many colluders the title of an attack names."""
    found = re.search(r", (\d+) colluders?$", attack)
    return int(found[1]) if found else 0


def alone(attack: str) -> str:
    """The title of the same attack without colluders."""
    return re.sub(r", \d+ colluders?$", "", attack)
