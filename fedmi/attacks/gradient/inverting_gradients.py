"""Inverting Gradients: records whose gradient points where the observed one does."""

from typing import ClassVar, Literal

from fedmi.attacks.engine.evidence import UPDATES
from fedmi.attacks.engine.inversion import Inversion


class InvertingGradients(Inversion):
    """Records found by matching the direction of their gradient to the observed update.

    Minimises (1 - cos(simulated, observed)) / unit + tv_weight TV(x) by Adam on the sign of its
    gradient, x kept in [0, 1], the step size falling tenfold at 3/8, 5/8 and 7/8 of the steps; the
    best iterate of the best restart by that same loss is returned. A client update or an aggregate
    is matched by the local training it came from, simulated step by step (parties of an aggregate
    hold equal shares where only the sum is known), or read as one gradient where
    `local_simulation` is off. Labels and batch order are used where granted; otherwise labels are
    recovered first, every epoch is taken to run in the same order, and which labels fell into
    which step is found by a short search over `label_orders` deals, the lowest loss winning.
    Batch normalisation in train mode uses the batch's statistics; those a client sent are matched
    only where they are granted. All targets and restarts of a round are one batched optimisation.

    Threat model: honest-but-curious, sees one update and the model it started from.
    `unit` is the distance of a grey image, so that one tv_weight serves networks whose distances
    lie orders of magnitude apart (the paper tunes it per network, 1e-4 .. 1e-1, with unit 1). The
    paper's learning rate of 0.1 in standardised pixels is 0.025 in pixels of [0, 1].
    Raises AttackError if an observation is missing, or granted labels do not fit it.
    """

    kind: Literal["inverting_gradients"] = "inverting_gradients"
    paper: ClassVar[str] = (
        "Geiping, Bauermeister, Droege, Moeller: Inverting Gradients - How easy is it to break "
        "privacy in federated learning? NeurIPS 2020"
    )

    channels: ClassVar = UPDATES
