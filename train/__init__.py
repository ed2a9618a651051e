"""Stage 2: train transcoders from a store, and use them. No LLM library is imported.

from train import Transcoder, load_settings, train
run = train("cache/tiny-L8-4656e6", load_settings("tiny", {"steps": 300}), "runs/short")
transcoder = Transcoder.load(run)
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.files.loop_cache import place_compiled_loops

if TYPE_CHECKING:
    from train.commands import evaluate, export, import_transcoder, probe, resume, sample, train, write_report
    from train.compare.arms import compare_runs
    from train.data.batches import batches
    from train.data.dataset import StoreDataset
    from train.interchange.read_transcoder import read_transcoder
    from train.model.transcoder import Transcoder, TranscoderOutput
    from train.run.load_run import LoadedRun, load_run
    from train.run.settings import Settings, load_settings
    from train.sweeps.run_sweep import sweep

place_compiled_loops(Path(__file__).parent)
_PLACES = {
    "train.commands": ("evaluate", "export", "import_transcoder", "probe", "resume", "sample", "train", "write_report"),
    "train.compare.arms": ("compare_runs",),
    "train.data.batches": ("batches",),
    "train.data.dataset": ("StoreDataset",),
    "train.interchange.read_transcoder": ("read_transcoder",),
    "train.model.transcoder": ("Transcoder", "TranscoderOutput"),
    "train.run.load_run": ("LoadedRun", "load_run"),
    "train.run.settings": ("Settings", "load_settings"),
    "train.sweeps.run_sweep": ("sweep",),
}
__all__ = [
    "LoadedRun",
    "Settings",
    "StoreDataset",
    "Transcoder",
    "TranscoderOutput",
    "batches",
    "compare_runs",
    "evaluate",
    "export",
    "import_transcoder",
    "load_run",
    "load_settings",
    "probe",
    "read_transcoder",
    "resume",
    "sample",
    "sweep",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import what is exported when it is first asked for: torch takes seconds, and `--help` needs none of it."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is exported beside what was imported, for completion."""
    return sorted({*globals(), *__all__})
