"""Whether the aggregators still answer while clients send them their shares."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedmi.protections.smpc_aggregation.frames import Kind
from fedmi.protections.smpc_aggregation.process import Aggregator, AggregatorError

INTERVAL_SECONDS = 1.0


@contextmanager
def watched(members: Sequence[Aggregator], round: int) -> Iterator[None]:
    """Asks each of them for a sign of life meanwhile; AggregatorError afterwards.

    One that gives none is ended at once: clients that wait for it, one after another, fail then.
    """
    over, found = threading.Event(), list[AggregatorError]()

    def watch() -> None:
        while not over.wait(INTERVAL_SECONDS):
            for member in members:
                try:
                    member.ask(Kind.PING, Kind.OK, round, counted=False)
                except AggregatorError as error:
                    found.append(error)
                    member.process.kill()
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if found:
        raise found[0]
