"""The text of single tokens, by the store's tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from shared.errors import CorruptData


def pieces(file: Path, tokens: Sequence[int]) -> list[str]:
    """Return what each of `tokens` adds to a text before it, spaces included, by the tokenizer in `file`.

    Bytes that are not whole characters are U+FFFD, special tokens their names, and what the tokenizer does not know its
    number in angle brackets. Raises `CorruptData` when the file is no tokenizer.
    """
    tokenizer = _load(file)
    # Many decoders drop the space that starts a text, so something stands before each token: no byte, which would join.
    names = (tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size()))
    before = next(([i] for i, name in enumerate(names) if name.isascii() and name.isalnum()), [])
    start = tokenizer.decode(before, skip_special_tokens=False)
    texts = tokenizer.decode_batch([[*before, int(token)] for token in tokens], skip_special_tokens=False)
    return [
        text.removeprefix(start) or tokenizer.id_to_token(int(token)) or f"<{token}>"
        for token, text in zip(tokens, texts, strict=True)
    ]


def known_tokens(file: Path) -> list[int]:
    """Return the ids of all tokens of the tokenizer in `file`. Raises `CorruptData` when the file is no tokenizer."""
    return sorted(_load(file).get_vocab(with_added_tokens=True).values())


def _load(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # what the library raises is a bare Exception
        raise CorruptData(f"{file}: not a readable tokenizer ({error}); repair the store") from error
