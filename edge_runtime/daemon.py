"""The daemon: build, run, drain."""

import asyncio
import ctypes
import gc
import logging
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack

from edge_runtime.config import Config, socket_path, tcp_address
from edge_runtime.runtime import Runtime
from edge_runtime.server import limits_of, start_server, tenancy_of
from edge_runtime.signals import stop_signals, unless_stopped

_log = logging.getLogger(__name__)


async def serve(config: Config, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; `announce` gets one line once requests are welcome.

    A second signal ends the process at once with exit code 1; one that comes while a model is tried ends the
    trial. Raises ConfigError, BundleError.
    """
    async with AsyncExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        runtime = await unless_stopped(stop, stack.enter_async_context(Runtime.open(config)))
        if runtime is None:
            return
        server = await start_server(
            runtime,
            socket_path=socket_path(config),
            tcp=tcp_address(config),
            allowed_hosts=config.server.allowed_hosts,
            limits=limits_of(config.server),
            tenancy=tenancy_of(config.server),
        )
        try:
            _calm_collector()
            announce(f"ready: {', '.join(config.models)} on {' and '.join(server.addresses)}")
            await stop.wait()
            _log.info("event=draining")
            await server.close_ingress()
            await server.drain(config.requests.drain_s)
        finally:
            await server.close()
    _log.info("event=stopped")


def _calm_collector() -> None:
    """Spare the collector what lives for ever, and have it look at the rest rarely.

    Each full pass over a filled cache stops the daemon for 20 to 30 ms; requests leave no cycles behind.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 100)
    if hasattr(
        libc := ctypes.CDLL(None), "malloc_trim"
    ):  # glibc keeps what loading a model needed for a moment
        libc.malloc_trim(0)


def run(config: Config) -> None:
    """Run `serve` on the quickest event loop there is."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")

    def announce(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - the one line supervisors and people wait for

    try:
        import uvloop  # noqa: PLC0415 - absent on some platforms
    except ImportError:
        asyncio.run(serve(config, announce))
    else:
        uvloop.run(serve(config, announce))
