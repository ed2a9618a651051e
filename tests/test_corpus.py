"""Rows, columns and documents of every kind of text, and their token ids."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harvest.commands.repair import own_text
from harvest.embedded.corpus import documents
from harvest.embedded.tokenizer import BOS_ID, EOS_ID
from harvest.hub import dataset_commit, explain
from harvest.settings import MOST_REFUSED, TextSettings
from harvest.text.corpus import open_corpus
from harvest.text.dataset_rows import FileRows
from harvest.text.local_files import find_files
from harvest.text.tokenize import Encoder, clean, split_at
from shared.errors import UserError
from shared.keyed import permutation
from tests.llms import VOCABULARY, edit_json, make_gemma, texts, write_jsonl

CHAT = [[{"role": "user", "content": f"index {i}"}, {"role": "assistant", "content": "value"}] for i in range(5)]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_gemma(tmp_path_factory.mktemp("models") / "gemma", num_hidden_layers=1)
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


def settings(*names: object, **more: Any) -> TextSettings:
    return TextSettings(name=tuple(map(str, names)), **more)


def read(*names: object, seed: int = 0, **more: Any) -> list[Any]:
    found = list(open_corpus(settings(*names, **more), None, seed).read())
    if refused := next((one for one in found if one.refusal), None):
        raise UserError(f"{refused.place}: {refused.refusal}")
    return [one.value for one in found]


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_embedded_text_is_permuted_by_the_seed() -> None:
    expected = [document.text for document in documents()]
    corpus = open_corpus(TextSettings(), "<eos>", 3)
    assert [one.value for one in corpus.read()] == [expected[i] for i in permutation(len(expected), "documents", 3)]
    assert corpus.identity.order == "shuffled" and corpus.identity.separator == "<eos>"


def test_jsonl_parquet_and_txt_give_the_same_documents_in_the_same_order(tmp_path: Path) -> None:
    found = texts(30)
    lines = tmp_path / "a.txt"
    lines.write_text("\n".join(found) + "\n")
    names = [
        write_jsonl(tmp_path / "a.jsonl", [{"id": i, "text": text} for i, text in enumerate(found)]),
        write_parquet(tmp_path / "a.parquet", {"id": list(range(30)), "text": found}),
        lines,
    ]
    expected = [found[i] for i in permutation(30, "documents", 7)]
    for name in names:
        assert read(name, seed=7) == expected
        assert read(name, streaming=True) == found
        identity = open_corpus(settings(name, streaming=True), None, 0).identity
        assert (identity.name, identity.kind, identity.column) == (name.name, "text", "text")
        assert identity.order == "as_read"


def test_several_files_are_one_text(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": f"{i} {j}"} for j in range(5)]) for i in range(3)]
    assert sorted(read(*files)) == [f"{i} {j}" for i in range(3) for j in range(5)]
    assert open_corpus(settings(*files), None, 0).identity.name == "0.jsonl, 1.jsonl, 2.jsonl"


def test_the_digest_follows_the_contents(tmp_path: Path) -> None:
    a, b = (write_jsonl(tmp_path / name / "x.jsonl", [{"text": "one"}]) for name in map(_made(tmp_path), "ab"))
    first, second = (open_corpus(settings(path), None, 0).identity for path in (a, b))
    assert first == second
    write_jsonl(b, [{"text": "two"}])
    assert open_corpus(settings(b), None, 0).identity.digest != first.digest


def _made(tmp_path: Path) -> Any:
    def make(name: str) -> str:
        (tmp_path / name).mkdir()
        return name

    return make


def test_the_default_column_goes_by_name_and_then_by_type(tmp_path: Path) -> None:
    def column(row: dict[str, Any]) -> tuple[str | None, str]:
        identity = open_corpus(settings(write_jsonl(tmp_path / "c.jsonl", [row])), None, 0).identity
        return identity.column, identity.kind

    assert column({"id": "7", "text": "a", "messages": CHAT[0]}) == ("text", "text")
    assert column({"id": "7", "chat": CHAT[0]}) == ("chat", "messages")
    assert column({"n": 3, "tokens": [5, 6]}) == ("tokens", "input_ids")
    assert column({"n": 3, "content": "a"}) == ("content", "text")


@pytest.mark.fault(40)
def test_a_missing_column_lists_the_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"title": "a", "body": "b"}])
    with pytest.raises(UserError, match=r"no column 'text'; its columns: title \(text\), body \(text\)"):
        read(path)
    with pytest.raises(UserError, match=r"no column 'boddy'; its columns: title \(text\), body \(text\)"):
        read(path, column="boddy")
    assert read(path, column="body") == ["b"]
    with pytest.raises(UserError, match="'n' holds no text"):
        read(write_jsonl(tmp_path / "n.jsonl", [{"n": 3}]), column="n")


@pytest.mark.parametrize("name", ["no.jsonl", "no.parquet", "no.txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"no text file at .*{name}"):
        read(tmp_path / name)


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="must all be of one kind"):
        read(tmp_path / "a.txt", tmp_path / "b.jsonl")


def test_an_unreachable_data_set_is_an_error_and_never_replaced() -> None:
    with pytest.raises(UserError, match=r"data set 'nobody/nothing': neither a local path nor usable"):
        read("nobody/nothing", column="text", kind="text")


def test_a_licence_that_is_not_accepted_says_what_to_do() -> None:
    refusal = type("GatedRepoError", (OSError,), {})(
        "401 Client Error: access to model google/gemma-2-2b is restricted"
    )
    line = explain("model", "google/gemma-2-2b", refusal)
    for part in ("google/gemma-2-2b", "accept its licence at https://huggingface.co/google/gemma-2-2b", "HF_TOKEN"):
        assert part in line
    assert "local folder" in line and "\n" not in line


@pytest.mark.parametrize(
    ("text", "message"),
    [("{broken", r"line 2: not valid JSON"), ("[1]", r"line 2: expected a JSON object"), ("[" * 99_999, r"line 2")],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "a"}}\n{text}\n')
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"bad\.parquet"):
        read(path)


@pytest.mark.fault(38)
def test_an_empty_file_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        read(tmp_path / "empty.jsonl")


def encoder(folder: Path, path: Path, separator: str | None = "<eos>") -> tuple[Encoder, Iterator[Any]]:
    corpus = open_corpus(settings(path, streaming=True), separator, 0)
    made = Encoder(folder, corpus.identity, VOCABULARY)
    return made, (one.ids for one in made.encode(corpus.read()))


def test_text_stays_text(folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "def <bos> return<eos>"}, {"text": None}, {"text": ""}])
    made, ids = encoder(folder, path)
    first, *empty = ids
    assert (made.bos, made.separator) == (BOS_ID, EOS_ID)
    assert not {BOS_ID, EOS_ID} & set(first.tolist())
    assert made._tokenizer.decode(first) == "def <bos> return<eos>"
    assert [piece.size for piece in empty] == [0, 0]


@pytest.mark.fault(40)
def test_bad_unicode_becomes_the_replacement_character(folder: Path, tmp_path: Path) -> None:
    assert clean("a\ud800b \ud83d\ude00 é") == "a\ufffdb \U0001f600 é"
    path = tmp_path / "u.jsonl"
    path.write_bytes(b'{"text": "a\\ud800 \xff"}\n')
    made, ids = encoder(folder, path)
    assert made._tokenizer.decode(next(ids)) == "a\ufffd \ufffd"


def test_messages_go_through_the_chat_template_without_its_bos(folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"messages": chat} for chat in CHAT] + [{"messages": []}])
    made, ids = encoder(folder, path)
    *found, empty = ids
    assert [made._tokenizer.decode(piece) for piece in found] == [
        f"user: index {i}<eos>assistant: value<eos>" for i in range(5)
    ]
    assert all(BOS_ID not in piece for piece in found) and empty.size == 0
    parquet = write_parquet(tmp_path / "m.parquet", {"messages": CHAT})
    assert [piece.tolist() for piece in encoder(folder, parquet)[1]] == [piece.tolist() for piece in found]


def test_a_message_may_say_nothing(tmp_path: Path) -> None:
    folder = make_gemma(tmp_path / "gemma", num_hidden_layers=1)
    edit_json(
        folder / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    )
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "value"}]
    made, ids = encoder(folder, write_jsonl(tmp_path / "m.jsonl", [{"messages": chat}]))
    assert made._tokenizer.decode(next(ids)) == "systemuservalue"


def test_a_hub_text_is_one_whether_its_column_was_named_or_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And repair finds it by its identity alone."""
    rows = FileRows(find_files([write_jsonl(tmp_path / "x.jsonl", [{"id": 1, "story": "one"}])], "train"))
    monkeypatch.setattr("harvest.text.corpus.dataset_commit", lambda name, revision: revision or "c0ffee")
    monkeypatch.setattr("harvest.text.corpus.hub_rows", lambda name, subset, split, commit: rows)
    found = open_corpus(settings("some/stories", subset="en", split="test"), None, 0).identity
    named = open_corpus(
        settings("some/stories", subset="en", split="test", column="story", kind="text"), None, 0
    ).identity
    assert found == named
    assert (found.revision, found.subset, found.split, found.column) == ("c0ffee", "en", "test", "story")
    assert own_text(found, ()) == settings(
        "some/stories",
        revision="c0ffee",
        subset="en",
        split="test",
        column="story",
        kind="text",
        max_refused=MOST_REFUSED,
    )
    other = open_corpus(settings("some/stories", subset="en"), None, 0).identity
    assert other.digest != found.digest
    assert own_text(found, ("x.jsonl",)) == settings("x.jsonl", column="story", kind="text", max_refused=MOST_REFUSED)


def test_a_commit_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    assert dataset_commit("some/stories", commit) == commit  # the tests are offline
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        dataset_commit("some/stories", "v1")


def test_a_hub_out_of_reach_is_told_by_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's second line is advice that its reader cannot follow."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = LocalEntryNotFoundError("Got: ConnectError: refused\nAn error happened while trying to locate the files")
    assert explain("model", "a/b", error) == (
        "model 'a/b': neither a local path nor usable from the Hugging Face hub: it is not in the hub's local cache, "
        "and the hub was not reached (ConnectError: refused); check the network, or pass a local folder"
    )


def test_messages_need_a_template(tmp_path: Path) -> None:
    folder = make_gemma(tmp_path / "gemma", num_hidden_layers=1)
    with pytest.raises(UserError, match="no chat template"):
        encoder(folder, write_jsonl(tmp_path / "m.jsonl", [{"messages": CHAT[0]}]))


def test_a_bos_in_given_ids_starts_a_new_document(folder: Path, tmp_path: Path) -> None:
    rows = [[BOS_ID, 5, 6], [7], [BOS_ID, 8, BOS_ID, BOS_ID, 9], [BOS_ID], []]
    _, ids = encoder(folder, write_jsonl(tmp_path / "i.jsonl", [{"input_ids": row} for row in rows]))
    assert [piece.tolist() for piece in ids] == [[5, 6], [7], [8], [9], [], []]
    assert [piece.tolist() for piece in split_at(np.array([4, 2, 2, 5], np.int32), 2)] == [[4], [5]]


@pytest.mark.parametrize(
    ("row", "message"),
    [([5, VOCABULARY], f"token id {VOCABULARY} is outside"), ([-1], "token id -1"), ([1.5], "list of whole numbers")],
)
def test_ids_outside_the_vocabulary_are_refused(folder: Path, tmp_path: Path, row: list[Any], message: str) -> None:
    path = write_jsonl(tmp_path / "i.jsonl", [{"input_ids": [5]}, {"input_ids": row}])
    with pytest.raises(UserError, match=message):
        list(encoder(folder, path)[1])


def test_a_row_that_is_no_text_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in ("a", 5)))
    with pytest.raises(UserError, match="expected text, got int"):
        list(encoder(folder, path)[1])
