"""The LLM with something in its MLP's place, beside plain transformers in float64 and beside exact cases."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harvest.llm.model import load_model
from harvest.splice import figures
from harvest.splice.forward import CLEAN, Losses, Splicer, losses
from harvest.splice.replacements import Replacement, open_run
from shared.splice_record import TRANSCODER
from shared.store.outliers import Exclusion
from tests.llms import command, make_gemma, make_llama, make_neox

LAYER, WINDOWS, CONTEXT = 1, 2, 12
WITHOUT_POSITION_0 = Exclusion(source_norm=None, target_norm=None, training=True, figures=True, position_0=True)


def replacement(predict, source="source") -> Replacement:
    return Replacement(
        library="test", weights="ab" * 32, step=None, source=source,
        predict=lambda x: {TRANSCODER: predict(x)}, encode=lambda x: x,
        directions=lambda latents: torch.zeros(len(latents), 1),
    )  # fmt: skip


def spliced(folder: Path, source: str, predict, side="source", exclusion=None) -> tuple[Losses, torch.Tensor]:
    hooks = [f"blocks.{LAYER}.{source}", f"blocks.{LAYER}.hook_mlp_out"]
    model = load_model(folder, "float32", "cpu", hooks, whole=True)
    ids = torch.arange(WINDOWS * CONTEXT).reshape(WINDOWS, CONTEXT) % 97 + 3
    splicer = Splicer(
        model=model, source_hook=hooks[0], target_hook=hooks[1], replacement=replacement(predict, side),
        mean=torch.full((32,), 0.25), linear=None, exclusion=exclusion,
    )  # fmt: skip
    return losses(splicer, ids, torch.arange(CONTEXT).expand(WINDOWS, -1)), ids


def reference(folder: Path, ids: torch.Tensor, module: str, first: int = 0, put: float | None = None) -> torch.Tensor:
    """Each next token's loss by transformers in float64, `module`'s output `put` from position `first` on."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )

    def change(_, __, output):
        if put is None:
            return output
        return torch.where(torch.arange(CONTEXT)[None, :, None] >= first, put, output)

    network.get_submodule(module).register_forward_hook(change)
    with torch.inference_mode():
        logits = network.double().eval()(ids, use_cache=False).logits
    return -logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)


SHAPES = [
    pytest.param(make_gemma, "hook_resid_mid", f"model.layers.{LAYER}.post_feedforward_layernorm", id="post-norm"),
    pytest.param(make_neox, "mlp.hook_in", f"gpt_neox.layers.{LAYER}.mlp", id="parallel attention"),
    pytest.param(make_llama, "hook_resid_mid", f"model.layers.{LAYER}.mlp", id="plain"),
]


@pytest.mark.parametrize(("make", "source", "module"), SHAPES)
def test_losses_are_those_of_transformers_in_float64(make, source, module, tmp_path: Path) -> None:
    """Clean, zero and mean ablated; a transcoder of zeros is zero ablation exactly."""
    found, ids = spliced(make(tmp_path / "model"), source, lambda x: torch.zeros(len(x), 32))
    for arm, put in ((CLEAN, None), ("zero", 0.0), ("mean", 0.25)):
        expected = reference(tmp_path / "model", ids, module, put=put)
        torch.testing.assert_close(found.ce[arm], expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(found.ce[TRANSCODER], found.ce["zero"]) and torch.equal(found.kl[TRANSCODER], found.kl["zero"])
    assert (found.ce["zero"] - found.ce[CLEAN]).abs().max() > 0.01


@pytest.mark.parametrize(("make", "source", "module"), SHAPES)
def test_the_mlps_own_output_in_its_place_changes_nothing(make, source, module, tmp_path: Path) -> None:
    found, _ = spliced(make(tmp_path / "model"), source, lambda x: x, side="target")
    assert torch.equal(found.ce[TRANSCODER], found.ce[CLEAN]) and not found.kl[TRANSCODER].any()
    sums = figures.batch_sums(found, np.repeat([[0], [1]], CONTEXT, 1), np.zeros((WINDOWS, CONTEXT), int))
    part = figures.part_of([sums], [0])
    assert part is not None
    arm = part.arms[TRANSCODER]
    assert arm.kl.value == 0 and (arm.ce_recovered is None or arm.ce_recovered.value == 1)


def test_rows_that_training_leaves_out_keep_the_mlps_output(tmp_path: Path) -> None:
    found, ids = spliced(make_llama(tmp_path / "model"), "hook_resid_mid", lambda x: torch.zeros(len(x), 32),
                         exclusion=WITHOUT_POSITION_0)  # fmt: skip
    module = f"model.layers.{LAYER}.mlp"
    for arm, first in (("zero", 1), ("zero everywhere", 0)):
        expected = reference(tmp_path / "model", ids, module, first, 0.0)
        torch.testing.assert_close(found.ce[arm], expected, atol=2e-3, rtol=1e-3)
    assert found.left == WINDOWS and torch.equal(found.ce["zero"][:, 0], found.ce[CLEAN][:, 0])


def test_a_ratio_and_its_interval_are_those_of_a_dense_loop() -> None:
    rng = np.random.default_rng(0)
    below = rng.integers(5, 50, 40).astype(float)
    above = 0.7 * below + rng.normal(size=40)
    found = figures.ratio(above, below)
    resampled = [above[i].sum() / below[i].sum() for i in (rng.integers(0, 40, 40) for _ in range(4000))]
    assert found.value == above.sum() / below.sum() and found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(2.02 * np.std(resampled), rel=0.1)
    two = figures.ratio(np.array([1.0, 2.0]), np.ones(2))  # standard error 0.5, Student's t with 1 degree of freedom
    assert two.high == pytest.approx(1.5 + 0.5 * 12.7062047, rel=1e-8)
    assert figures.ratio(np.ones(1), np.ones(1)).low is None


def test_a_measurement_that_was_stopped_ends_with_the_same_bytes(
    trained_on_text: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harvest.splice import measure

    monkeypatch.setattr(measure, "_MOST_WINDOWS", 4)
    whole, stopped = (Path(shutil.copytree(trained_on_text, tmp_path / name)) for name in ("whole", "stopped"))
    options = ("--tokens", 320, "--linear", "--model", model)
    assert command("splice", whole, *options, "--json").code == 0
    calls: list[int] = []

    def fail(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*given)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "losses", fail)
        assert command("splice", stopped, *options).code != 0
    assert not (stopped / "splice.json").exists() and len(list(stopped.glob("splice/*/batch-*.json"))) == 2
    assert command("splice", stopped, *options).code == 0
    assert (stopped / "splice.json").read_bytes() == (whole / "splice.json").read_bytes()
    found = json.loads((whole / "splice.json").read_text())
    assert found["windows"] == 10 and "linear" in found["whole"]["arms"] and not list(stopped.glob("splice/*/*"))


def promoted_tokens(run: Path, model: Path, latents: list[int]) -> dict[int, list[str]]:
    """The five tokens whose logits each latent raises most, by a dense product in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model).double(), AutoTokenizer.from_pretrained(model)
    transcoder = open_run(run, None).transcoder
    rows = transcoder.W_dec.detach().double() * transcoder.target_scale
    unembed = network.lm_head.weight.detach() * (1 + network.model.norm.weight.detach())
    best = (rows[latents] @ unembed[: len(tokenizer)].T).topk(5).indices.tolist()
    return {i: [tokenizer.decode([one]) for one in row] for i, row in zip(latents, best, strict=True)}


def strongest_samples(run: Path, latent: int) -> tuple[list[str], str] | None:
    """The tokens at the peaks of a latent's strongest samples, and the text of the first of these."""
    from pyarrow import parquet

    (file,) = run.glob("samples/step-*.parquet")
    rows = [row for row in parquet.read_table(file).to_pylist() if row["latent"] == latent and row["kind"] == "top"]
    rows.sort(key=lambda row: row["rank"])
    return (list(dict.fromkeys(row["text"][row["peak"]] for row in rows)), "".join(rows[0]["text"])) if rows else None


def test_encode_lists_the_latents_of_every_token(trained_on_text: Path, model: Path, tmp_path: Path) -> None:
    line = ("encode", trained_on_text, "--prompt", "def [red]\x1b[31mvalue", "--model", model)
    found = command(*line, "--top", 3, "--json")
    assert found.code == 0, found.err
    told = json.loads(found.out)
    rows, labels = told["tokens"], {one["latent"]: one for one in told["latents"]}
    assert rows[0]["position"] == 0 and all(len(row["latents"]) == min(3, row["active"]) for row in rows)
    assert set(labels) == {i for row in rows for i in row["latents"]}
    assert {i: one["promotes"] for i, one in labels.items()} == promoted_tokens(trained_on_text, model, list(labels))
    sampled = 0
    for i, one in labels.items():
        expected, where = strongest_samples(trained_on_text, i), one["strongest"]
        assert (expected is None) == (where is None)
        if expected and where:
            assert where["tokens"] == expected[0] and where["peak"] == expected[0][0]
            assert where["before"] + where["peak"] + where["after"] in expected[1]
            sampled += 1
    assert sampled
    shown = command(*line)
    assert shown.code == 0 and "\x1b" not in shown.out and "strongest on" in shown.out
    assert command(*line[:2], "--prompt", "", *line[4:]).code == 2
    bare = Path(shutil.copytree(trained_on_text, tmp_path / "bare", ignore=shutil.ignore_patterns("samples")))
    without = command("encode", bare, *line[2:], "--json")
    assert without.code == 0 and "make them with: train samples RUN" in without.err
    assert {one["strongest"] for one in json.loads(without.out)["latents"]} == {None}
