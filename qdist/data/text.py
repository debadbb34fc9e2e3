"""Samples of token ids: a text file, cut into chunks by a llama2.c tokenizer."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.data.stored import read_bytes, text_lines, unreadable
from qdist.data.tokenizer import BOS, Tokenizer
from qdist.digest import digest_arrays
from qdist.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Chunks of consecutive tokens; a sample is ``{input_name: int64 [length]}``.

    ``lengths``      tokens per chunk, BOS included, taken in turn: (64, 128) alternates.
    ``n_samples``    number of chunks; None: as many whole ones as the text gives.
    ``start_token``  tokens of the text to skip, so that two sets need not overlap.
    ``bos``          start every chunk with BOS.

    There is no `label`: the next-token loss uses the inputs. The text is read line by line, no
    further than needed. Raises QD104 (bad lengths, or fewer chunks there than asked for), QD301,
    QD302, QD306.
    """

    path: Path
    tokenizer_path: Path
    input_name: str
    lengths: tuple[int, ...]
    n_samples: int | None = None
    start_token: int = 0
    bos: bool = True

    def __post_init__(self) -> None:
        shortest = 2 if self.bos else 1
        n_samples = 1 if self.n_samples is None else self.n_samples
        bad = not self.lengths or min(self.lengths) < shortest
        if bad or n_samples < 1 or self.start_token < 0:
            raise ConfigError(
                "QD104",
                where=str(self.path),
                got=f"lengths={list(self.lengths)}, n_samples={self.n_samples}, "
                f"start_token={self.start_token}",
                expected=f"lengths of at least {shortest}, at least 1 sample, a start from 0",
                mend="change the setting that is out of range",
            )

    def __getstate__(self) -> dict[str, Any]:
        # Leaves the tokens behind: the process that unpickles reads its own.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same shape by construction."""
        return len(set(self.lengths)) == 1

    def keys(self) -> list[str]:
        """The chunk's number as six or more digits."""
        return [f"{index:06d}" for index in range(len(self._spans))]

    def content_digest(self, key: str) -> str:
        """Over the chunk's token ids."""
        return digest_arrays(self.load(key).items())

    def preprocessing(self) -> dict[str, Any]:
        """The tokenizer's digest and whether BOS was added."""
        content = read_bytes(self.tokenizer_path, "a llama2.c tokenizer file")
        return {
            "kind": "text",
            "input": self.input_name,
            "tokenizer": hashlib.sha256(content).hexdigest(),
            "bos": self.bos,
        }

    def load(self, key: str) -> Feeds:
        """Token ids of one chunk, int64 [length]."""
        if not key.isdecimal() or int(key) >= len(self._spans):
            raise unreadable(
                self.path,
                f"no chunk {key!r}",
                f"a number below {len(self._spans)}",
                "look the sample up by a key of this data set",
            )
        start, stop = self._spans[int(key)]
        tokens = self._tokens[start:stop].astype(np.int64)
        return {self.input_name: np.concatenate([[BOS], tokens]) if self.bos else tokens}

    def label(self, key: str) -> NDArray[np.int64] | None:
        """None: the inputs are their own labels."""
        return None

    @cached_property
    def _tokens(self) -> NDArray[np.int32]:
        """Tokens of the text from its beginning, as far as the chunks reach."""
        wanted = self._n_tokens_wanted
        tokenizer = Tokenizer.read(self.tokenizer_path)
        found: list[NDArray[np.int32]] = []
        n_found = 0
        for portion in tokenizer.encode_lines(text_lines(self.path)):
            found.append(np.asarray(portion, np.int32))
            n_found += len(portion)
            if wanted is not None and n_found >= wanted:
                break
        return np.concatenate(found) if found else np.empty(0, np.int32)

    @property
    def _n_tokens_wanted(self) -> int | None:
        if self.n_samples is None:
            return None
        chunks = itertools.islice(itertools.cycle(self.lengths), self.n_samples)
        return self.start_token + sum(chunks) - self.n_samples * self.bos

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """First and past-the-last position in ``_tokens`` of each chunk."""
        spans: list[tuple[int, int]] = []
        start = self.start_token
        for length in itertools.cycle(self.lengths):
            stop = start + length - self.bos
            if stop > len(self._tokens) or len(spans) == self.n_samples:
                break
            spans.append((start, stop))
            start = stop
        if not spans:
            raise DataError(
                "QD302",
                where=str(self.path),
                got=f"{len(self._tokens)} tokens",
                expected=f"a chunk of {self.lengths[0]} after the first {self.start_token}",
                mend="use a longer text, shorter chunks or an earlier start",
            )
        if self.n_samples is not None and len(spans) < self.n_samples:
            raise ConfigError(
                "QD104",
                where=str(self.path),
                got=f"n_samples={self.n_samples} from a text of {len(self._tokens)} tokens",
                expected=f"at most {len(spans)} chunks of these lengths from token "
                f"{self.start_token}",
                mend=f"set n_samples={len(spans)}, or use a longer text or shorter chunks",
            )
        return spans
