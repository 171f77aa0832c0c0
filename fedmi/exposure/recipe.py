"""How a model is trained on one party's records, in centralized and federated training alike."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """Local SGD: minibatches without replacement in a fresh random order each epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(default=0.1, gt=0, le=1e3, description="SGD step size")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="SGD momentum, reset each round")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="L2 penalty")
    batch_size: int = Field(default=16, ge=1, description="records a step")
    mode: Literal["train", "eval"] = Field(
        default="train", description="module mode while training (dropout, batch statistics)"
    )


class Pretraining(Recipe):
    """What everybody starts from: a model that somebody trained on the public records.

    Fine-tuning, as most federations of today do it. The model is known to all, as an initial
    model is, and a twin starts from the very same one.
    """

    epochs: int = Field(
        default=0, ge=0, le=10_000, description="passes over the public records; 0 = none"
    )

    @property
    def work(self) -> "LocalWork":
        named = {name: getattr(self, name) for name in Recipe.model_fields}
        return LocalWork(recipe=Recipe(**named), epochs=max(1, self.epochs))


class LocalWork(BaseModel):
    """The work one party does in one round; exactly one of `epochs` and `steps` counts.

    steps > 0 wins over epochs; a party with fewer records than a batch uses all of them.
    sampling: `shuffle` deals every epoch anew without replacement; `poisson` puts each record into
    each step's batch by a coin of its own, so that batches differ in size and may be empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe = Recipe()
    epochs: int = Field(default=1, ge=1)
    steps: int = Field(default=0, ge=0)
    proximal_mu: float = Field(default=0.0, ge=0)
    sampling: Literal["shuffle", "poisson"] = "shuffle"

    def sample_rate(self, records: int) -> float:
        """Probability of a record to be in a step's batch, under `poisson`."""
        return min(self.recipe.batch_size, records) / records

    def batch_sizes(self, records: int) -> list[int]:
        """Sizes of the minibatches, in order, for a party that holds `records` records; under
        `poisson` their expectation."""
        size = min(self.recipe.batch_size, records)
        epoch = [min(size, records - start) for start in range(0, records, size)]
        if self.sampling == "poisson":
            epoch = [size] * len(epoch)
        if not self.steps:
            return epoch * self.epochs
        return [epoch[i % len(epoch)] for i in range(self.steps)]
