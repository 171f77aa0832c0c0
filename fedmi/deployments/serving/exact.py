"""The exact serving regime: the model answers as it was trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedmi.deployments.serving.base import Serving, Trained
from fedmi.exposure.service import Service
from fedmi.exposure.words import Channel


class Exact(Serving):
    """Softmax probabilities, or the likeliest class, from the model in the clear.

    The module is in eval mode and no gradient leads through an answer.
    """

    kind: Literal["exact"] = "exact"

    @contextmanager
    def door(self, model: Trained, channel: Channel, directory: Path) -> Iterator[Service]:
        if channel not in (Channel.PREDICTIONS, Channel.LABELS):
            raise ValueError(f"a service answers with predictions or labels, not {channel}")
        module = model.module()

        @torch.no_grad()
        def answer(inputs: Tensor) -> Tensor:
            logits: Tensor = module(inputs.detach())
            return logits.softmax(1) if channel == Channel.PREDICTIONS else logits.argmax(1)

        yield Service(answer, channel)
