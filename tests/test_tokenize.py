"""Rows to token ids: masks and padding, chats as people write them, rows that are no document, ids without a row."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harvest.embedded.tokenizer import BOS_ID, EOS_ID, PAD_ID
from harvest.settings import TextSettings
from harvest.text.corpus import Document, open_corpus
from harvest.text.tokenize import Encoder
from shared.errors import UserError
from tests.llms import VOCABULARY, edit_json, make_gemma, write_jsonl

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
)
TURNS = [{"role": "user", "content": "index"}, {"role": "assistant", "content": "value"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_gemma(tmp_path_factory.mktemp("models") / "gemma", num_hidden_layers=1)
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def shared_token(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, with EOS as its BOS, and with no token for padding, as GPT-2's."""
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("models") / "shared"))
    edit_json(copy / "tokenizer_config.json", bos_token="<eos>", pad_token=None)
    return copy


class Read:
    """What rows become."""

    def __init__(self, folder: Path, path: Path, separator: str | None = "<eos>", **more: Any) -> None:
        settings = TextSettings(name=(str(path),), streaming=True, **more)
        corpus = open_corpus(settings, separator, 0)
        self.identity = corpus.identity
        self.encoder = Encoder(folder, corpus.identity, VOCABULARY, settings.max_refused)
        encoded = list(self.encoder.encode(corpus.read()))
        self.ids = [one.ids.tolist() for one in encoded]
        self.left_out = sum((Counter(one.left_out) for one in encoded), Counter[str]())
        self.texts = [self.encoder._tokenizer.decode(ids) for ids in self.ids] if self.encoder._tokenizer else []


def rows(tmp_path: Path, *values: dict[str, Any]) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", values)


@pytest.mark.fault(51)
def test_what_the_mask_leaves_out_is_no_token(folder: Path, tmp_path: Path) -> None:
    path = rows(
        tmp_path,
        {"labels": [-100, 5], "attention_mask": [1, 1], "input_ids": [7, 5], "token_type_ids": [0, 0]},
        {"input_ids": [7, 8, 999, -1], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [EOS_ID, EOS_ID, 7, EOS_ID], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [9, 9], "attention_mask": [0, 0]},
        {"input_ids": [7, EOS_ID, EOS_ID], "attention_mask": None},
    )
    found = Read(folder, path)
    assert (found.identity.column, found.identity.kind) == ("input_ids", "input_ids")
    assert found.ids == [[7, 5], [7, 8], [7, EOS_ID], [], [7]]
    assert found.left_out == {"padding_tokens": 8}


def test_a_mask_goes_with_the_ids_of_its_name(folder: Path, tmp_path: Path) -> None:
    ids, mask, other = "chosen_input_ids", "chosen_attention_mask", "attention_mask"
    path = rows(tmp_path, {ids: [7, 8, 9], mask: [1, 1, 0], other: [1]})
    assert Read(folder, path, column=ids).ids == [[7, 8]]
    assert Read(folder, rows(tmp_path, {"tokens": [7, 8, 9], "attention_mask": [0, 1, 1]})).ids == [[8, 9]]


@pytest.mark.fault(51)
@pytest.mark.parametrize(
    ("mask", "message"),
    [([1, 1], "holds 3 token ids, and its attention_mask 2 values"), ([[1], [1, 1]], "attention_mask of"), ("x", "of")],
)
def test_a_mask_that_does_not_fit_names_the_row(folder: Path, tmp_path: Path, mask: Any, message: str) -> None:
    path = rows(tmp_path, {"input_ids": [7], "attention_mask": [1]}, {"input_ids": [7, 8, 9], "attention_mask": mask})
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: column 'input_ids'|rows\.jsonl, line 2: .*{message}"):
        Read(folder, path)


@pytest.mark.fault(51)
@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([7, 8, PAD_ID], [7, 8]),
        ([PAD_ID, PAD_ID, 7, PAD_ID, 8, EOS_ID, PAD_ID], [7, PAD_ID, 8, EOS_ID]),
        ([7, 8, EOS_ID], [7, 8, EOS_ID]),
        ([7, 8] + [EOS_ID] * 54, [7, 8]),
        ([EOS_ID, EOS_ID, 7], [7]),
        ([PAD_ID] * 9, []),
    ],
)
def test_padding_without_a_mask_is_recognised(folder: Path, tmp_path: Path, ids: list[int], kept: list[int]) -> None:
    found = Read(folder, rows(tmp_path, {"input_ids": ids}))
    assert found.ids == [kept]
    assert found.left_out["padding_tokens"] == len(ids) - len(kept)


def test_without_a_separator_one_eos_marks_the_documents_end(folder: Path, tmp_path: Path) -> None:
    assert Read(folder, rows(tmp_path, {"input_ids": [7] + [EOS_ID] * 5}), None).ids == [[7, EOS_ID]]


def test_where_bos_is_eos_ids_are_split_and_padding_is_none(shared_token: Path, tmp_path: Path) -> None:
    found = Read(shared_token, rows(tmp_path, {"input_ids": [EOS_ID, 7, 8, EOS_ID, 9, EOS_ID, EOS_ID, EOS_ID]}))
    assert found.ids == [[7, 8], [9]]


def test_where_bos_is_eos_a_chat_stays_one_document(folder: Path, shared_token: Path, tmp_path: Path) -> None:
    """EOS stands between its turns; at its end the separator stands for it."""
    path = rows(tmp_path, {"messages": TURNS})
    assert Read(shared_token, path).texts == ["[user] index<eos>[assistant] value"]
    assert Read(shared_token, path, None).texts == ["[user] index<eos>[assistant] value<eos>"]
    assert Read(folder, path).texts == ["[user] index<eos>[assistant] value<eos>"]


def test_content_in_parts_is_joined(folder: Path, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "index "}, {"type": "text", "text": "list", "image": None}, " token"]
    path = rows(tmp_path, {"messages": [{"role": "user", "content": parts}, TURNS[1]]})
    assert Read(folder, path).texts == ["[user] index list token<eos>[assistant] value<eos>"]


def test_a_template_that_knows_parts_gets_them(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    each = "{% for m in messages %}{% for p in m['content'] %}<{{ p['text'] }}>{% endfor %}{% endfor %}"
    edit_json(copy / "tokenizer_config.json", chat_template=each)
    parts = [{"type": "text", "text": "index"}, {"type": "text", "text": "list"}]
    assert Read(copy, rows(tmp_path, {"messages": [{"role": "user", "content": parts}]})).texts == ["<index><list>"]


def test_sharegpt_rows_and_chats_in_json_are_read(folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "index"}, {"from": "gpt", "value": "value"}]
    expected = ["[user] index<eos>[assistant] value<eos>"]
    assert Read(folder, rows(tmp_path, {"id": "7", "conversations": turns})).texts == expected
    assert Read(folder, rows(tmp_path, {"messages": json.dumps(TURNS)})).texts == expected
    mixed = [{"from": "human", "content": "index"}, {"role": "assistant", "value": "value"}]
    assert Read(folder, rows(tmp_path, {"conversations": mixed})).texts == expected
    part = [TURNS[0], {"role": "assistant", "content": {"type": "text", "text": "value"}}]
    assert Read(folder, rows(tmp_path, {"messages": part})).texts == expected
    assert Read(folder, rows(tmp_path, {"text": json.dumps(TURNS)})).identity.kind == "text"


def test_a_template_that_asks_for_the_date_gives_the_same_text_on_any_day(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit_json(copy / "tokenizer_config.json", chat_template="{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    assert Read(copy, rows(tmp_path, {"messages": TURNS})).texts == ["26 Jul 2024 index"]


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no text": ({"text": "a"}, {"text": 5}, "column 'text': expected text, got int"),
    "no column": ({"text": "a"}, {"content": "a"}, "no column 'text'; its columns: content"),
    "no column at all": ({"text": "a"}, {}, "no column 'text'"),
    "refused": ({"messages": TURNS}, {"messages": [{"role": "system", "content": "a"}]}, "no system turn"),
    "no chat": ({"messages": TURNS}, {"messages": 5}, "expected a list of messages"),
    "no roles": ({"messages": TURNS}, {"messages": [{"content": "a"}]}, "expected a list of messages"),
    "role": ({"messages": TURNS}, {"messages": [{"role": None, "content": "a"}]}, "a message's role is None"),
    "sender": ({"messages": TURNS}, {"messages": [{"from": ["a"], "value": "a"}]}, "a message's role is ['a']"),
    "number": (
        {"messages": TURNS},
        {"messages": [{"role": "user", "content": 5}]},
        "a message has a part that is not text: int",
    ),
    "image": (
        {"messages": TURNS},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]},
        "a message has a part that is not text: image_url",
    ),
    "ids": ({"input_ids": [7]}, {"input_ids": [7, VOCABULARY]}, f"token id {VOCABULARY} is outside"),
    "lists": ({"input_ids": [7]}, {"input_ids": [[7], [8, 9]]}, "expected a list of whole numbers"),
    "null in ids": ({"input_ids": [7]}, {"input_ids": [7, None]}, "expected a list of whole numbers"),
    "words": ({"input_ids": [7]}, {"input_ids": "words"}, "expected a list of whole numbers"),
}


@pytest.mark.fault(52)
@pytest.mark.parametrize("case", BAD)
def test_a_row_that_is_no_document_is_named_and_can_be_left_out(folder: Path, tmp_path: Path, case: str) -> None:
    good, bad, message = BAD[case]
    path = rows(tmp_path, good, good, bad, good, bad, good)
    with pytest.raises(UserError, match="text.max_refused=N") as caught:
        Read(folder, path)
    assert "rows.jsonl, line 3: " in str(caught.value) and message in str(caught.value)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 5: .*2 rows are not documents, and text.max_refused is 1"):
        Read(folder, path, max_refused=1)
    found = Read(folder, path, max_refused=2)
    assert found.left_out == {"refused_rows": 2}
    assert [ids for ids in found.ids if ids] == [found.ids[0]] * 4
    assert str(found.encoder.first_refusal).startswith(f"{path}, line 3: ")


@pytest.mark.fault(52)
def test_lines_that_are_no_json_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "value"}\n{broken\n[1]\n{"text": "a\0"}\n{"text": "list"}\n')
    found = Read(folder, tmp_path / "rows.jsonl", max_refused=3)
    assert found.texts == ["value", "", "", "", "list"] and found.left_out == {"refused_rows": 3}


def test_a_null_is_an_empty_document(folder: Path, tmp_path: Path) -> None:
    for column, value in (("text", "value"), ("messages", TURNS), ("input_ids", [7])):
        nothing: Any = "" if column == "text" else []
        found = Read(folder, rows(tmp_path, {column: value}, {column: None}, {column: nothing}, {column: value}))
        assert [bool(ids) for ids in found.ids] == [True, False, False, True] and not found.left_out


def test_replaced_characters_are_counted(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a\xff\\ud800 \\ud83d\\ude00"}\n' + '{"text": "\ufffd"}\n'.encode())
    found = Read(folder, path)
    assert found.texts == ["a\ufffd\ufffd \U0001f600", "\ufffd"] and found.left_out == {"replaced_characters": 2}
    parts = [{"type": "text", "text": "a\ud800"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}, TURNS[1]]}))
    assert Read(folder, path).left_out == {"replaced_characters": 1}


@pytest.mark.fault(53)
def test_ids_that_the_model_cannot_embed_are_never_made(folder: Path, tmp_path: Path) -> None:
    identity = Read(folder, rows(tmp_path, {"text": "value"})).identity
    encoder = Encoder(folder, identity, 300, max_refused=100)
    assert [one.ids.max() < 300 for one in encoder.encode([Document("abc", "x")])] == [True]
    with pytest.raises(
        UserError, match="its tokenizer has token .* with id 3.., and the model's embedding has 300 row"
    ):
        list(encoder.encode([Document("def return import class self value list index token layer", "x")] * 3))
    with pytest.raises(UserError, match="token '<bos>' with id 2, and the model's embedding has 2 rows"):
        Encoder(folder, identity, 2).require_embedded(BOS_ID, None)
    chat = Read(folder, rows(tmp_path, {"messages": TURNS})).identity
    with pytest.raises(UserError, match="the model's embedding has 8 rows"):
        list(Encoder(folder, chat, 8).encode([Document(TURNS, "x")]))


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    found = Read(tmp_path, rows(tmp_path, {"input_ids": [5, 6, 6, 6]}, {"input_ids": [0]}), None)
    assert found.ids == [[5, 6, 6, 6], [0]] and (found.encoder.bos, found.encoder.special) == (None, ())


@pytest.mark.parametrize("more", [{}, {"column": "text"}])
def test_columns_are_judged_by_the_first_rows_that_hold_anything(tmp_path: Path, more: dict[str, str]) -> None:
    def kind(*given: dict[str, Any]) -> tuple[str | None, str]:
        identity = open_corpus(TextSettings(name=(str(rows(tmp_path, *given)),), **more), None, 0).identity
        return identity.column, identity.kind

    assert kind(*[{"text": None}] * 3000, {"text": "a"}) == ("text", "text")
    assert kind(*[{"title": "x", "text": None}] * 300, {"title": "x", "text": "a"}) == ("text", "text")
    assert kind(*[{"title": "x", "text": []}] * 300, {"title": "x", "text": [5]}) == ("text", "input_ids")


@pytest.mark.fault(40)
def test_what_columns_hold_is_told(tmp_path: Path) -> None:
    def told(row: dict[str, Any], **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            open_corpus(TextSettings(name=(str(rows(tmp_path, *[row] * 150)),), **more), None, 0)
        return str(caught.value)

    assert "column 'text' holds nothing in all the rows that were read" in told({"text": None})
    assert "column 'text' holds no text, chat messages or token ids, but a list of str" in told({"text": ["a"]})
    assert "no column 'text'; its columns: a (text), b (text) (" in told({"a": "x", "b": "y"})
    assert "no column 'text'; its columns: a (float), labels (input_ids) (" in told({"a": 1.5, "labels": [1]})
    assert "its columns: input_ids (a list of NoneType and int) (" in told({"input_ids": [5, None]})
    assert "its columns: messages (a list as a string) (" in told({"messages": str(TURNS)})
    assert "c9 (text), ... (300 in all) (" in told({f"c{i}": "x" for i in range(300)})
    assert f"its columns: {'x' * 80}... (--set" in told({"x" * 500: 5})


@pytest.mark.fault(56)
def test_a_tokenizer_that_panics_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """What the tokenizers library raises: no `Exception`."""

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("regex: stack overflow")

    path = rows(tmp_path, {"text": "index"})
    corpus = open_corpus(TextSettings(name=(str(path),), streaming=True), None, 0)
    encoder = Encoder(folder, corpus.identity, VOCABULARY)
    monkeypatch.setattr(encoder, "_tokenizer", panic)
    with pytest.raises(UserError, match=r"its tokenizer fails on a text of 5 characters.*regex: stack overflow"):
        list(encoder.encode(corpus.read()))
