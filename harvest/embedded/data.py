"""Token streams of both parts of the corpus, and the windows that training and evaluation see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from harvest.embedded.corpus import Corpus, Document, is_held_out
from harvest.embedded.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCABULARY, train_tokenizer

SCORED = 256
"""Tokens that a window predicts, from a context of as many: the beginning-of-sequence token and the tokens before."""
NOT_SCORED = -100


@dataclass(frozen=True)
class Data:
    """The token streams [N] of both parts of the corpus, and the held-out part's size in UTF-8 bytes."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor
    held_out_bytes: int

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Convert a loss per held-out token to one that does not depend on what the tokenizer calls a token."""
        return nats_per_token * len(self.held_out) / self.held_out_bytes / math.log(2)


def token_stream(documents: Iterable[Document], tokenizer: Tokenizer) -> Tensor:
    """Return all documents as one run of token ids [N], each document followed by an end-of-sequence token."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast([d.text for d in documents], add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(EOS_ID)
    return torch.tensor(ids)


def prepare_data(corpus: Corpus) -> Data:
    """Train the tokenizer on the training documents, and encode both parts with it."""
    train = [d for d in corpus.documents if not is_held_out(d.name)]
    held_out = [d for d in corpus.documents if is_held_out(d.name)]
    tokenizer = train_tokenizer((d.text for d in train), VOCABULARY)
    size = sum(len(d.text.encode()) for d in held_out)
    return Data(tokenizer, token_stream(train, tokenizer), token_stream(held_out, tokenizer), size)


def with_bos(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and labels, both [W, 256], of text windows [W, 256]: each label is the token after its input."""
    bos = torch.full((len(windows), 1), BOS_ID)
    return torch.cat((bos, windows[:, :-1]), dim=1), windows


def evaluation_windows(stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and labels [W, 256] that score every token of a stream once; only the last window may be padded."""
    missing = -len(stream) % SCORED
    inputs, labels = with_bos(torch.cat((stream, torch.full((missing,), PAD_ID))).view(-1, SCORED))
    return inputs, labels.masked_fill(labels == PAD_ID, NOT_SCORED)


def training_batches(stream: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless inputs and labels [batch, 256]. Every epoch cuts the stream at another offset, in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(SCORED, (), generator=generator))
        count = (len(stream) - offset) // SCORED
        windows = stream[offset : offset + count * SCORED].view(count, SCORED)
        order = torch.randperm(count, generator=generator)
        # A last, smaller batch would weigh its windows more; the next epoch's offset reaches them anyway.
        for rows in order[: count - count % batch].view(-1, batch):
            yield with_bos(windows[rows])
