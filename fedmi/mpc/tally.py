"""How much a party received from its peers."""

from collections import OrderedDict

from fedmi.mpc.framing import Push

REMEMBERED = 4096


class Tally:
    """Since the start. Control messages (ACK, FIN, trial of a connection) count as framing only.

    rounds: how often the party had to wait for messages: one for each point-to-point message and
    one for each collective operation, whose messages from all peers bear one key. Messages that do
    not depend on each other and could have travelled together count each, so it is an upper bound
    of the protocol's depth, and exact for a program that does one thing after another.
    """

    def __init__(self) -> None:
        self.received_bytes = 0
        self.wire_bytes = 0
        self.messages = 0
        self.rounds = 0
        self._recent: OrderedDict[str, None] = OrderedDict()

    def add(self, push: Push) -> None:
        """One message, or one chunk of it."""
        if push.is_control:
            return
        self.received_bytes += len(push.value)
        if not push.is_first:
            return
        self.messages += 1
        if push.key in self._recent:
            return
        self.rounds += 1
        self._recent[push.key] = None
        if len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)
