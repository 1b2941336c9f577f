"""Runs small quantised models on a device, and asks a cloud tier only when unsure and allowed.

    async with Runtime.open() as runtime:
        outcome = await runtime.ask("turn the lights off")

What this module exports is the public interface; everything else may change with any version.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.runtime import Runtime as Runtime

__version__ = "0.1.0"
__all__ = ["Runtime", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that `edge-runtime --help` and the client never pay for loading a model runner.
    if name == "Runtime":
        from edge_runtime.runtime import Runtime  # noqa: PLC0415

        return Runtime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
