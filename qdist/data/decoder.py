"""Decoders with a cache: one sample of tokens becomes a prefill and some decode steps.

Such a model takes what it computed for earlier tokens as inputs (``past_key_values.0.key``) and
returns it with the new tokens added (``present.0.key``). Deployed, it runs over the prompt with
empty pasts, and then one token at a time. Names as exported by optimum and transformers
(``past_key_values.N.key`` and ``present.N.key``), by onnxruntime-genai (the same, ``past_N`` and
``present_N``, ``past_key_N`` and ``present_key_N``), and merged decoders with ``use_cache_branch``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.checks import InputSpec
from qdist.data.source import DataSource, Feeds
from qdist.errors import ConfigError, DataError

_PAST = re.compile(r"past(_|\b)")
_PRESENT = (("past_key_values", "present"), ("past_key_values", "present_key_values"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """One input of the cache. ``shape``: of the empty one, with ``batch_axis`` set to 1."""

    input: str
    output: str
    dtype: str
    shape: tuple[int, ...]
    batch_axis: int

    def empty(self, n_samples: int) -> NDArray[Any]:
        """The cache before the first token: no elements, for a batch of ``n_samples``."""
        shape = list(self.shape)
        shape[self.batch_axis] = n_samples
        return np.zeros(shape, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """How a model with a cache is run over samples of tokens.

    ``n_steps``    tokens at a sample's end that are decoded one at a time; the others are the
                   prefill. 0: the prefill alone.
    ``token``      the input of token ids; ``mask``, ``positions`` and ``branch`` (a bool that says
                   whether there are pasts) where the model has them.
    ``along``      other inputs that have one entry per new token, cut as the tokens are.
    ``pasts``      the cache.
    ``specs``      all inputs of the model.
    """

    n_steps: int
    token: InputSpec
    mask: InputSpec | None
    positions: InputSpec | None
    branch: InputSpec | None
    along: tuple[str, ...]
    pasts: tuple[Past, ...]
    specs: tuple[InputSpec, ...]

    def __post_init__(self) -> None:
        if self.n_steps < 0:
            raise ConfigError(
                "QD104",
                where="decode_steps",
                got=str(self.n_steps),
                expected="at least 0",
                mend="set the number of tokens to decode one at a time",
            )

    @property
    def carry(self) -> tuple[tuple[str, str], ...]:
        """(input, output of the phase before) pairs, for every phase but the first."""
        return tuple((past.input, past.output) for past in self.pasts)

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the phases made of the same sample, as JSON."""
        return {
            "decode_steps": self.n_steps,
            "token": self.token.name,
            "carry": [list(pair) for pair in self.carry],
        }

    def sample_specs(self, feeds: Feeds) -> tuple[InputSpec, ...]:
        """The inputs that a sample has to give: without cache and branch, which are made here,
        and without mask and positions where ``feeds`` lacks them."""
        made = {past.input for past in self.pasts}
        made |= {self.branch.name} if self.branch else set()
        optional = {spec.name for spec in (self.mask, self.positions) if spec}
        made |= optional - feeds.keys()
        return tuple(spec for spec in self.specs if spec.name not in made)

    def phases(self, feeds: Feeds) -> list[Feeds]:
        """Feeds of the prefill and of each decode step, without those that `carry` fills.

        ``feeds``: a micro-batch with the batch axis, tokens [B, L]. The prefill has the first
        ``L - n_steps`` tokens and empty pasts, each step one token more. The mask covers the past
        and the new tokens; it and positions are cut from the sample's, or made: ones, and the
        number of tokens before that are no padding.

        Raises QD303 for tokens that are not [B, L] or not more than ``n_steps``, and for other
        lengths of mask and positions.
        """
        tokens = feeds[self.token.name]
        if tokens.ndim != 2 or tokens.shape[1] <= self.n_steps:
            raise DataError(
                "QD303",
                where=f"input {self.token.name}",
                got=f"tokens of shape {list(tokens.shape)}",
                expected=f"[batch, length] with more than {self.n_steps} tokens, of which the "
                f"last {self.n_steps} are decoded one at a time",
                mend="use longer samples, or lower data.calibration.decode_steps",
            )
        n_tokens = tokens.shape[1]
        whole = self._whole(feeds)
        cuts = [0, *range(n_tokens - self.n_steps, n_tokens + 1)]
        return [self._phase(whole, start, stop) for start, stop in itertools.pairwise(cuts)]

    def _phase(self, whole: Feeds, start: int, stop: int) -> Feeds:
        """Tokens ``start`` to ``stop``; the first phase has the empty cache."""
        n_samples = whole[self.token.name].shape[0]
        cut = {self.token.name, *self.along}
        cut |= {self.positions.name} if self.positions else set()
        feeds: Feeds = {}
        for name, array in whole.items():
            if name in cut:
                feeds[name] = np.ascontiguousarray(array[:, start:stop])
            elif self.mask is not None and name == self.mask.name:
                feeds[name] = np.ascontiguousarray(array[:, :stop])
            else:
                feeds[name] = array
        if self.branch is not None:
            shape = self.branch.shape if self.branch.shape is not None else (1,)
            feeds[self.branch.name] = np.full([1] * len(shape), start > 0)
        if start == 0:
            feeds.update((past.input, past.empty(n_samples)) for past in self.pasts)
        return feeds

    def _whole(self, feeds: Feeds) -> Feeds:
        """``feeds`` with mask and positions of all tokens."""
        tokens = feeds[self.token.name]
        whole = dict(feeds)
        seen: NDArray[Any] = np.ones(tokens.shape, np.int64)
        if self.mask is not None:
            whole.setdefault(self.mask.name, seen.astype(self.mask.dtype))
            seen = (whole[self.mask.name] != 0).astype(np.int64)
        if self.positions is not None and self.positions.name not in whole:
            before = np.maximum(np.cumsum(seen, axis=1) - 1, 0)
            whole[self.positions.name] = before.astype(self.positions.dtype)
        for spec in (self.mask, self.positions):
            if spec is not None and whole[spec.name].shape != tokens.shape:
                raise DataError(
                    "QD303",
                    where=f"input {spec.name}",
                    got=f"shape {list(whole[spec.name].shape)}",
                    expected=f"{list(tokens.shape)}, one number per token of the sample",
                    mend="leave it out, so that it is made for every phase, or give one per token",
                )
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Phased:
    """The samples of ``source``, named as what ``decoder`` makes of them.

    Arrays are the source's, whole; `Decoder.phases` cuts a micro-batch of them. The settings of the
    decoder are part of `preprocessing`, and so of every sample's id.
    """

    source: DataSource
    decoder: Decoder

    @property
    def uniform(self) -> bool:
        """Whether every sample has the same shapes by construction."""
        return bool(getattr(self.source, "uniform", False))

    def keys(self) -> list[str]:
        """The source's."""
        return self.source.keys()

    def content_digest(self, key: str) -> str:
        """The source's."""
        return self.source.content_digest(key)

    def preprocessing(self) -> dict[str, Any]:
        """The source's, and the decoder's settings."""
        inner = self.source.preprocessing()
        return {"kind": "decoder", **self.decoder.settings, "source": inner}

    def load(self, key: str) -> Feeds:
        """The source's."""
        return self.source.load(key)

    def label(self, key: str) -> NDArray[np.int64] | None:
        """The source's."""
        return self.source.label(key)


def find_decoder(
    inputs: Sequence[InputSpec],
    outputs: Sequence[str],
    *,
    n_steps: int = 4,
    token_input: str = "input_ids",
    mask_input: str = "attention_mask",
    position_input: str = "position_ids",
) -> Decoder | None:
    """The decoder that a model's inputs and outputs describe, or None where it takes no pasts.

    Raises QD307 where an input has no output to be carried from or the model has no such token
    input, QD303 where the shape of a past does not say which axis grows, and QD104 for negative
    ``n_steps``.
    """
    by_name = {spec.name: spec for spec in inputs}
    named = [spec for spec in inputs if _PAST.match(spec.name)]
    if not any(_present(spec.name, outputs) for spec in named):
        return None
    token = by_name.get(token_input)
    if token is None or token.shape is None or len(token.shape) != 2:
        raise DataError(
            "QD307",
            where="the decoder's token input",
            got=f"no input {token_input} with axes [batch, sequence]",
            expected=f"one of {', '.join(s.name for s in inputs if not _PAST.match(s.name))}",
            mend="name it with data.calibration.token_input=NAME",
        )
    branch = by_name.get("use_cache_branch")
    known = {token_input, mask_input, position_input}
    return Decoder(
        n_steps=n_steps,
        token=token,
        mask=by_name.get(mask_input),
        positions=by_name.get(position_input),
        branch=branch,
        along=tuple(
            spec.name
            for spec in inputs
            if spec.name not in known
            and isinstance(token.shape[1], str)
            and spec.shape is not None
            and len(spec.shape) >= 2
            and spec.shape[1] == token.shape[1]
        ),
        pasts=tuple(_past(spec, outputs, token) for spec in named),
        specs=tuple(inputs),
    )


def _present(name: str, outputs: Sequence[str]) -> str | None:
    """The output that belongs to the past ``name``."""
    candidates = [name.replace(old, new, 1) for old, new in _PRESENT if name.startswith(old)]
    candidates.append(name.replace("past", "present", 1))
    return next((candidate for candidate in candidates if candidate in outputs), None)


def _past(spec: InputSpec, outputs: Sequence[str], token: InputSpec) -> Past:
    output = _present(spec.name, outputs)
    if output is None or ".encoder." in spec.name:
        raise DataError(
            "QD307",
            where=f"input {spec.name}",
            got="a cache of the encoder" if output else "a past without an output of its own",
            expected="an output such as " + spec.name.replace("past_key_values", "present", 1),
            mend="export the decoder with its present outputs"
            if output is None
            else "give samples with all inputs, pasts included, and set decode_steps=null",
        )
    if spec.shape is None or len(spec.shape) < 3:
        raise _unclear(spec, "a shape with named axes for batch and sequence")
    batch_axis = _batch_axis(spec.shape, token.shape[0] if token.shape else None)
    open_axes = [
        axis
        for axis, dim in enumerate(spec.shape)
        if not isinstance(dim, int) and axis != batch_axis
    ]
    if len(open_axes) != 1:
        raise _unclear(spec, "one dynamic axis beside the batch, along which the cache grows")
    shape = [dim if isinstance(dim, int) else 0 for dim in spec.shape]
    shape[batch_axis] = 1
    return Past(
        input=spec.name,
        output=output,
        dtype=spec.dtype,
        shape=tuple(shape),
        batch_axis=batch_axis,
    )


def _batch_axis(shape: Sequence[int | str | None], batch: int | str | None) -> int:
    """The axis that is named as the tokens' batch; or the second of five ([2, batch, ...])."""
    if isinstance(batch, str) and batch in shape:
        return list(shape).index(batch)
    return 1 if len(shape) == 5 else 0


def _unclear(spec: InputSpec, expected: str) -> DataError:
    return DataError(
        "QD303",
        where=f"input {spec.name}",
        got=f"shape {list(spec.shape) if spec.shape is not None else 'unknown'}",
        expected=expected,
        mend="export the model with these dimensions as numbers, or give samples with all inputs, "
        "pasts included, and set decode_steps=null",
    )
