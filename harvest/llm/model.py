"""The LLM behind transformer-lens' bridge, cut after the last layer that is needed."""

import copy
import difflib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harvest.text.tokenizer_files import has_tokenizer, load_tokenizer
from shared.errors import UserError
from shared.store.layout import StorageType

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

        Positions count from 0, or are `position_ids` [S, T], which start again at 0 with every document: attention
        does not cross from one document to the next then (only without a key-value cache, which is off).
        """
        positions = {} if position_ids is None else {"position_ids": position_ids}
        seen = set()

        def hook(name: str, values: Tensor, hook: Any) -> None:
            seen.add(name)
            take(name, values)

        with torch.inference_mode():
            hooks = [(name, partial(hook, name)) for name in self._hooks]
            self._bridge.run_with_hooks(ids, fwd_hooks=hooks, **positions, **self._forward)
        assert seen == set(self._hooks), f"hooks {set(self._hooks) - seen} gave nothing"

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


def load_model(folder: Path, dtype: StorageType, device: str, hooks: Sequence[str]) -> Model:
    """Load the model in `folder`, only the layers that `hooks` need. Raises `UserError`.

    On CUDA the process computes deterministically from here on: cuBLAS reads its setting at its first call.
    """
    check_device(device)
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    layers, kind = layers_needed(hooks), getattr(torch, dtype)
    with _quiet(), _explained(folder):
        network, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            config=_cut_config(folder, layers),
            key_mapping=_NESTED,
            dtype=kind,
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
        # transformers fills what it does not find with random numbers, and says so in a warning only.
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(f"{folder}: its weights lack {len(missing)} tensors, the first is {missing[0]}")
        return Model(
            _bridge(folder, network.to(device), device, kind), hooks, {"use_cache": False, **_few_logits(network)}
        )


def probe(folder: Path, hooks: Sequence[str], context_size: int) -> dict[str, int]:
    """Return the width of each hook, from a model without weights. Raises `UserError` on a hook that is not there.

    Also refuses hooks that do not give one row per position: [S, T, width].
    """
    # Tensors with a shape only. Not the device `meta`: the bridge refuses to split GPT-2's joined projection there.
    with _quiet(), _explained(folder), FakeTensorMode(allow_non_fake_inputs=True):
        network = transformers.AutoModelForCausalLM.from_config(
            _cut_config(folder, layers_needed(hooks)), attn_implementation="eager", trust_remote_code=False
        )
        # Not use_cache=False, as in a harvest: it looks at values, and there are none.
        model = Model(_bridge(folder, network, "cpu", torch.float32), hooks, _few_logits(network))
    _check_names(model.hook_names, hooks)
    with _quiet(), _explained(folder), FakeTensorMode(allow_non_fake_inputs=True):
        found = {name: tuple(value.shape) for name, value in model(torch.zeros(2, context_size).long()).items()}
    for name, shape in found.items():
        if len(shape) != 3 or shape[:2] != (2, context_size):
            raise UserError(f"hook {name} has no rows per position: shape {shape} for 2 windows of {context_size}")
    return {name: shape[2] for name, shape in found.items()}


def _check_names(known: Sequence[str], hooks: Sequence[str]) -> None:
    for name in hooks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or [n for n in known if "mlp" in n][:3]
            raise UserError(f"the model has no hook {name!r}; near it: {', '.join(near)}")


def _cut_config(folder: Path, layers: int) -> Any:
    """Return the model's configuration with `layers` layers; lists with one entry per layer are cut too."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config = config.get_text_config()  # of a model that also sees, the part that reads
    whole = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


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
    """Turn what the libraries raise for a folder they cannot use into one line."""
    try:
        yield
    except (ValueError, KeyError, OSError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the model does not load ({type(error).__name__}: {error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' notes and bars out of the progress line."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
