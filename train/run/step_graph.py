"""A training step as one CUDA graph: recorded once, and then launched whole, with no host work but its rows' copy.

A graph repeats the same kernels on the same memory. So what differs between two steps is on the device (the number of
the step, the learning rate, Adam's powers, which latents are dead), or is part of a key: a step with another key, which
k on its way from `k_start` and new pairs of the diversity loss bring about, is recorded anew. The first step
with a key is launched operation by operation, which compiles kernels; the second one is recorded. Both ways compute the
same bits. Never run on a GPU: decisions/014.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from shared.console.terminal import say
from shared.errors import ProjectError, UserError, warn
from train.model.step_output import StepOutput
from train.run.device_rules import why_no_step_graph

if TYPE_CHECKING:
    from train.run.settings import Settings

Choice = Literal["auto", "on", "off"]
Body = Callable[[Sequence[Tensor]], StepOutput]


class StepGraph:
    """Runs steps: those that come again with the same key from a graph, where there may be one."""

    def __init__(self, device: torch.device, wanted: Choice) -> None:
        """Begin without a graph. Unless it is `wanted` off, steps must be such as `graph_of` finds."""
        self._device, self._wanted, self._on = device, wanted, wanted != "off"
        self.number = torch.zeros((), dtype=torch.int64, device=self._device) if self._on else None
        """The step that is trained, on the device; none without graphs."""
        self._key: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: StepOutput | None = None
        self.replayed = 0
        """Steps that were launched as a graph."""

    def run(self, step: int, key: Hashable, inputs: Sequence[Tensor], body: Body) -> StepOutput:
        """Return what `body` makes of `inputs`; `key` is equal for steps that differ on the device alone, or none.

        Raises `ProjectError` where a step cannot be recorded and graphs are asked for; else it warns, and graphs are
        off from there on.
        """
        if self.number is None:
            return body(inputs)
        self.number.fill_(step)
        if not self._on or key is None or key != self._key:
            self._key, self._graph, self._output, self._inputs = key, None, None, []
            return body(inputs)
        with torch.cuda.device(self._device):
            if self._graph is None and not self._record(inputs, body):
                return body(inputs)
            assert self._graph is not None and self._output is not None
            for static, one in zip(self._inputs, inputs, strict=True):
                static.copy_(one)
            self._graph.replay()
        self.replayed += 1
        return self._output

    def _record(self, inputs: Sequence[Tensor], body: Body) -> bool:
        """Record a step, which runs nothing; tells whether that went well."""
        graph = torch.cuda.CUDAGraph()
        self._inputs = [one.clone() for one in inputs]
        stream = torch.cuda.Stream(self._device)
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),  # which is back after an error, too
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),  # others copy meanwhile
            ):
                self._output = body(self._inputs)
        except Exception as error:  # whatever a driver or a compiler raises
            self._on, self._inputs, self._output = False, [], None
            memory = isinstance(error, torch.OutOfMemoryError)
            told = str(error).strip() or "no message"
            why = "there is too little memory" if memory else f"{type(error).__name__}: {told.splitlines()[0]}"
            if self._wanted == "on":
                raise ProjectError(
                    f"step_graph = on, and a step could not be recorded: {why}; set step_graph to auto or off"
                    + (", or lower rows.batch_rows" if memory else "")
                ) from error
            warn(f"a step could not be recorded as a CUDA graph ({why}); its operations are launched one by one")
            return False
        self._graph = graph
        return True


def graph_of(settings: "Settings") -> StepGraph:
    """Return what runs the steps of a run, and say on CUDA which it is.

    Raises `UserError` where a graph is asked for and cannot be.
    """
    why_not = _why_not(settings)
    if why_not and settings.step_graph == "on":
        raise UserError(f"step_graph = on, and {why_not}; use --set step_graph=auto")
    if settings.device != "cpu":
        say(f"a step is not a CUDA graph: {why_not}" if why_not else "a step is one CUDA graph")
    return StepGraph(torch.device(settings.device), "off" if why_not else settings.step_graph)


def may_be_graph(settings: "Settings") -> bool:
    """Tell whether steps of a run are going to be graphs, unless recording fails."""
    return _why_not(settings) is None


def _why_not(settings: "Settings") -> str | None:
    off = settings.step_graph == "off" and settings.device != "cpu"
    return "step_graph = off" if off else why_no_step_graph(settings.model_dump(), settings.device)
