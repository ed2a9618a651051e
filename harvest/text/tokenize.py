"""Documents to token ids. Text stays text: a special token's name inside a document is encoded as characters."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, tzinfo
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvest.text.corpus import Document, is_chat, parsed
from harvest.text.packing import Encoded, Ids
from harvest.text.tokenizer_files import has_tokenizer, load_tokenizer
from shared.errors import UserError, cause
from shared.store.layout import CorpusIdentity

_BATCH = 64
_NONE = np.zeros(0, np.int32)
_ROLES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT calls the roles of a chat."""

_PANIC = "PanicException"
"""What the tokenizers library raises where its own code fails, in a regular expression for one; no `Exception`."""


class _OneDay(datetime):
    """What a chat template is told of the time: a text must not differ from one day to the next."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_OneDay":
        """Return the day that Llama's template falls back to where it has no clock."""
        return cls(2024, 7, 26, tzinfo=tz)


class _Unfit(Exception):
    """A row is no document; says why."""


class Encoder:
    """A tokenizer and what a corpus's rows are; BOS and EOS as ids. Token ids can be read with no tokenizer."""

    def __init__(self, folder: Path, corpus: CorpusIdentity, vocabulary: int, max_refused: int = 0) -> None:
        needed = corpus.kind != "input_ids" or has_tokenizer(folder)
        self._tokenizer: Any = load_tokenizer(folder) if needed else None
        self._corpus, self._vocabulary, self._folder = corpus, vocabulary, folder
        self._max_refused, self._refused = max_refused, 0
        self.first_refusal: str | None = None
        """The first row that was left out, and why."""
        self._eos: int | None = getattr(self._tokenizer, "eos_token_id", None)
        self.bos: int | None = getattr(self._tokenizer, "bos_token_id", None)
        self.special: tuple[int, ...] = tuple(sorted(set(getattr(self._tokenizer, "all_special_ids", ()))))
        """Ids of all special tokens."""
        self.separator: int | None = None if corpus.separator is None else self._eos
        if corpus.kind == "messages" and not getattr(self._tokenizer, "chat_template", None):
            raise UserError(f"{folder}: its tokenizer has no chat template, which a column of messages needs")

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Yield the token ids of each document, without BOS; an empty, missing or refused document gives none.

        A BOS in given ids, or one apart from EOS in what a chat template writes, starts a new document. Raises
        `UserError` on more rows that are no document than may be refused, and on ids that the model cannot embed.
        """
        rest = iter(documents)
        self._refused, self.first_refusal = 0, None
        while batch := list(islice(rest, _BATCH if self._corpus.kind == "text" else 1)):
            yield from self._texts(batch) if self._corpus.kind == "text" else self._row(batch[0])

    def require_embedded(self, *tokens: int | None) -> None:
        """Raise `UserError` when the model has no embedding of one of `tokens`."""
        if wrong := [token for token in tokens if token is not None and token >= self._vocabulary]:
            name = self._tokenizer.convert_ids_to_tokens(wrong[0])
            raise UserError(
                f"{self._folder}: its tokenizer has token {name!r} with id {wrong[0]}, and the model's embedding has "
                f"{self._vocabulary} rows; use the tokenizer that belongs to the model"
            )

    def _texts(self, batch: list[Document]) -> Iterator[Encoded]:
        texts: list[str] = []
        left_out: list[Mapping[str, int]] = []
        for document in batch:
            text, without = self._text(document)
            left_out.append(without)
            if text is not None:
                texts.append(text)
        ids = iter(self._tokenized(texts, split_special_tokens=True))
        yield from (Encoded(_NONE if "refused_rows" in without else next(ids), without) for without in left_out)

    def _text(self, document: Document) -> tuple[str | None, Mapping[str, int]]:
        """Return a document's text, none if it is refused, and what is left out of it."""
        if document.refusal is not None:
            return None, self._refuse(document, document.refusal)
        if not isinstance(document.value, str | None):
            return None, self._refuse(document, f"{self._column}: expected text, got {type(document.value).__name__}")
        text = clean(document.value or "")
        return text, _counted(replaced_characters=document.replaced + _replaced(document.value, text))

    def _row(self, document: Document) -> Iterator[Encoded]:
        """Yield the documents of a row of messages or ids; what is left out of it is told with the first."""
        try:
            if document.refusal is not None:
                raise _Unfit(document.refusal)
            ids, left_out = self._messages(document) if self._corpus.kind == "messages" else self._given(document)
        except _Unfit as why:
            yield Encoded(_NONE, self._refuse(document, str(why)))
            return
        for number, piece in enumerate(self._pieces(ids)):
            yield Encoded(piece, {} if number else left_out)

    def _pieces(self, ids: Ids) -> list[Ids]:
        if self.bos is None:
            return [ids]
        if self._corpus.kind == "messages" and self.bos == self._eos:  # it stands between the turns of one document
            return [_trimmed(ids, self.bos, end=self.separator is not None)]
        return split_at(ids, self.bos)

    def _messages(self, document: Document) -> tuple[Ids, Mapping[str, int]]:
        messages = parsed(document.value) if isinstance(document.value, str) else document.value
        if not messages and document.value in (None, "", [], "[]"):
            return _NONE, {}
        if not is_chat(messages):
            raise _Unfit(f"{self._column}: expected a list of messages with role and content, got {_short(messages)}")
        chat = [_message(message) for message in messages]
        text = self._rendered(chat)
        replaced = document.replaced + sum(_replaced(_content(m), None) for m in messages)
        return self._tokenized([text])[0], _counted(replaced_characters=replaced)

    def _rendered(self, chat: list[dict[str, Any]]) -> str:
        """Return the text of a chat; content in parts is joined where the template would write the list itself."""
        joined = [{**m, "content": _joined(m["content"])} if isinstance(m.get("content"), list) else m for m in chat]
        parts = [str(m["content"]) for m in chat if isinstance(m.get("content"), list)]
        try:
            if not parts:
                return self._templated(chat)
            text = self._templated(chat)
        except _Unfit:
            if not parts:
                raise
            return self._templated(joined)
        return self._templated(joined) if any(part in text for part in parts) else text

    def _templated(self, chat: list[dict[str, Any]]) -> str:
        from transformers.utils import chat_template_utils

        chat_template_utils.datetime = _OneDay  # what its `strftime_now` asks, which a template cannot be given
        try:
            return str(self._tokenizer.apply_chat_template(chat, tokenize=False))
        except Exception as error:  # templates raise whatever they like
            raise _Unfit(f"{self._column}: the chat template refuses it ({cause(error)})") from error

    def _tokenized(self, texts: list[str], **options: Any) -> list[Ids]:
        """Return the ids of each text. Raises `UserError` on one that the model has no embedding of."""
        if not texts:
            return []
        options |= {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        try:
            found = [np.array(ids, np.int32) for ids in self._tokenizer(texts, **options)["input_ids"]]
        except BaseException as error:
            if type(error).__name__ != _PANIC:
                raise
            raise UserError(
                f"{self._folder}: its tokenizer fails on a text of {max(map(len, texts)):,} characters or less "
                f"({cause(error)}); see its tokenizer.json, or split the text"
            ) from error
        self.require_embedded(max((int(ids.max()) for ids in found if ids.size), default=None))
        return found

    def _given(self, document: Document) -> tuple[Ids, Mapping[str, int]]:
        """Return given ids without padding: where the mask is 0, or else what stands at an end again and again."""
        ids = _integers(document.value, self._column, "iu")
        if document.mask is None:
            kept = self._unpadded(ids)
        else:
            mask = _integers(document.mask, f"the attention_mask of {self._column}", "iub")
            if len(mask) != len(ids):
                raise _Unfit(f"{self._column}: holds {len(ids)} token ids, and its attention_mask {len(mask)} values")
            kept = ids[mask != 0]
        if len(wrong := kept[(kept < 0) | (kept >= self._vocabulary)]):
            raise _Unfit(f"{self._column}: token id {wrong[0]} is outside the vocabulary of {self._vocabulary} tokens")
        return kept.astype(np.int32), _counted(padding_tokens=len(ids) - len(kept))

    def _unpadded(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return ids without the padding at their ends.

        A token for padding alone is padding wherever it stands there; one that has another use, and EOS, only where it
        stands there twice or more.
        """
        pad = getattr(self._tokenizer, "pad_token_id", None)
        for token in dict.fromkeys((pad, self._eos)):
            if token is not None:
                alone = token not in (self._eos, self.bos, self._tokenizer.unk_token_id)
                ids = _without_runs(
                    ids, token, 1 if alone else 2, keep=int(token == self._eos and self.separator is None)
                )
        return ids

    def _refuse(self, document: Document, why: str) -> Mapping[str, int]:
        """Count a row that is no document. Raises `UserError` when there are more than may be."""
        self._refused += 1
        self.first_refusal = self.first_refusal or f"{document.place}: {why}"
        if self._refused > self._max_refused:
            limit = f"; {self._refused} rows are not documents, and text.max_refused is {self._max_refused}"
            remedy = "; mend it, or leave out up to N such rows with --set text.max_refused=N"
            raise UserError(f"{document.place}: {why}{limit if self._max_refused else remedy}")
        return {"refused_rows": 1}

    @property
    def _column(self) -> str:
        return f"column {self._corpus.column!r}"


def clean(text: Any) -> Any:
    """Return `text` with surrogate pairs joined and lone surrogates, which no encoding has, replaced by U+FFFD."""
    if not isinstance(text, str) or text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split_at(ids: Ids, bos: int) -> list[Ids]:
    """Cut `ids` at every `bos`, which is left out; a document's own start leaves no empty piece before it."""
    cuts = [-1, *np.flatnonzero(ids == bos).tolist(), len(ids)]
    pieces = [ids[low + 1 : high] for low, high in pairwise(cuts)]
    return [piece for piece in pieces if len(piece)] or pieces[:1]


def _integers(values: Any, what: str, kinds: str) -> NDArray[Any]:
    """Return a list of numbers of some of numpy's `kinds` as an array. Raises `_Unfit` when it is none."""
    try:
        found = np.asarray([] if values is None else values)
    except ValueError:  # lists of different lengths
        found = np.zeros((1, 1))
    if not found.size:
        return _NONE
    if found.ndim != 1 or found.dtype.kind not in kinds:
        raise _Unfit(f"{what}: expected a list of whole numbers, got {_short(values)}")
    return found


def _without_runs(ids: NDArray[Any], token: int, least: int, *, keep: int) -> NDArray[Any]:
    """Return `ids` without the runs of `least` or more of `token` at their ends, but for `keep` tokens of the last."""
    others = np.flatnonzero(ids != token)
    first, last = (int(others[0]), int(others[-1]) + 1) if others.size else (0, 0)
    return ids[first if first >= least else 0 : last + keep if len(ids) - last >= least else len(ids)]


def _trimmed(ids: Ids, token: int, *, end: bool) -> Ids:
    """Return `ids` without `token` at the start, and with `end` without one at the end."""
    first = int(ids.size > 0 and ids[0] == token)
    return ids[first : len(ids) - int(end and ids.size > first and ids[-1] == token)]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with role and content, without what is None, as templates expect it."""
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise _Unfit(f"a message's role is {_short(role)}, expected text")
    if "role" not in message or ("content" not in message and "value" in message):
        message = {"role": role if "role" in message else _ROLES.get(role, role), "content": _content(message)}
    found = {key: clean(value) for key, value in message.items() if value is not None}
    content = found.get("content", "")
    if isinstance(content, list):
        found["content"] = [_part(part) for part in content]
    elif not isinstance(content, str):
        found["content"] = _part(content)["text"]
    return found


def _content(message: Mapping[str, Any]) -> Any:
    """Return what a message says; ShareGPT has another name for it."""
    return message.get("content", message.get("value"))


def _part(part: Any) -> dict[str, Any]:
    """Return a part of a message's content. Raises `_Unfit` when it is no text."""
    if isinstance(part, str):
        return {"type": "text", "text": clean(part)}
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": clean(part["text"])}
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise _Unfit(f"a message has a part that is not text: {_short(kind)}")


def _joined(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


def _replaced(text: Any, cleaned: str | None) -> int:
    """Count the characters of `text`, or of its parts, that `clean` replaces; `cleaned` is its result, if known."""
    if isinstance(text, list):
        return sum(_replaced(part.get("text") if isinstance(part, dict) else part, None) for part in text)
    if not isinstance(text, str) or text.isascii():
        return 0
    return (clean(text) if cleaned is None else cleaned).count("\ufffd") - text.count("\ufffd")


def _counted(**counts: int) -> Mapping[str, int]:
    return {name: count for name, count in counts.items() if count}


def _short(value: Any) -> str:
    return str(value)[:60]
