"""`harvest import` of what SAELens, vLLM and CLT-Forge write: the rows that are stored, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.store.store import Store
from tests.imported_rows import SIXTEEN, Arrays, D, S, T, expected_rows, flat, imported, pairs, rows_of
from tests.llms import command, contents, refused


def write_saelens(folder: Path, columns: Arrays) -> Path:
    """As SAELens' runner caches activations: a column per hook, and `token_ids`."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    features: dict[str, Any] = {
        name: Array2D(shape=rows.shape[1:], dtype="float32") for name, rows in columns.items() if name != "token_ids"
    }
    features["token_ids"] = Sequence(Value("int32"), length=T)
    Dataset.from_dict(columns, features=Features(features)).save_to_disk(folder, num_shards=3)
    return folder


@pytest.mark.parametrize("folders", [1, 2])
def test_cached_activations_of_saelens(tmp_path: Path, folders: int) -> None:
    arrays = pairs()
    source, target = "blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out"
    hooks = {source: arrays["source"], target: arrays["target"]}
    if folders == 1:
        paths = [write_saelens(tmp_path / "both", {**hooks, "token_ids": arrays["tokens"]})]
        more: tuple[object, ...] = ("--source", source, "--target", target)
    else:
        paths = [
            write_saelens(tmp_path / name, {name: rows, "token_ids": arrays["tokens"]}) for name, rows in hooks.items()
        ]
        more = ()
    done = command("import", *paths, "--format", "saelens", "--cache", tmp_path / "cache", *SIXTEEN, *more)
    assert done.code == 0, done.err
    store = Store.open(done.store)
    assert rows_of(store) == expected_rows(arrays, 64)
    assert (store.request.layer, store.request.source_hook, store.request.target_hook) == (3, source, target)


def test_caches_of_other_tokens_are_refused(tmp_path: Path) -> None:
    arrays = pairs()
    other = arrays["tokens"].copy()
    other[5, 7] += 1
    a = write_saelens(tmp_path / "a", {"x": arrays["source"], "token_ids": arrays["tokens"]})
    b = write_saelens(tmp_path / "b", {"y": arrays["target"], "token_ids": other})
    done = command("import", a, b, "--format", "saelens", "--cache", tmp_path / "cache", *SIXTEEN)
    refused(done, "different tokens from sequence 5 on", folder=tmp_path / "cache")


def write_requests(folder: Path, arrays: Arrays, short: int = 3) -> Path:
    """As vLLM saves hidden states: a file per request of its own length, here three states of each token."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(S + short):
        more = -1 if number % 20 == 7 else int(rng.integers(0, 9))  # these are too short
        kept = number - (number + 12) // 20
        states, ids = rng.normal(size=(T + more, 3, D)), rng.integers(1, 300, T + more)
        if more >= 0:
            states[:T, 2], states[:T, 1], ids[:T] = (arrays[name][kept] for name in ("source", "target", "tokens"))
        tensors = {"hidden_states": torch.from_numpy(states).bfloat16(), "token_ids": torch.from_numpy(ids)}
        save_file(tensors, folder / f"cmpl-{number}.safetensors")
        (folder / f"cmpl-{number}.safetensors.lock").touch()
    return folder


VLLM = ("--source", "blocks.4.hook_resid_pre:2", "--target", "blocks.5.hook_resid_pre:1", "--context-size", T)


def test_requests_that_vllm_saved_are_cut_to_one_length(tmp_path: Path) -> None:
    arrays = pairs() | {"target": pairs()["source"][::-1].copy()}
    folder = write_requests(tmp_path / "states", arrays, short=4)
    done = imported(folder, tmp_path / "cache", *VLLM, "--json", kind="vllm")
    assert done.code == 0 and "4 sequences are shorter than 32 tokens" in done.err, done.err
    told = json.loads(done.out)
    store = Store.open(Path(told["path"]))
    assert rows_of(store) == expected_rows(arrays, 64)
    assert told["request"]["layer"] == store.request.layer == 4 and told["training_blocks"] == 2
    assert (store.request.source_hook, store.request.target_hook) == (
        "blocks.4.hook_resid_pre",
        "blocks.5.hook_resid_pre",
    )
    before, shard = contents(store.path), store.path / "activations.zarr" / "strata/004-016/source/c/3/0"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert command("repair", store.path, "--from", folder).code == 0
    assert contents(store.path) == before


@pytest.mark.slow
def test_a_models_hidden_states_saved_so_are_the_hooks_that_they_are_called(model: Path, tmp_path: Path) -> None:
    """State i is the residual stream before layer i: the model, asked by this harvest, gives the same rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, bos = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model).bos_token_id
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "states").mkdir()
    for number in range(12):
        ids = torch.randint(3, 90, (T + number % 3,), generator=generator)
        ids[0] = bos
        with torch.inference_mode():
            states = network(ids[None], output_hidden_states=True).hidden_states
        tensors = {"hidden_states": torch.stack([states[0][0], states[1][0]], dim=1), "token_ids": ids}
        save_file(
            {name: one.contiguous() for name, one in tensors.items()}, tmp_path / "states" / f"{number}.safetensors"
        )
    hooks = ("--source", "blocks.0.hook_resid_pre:0", "--target", "blocks.1.hook_resid_pre:1", "--context-size", T)
    size = ("--set", "store.block_sequences=4", "--model", model)
    line = ("import", tmp_path / "states", "--format", "vllm", "--cache", tmp_path / "cache", *hooks, *size)
    done = command("verify", command(*line).store, "--against-model", 40)  # where the model lies is remembered
    assert done.code == 0 and "40 rows recomputed" in done.out, done.err + done.out


def write_clt_forge(folder: Path, arrays: Arrays) -> Path:
    """As CLT-Forge caches activations: all layers of a token together, here 5 with the pairs as layer 3."""
    (folder / f"ctx_{T}").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number, part in enumerate(np.array_split(np.arange(S), 2)):
        sides = {name: rng.normal(size=(len(part) * T, 5, D)).astype(np.float32) for name in ("act_in", "act_out")}
        for name, side in zip(sides, ("source", "target"), strict=True):
            sides[name][:, 3] = arrays[side][part].reshape(-1, D)
        tensors = {
            name: torch.from_numpy(rows)
            for name, rows in (*sides.items(), ("tokens", flat(arrays)["tokens"][part[0] * T :][: len(part) * T]))
        }
        save_file(tensors, folder / f"ctx_{T}" / f"activations_split_{number}.safetensors")
    return folder


def test_a_layer_of_clt_forges_cache_has_no_position_0(tmp_path: Path) -> None:
    arrays = pairs() | {"target": pairs()["source"][::-1].copy()}
    done = imported(write_clt_forge(tmp_path / "cached", arrays), tmp_path / "cache", "--layer", 3, kind="clt-forge")
    assert done.code == 0 and "position p of the store is the model's p + 1" in done.err, done.err
    store = Store.open(done.store)
    assert rows_of(store) == expected_rows(arrays, 64)
    assert next(iter(store.strata)) == "000-004"
    assert (store.request.source_hook, store.request.layer) == ("blocks.3.ln2.hook_normalized", 3)


def ragged(folder: Path) -> Path:
    return write_requests(folder, pairs() | {"target": pairs()["source"]})


def cached(folder: Path) -> Path:
    return write_clt_forge(folder, pairs() | {"target": pairs()["source"]})


@pytest.mark.fault(59)
@pytest.mark.parametrize(
    ("kind", "write", "more", "told"),
    [
        ("vllm", ragged, VLLM[:4], "say how many tokens to take of each with --context-size"),
        ("vllm", ragged, (*VLLM[:2], "--target", "resid", *VLLM[4:]), "--target resid: expected HOOK:N"),
        ("vllm", ragged, ("--source", "a:0", "--target", "a:1", *VLLM[4:]), "are different states"),
        ("vllm", ragged, (*VLLM[:2], "--target", "x:3", *VLLM[4:]), "expected [rows, layers, d] and layer 3"),
        ("vllm", ragged, (*VLLM[:4], "--context-size", 64), "all 73 requests"),
        ("vllm", cached, VLLM, "holds no .safetensors files"),
        ("clt-forge", cached, (), "choose one with --layer"),
        ("clt-forge", cached, ("--layer", 5), "expected [rows, layers, d] and layer 5"),
        ("clt-forge", cached, ("--layer", 3, "--source", "x"), "CLT-Forge's names are fixed"),
        ("clt-forge", ragged, ("--layer", 3), "expected one folder ctx_T"),
    ],
)
def test_what_another_writers_files_lack_is_one_error(
    tmp_path: Path, kind: str, write: Callable[[Path], Path], more: tuple[object, ...], told: str
) -> None:
    done = imported(write(tmp_path / "rows"), tmp_path / "cache", *more, kind=kind)
    refused(done, told, folder=tmp_path / "cache")
