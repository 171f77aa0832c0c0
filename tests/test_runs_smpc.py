"""One run from scenario to table: what a compute party reads alone, and with a colluder."""

from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("spu")

from fedmi.leakage.row import split
from fedmi.runs.collect import Results
from fedmi.runs.execute import run
from tests.small import small

pytestmark = pytest.mark.slow

ATTACKS = [
    ("model_holder", "global_model", "mi_face", 0, ["central", "served", "mpc"]),
    ("compute_party", "share", "share_reconstruction", 0, ["mpc"]),
    ("compute_party", "share", "share_reconstruction", 1, ["mpc"]),
    ("compute_party", "share", "mi_face", 0, ["served", "mpc"]),
    ("compute_party", "share", "mi_face", 1, ["served", "mpc"]),
]
HEAD = """
name = "parties"
seeds = [1]
metrics = ["psnr", "attack_accuracy_top1"]

[data]
kind = "digits"

[model]
kind = "mlp"
hidden = [16]
activation = "relu"

[training]
learning_rate = 0.5
batch_size = 64

[evaluator]
kind = "mlp"

[[deployment]]
kind = "centralized"
name = "central"
epochs = 2

[[deployment]]
kind = "centralized"
name = "served"
epochs = 2
serving = { kind = "smpc", rehearsal = 20 }

[[deployment]]
kind = "smpc"
name = "mpc"
epochs = 2
"""


def scenario() -> str:
    parts = [HEAD]
    for position, channel, kind, colluders, deployments in ATTACKS:
        options = f"colluders = {colluders}\n" if colluders else ""
        options += "alpha = 50\n" if kind == "mi_face" else ""
        parts.append(
            f'[[attack]]\nkind = "{kind}"\nposition = "{position}"\nchannel = "{channel}"\n'
            f"deployments = {deployments}\n{options}".replace("'", '"')
        )
    return "\n".join(parts)
