"""What changing a latent does to a prompt: beside plain transformers in float64, by the command, and on its page."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from harvest.llm.model import load_model
from harvest.splice.change_latents import change_latents, run_prompt
from tests.browser import open_page
from tests.llms import command, make_llama

LAYER, D = 1, 32
HOOKS = [f"blocks.{LAYER}.hook_resid_mid", f"blocks.{LAYER}.hook_mlp_out"]


def reference(folder: Path, ids: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T, V] by transformers in float64, with `add` [T, O] added to the MLP's output."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    network.get_submodule(f"model.layers.{LAYER}.mlp").register_forward_hook(lambda _, __, output: output + add)
    with torch.inference_mode():
        logits: torch.Tensor = network.double().eval()(ids, use_cache=False).logits
    return logits[0].log_softmax(-1)


def test_a_change_adds_the_difference_times_the_direction_but_at_kept_rows(tmp_path: Path):
    make_llama(tmp_path / "model")
    ids = torch.tensor([[3, 50, 7, 81, 22]])
    model = load_model(tmp_path / "model", "float32", "cpu", HOOKS, whole=True)
    clean = run_prompt(model, ids, *HOOKS)
    rng = torch.Generator().manual_seed(0)
    latents, directions = torch.rand(5, 4, generator=rng), {i: torch.randn(D, generator=rng) for i in (1, 3)}
    kept = torch.tensor([True, False, False, False, False])
    values = [(3, 0.0), (1, 2.5)]
    found = change_latents(model, HOOKS[1], clean, latents, directions, values, kept)
    before = reference(tmp_path / "model", ids, torch.zeros(5, D, dtype=torch.float64))
    for one, (latent, value) in zip(found, values, strict=True):
        add = (value - latents[:, latent].double())[:, None] * directions[latent].double()
        add[0] = 0
        after = reference(tmp_path / "model", ids, add)
        kl = (before.exp() * (before - after)).sum(1)
        assert (one.latent, one.value) == (latent, value)
        assert one.kl == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
        moved = (after[-1].exp() - before[-1].exp()).abs().topk(10).indices.tolist()
        assert [token.token for token in one.next] == moved
        for token in one.next:
            assert token.before == pytest.approx(float(before[-1, token.token].exp()), rel=1e-4)
            assert token.after == pytest.approx(float(after[-1, token.token].exp()), rel=1e-4)


@pytest.fixture
def run(trained_on_text: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_on_text, tmp_path / "run"))


def test_the_command_changes_what_it_is_told_and_refuses_what_there_is_not(run: Path, model: Path):
    line = ("encode", run, "--prompt", "def value", "--model", model, "--json")
    plain = json.loads(command(*line).out)
    assert plain["changes"] == []
    found = command(*line, "--ablate", "3,5-6", "--steer", "9=4.5")
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert [(one["latent"], one["value"]) for one in told["changes"]] == [(3, 0), (5, 0), (6, 0), (9, 4.5)]
    assert told["tokens"] == plain["tokens"]
    assert {3, 5, 6, 9} <= {one["latent"] for one in told["latents"]}
    assert all(len(one["kl"]) == len(told["tokens"]) for one in told["changes"])
    for wrong, words in ((("--ablate", "64"), "there is no latent 64"), (("--steer", "3"), "'3' is not LATENT=VALUE")):
        refused = command(*line, *wrong)
        assert refused.code == 2
        assert words in refused.err


@pytest.mark.slow
def test_the_page_shows_the_latents_of_the_token_that_is_chosen(run: Path, model: Path, tmp_path: Path):
    page_file = tmp_path / "prompt.html"
    prompt = "def <b>value</b>\x1b"
    found = command("encode", run, "--prompt", prompt, "--model", model, "--html", page_file, "--json")
    assert found.code == 0, found.err
    told = json.loads("\n".join(found.out.splitlines()[:-1]))
    assert told["changes"] and all(one["value"] == 0 for one in told["changes"])
    for dark, width in ((False, 1280), (True, 390)):
        with open_page(page_file, width, dark=dark) as page:
            assert page.locator("#prompt button").count() == len(told["tokens"])
            every = page.locator("article.latent").count()
            assert every == len(told["latents"])
            page.locator("#prompt button").nth(1).click()
            shown = page.locator("article.latent:visible h2")
            active = told["tokens"][1]["latents"]
            assert [int(text.split()[1]) for text in shown.all_inner_texts()][: len(active)] == active
            assert page.locator(".change").count() == len(told["changes"])
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.get_by_text("Show all latents").click()
            assert page.locator("article.latent:visible").count() == every
