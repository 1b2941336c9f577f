"""The daemon: build, run, drain."""

import asyncio
import ctypes
import gc
import logging
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack

from edge_runtime.config import Config, check_listens, socket_path, tcp_address
from edge_runtime.runtime import Runtime
from edge_runtime.server import Server, limits_of, start_server, tenancy_of
from edge_runtime.signals import stop_signals, unless_stopped

_log = logging.getLogger(__name__)
_CLOUD_SHARE = 0.8  # of the drain
_WATCH_S = 1.0  # a second of doubt about since when; once a second costs 0.01 % of a core


async def serve(config: Config, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; `announce` gets one line once requests may come.

    A second signal ends the process at once with exit code 1; one that comes while models are loaded ends the load.
    Raises ConfigError, BundleError.
    """
    check_listens(config, "Config")
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
        stack.push_async_callback(server.close)
        runtime.addresses = tuple(server.addresses)
        watch = asyncio.create_task(_watch(runtime), name="watch-problems")
        stack.push_async_callback(_end, watch)
        _calm_collector()
        announce(f"ready: {', '.join(config.models)} on {' and '.join(server.addresses)}")
        await stop.wait()
        await _drain(runtime, server, config.requests.drain_s)
    _log.info("event=stopped")


async def _drain(runtime: Runtime, server: Server, drain_s: float) -> None:
    """Take no new requests, and answer those that were taken, for `drain_s` at most."""
    _log.info("event=draining")
    # Before the listeners close, so that a caller that asks for readiness on an open connection sends no more. Rows that
    # wait for the cloud get the local answer when _CLOUD_SHARE of the time is over: the rest is for writing it.
    runtime.service.drain(_CLOUD_SHARE * drain_s)
    await server.close_ingress()
    if not await server.drain(drain_s):
        _log.warning("event=drain_incomplete after_s=%g", drain_s)


async def _watch(runtime: Runtime) -> None:
    """Note each second what is wrong, so that status can tell since when."""
    while True:
        runtime.note_problems()
        await asyncio.sleep(_WATCH_S)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; an error that ended it before is logged."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and task.exception() is not None:
        _log.error("event=task_failed task=%s", task.get_name(), exc_info=task.exception())


def _calm_collector() -> None:
    """Exempt what lives as long as the process from garbage collection, and run full collections rarely.

    Each full collection over a filled cache stops the daemon for 20 to 30 ms; requests leave no cycles behind.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 100)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps the memory that loading a model needed for a moment
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
