"""The LLM behind transformer-lens' bridge, cut after the last layer that is needed."""

import copy
import difflib
import errno
import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers.quantizers import AutoHfQuantizer

from harvest.text.tokenizer_files import has_tokenizer, load_tokenizer
from shared.errors import ProjectError, UserError, cause, warn
from shared.store.layout import Attention
from shared.store.row_arrays import FloatType

_TOLERANCE: dict[FloatType, float] = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Of logits, relative: a bridge may compute queries, keys and values apart that are one product without it."""
_OFF = {
    "hook_mlp_in": "hook_resid_mid",
    "hook_attn_in": "hook_resid_pre",
    **dict.fromkeys(("hook_q_input", "hook_k_input", "hook_v_input"), "hook_resid_pre"),
    "attn.hook_result": "attn.hook_z",
}
"""Ends of names of hooks that the bridge has, but leaves out until it is asked, and what to use in their place."""
_OFF_WHY = {
    "hook_resid_mid": "has the same values",
    "hook_resid_pre": "has the same values",
    "attn.hook_z": "has each head's output before the projection that makes this of it",
}
_NESTED = {r"^language_model\.lm_head\.": "lm_head.", r"^(model\.language_model|language_model\.model)\.": "model."}
"""Names of the text part's weights in models that also see, old and new, to those of the text model alone."""


class Model:
    """A causal language model cut after the last layer that a hook needs."""

    def __init__(self, bridge: Any, hooks: Sequence[str], forward: Mapping[str, Any]) -> None:
        self._bridge, self._hooks, self._forward = bridge, list(hooks), forward
        """`forward`: further arguments of the forward pass."""

    @property
    def hook_names(self) -> list[str]:
        """Every hook the model has, aliases included."""
        return list(self._bridge.hook_dict)

    def __call__(self, ids: Tensor, position_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Return the activations of each hook for windows `ids` [S, T]; `position_ids` as in `visit`."""
        found: dict[str, Tensor] = {}
        self.visit(ids, position_ids, lambda name, values: found.update({name: values.clone()}))
        return {name: found[name] for name in self._hooks}

    def visit(self, ids: Tensor, position_ids: Tensor | None, take: Callable[[str, Tensor], None]) -> None:
        """Run windows `ids` [S, T] and call `take` with each hook's name and activations, which it must not keep.

        Activations by head, [S, T, heads, width], come as one row per position, one head after the other.
        Positions count from 0, or are `position_ids` [S, T], which start again at 0 with every document: attention
        does not cross from one document to the next then (only without a key-value cache, which is off).
        """
        positions = {} if position_ids is None else {"position_ids": position_ids}
        seen = set()

        def hook(name: str, values: Tensor, hook: Any) -> None:
            seen.add(name)
            take(name, _rows(values))

        with torch.inference_mode():
            hooks = [(name, partial(hook, name)) for name in self._hooks]
            self._bridge.run_with_hooks(ids, fwd_hooks=hooks, **positions, **self._forward)
        assert seen == set(self._hooks), f"hooks {set(self._hooks) - seen} gave nothing"

    def logits(
        self, ids: Tensor, position_ids: Tensor | None, hooks: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Tensor:
        """Return the logits [S, T, V] of windows `ids` [S, T]; a hook's activations become what its function returns.

        Of a model that was loaded `whole`. `position_ids` as in `visit`; functions must not change what they are given.
        """
        positions = {} if position_ids is None else {"position_ids": position_ids}
        seen = set()

        def hook(name: str, change: Callable[[Tensor], Tensor], values: Tensor, hook: Any) -> Tensor:
            seen.add(name)
            return change(_rows(values)).reshape(values.shape)

        with torch.inference_mode():
            changes = [(name, partial(hook, name, change)) for name, change in hooks.items()]
            found: Tensor = self._bridge.run_with_hooks(ids, fwd_hooks=changes, **positions, **self._forward)
        assert seen == set(hooks), f"hooks {set(hooks) - seen} gave nothing"
        return found

    def trace(self, ids: Tensor, hooks: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Run windows `ids` [S, T] with gradients; each hook's activations become what its function returns."""

        def hook(change: Callable[[Tensor], Tensor], values: Tensor, hook: Any) -> Tensor:
            return change(values)

        with torch.enable_grad():
            changes = [(name, partial(hook, change)) for name, change in hooks.items()]
            self._bridge.run_with_hooks(ids, fwd_hooks=changes, **self._forward)

    @property
    def embedding(self) -> Tensor:
        """The token embedding [vocabulary, d_model]."""
        return self._bridge.original_model.get_input_embeddings().weight

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding, without hooks."""
        return self._bridge.ln_final.original_component

    @property
    def unembedding(self) -> tuple[Tensor, Tensor]:
        """From the residual stream to logits: weight [vocabulary, d_model] and bias [vocabulary]."""
        linear = self._bridge.original_model.get_output_embeddings()
        bias = getattr(linear, "bias", None)
        return linear.weight, torch.zeros(len(linear.weight)) if bias is None else bias

    @property
    def text_config(self) -> Any:
        """The model's configuration."""
        return self._bridge.original_model.config.get_text_config()

    def replica(self) -> "Model":
        """Make a second model over the same parameters, so that two threads can run hooks of their own."""
        bridge = self._bridge
        shared = {id(item): item for item in (*bridge.parameters(), *bridge.buffers())}
        return Model(copy.deepcopy(bridge, shared), self._hooks, self._forward)


def layers_needed(hooks: Sequence[str]) -> int:
    """Return the number of layers that must run for hooks named `blocks.<layer>.<hook>`."""
    return 1 + max(int(name.split(".")[1]) for name in hooks)


def check_isolation(model: Model, context_size: int, device: str) -> None:
    """Raise `UserError` unless documents that share a window cannot see each other.

    The second of two documents is run behind two different first ones, and alone.
    """
    half = context_size // 2
    ids = torch.arange(context_size, device=device).expand(2, -1) % 7 + 3
    ids = torch.stack([ids[0], torch.cat([ids[0, :half] + 1, ids[0, half:]])])
    positions = torch.cat([torch.arange(half), torch.arange(context_size - half)]).to(device).expand(2, -1)
    together, alone = model(ids, positions), model(ids[:1, half:])
    for name, values in together.items():
        second = values[:, half:]
        near = torch.allclose(second[0], alone[name][0], rtol=0.05, atol=0.05 * float(alone[name].abs().max()))
        if not torch.equal(second[0], second[1]) or not near:
            raise UserError(
                f"this model does not keep the documents of a window apart (seen at {name}); "
                "use --set windows.documents=joined"
            )


def check_device(device: str) -> None:
    """Raise `UserError` when the device, such as `cpu` or `cuda:1`, is not there."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "the model's device is cuda, and this torch sees no CUDA device; harvest with --set model.device=cpu "
            "(another store), or use a machine with one"
        )


def load_model(
    folder: Path,
    dtype: FloatType,
    device: str,
    hooks: Sequence[str],
    *,
    whole: bool = False,
    attention: Attention = "eager",
) -> Model:
    """Load the model in `folder`, only the layers that `hooks` need, or the `whole` of it. Raises `UserError`.

    Whatever computes its attention, its logits are compared with those of plain transformers with eager attention.
    On CUDA the process computes deterministically from here on: cuBLAS reads its setting at its first call.
    """
    check_device(device)
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # It would write NaN into all new memory first: that shows errors, and changes no result.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    kind = getattr(torch, dtype)
    with _quiet(), _explained(folder):
        layers = _config(folder).num_hidden_layers if whole else layers_needed(hooks)
        network, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            config=_cut_config(folder, layers),
            key_mapping=_NESTED,
            dtype=kind,
            attn_implementation="eager",
            experts_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
        # transformers fills what it does not find with random numbers, and says so in a warning only.
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(f"{folder}: its weights lack {len(missing)} tensors, the first is {missing[0]}")
        if left := _left_over(loaded["unexpected_keys"], network, layers):
            warn(
                f"{folder}: its weights hold {len(left)} tensors that the model has no place for, the first is "
                f"{left[0]}; rows are computed without them: see whether config.json belongs to these weights"
            )
        forward = {"use_cache": False, **({} if whole else _few_logits(network))}
        ids = torch.arange(16, device=device)[None] % network.get_input_embeddings().num_embeddings
        with torch.inference_mode():
            expected = network.to(device).eval()(ids, **forward).logits.float()
            bridge = _bridge(folder, network, device, kind)
            if attention != "eager":
                _set_attention(folder, bridge, network, attention)
            _check_same(folder, bridge(ids, **forward).float(), expected, _TOLERANCE[dtype])
        model = Model(bridge, hooks, forward)
        if attention != "eager":
            _check_reached(model, ids, hooks, attention)
        return model


def _set_attention(folder: Path, bridge: Any, network: Any, attention: Attention) -> None:
    """Let transformers compute attention: the bridge does it by itself, eagerly. Raises `UserError`."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    _require_attention(folder, network, attention)
    for module in bridge.modules():
        if isinstance(module, AttentionBridge):  # whose own __setattr__ would set it in what it wraps
            object.__setattr__(module, "forward", MethodType(AttentionBridge.forward, module))


def _require_attention(folder: Path, network: Any, attention: Attention) -> None:
    """Choose how a model computes attention. Raises `UserError` where its family has no such way."""
    try:
        network.set_attn_implementation(attention)
    except ValueError as error:
        raise UserError(f"{folder}: not with model.attention={attention} ({cause(error)})") from error
    if network.config._attn_implementation != attention:
        raise UserError(
            f"{folder}: transformers has no {attention} attention for this model; choose model.attention=eager"
        )


def _check_reached(model: Model, ids: Tensor, hooks: Sequence[str], attention: Attention) -> None:
    """Raise `UserError` on a hook inside of attention that gives nothing where transformers computes that."""
    reached: set[str] = set()
    with suppress(AssertionError):
        model.visit(ids, None, lambda name, _: reached.add(name))
    if missed := sorted(set(hooks) - reached):
        said = f"hook {missed[0]} gives nothing with model.attention={attention}"
        raise UserError(f"{said}; use --set model.attention=eager")


def _left_over(names: Iterable[str], network: nn.Module, layers: int) -> list[str]:
    """List the tensors that belong into the layers that run, and are not used."""
    starts = {found[1] for name in network.state_dict() if (found := re.match(r"(.+?)\.\d+\.", name))}
    inner = {name: re.match(r"(.+?)\.(\d+)\.", name) for name in names}
    return sorted(name for name, found in inner.items() if found and found[1] in starts and int(found[2]) < layers)


def _check_same(folder: Path, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise `UserError` unless the model computes behind the bridge what it computes without it; NaN is told later."""
    difference = float((found - expected).norm() / expected.norm())
    if difference > tolerance:
        raise UserError(
            f"{folder}: transformer-lens {version('transformer-lens')} computes something else than transformers for "
            f"this model (its logits differ by {difference:.2g} of their norm); it cannot be harvested"
        )


def probe(folder: Path, hooks: Sequence[str], context_size: int, attention: Attention = "eager") -> dict[str, int]:
    """Return the width of each hook, from a model without weights. Raises `UserError` on a hook that is not there.

    Also refuses hooks that do not give one row per position, [S, T, width], and ways to compute attention that the
    model's family does not have.
    """
    with without_weights(folder, hooks) as model:
        found, shorter = (
            {name: tuple(value.shape) for name, value in model(torch.zeros(2, size).long()).items()}
            for size in (context_size, context_size - 1)
        )
        _require_attention(folder, model._bridge.original_model, attention)
    for name, shape in found.items():
        # Of attention's pattern, [S, heads, T, T], the width changes with the context.
        if len(shape) != 3 or shape[:2] != (2, context_size) or shape[2] != shorter[name][-1]:
            raise UserError(f"hook {name} has no rows per position: shape {shape} for 2 windows of {context_size}")
    return {name: shape[2] for name, shape in found.items()}


@contextmanager
def without_weights(folder: Path, hooks: Sequence[str]) -> Iterator[Model]:
    """Yield the model with tensors that have a shape only. Raises `UserError` on a hook that is not there."""
    # Not the device `meta`: the bridge refuses to split GPT-2's joined projection there. Experts are chosen by value,
    # but for those that are computed as one product.
    with _quiet(), _explained(folder), FakeTensorMode(allow_non_fake_inputs=True), _NothingEdited():
        _require_quantiser(config := _cut_config(folder, layers_needed(hooks)))
        network = transformers.AutoModelForCausalLM.from_config(
            config,
            attn_implementation="eager",
            experts_implementation="batched_mm",
            trust_remote_code=False,
        )
        # Not use_cache=False, as in a harvest: it looks at values, and there are none.
        model = Model(_bridge(folder, network, "cpu", torch.float32), hooks, _few_logits(network))
        _check_names(model.hook_names, hooks)
        yield model


class _NothingEdited(TorchFunctionMode):
    """Answers routers of experts, which compare values to see whether a hook has changed them: no."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.equal else func(*args, **(kwargs or {}))


def _rows(values: Tensor) -> Tensor:
    return values.flatten(2) if values.dim() > 3 else values


def _check_names(known: Sequence[str], hooks: Sequence[str]) -> None:
    offered = [name for name in known if not name.endswith(tuple(_OFF))]
    for name in hooks:
        start, middle = name.rpartition(".")[0], "hook_resid_mid"
        if other := next((other for end, other in _OFF.items() if name.endswith(end)), None):
            other = other if f"{start}.{middle}" in known or other != middle else "hook_resid_pre"
            raise UserError(f"hook {name} is switched off in this model; use {other}, which {_OFF_WHY[other]}")
        if name not in known and name.endswith(middle) and f"{start}.mlp.hook_in" in known:
            raise UserError(
                f"the model has no hook {name!r}: its attention and MLP run in parallel, and nothing is between them; "
                "for what the MLP reads, use --set capture.source=mlp.hook_in"
            )
        if name not in known:
            near = difflib.get_close_matches(name, offered, n=3) or [n for n in offered if "mlp" in n][:3]
            raise UserError(f"the model has no hook {name!r}; near it: {', '.join(near)}")


def _config(folder: Path) -> Any:
    """Return the model's configuration; of a model that also sees, that of the part that reads."""
    found = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return found.get_text_config()


def _cut_config(folder: Path, layers: int) -> Any:
    """Return the model's configuration with `layers` layers; lists with one entry per layer are cut too."""
    config = _config(folder)
    whole = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def _require_quantiser(config: Any) -> None:
    """Raise `ImportError` where quantised weights need a package that is not there: here, before text is read."""
    if found := getattr(config, "quantization_config", None):
        AutoHfQuantizer.from_config(found, pre_quantized=True).validate_environment(device_map=None)


def _few_logits(network: nn.Module) -> dict[str, int]:
    """Return the argument that has logits computed for one position only; nothing here reads them.

    The bridge's own `stop_at_layer` stops before a layer, and the cut model has none there: it would run to the end.
    """
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}


def _bridge(folder: Path, network: Any, device: str, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    # A nested configuration does not name its class, and the bridge goes by that name.
    network.config.architectures = [type(network).__name__]
    # The bridge insists on a tokenizer, and nothing here asks it for one.
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else _any_tokenizer()
    bridge = TransformerBridge.boot_transformers(
        str(folder), hf_model=network.eval(), tokenizer=tokenizer, device=device, dtype=dtype
    )
    return bridge.eval()


def _any_tokenizer() -> Any:
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a", pad_token="a")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise for a folder they cannot use into one line; it can be anything."""
    try:
        yield
    except (ProjectError, MemoryError):
        raise
    except ImportError as error:
        raise UserError(
            f"{folder}: the model needs a package that is not installed ({cause(error)}); install it"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        if "ignore_mismatched_sizes" in str(error):  # an argument that nobody can give here
            raise UserError(f"{folder}: its weights have other shapes than its config.json says") from error
        raise UserError(f"{folder}: the model does not load ({type(error).__name__}: {cause(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' notes and bars out of the progress line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
