from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdist.data.text import TextSource
from qdist.data.tokenizer import Tokenizer
from qdist.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
STORIES = SHARED / "data" / "tinystories_120k.txt"
TOK512 = SHARED / "models" / "stories260K" / "tok512.bin"
TEXT = "The cat sat on the mat.\nThe café hat \U0001f600 — that!\r\n\n  attatth\n"
FIXED = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{b:02X}>".encode() for b in range(256))]


def _tokenizer(merges: Sequence[bytes], characters: bytes = b" Tacehmnost.") -> Tokenizer:
    pieces = [*FIXED, *merges, *(bytes([character]) for character in characters)]
    scores = [0.0] * len(FIXED) + [-float(i) for i in range(len(pieces) - len(FIXED))]
    return Tokenizer(pieces=tuple(pieces), scores=tuple(scores))


def _write(tokenizer: Tokenizer, path: Path) -> Path:
    content = struct.pack("<i", max(map(len, tokenizer.pieces)))
    for piece, score in zip(tokenizer.pieces, tokenizer.scores, strict=True):
        content += struct.pack("<fi", score, len(piece)) + piece
    path.write_bytes(content)
    return path


def _as_in_run_c(tokenizer: Tokenizer, text: str) -> list[int]:
    """``encode`` of llama2.c's run.c, transcribed: quadratic, without BOS and EOS."""
    lookup = {piece: i for i, piece in reversed(list(enumerate(tokenizer.pieces)))}
    tokens = [lookup[b" "]] if text else []
    for character in text:
        encoded = character.encode()
        if encoded in lookup:
            tokens.append(lookup[encoded])
        else:
            tokens.extend(byte + 3 for byte in encoded)
    while True:
        best_score, best_id, best_at = -1e10, -1, -1
        for i in range(len(tokens) - 1):
            pair = tokenizer.pieces[tokens[i]] + tokenizer.pieces[tokens[i + 1]]
            merged = lookup.get(pair, -1)
            if merged != -1 and tokenizer.scores[merged] > best_score:
                best_score, best_id, best_at = tokenizer.scores[merged], merged, i
        if best_at == -1:
            return tokens
        tokens[best_at : best_at + 2] = [best_id]


MERGES = [b"at", b" t", b"th", b"he", b" th", b" the", b"tt", b"aa", b"att", b"cat"]


@pytest.mark.parametrize("text", [TEXT, "", " ", "aaaaa", "tttatt", "\n", "a" * 50, "é"])
def test_encode_equals_the_transcription_and_decodes_to_the_text(text: str) -> None:
    tokenizer = _tokenizer(MERGES)
    ids = tokenizer.encode(text)
    assert ids == _as_in_run_c(tokenizer, text)
    assert tokenizer.decode([1, *ids]) == text


def test_equal_scores_merge_the_leftmost_pair_first() -> None:
    plain = _tokenizer([b"aa"])
    flat = Tokenizer(pieces=plain.pieces, scores=(0.0,) * len(plain.pieces))
    ids = flat.encode("aaaaa")
    assert [flat.pieces[token] for token in ids] == [b" ", b"aa", b"aa", b"a"]
    assert ids == _as_in_run_c(flat, "aaaaa")


@pytest.mark.parametrize(
    ("merges", "characters"),
    [
        (MERGES, b" at"),
        (MERGES, b" at\n"),  # the line end is a token of its own
        ([*MERGES, b"\n\n", b"\nT"], b" aT\n"),  # tokens continue across line ends
        ([*MERGES, b"<0x0A>T"], b" aT"),  # and across the name of the byte
    ],
)
def test_encoding_line_by_line_equals_encoding_at_once(
    merges: list[bytes], characters: bytes
) -> None:
    tokenizer = _tokenizer(merges, characters)
    lines = TEXT.splitlines(keepends=True)
    portions = list(tokenizer.encode_lines(iter(lines)))
    assert [token for portion in portions for token in portion] == _as_in_run_c(tokenizer, TEXT)


def test_a_cut_through_a_character_decodes_to_the_replacement_character() -> None:
    tokenizer = _tokenizer([])
    assert tokenizer.decode(tokenizer.encode("é")[:-1]) == "�"


def test_read_gives_what_the_file_says(tmp_path: Path) -> None:
    tokenizer = _tokenizer(MERGES)
    assert Tokenizer.read(_write(tokenizer, tmp_path / "tok.bin")) == tokenizer


@pytest.mark.parametrize("kind", ["truncated", "too few", "text", "empty", "none"])
def test_tokenizer_files_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = _write(_tokenizer(MERGES), tmp_path / "tok.bin")
    whole = path.read_bytes()
    parts = {"truncated": whole[:-1], "too few": whole[:31], "text": b"hello world", "empty": b""}
    if kind == "none":
        path.unlink()
    else:
        path.write_bytes(parts[kind])
    with pytest.raises(DataError, match="QD301" if kind == "none" else "QD306"):
        Tokenizer.read(path)


def _source(folder: Path, **settings: Any) -> TextSource:
    (folder / "text.txt").write_text(TEXT, newline="")
    _write(_tokenizer(MERGES), folder / "tok.bin")
    return TextSource(
        **{
            "path": folder / "text.txt",
            "tokenizer_path": folder / "tok.bin",
            "input_name": "ids",
            "lengths": (4, 6),
            **settings,
        }
    )


def test_chunks_are_consecutive_and_begin_with_bos(tmp_path: Path) -> None:
    source = _source(tmp_path, n_samples=5)
    ids = _tokenizer(MERGES).encode(TEXT)
    keys = source.keys()
    chunks = [source.load(key)["ids"] for key in keys]
    assert [len(chunk) for chunk in chunks] == [4, 6, 4, 6, 4]
    assert all(chunk.dtype == np.int64 and chunk[0] == 1 for chunk in chunks)
    assert [token for chunk in chunks for token in chunk[1:]] == ids[: 3 + 5 + 3 + 5 + 3]
    assert not source.uniform
    assert source.label("000000") is None


def test_without_bos_and_from_a_later_token(tmp_path: Path) -> None:
    source = _source(tmp_path, lengths=(5,), n_samples=2, start_token=3, bos=False)
    ids = _tokenizer(MERGES).encode(TEXT)
    keys = source.keys()
    assert [source.load(key)["ids"].tolist() for key in keys] == [ids[3:8], ids[8:13]]
    assert source.uniform


def test_all_whole_chunks_without_a_number(tmp_path: Path) -> None:
    n = len(_tokenizer(MERGES).encode(TEXT))
    assert len(_source(tmp_path, lengths=(5,)).keys()) == n // 4
    assert len(_source(tmp_path, lengths=(n + 1,)).keys()) == 1


def test_only_as_much_of_the_text_is_encoded_as_is_needed(tmp_path: Path) -> None:
    source = _source(tmp_path, lengths=(4,), n_samples=2)
    source.keys()
    assert len(source._tokens) < len(_tokenizer(MERGES).encode(TEXT))


def test_fewer_chunks_than_asked_for_say_how_many_there_are(tmp_path: Path) -> None:
    n = len(_source(tmp_path, lengths=(5,)).keys())
    with pytest.raises(ConfigError, match=f"QD104.*set n_samples={n}"):
        _source(tmp_path, lengths=(5,), n_samples=n + 1).keys()
    assert len(_source(tmp_path, lengths=(5,), n_samples=n).keys()) == n


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="QD302"):
        _source(tmp_path, lengths=(500,)).keys()
    with pytest.raises(DataError, match="QD301"):
        _source(tmp_path, path=tmp_path / "none.txt").keys()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match="QD306"):
        _source(tmp_path, path=tmp_path / "latin.txt").keys()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="QD302"):
        _source(tmp_path, path=tmp_path / "empty.txt").keys()
    with pytest.raises(DataError, match="QD306"):
        _source(tmp_path).load("000099")


@pytest.mark.parametrize(
    "settings",
    [{"lengths": ()}, {"lengths": (8, 1)}, {"n_samples": 0}, {"start_token": -1}],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="QD104"):
        _source(tmp_path, **settings)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data")
def test_the_real_tokenizer_on_the_real_text() -> None:
    tokenizer = Tokenizer.read(TOK512)
    text = STORIES.read_text(encoding="utf-8")
    for short in (text[:400], text[5000:5300], "Once upon a time, 你好 \U0001f600\n\n<s> x"):
        assert tokenizer.encode(short) == _as_in_run_c(tokenizer, short)
    begin = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - begin < 10
    assert tokenizer.decode(ids) == text
    lines = text.splitlines(keepends=True)
    assert [token for part in tokenizer.encode_lines(iter(lines)) for token in part] == ids


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real data")
def test_the_real_model_predicts_the_real_text() -> None:
    import onnxruntime as ort

    source = TextSource(
        path=STORIES, tokenizer_path=TOK512, input_name="input_ids", lengths=(256,), n_samples=100
    )
    session = ort.InferenceSession(SHARED / "models" / "stories260K" / "model.onnx")
    losses = []
    keys = source.keys()
    for key in keys:
        ids = source.load(key)["input_ids"]
        logits = session.run(None, {"input_ids": ids[None]})[0][0].astype(np.float64)
        norm = np.logaddexp.reduce(logits, axis=1)
        losses.append(np.mean((norm - logits[np.arange(256), np.roll(ids, -1)])[:-1]))
    assert np.mean(losses) == pytest.approx(1.523, abs=0.01)
