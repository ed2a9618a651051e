"""Code that comes with a model, a tokenizer or a data set is never run by a harvest."""

import shutil
from pathlib import Path

import pytest

from shared.store.store import Store
from tests.llms import BLOCK_TOKENS, Line, command, edit_json, refused

MODULES = ("configuration_theirs", "modeling_theirs", "tokenization_theirs")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def theirs(model: Path, tmp_path: Path, marker: Path) -> Path:
    """A sound model whose folder also names modules of its own; each leaves a mark when it is imported."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for name in MODULES:
        code = f"open({str(marker)!r}, 'a').write({name!r})\nclass Theirs:\n    pass\n"
        (folder / f"{name}.py").write_text(code)
    auto = {
        "AutoConfig": "configuration_theirs.Theirs",
        "AutoModel": "modeling_theirs.Theirs",
        "AutoModelForCausalLM": "modeling_theirs.Theirs",
        "AutoTokenizer": "tokenization_theirs.Theirs",
    }
    edit_json(folder / "config.json", auto_map=auto)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_theirs.Theirs", None]})
    return folder


def test_the_modules_would_leave_their_mark(theirs: Path, marker: Path) -> None:
    """What the tests below would see: the same folder, trusted."""
    from transformers import AutoConfig

    with pytest.raises(Exception):  # noqa: B017  # the class is none that transformers could use
        AutoConfig.from_pretrained(theirs, trust_remote_code=True)
    assert marker.read_text() == "configuration_theirs"


@pytest.mark.fault(27)
def test_a_model_that_brings_code_is_run_without_it(small: Line, theirs: Path, tmp_path: Path, marker: Path) -> None:
    found = command(*small(tmp_path / "cache", model=theirs, tokens=BLOCK_TOKENS))
    assert Store.open(found.store).record.blocks == 3
    assert not marker.exists()


@pytest.mark.fault(27)
@pytest.mark.parametrize("change", ["model_type", "tokenizer_class"])
def test_a_model_that_needs_its_code_is_refused(
    small: Line, theirs: Path, tmp_path: Path, marker: Path, change: str
) -> None:
    if change == "model_type":
        edit_json(theirs / "config.json", model_type="theirs", architectures=["Theirs"])
    else:
        edit_json(theirs / "tokenizer_config.json", tokenizer_class="Theirs")
        for name in ("tokenizer.json", "special_tokens_map.json"):
            (theirs / name).unlink(missing_ok=True)
        (theirs / "vocab.txt").write_text("a\nb\n")
    found = command(*small(tmp_path / "cache", model=theirs, tokens=BLOCK_TOKENS))
    refused(found, "does not load", folder=tmp_path / "cache")
    assert not marker.exists()


@pytest.mark.fault(27)
@pytest.mark.parametrize("given", ["folder", "script"])
def test_a_loading_script_of_a_data_set_is_never_run(small: Line, tmp_path: Path, marker: Path, given: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    text = folder if given == "folder" else folder / "data.py"
    words = "1 documents hold" if given == "folder" else "not a kind of text"  # of a folder, the rows alone are read
    refused(command(*small(tmp_path / "cache", text=text)), words, folder=tmp_path / "cache")
    assert not marker.exists()


@pytest.mark.fault(26, 27)
def test_pickled_weights_are_never_loaded(small: Line, model: Path, tmp_path: Path, marker: Path) -> None:
    import torch

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, folder / "pytorch_model.bin")
    found = command(*small(tmp_path / "cache", model=folder))
    refused(found, "pickled weights are never loaded", folder=tmp_path / "cache")
    torch.save({"model.embed_tokens.weight": Bomb()}, folder / "model.safetensors")
    found = command(*small(tmp_path / "cache", model=folder, tokens=BLOCK_TOKENS))
    assert found.code in (1, 2) and len(found.err.splitlines()) >= 1 and "Traceback" not in found.err
    assert not marker.exists()
