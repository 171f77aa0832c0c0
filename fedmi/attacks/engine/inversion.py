"""The recipe of Inverting Gradients, which attacks on sealed updates end in as well."""

from pydantic import Field

from fedmi.attacks.engine.descent import Schedule
from fedmi.attacks.engine.smooth_matching import SmoothMatching


class Inversion(SmoothMatching):
    """Adam on the direction of the update and the total variation; see `InvertingGradients`."""

    signed: bool = Field(default=True, description="descend along the sign of the gradient")

    def schedule(self) -> Schedule:
        return Schedule(
            self.steps,
            self.learning_rate,
            sign="hard" if self.signed else "none",
            patience=self.patience,
            stop_below=self.stop_below,
        )
