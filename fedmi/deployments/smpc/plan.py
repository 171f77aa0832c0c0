"""What owners, compute parties and the receiver of a training on shares agree on."""

from dataclasses import dataclass

from fedmi.data.records import Ints
from fedmi.deployments.smpc.owners import Owners
from fedmi.exposure.recipe import LocalWork
from fedmi.models.base import ModelSpec, Shape
from fedmi.mpc.scheme import Scheme


@dataclass(frozen=True)
class Plan:
    """Fixed before anything is shared; all of it is public.

    batches: rows of the private records, step by step. epoch: steps of one pass over them.
    recorded_steps: so many first steps whose messages are kept. opens_model: whether the finished
    model is opened.
    """

    name: str
    scheme: Scheme
    model: ModelSpec
    shape: Shape
    classes: int
    work: LocalWork
    batches: tuple[Ints, ...]
    epoch: int
    owners: Owners
    recorded_steps: int
    opens_model: bool

    def at(self, step: int) -> str:
        """The step in words, counted from 1."""
        return f"step {step} of {len(self.batches)}"

    def checked_after(self, step: int) -> bool:
        """Whether the range of the fixed-point numbers is checked after the step."""
        return step % self.epoch == 0 or step == len(self.batches)
