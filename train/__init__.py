"""Stage 2: train transcoders from a store, and use them. No LLM library is imported.

from train import Transcoder
transcoder = Transcoder.load("runs/tiny-001")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.model.transcoder import Transcoder, TranscoderOutput
    from train.run.load_run import LoadedRun, load_run

__all__ = ["LoadedRun", "Transcoder", "TranscoderOutput", "load_run"]


def __getattr__(name: str) -> Any:
    """Import what is exported when it is first asked for: torch takes seconds, and `--help` needs none of it."""
    if name in ("Transcoder", "TranscoderOutput"):
        from train.model import transcoder as module
    elif name in ("LoadedRun", "load_run"):
        from train.run import load_run as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
