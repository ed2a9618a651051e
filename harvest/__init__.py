"""Stage 1: run an LLM once and keep its activations in a store.

from harvest import harvest, load_settings
(store,) = harvest(load_settings("tiny", tokens=100_000), "cache")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harvest.imports.import_pairs import import_pairs, load_import_settings
    from harvest.run.pipeline import estimates, harvest
    from harvest.settings import Settings, load_settings

__all__ = ["Settings", "estimates", "harvest", "import_pairs", "load_import_settings", "load_settings"]


def __getattr__(name: str) -> Any:
    """Import what is exported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("Settings", "load_settings"):
        from harvest import settings as module
    elif name in ("import_pairs", "load_import_settings"):
        from harvest.imports import import_pairs as module  # type: ignore[no-redef]
    else:
        from harvest.run import pipeline as module  # type: ignore[no-redef]
    return getattr(module, name)


def __dir__() -> list[str]:
    """List what is exported beside what was imported, for completion."""
    return sorted({*globals(), *__all__})
