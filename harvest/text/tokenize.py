"""Documents to token ids. Text stays text: a special token's name inside a document is encoded as characters."""

from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError
from shared.store.layout import CorpusIdentity

Ids = NDArray[np.int32]
_BATCH = 64


class Encoder:
    """A tokenizer and what a corpus's rows are; BOS and EOS as ids."""

    def __init__(self, folder: Path, corpus: CorpusIdentity, vocabulary: int) -> None:
        self._tokenizer = _load(folder)
        self._corpus, self._vocabulary = corpus, vocabulary
        self.bos: int | None = self._tokenizer.bos_token_id
        self.special: tuple[int, ...] = tuple(sorted(set(self._tokenizer.all_special_ids)))
        """Ids of all special tokens."""
        self.separator: int | None = None if corpus.separator is None else self._tokenizer.eos_token_id
        if corpus.kind == "messages" and not self._tokenizer.chat_template:
            raise UserError(f"{folder}: its tokenizer has no chat template, which a column of messages needs")

    def encode(self, documents: Iterable[Any]) -> Iterator[Ids]:
        """Yield the token ids of each document, without BOS; an empty or missing document gives none.

        A BOS in given ids or in what a chat template writes starts a new document. Raises `UserError` on what is no
        document, and on ids outside the vocabulary.
        """
        if self._corpus.kind == "text":
            rest = iter(documents)
            while batch := list(islice(rest, _BATCH)):
                yield from self._texts(batch)
            return
        for document in documents:
            ids = self._messages(document) if self._corpus.kind == "messages" else self._checked(document)
            yield from [ids] if self.bos is None else split_at(ids, self.bos)

    def _texts(self, texts: list[Any]) -> list[Ids]:
        if wrong := next((text for text in texts if not isinstance(text, str | None)), None):
            raise UserError(f"{self._where}: expected text, got {type(wrong).__name__}")
        encoded = self._tokenizer(
            [clean(text or "") for text in texts],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.array(ids, np.int32) for ids in encoded["input_ids"]]

    def _messages(self, messages: Any) -> Ids:
        if not messages:
            return np.zeros(0, np.int32)
        try:
            chat = [{key: clean(value) for key, value in message.items() if value is not None} for message in messages]
            text = self._tokenizer.apply_chat_template(chat, tokenize=False)
            return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        except Exception as error:  # templates raise whatever they like
            raise UserError(f"{self._where}: the chat template refuses a row: {error}") from error

    def _checked(self, ids: Any) -> Ids:
        values = np.asarray([] if ids is None else ids)
        if not values.size:
            return np.zeros(0, np.int32)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise UserError(f"{self._where}: expected a list of token ids, got {str(ids)[:60]}")
        if len(wrong := values[(values < 0) | (values >= self._vocabulary)]):
            raise UserError(
                f"{self._where}: token id {wrong[0]} is outside the vocabulary of {self._vocabulary} tokens"
            )
        return values.astype(np.int32)

    @property
    def _where(self) -> str:
        return f"{self._corpus.name}, column {self._corpus.column!r}"


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


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder}: its tokenizer does not load: {error}") from error
