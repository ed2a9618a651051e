"""What both stages share: the store format, durable files, configuration. Imports neither stage, and no torch.

from shared import Store
store = Store.open("cache/tiny-L8-4656e6")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.store.store import Store

__all__ = ["Store"]


def __getattr__(name: str) -> Any:
    """Import what is exported when it is first asked for."""
    if name != "Store":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shared.store.store import Store

    return Store


def __dir__() -> list[str]:
    """List what is exported beside what was imported, for completion."""
    return sorted({*globals(), *__all__})
