"""Samples of token ids: a text file, cut into chunks by a llama2.c tokenizer.

Format and algorithm of the tokenizer: karpathy/llama2.c, ``tokenizer.py`` and ``encode`` in
``run.c`` (byte-pair encoding with byte fallback, highest score first, leftmost among equals).
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.digest import digest_arrays
from qdist.errors import ConfigError, DataError

BOS = 1
_FIRST_BYTE_TOKEN = 3
_BYTE_TOKEN = re.compile(rb"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """llama2.c's vocabulary: ``pieces[i]`` are the bytes of token i, ``scores[i]`` its merge score.

    Tokens 0, 1, 2 are unknown, BOS and EOS; token ``3 + b`` stands for the byte b.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """From int32 longest length, then float32 score, int32 length and bytes of each token.

        All little-endian. Raises QD301, QD306.
        """
        content = _read_bytes(path, "a llama2.c tokenizer file")
        pieces: list[bytes] = []
        scores: list[float] = []
        try:
            (longest,) = struct.unpack_from("<i", content, 0)
            at = 4
            while at < len(content):
                score, length = struct.unpack_from("<fi", content, at)
                if not 0 <= length <= longest or at + 8 + length > len(content):
                    raise struct.error(f"token {len(pieces)} of {length} bytes at offset {at}")
                pieces.append(content[at + 8 : at + 8 + length])
                scores.append(score)
                at += 8 + length
            if len(pieces) < _FIRST_BYTE_TOKEN + 256:
                raise struct.error(f"{len(pieces)} tokens, too few for all bytes")
        except struct.error as error:
            raise DataError(
                "QD306",
                where=str(path),
                got=str(error),
                expected="a whole llama2.c tokenizer file",
                mend="export the tokenizer again with llama2.c's tokenizer.py",
            ) from error
        return cls(pieces=tuple(pieces), scores=tuple(scores))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, after the dummy space that llama2.c puts first; without BOS."""
        return list(itertools.chain.from_iterable(self.encode_lines(iter([text]))))

    def encode_lines(self, lines: Iterator[str]) -> Iterator[list[int]]:
        """Token ids of the text that ``lines`` (each with its line end) make up, in portions.

        Exactly what the whole text gives: a line end is a cut only where no token continues
        across it. Where one might, the text is encoded in one portion.
        """
        # The last token of a line ends in what stands for its end: a piece, or a byte's name.
        end = b"\n" if b"\n" in self._ids else b"<0x0A>"
        continued = any(end in piece[:-1] for piece in self.pieces)
        blocks = iter(["".join(lines)]) if continued else lines
        first = True
        for block in blocks:
            if block:
                yield self._merged(self._characters(f" {block}" if first else block))
                first = False

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids`` without the dummy space and BOS.

        Where a cut went through a character, its bytes become U+FFFD.
        """
        parts = [self._bytes(token) for token in ids if token != BOS]
        return b"".join(parts).removeprefix(b" ").decode(errors="replace")

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """Piece -> token; the first of equal pieces."""
        found: dict[bytes, int] = {}
        for token, piece in enumerate(self.pieces):
            found.setdefault(piece, token)
        return found

    def _bytes(self, token: int) -> bytes:
        match = _BYTE_TOKEN.fullmatch(self.pieces[token])
        return bytes([int(match[1], 16)]) if match else self.pieces[token]

    def _characters(self, text: str) -> list[int]:
        """One token per character of the vocabulary, one per UTF-8 byte of any other."""
        tokens: list[int] = []
        for character in text:
            encoded = character.encode()
            token = self._ids.get(encoded)
            if token is None:
                tokens.extend(byte + _FIRST_BYTE_TOKEN for byte in encoded)
            else:
                tokens.append(token)
        return tokens

    def _merged(self, tokens: list[int]) -> list[int]:
        """Greedy merging in O(n log n): a heap of candidate pairs over a linked list."""
        n = len(tokens)
        after = [*range(1, n), -1] if n else []
        before = list(range(-1, n - 1))
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(left: int) -> None:
            right = after[left]
            pair = self.pieces[tokens[left]] + self.pieces[tokens[right]]
            merged = self._ids.get(pair)
            if merged is not None:
                # Position second: among equal scores the leftmost pair is merged first.
                heapq.heappush(
                    heap, (-self.scores[merged], left, tokens[left], tokens[right], merged)
                )

        for left in range(n - 1):
            offer(left)
        while heap:
            _, left, token, next_token, merged = heapq.heappop(heap)
            right = after[left]
            # A pair is stale once either side was merged with something else.
            if tokens[left] != token or right == -1 or tokens[right] != next_token:
                continue
            tokens[left], tokens[right] = merged, -1
            after[left] = after[right]
            if after[left] != -1:
                before[after[left]] = left
                offer(left)
            if before[left] != -1:
                offer(before[left])
        return [token for token in tokens if token != -1]


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
        content = _read_bytes(self.tokenizer_path, "a llama2.c tokenizer file")
        return {
            "kind": "text",
            "input": self.input_name,
            "tokenizer": hashlib.sha256(content).hexdigest(),
            "bos": self.bos,
        }

    def load(self, key: str) -> Feeds:
        """Token ids of one chunk, int64 [length]."""
        if not key.isdecimal() or int(key) >= len(self._spans):
            raise DataError(
                "QD306",
                where=str(self.path),
                got=f"no chunk {key!r}",
                expected=f"a number below {len(self._spans)}",
                mend="look the sample up by a key of this data set",
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
        for portion in tokenizer.encode_lines(_text_lines(self.path)):
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


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, which are left as they are stored. Raises QD301, QD306."""
    try:
        with path.open(encoding="utf-8", newline="\n") as stream:
            yield from stream
    except FileNotFoundError as error:
        raise _not_found(path, "a text file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "QD306",
            where=str(path),
            got=str(error),
            expected="a readable text file in UTF-8",
            mend="save the text as UTF-8",
        ) from error


def _read_bytes(path: Path, expected: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _not_found(path, expected) from error
    except OSError as error:
        raise DataError(
            "QD306",
            where=str(path),
            got=error.strerror or str(error),
            expected=expected,
            mend="choose a file that this user can read",
        ) from error


def _not_found(path: Path, expected: str) -> DataError:
    return DataError(
        "QD301",
        where=str(path),
        got="no such file",
        expected=expected,
        mend="check the path; relative paths start at the working directory",
    )
