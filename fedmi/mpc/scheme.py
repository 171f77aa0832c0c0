"""The sharing scheme: how many parties hold shares, and how many of them together open them."""

from importlib.util import find_spec
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Protocol = Literal["aby3", "semi2k", "cheetah"]

RING_BITS = 64


class Scheme(BaseModel):
    """Fixed-point numbers x * 2^fraction_bits in Z_2^64, shared among compute parties.

    aby3: three parties, replicated sharing x = x0 + x1 + x2, party i holds (x_i, x_{i+1 mod 3});
    any two of them open it (Mohassel and Rindal, CCS 2018).
    semi2k: two or more parties, additive sharing; all together open it. Beaver triples come from a
    dealer, a trusted third party (Cramer et al., SPDZ2k, CRYPTO 2018, against passive adversaries).
    cheetah: two parties, additive sharing, no dealer: lattice encryption and oblivious transfer in
    its place (Huang et al., USENIX Security 2022).
    All are secure against passive adversaries only: a party that lies is not noticed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Protocol = Field(default="aby3", description="how numbers are shared and multiplied")
    parties: int = Field(
        default=0, ge=0, le=8, description="compute parties; 0 = as few as it takes"
    )
    fraction_bits: int = Field(
        default=18, ge=8, le=26, description="bits after the binary point, of the 64 of the ring"
    )

    @property
    def size(self) -> int:
        """How many parties compute."""
        return self.parties or (3 if self.protocol == "aby3" else 2)

    @property
    def threshold(self) -> int:
        """So many parties together open every share; one fewer learn nothing. Where there is a
        dealer, it and any one of them open what is multiplied."""
        return 2 if self.protocol == "aby3" else self.size

    @property
    def has_dealer(self) -> bool:
        """Whether a trusted third party hands out Beaver triples."""
        return self.protocol == "semi2k"

    @property
    def elements(self) -> int:
        """Ring elements that one party holds of one shared number."""
        return 2 if self.protocol == "aby3" else 1

    @property
    def title(self) -> str:
        return f"{self.protocol}, {self.size} parties"

    def refusals(self) -> list[str]:
        """Why this scheme cannot be run, in words."""
        found = []
        if self.protocol == "aby3" and self.size != 3:
            found.append(
                f'parties = {self.parties}: "aby3" is for 3; with 2 its threshold would leave each '
                'party the whole secret; use protocol = "semi2k" (with a dealer) or "cheetah"'
            )
        if self.protocol == "cheetah" and self.size != 2:
            found.append(f'parties = {self.parties}: "cheetah" is for 2; use "semi2k" for more')
        if self.protocol == "semi2k" and self.size < 2:
            found.append(
                f"parties = {self.parties}: one party alone would hold the secret; use 2 or more"
            )
        if find_spec("spu") is None or (self.has_dealer and find_spec("gmalg") is None):
            found.append("the MPC engine is not installed: pip install 'fedmi[smpc]'")
        return found
