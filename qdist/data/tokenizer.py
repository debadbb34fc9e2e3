"""The tokenizer of llama2.c: byte-pair encoding over a vocabulary with scores.

Format and algorithm: karpathy/llama2.c, ``tokenizer.py`` and ``encode`` in ``run.c`` (byte-pair
encoding with byte fallback, highest score first, leftmost among equals).
"""

from __future__ import annotations

import heapq
import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qdist.data.stored import read_bytes, unreadable

BOS = 1
"""The token that begins a text."""

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
        content = read_bytes(path, "a llama2.c tokenizer file")
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
            raise unreadable(
                path,
                str(error),
                "a whole llama2.c tokenizer file",
                "export the tokenizer again with llama2.c's tokenizer.py",
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
