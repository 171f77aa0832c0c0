"""How a party's engine finds its peers."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmi.mpc import engine
from fedmi.mpc.counters import EngineLog
from fedmi.mpc.engine import Runtime, Settings
from fedmi.mpc.passage import Passage
from fedmi.mpc.relay import Relay
from fedmi.mpc.vault import Vault
from fedmi.mpc.workshop import Workshop

ATTEMPTS = 5
LOG_BYTES = 1 << 26


def join(header: Mapping[str, object], rank: int, hosts: Sequence[str], relay: Relay) -> Workshop:
    """Start the engine behind the relay and wait until all parties are there.

    hosts: HOST:PORT of every party's relay, by rank. header: protocol, fraction_bits, elements,
    dealer (the engine's options for it, or null), log (a path), recv_timeout_ms, garbage_after (a
    fault to inject, or null), handshake and dealt (paths: where to keep what peers and dealer send
    from the start, or null).
    """
    log = Path(str(header["log"]))
    _log_to(log)
    dealing, dealer = _to_dealer(header["dealer"])
    if header["handshake"] is not None:
        relay.ledger.record(Path(str(header["handshake"])))
        if dealing is not None:
            dealing.record(Path(str(header["dealt"])))
    settings = Settings(
        str(header["protocol"]),
        int(str(header["fraction_bits"])),
        int(str(header["elements"])),
        dealer,
    )
    config = settings.config()
    spoilt = header["garbage_after"]
    if isinstance(spoilt, int):
        hosts = [
            host if peer == rank else Passage(host, spoilt).address
            for peer, host in enumerate(hosts)
        ]
    link = _linked(rank, hosts, int(str(header["recv_timeout_ms"])), relay)
    runtime: Runtime = engine.library().RuntimeWrapper(link, config)
    return Workshop(runtime, settings, relay, Vault(), EngineLog(log), dealing)


def _linked(rank: int, hosts: Sequence[str], recv_timeout_ms: int, relay: Relay) -> object:
    """The engine's link, on a port of its own behind the relay.

    The port is free when it is chosen; should another process take it before the engine does,
    another one is tried, and at last OSError names them.
    """
    spu, tried = engine.library(), []
    for _ in range(ATTEMPTS):
        port = _free_port()
        tried.append(port)
        relay.forward_to(port)
        desc = spu.link.Desc()
        desc.recv_timeout_ms = recv_timeout_ms
        for peer, host in enumerate(hosts):
            desc.add_party(f"party{peer}", f"127.0.0.1:{port}" if peer == rank else host)
        try:
            return spu.link.create_brpc(desc, rank)
        except RuntimeError as error:
            if "server failed start" not in str(error):
                raise
    raise OSError(f"the engine could listen on none of the ports {tried}: all are taken")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _to_dealer(
    options: object,
) -> tuple[Passage | None, Mapping[str, object] | None]:
    """The engine's options for the dealer, by way of a passage that counts."""
    if not isinstance(options, Mapping):
        return None, None
    passage = Passage(str(options["server_host"]))
    return passage, {**options, "server_host": passage.address}


def _log_to(path: Path) -> None:
    spu = engine.library()
    options = spu.logging.LogOptions()
    options.enable_console_logger = False
    options.system_log_path = str(path)
    options.max_log_file_size = LOG_BYTES
    spu.logging.setup_logging(options)
