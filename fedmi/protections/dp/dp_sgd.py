"""Example-level differential privacy: DP-SGD in every client."""

import math
from typing import ClassVar, Literal, Self

from opacus.grad_sample import GradSampleModule
from opacus.utils.module_utils import trainable_modules
from opacus.validators import ModuleValidator
from pydantic import Field, model_validator
from torch import nn

from fedmi.exposure.claim import PrivacyClaim
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel
from fedmi.protections.audit.canaries import GradientCanaries
from fedmi.protections.base import Setting, TrainingProtection
from fedmi.protections.dp.accounting import Accountant, Sampling, frontier, noise_for, worst
from fedmi.protections.dp.opacus_learner import Mode, OpacusLearner
from fedmi.training.local import Learner

CANARY_NORM = 10.0
"""Of a canary's raw gradient, in clipping norms: a mechanism that forgets to clip shows."""


class DPSGD(TrainingProtection):
    """DP-SGD: every example's gradient is clipped, and Gaussian noise added to their sum.

    step: (sum_i g_i min(1, max_grad_norm / |g_i|) + N(0, (noise_multiplier max_grad_norm)^2)) / b,
    over a Poisson sample of the client's records with rate b / records, b the batch size.

    Formal guarantee: everything a client sends over the whole training, together, is
    (epsilon, delta)-DP under adding or removing one of its records, against every position and any
    coalition, since the noise is added in the client. One accountant counts all steps of all
    rounds a client takes part in; the claim is the worst client's. Amplification by the sampling
    of clients is not claimed. How many records a client holds is taken as public: it travels in
    clear, and sets the sampling rate and the number of steps. The local loss is not sent.

    The noise comes from a seeded generator, for simulation: whoever knows the seed knows it.

    Refused: layers that mix examples or keep statistics (batch normalisation), module mode
    `eval`, and gradients over several batches in one.
    """

    kind: Literal["dp_sgd"] = "dp_sgd"
    noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        le=1e4,
        description="standard deviation of the noise / max_grad_norm; 0 = solve for target_epsilon",
    )
    target_epsilon: float = Field(
        default=0.0, ge=0, le=100, description="epsilon over all rounds; 0 = use noise_multiplier"
    )
    delta: float = Field(default=1e-5, gt=0, lt=0.1, description="delta of the claim")
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=1e6, description="L2 norm an example's gradient is clipped to"
    )
    accountant: Accountant = Field(default="prv", description="how the steps are composed")
    grad_sample_mode: Mode = Field(
        default="auto",
        description="how gradients of examples are clipped; auto = book_keeping where every layer "
        "allows it, else ghost (which falls back to functorch layer by layer)",
    )
    audit_canaries: int = Field(
        default=0,
        ge=0,
        description="canary gradients planted at each client, half of them in by a coin, for "
        "canary_audit; they cost utility. 0 = no audit",
    )
    sampling: ClassVar = "poisson"
    paper: ClassVar[str] = "Abadi et al.: Deep Learning with Differential Privacy. CCS 2016"

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.noise_multiplier > 0) == (self.target_epsilon > 0):
            raise ValueError("set either noise_multiplier or target_epsilon, above 0")
        return self

    def learner(self, setting: Setting, client: int, seed: Seed) -> Learner:
        noise = self.noise(setting)
        canaries = self.canaries(setting, client)
        return OpacusLearner(noise, self.max_grad_norm, self.grad_sample_mode, seed, canaries)

    @property
    def audited(self) -> bool:
        return self.audit_canaries > 0

    def canaries(self, setting: Setting, client: int) -> GradientCanaries | None:
        if not self.audit_canaries or setting.audit_seed is None:
            return None
        parameters = {n: s for n, s in setting.layout.items() if n in setting.parameters}
        seed = setting.audit_seed.child("gradients", client)
        norm = CANARY_NORM * self.max_grad_norm
        return GradientCanaries.plant(parameters, self.audit_canaries, norm, seed)

    def problems(self, setting: Setting) -> list[str]:
        found = unsupported(setting.network)
        if setting.work.recipe.mode == "eval":
            found.append("dp_sgd needs mode = 'train': Opacus follows no model in mode 'eval'")
        if setting.sends == Channel.GRADIENT and setting.work.steps != 1:
            found.append("dp_sgd with gradients as updates needs local_steps = 1: one noisy batch")
        parameters = sum(p.numel() for p in setting.network.parameters())
        if self.audit_canaries > parameters // 2:
            found.append(
                f"audit_canaries = {self.audit_canaries}, but the model has {parameters} "
                f"parameters; at most {parameters // 2} would be right"
            )
        return found

    def claims(self, setting: Setting) -> tuple[PrivacyClaim, ...]:
        taken = samplings(setting)
        if not taken:
            return ()
        cost = worst(self.noise(setting), taken, self.delta, self.accountant)
        return (PrivacyClaim(cost.epsilon, self.delta, "example", "add_remove", cost.accountant),)

    def noise(self, setting: Setting) -> float:
        """The noise multiplier: the same for every client and step. ValueError if none will do.

        With a target it is NaN until the partition is drawn.
        """
        if self.noise_multiplier:
            return self.noise_multiplier
        taken = samplings(setting)
        if not taken:
            return math.nan
        return noise_for(self.target_epsilon, taken, self.delta, self.accountant)


def samplings(setting: Setting) -> tuple[Sampling, ...]:
    """What each client does over the whole training, without those others exceed; empty until the
    partition is drawn."""
    work = setting.work
    return frontier(
        Sampling(work.sample_rate(records), len(work.batch_sizes(records)) * rounds)
        for records, rounds in zip(setting.records, setting.participations, strict=True)
        if rounds
    )


def unsupported(model: nn.Module) -> list[str]:
    """Every layer that Opacus refuses, by name, with what to use instead."""
    layers = dict(trainable_modules(model))
    found: dict[str, str] = {}
    for name, layer in model.named_modules():
        if _mixes(layer):
            found[name] = f"{_named(name, layer)} shares statistics between examples"
    for name, layer in layers.items():
        for error in ModuleValidator.VALIDATORS.get(type(layer), lambda _: [])(layer):
            found[name] = f"{_named(name, layer)}: {str(error).partition('. ')[0]}"
        if name not in found and GradSampleModule.validate(layer):
            found[name] = f"{_named(name, layer)} keeps buffers"
    return [_offer(text, model.get_submodule(name)) for name, text in found.items()]


def _mixes(layer: nn.Module) -> bool:
    batch, norms = nn.modules.batchnorm._BatchNorm, nn.modules.batchnorm._NormBase
    return isinstance(layer, batch) or (isinstance(layer, norms) and layer.track_running_stats)


def _named(name: str, layer: nn.Module) -> str:
    return f"dp_sgd cannot train layer '{name}' ({type(layer).__name__})"


def _offer(text: str, layer: nn.Module) -> str:
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return f"{text}; use group normalisation (norm = 'group')"
    return text
