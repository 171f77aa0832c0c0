"""The dealer of Beaver triples for `semi2k`: a trusted third party, in a process of its own.

The engine ships the half that asks; this is the half that answers, written from the protocol
(SPU's `ttp_server/service.proto`). Before they start, the parties each draw a seed and encrypt it
to the dealer's SM2 key. For every triple one party, `adjust_rank`, sends all these ciphertexts with
the position in the streams and the sizes, and is told the correction that makes the triple right.

What the dealer sees: the parties' seeds, the order and sizes of operations, stream positions. None
of it depends on data, and no share, no message among parties and no result reaches it; alone it
learns the public program and nothing else. What it could do: it knows every mask. With what one
party received and that party's own shares it takes the masks off (`fedmi.mpc.dealer.collusion`;
the attack `share_reconstruction` with `colluders = 1` does so): the dealer counts towards the
threshold. It could also answer wrongly and spoil the result unnoticed; parties and dealer are taken
to be honest but curious.
"""

from fedmi.mpc.dealer.process import Dealer, DealerConfig

__all__ = ["Dealer", "DealerConfig"]
