"""Builds the engine that a manifest names. A runtime is imported only when a model needs it."""

from types import ModuleType

from edge_runtime.core.errors import BundleError
from edge_runtime.engines import Engine


def build_engine(
    engine: str,
    model: bytes,
    *,
    max_batch: int,
    threads: int = 1,
    is_batch_invariant: bool = True,
    are_rows_alike: bool = False,
) -> Engine:
    """Load the plain bytes of a model into the engine that a manifest names ("onnx", "tflite").

    `threads` is what the engine uses inside one operator; `is_batch_invariant` is the maker's claim, and
    `are_rows_alike` says that all rows have the same shapes. Raises BundleError.
    """
    # Imported late: a process that only reads bundles must not pay 20 MB for a runtime.
    if engine == "onnx":
        from edge_runtime.engines.onnx import OnnxEngine  # noqa: PLC0415

        return OnnxEngine(
            model,
            max_batch=max_batch,
            threads=threads,
            is_batch_invariant=is_batch_invariant,
            are_rows_alike=are_rows_alike,
        )
    if engine == "tflite":
        loaded: Engine = _litert().LitertEngine(
            model, max_batch=max_batch, threads=threads, is_batch_invariant=is_batch_invariant
        )
        return loaded
    raise _unknown(engine)


def engine_version(engine: str) -> str:
    """Return name and version of the runtime of a manifest's engine, which is imported for it. Raises BundleError."""
    if engine == "onnx":
        from edge_runtime.engines.onnx import VERSION  # noqa: PLC0415

        return VERSION
    if engine == "tflite":
        version: str = _litert().VERSION
        return version
    raise _unknown(engine)


def _litert() -> ModuleType:
    try:
        from edge_runtime.engines import litert  # noqa: PLC0415
    except ImportError as error:
        raise BundleError(
            f"the bundle is a TFLite model, and no runtime for it can be imported ({error}); "
            "run: pip install 'edge-runtime[tflite]'"
        ) from None
    return litert


def _unknown(engine: str) -> BundleError:
    return BundleError(f"the bundle needs the engine {engine!r}; this release runs 'onnx' and 'tflite'")
