"""Formats whose files hold several layers of every token: those of vLLM's requests, and of CLT-Forge's cache."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harvest.imports.row_files import (
    Names,
    Pairs,
    Part,
    in_order,
    named_tensor,
    only,
    pairs_of,
    read_tensors,
    tensor_files,
)
from shared.errors import UserError

_TOKEN_IDS = "token_ids"
_OTHERS = "; another program has written it"
_STATE = re.compile(r"(.+):(\d{1,4})")


def vllm(paths: Sequence[Path], names: Names) -> Pairs:
    """Open what vLLM's `ExampleHiddenStatesConnector` wrote: a file for each request, of any length.

    `hidden_states` [T, states, d] and `token_ids` [T]. Sources and targets are named HOOK:N, N being the place of the
    layer in vLLM's `eagle_aux_hidden_state_layer_ids`. The first `context_size` tokens of every request are taken.
    """
    if names.tokens not in (None, _TOKEN_IDS):
        raise UserError(f"--tokens is for other formats: vLLM calls token ids {_TOKEN_IDS}")
    if not (length := names.context_size):
        raise UserError("requests have different lengths; say how many tokens to take of each with --context-size")
    (source, first), (target, second) = _state(names.source, "--source"), _state(names.target, "--target")
    if source == target and first != second:
        raise UserError(f"--source and --target are different states, and both are called {source}; rename one")
    files = tensor_files(only(paths, "vllm"))
    requests = [(states, ids) for states, ids in map(_request, files) if ids.shape[0] >= length]
    if not requests:
        raise UserError(f"all {len(files):,} requests of {paths[0]} are shorter than --context-size {length:,}")
    return pairs_of(
        replace(names, tokens=_TOKEN_IDS),
        [_layer(states, first, length) for states, _ in requests],
        [_layer(states, second, length) for states, _ in requests],
        [_beginning(ids, length) for _, ids in requests],
        context_size=length,
        hooks=(source, target),
        short=len(files) - len(requests),
    )


def _request(file: Path) -> tuple[Part, Part]:
    """Return the hidden states and the token ids of a request."""
    found = read_tensors(file)
    states, ids = (named_tensor(found, name, file, _OTHERS) for name in ("hidden_states", _TOKEN_IDS))
    if ids.shape != states.shape[:1]:
        raise UserError(f"{file}: hidden states of {states.shape[0]:,} tokens, and token ids {list(ids.shape)}")
    return states, ids


def _beginning(ids: Part, length: int) -> Part:
    return ids._replace(shape=(length,), load=lambda: ids.load()[:length])


def _state(name: str | None, option: str) -> tuple[str, int]:
    found = _STATE.fullmatch(name or "")
    if not found:
        raise UserError(
            f"{option} {name or ''}: expected HOOK:N, such as blocks.8.hook_resid_pre:0 for the first of the states "
            "that vLLM was told to save"
        )
    return found[1], int(found[2])


def clt_forge(paths: Sequence[Path], names: Names) -> Pairs:
    """Open one layer of CLT-Forge's cache: `ctx_T/activations_split_N.safetensors`.

    `act_in` and `act_out` [rows, layers, d] in order of sequences of T tokens, which have lost their BOS; `tokens`
    [rows]. The hooks are CLT-Forge's: the MLP's normalised input, and its output.
    """
    if names.layer is None:
        raise UserError("the files hold every layer; choose one with --layer")
    hooks = f"blocks.{names.layer}.ln2.hook_normalized", f"blocks.{names.layer}.hook_mlp_out"
    given = (names.source or hooks[0], names.target or hooks[1], names.tokens or "tokens")
    if given != (*hooks, "tokens"):
        raise UserError("--source, --target and --tokens are for other formats: CLT-Forge's names are fixed")
    folder = _context_folder(only(paths, "clt-forge"))
    files = in_order(list(folder.glob("activations_split_*.safetensors")))
    if not files:
        raise UserError(f"{folder} holds no activations_split_*.safetensors; compressed caches (.bin) are not read")
    length, tensors = int(folder.name.removeprefix("ctx_")), [(file, read_tensors(file)) for file in files]
    source, target, tokens = (
        [named_tensor(found, name, file, _OTHERS) for file, found in tensors]
        for name in ("act_in", "act_out", "tokens")
    )
    return pairs_of(
        replace(names, source=hooks[0], target=hooks[1], tokens="tokens"),
        [_layer(part, names.layer) for part in source],
        [_layer(part, names.layer) for part in target],
        tokens,
        context_size=length,
        hooks=hooks,
        has_position_0=False,
    )


def _context_folder(folder: Path) -> Path:
    """Return the folder `ctx_T` at or in a folder."""
    found = [one for one in (folder, *sorted(folder.glob("ctx_*"))) if re.fullmatch(r"ctx_\d{1,6}", one.resolve().name)]
    if len(found) != 1:
        raise UserError(f"{folder}: expected one folder ctx_T, and it has {len(found)}; pass one of them")
    return found[0].resolve()


def _layer(part: Part, number: int, length: int | None = None) -> Part:
    """Return one layer [n, d] of a part [n, layers, d], and of its rows the first `length`."""
    if len(part.shape) != 3 or number >= part.shape[1]:
        raise UserError(f"{part.name} has the shape {list(part.shape)}, expected [rows, layers, d] and layer {number}")
    rows, _, d = part.shape
    return part._replace(
        what=f"{part.what}, layer {number}", shape=(length or rows, d), load=lambda: part.load()[:length, number]
    )
