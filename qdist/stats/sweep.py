"""One sweep over a tensor for all of its statistics: the hot loops, compiled with Numba.

The tensor goes by in blocks that stay in the first-level cache. Whole rows of lanes (one channel
each) have a sweep of their own, `sweep_rows`. In any other tensor a first, vectorised pass over a
block finds its extrema as *order keys*, integers that order floats as their values do. They tell
without another look whether the block holds infinities or NaNs, whether it is constant, whether it
can change the extrema, and whether any of its values can be among the largest. A second pass only
counts, without a branch, into four interleaved tables, so that runs of equal values (zeros after
ReLU) do not wait for one counter. Rare cases take the slow paths beside it.

Every loop has a plain NumPy twin in the tests, which it equals bit for bit.

Why some loops are written out rather than called: each array that is passed to a function has its
references counted, atomically, which takes as long as some twenty additions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from qdist.stats.compiled import compiled

BLOCK = 4096
"""Elements of a block."""
FLUSH_BLOCKS = 63
"""Blocks after which the 16-bit scratch counters, four to a bin, must be emptied."""
SMALL = 1536
"""Tensors of fewer elements are counted without the scratch tables."""
PAGE_BINS = 128
PAGES = 512
"""Pages of one histogram; a page is one sign and exponent."""

N_STATE = 5
"""Columns of ``state``: lowest and highest order key, NaNs, largest kept, their threshold."""
LOW, HIGH, NAN, KEPT, THRESHOLD = range(N_STATE)
NO_LOW = 0x7FFFFFFF
NO_HIGH = -0x80000000

NO_CHANNELS, LANES, RUNS = range(3)
"""How channels lie in a flat tensor: not wanted; element ``i`` belongs to lane ``i % n``; ``inner``
elements in a row belong to one channel."""

N_LAYOUT = 4
"""Columns that say how a tensor is swept: elements, layout, ``inner``, lanes or channels."""

_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_QUIET = np.uint32(0x7FC00000)
_FIRST_SPECIAL = np.uint32(0xFF000000)
_POSITIVE_INFINITY_KEY = 0x7F800000
_NEGATIVE_INFINITY_KEY = -0x7F800001


def new_state(n_rows: int) -> NDArray[np.int64]:
    """``state`` int64[n_rows, 5] of tensors of which nothing was seen."""
    state = np.zeros((n_rows, N_STATE), np.int64)
    state[:, LOW], state[:, HIGH], state[:, THRESHOLD] = NO_LOW, NO_HIGH, -1
    return state


def new_scratch() -> NDArray[np.uint16]:
    """Counters shared by all tensors; zero between calls."""
    return np.zeros(4 << 16, np.uint16)


def bits_of(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """A contiguous tensor's bits, flat and read-only: the one kind of array that loops take,
    since each kind is compiled for itself."""
    bits = values.reshape(-1).view(np.uint32)
    if not bits.flags.aligned:
        bits = bits.copy()
    bits.flags.writeable = False
    return bits


def floats_of(keys: NDArray[np.int64], none: float) -> NDArray[np.float32]:
    """The float32 of order keys, -0 as +0; ``none`` for the key of no value."""
    low = keys.astype(np.int32)
    bits = low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF))
    values = bits.view(np.float32) + np.float32(0)
    missing = (keys == NO_LOW) | (keys == NO_HIGH)
    return np.where(missing, np.float32(none), values).astype(np.float32)


@intrinsic  # type: ignore[untyped-decorator]
def _borrowed(typing: Any, array: Any) -> Any:
    """The same array, of which no reference is counted: whoever holds it keeps it alive."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        lent = context.make_array(signature.return_type)(context, builder)
        for field in ("data", "nitems", "itemsize", "shape", "strides"):
            setattr(lent, field, getattr(held, field))
        lent.meminfo = lent.meminfo.type(None)
        lent.parent = lent.parent.type(None)
        return lent._getvalue()

    return array(array), generate


@compiled
def _extrema(bits: NDArray[np.int32], start: Any, stop: Any) -> tuple[Any, Any]:
    """Lowest and highest order key, infinities and NaNs included."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(np.uint64(start), np.uint64(stop)):
        b = bits[i]
        key = np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low = np.int32(min(low, key))
        high = np.int32(max(high, key))
    return low, high


@compiled
def _finite_extrema(bits: NDArray[np.int32], start: Any, stop: Any) -> tuple[Any, Any]:
    """Lowest and highest order key of the finite values."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(np.uint64(start), np.uint64(stop)):
        b = bits[i]
        key = np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        finite = np.int32(b & np.int32(0x7FFFFFFF)) < np.int32(0x7F800000)
        low = np.int32(min(low, key if finite else np.int32(0x7FFFFFFF)))
        high = np.int32(max(high, key if finite else np.int32(-0x80000000)))
    return low, high


@compiled
def _magnitude(bits: NDArray[np.uint32], start: Any, stop: Any) -> Any:
    """The largest magnitude of a block, as bits; infinities and NaNs included."""
    most = np.uint32(0)
    for i in range(np.uint64(start), np.uint64(stop)):
        most = np.uint32(max(most, np.uint32(bits[i] & np.uint32(0x7FFFFFFF))))
    return most


@compiled
def _lanes_of(
    lows: NDArray[np.int32],
    highs: NDArray[np.int32],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
) -> None:
    """Lanes as floats, which compare in one instruction; infinities where nothing was seen."""
    infinity = np.uint32(0x7F800000)
    low_bits, high_bits = low.view(np.uint32), high.view(np.uint32)
    for i in range(lows.size):
        a, b = lows[i], highs[i]
        bits = np.uint32(a ^ np.int32(np.int32(a >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low_bits[i] = infinity if a == np.int32(0x7FFFFFFF) else bits
        bits = np.uint32(b ^ np.int32(np.int32(b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        high_bits[i] = np.uint32(0xFF800000) if b == np.int32(-0x80000000) else bits


@compiled
def _keys_of(
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    lows: NDArray[np.int32],
    highs: NDArray[np.int32],
) -> tuple[Any, Any]:
    """From `_lanes_of` back to order keys; returns the lowest and the highest."""
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    low_bits, high_bits = low.view(np.int32), high.view(np.int32)
    for i in range(lows.size):
        a, b = low_bits[i], high_bits[i]
        key = np.int32(a ^ np.int32(np.int32(a >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        key = np.int32(0x7FFFFFFF) if a == np.int32(0x7F800000) else key
        lows[i] = key
        least = np.int32(min(least, key))
        key = np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        key = np.int32(-0x80000000) if b == np.int32(-0x800000) else key
        highs[i] = key
        most = np.int32(max(most, key))
    return least, most


@compiled
def _widen_lanes(
    values: NDArray[np.float32],
    start: int,
    stop: int,
    lane: int,
    special: Any,
    lows: NDArray[np.float32],
    highs: NDArray[np.float32],
) -> None:
    """Lanes of the block ``values[start:stop]``, of which the first value is in ``lane``;
    ``special``: not all is finite.

    Which of +0 and -0 is kept depends on the order; they are one value wherever keys become floats.
    """
    n_lanes = lows.size
    done = start
    infinity = np.float32(np.inf)
    while done < stop:
        left = stop - done
        if lane == 0 and left >= 4 * n_lanes and not special:
            # Four rows at once, so that the lanes are read and written once for them.
            first, n = np.uint64(done), np.uint64(n_lanes)
            second, third, fourth = first + n, first + n + n, first + n + n + n
            for i in range(n):
                a, b = values[first + i], values[second + i]
                c, d = values[third + i], values[fourth + i]
                ab, cd = a if a < b else b, c if c < d else d
                least = ab if ab < cd else cd
                ab, cd = a if a > b else b, c if c > d else d
                most = ab if ab > cd else cd
                lows[i] = least if least < lows[i] else lows[i]
                highs[i] = most if most > highs[i] else highs[i]
            done += 4 * n_lanes
            continue
        step = min(left, n_lanes - lane)
        first, at = np.uint64(done), np.uint64(lane)
        if special:
            for i in range(np.uint64(step)):
                x = values[first + i]
                finite = (x < infinity) & (x > -infinity)
                lows[at + i] = x if (x < lows[at + i]) & finite else lows[at + i]
                highs[at + i] = x if (x > highs[at + i]) & finite else highs[at + i]
        else:
            for i in range(np.uint64(step)):
                x = values[first + i]
                lows[at + i] = x if x < lows[at + i] else lows[at + i]
                highs[at + i] = x if x > highs[at + i] else highs[at + i]
        done += step
        lane = 0


@compiled
def _widen_runs(
    bits: NDArray[np.int32],
    start: int,
    end: int,
    inner: int,
    lows: NDArray[np.int32],
    highs: NDArray[np.int32],
) -> tuple[Any, Any, Any, Any]:
    """Channels of the block from flat position ``start`` to ``end``, and the block's own extrema.

    All extrema, infinities and NaNs included, then those of the finite values.
    """
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    finite_low, finite_high = low, high
    n_channels = lows.size
    run = start // inner
    channel = run % n_channels
    stop = (run + 1) * inner
    done = start
    while done < end:
        stop = min(stop, end)
        run_low, run_high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(np.uint64(done), np.uint64(stop)):
            b = bits[i]
            key = np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            run_low = np.int32(min(run_low, key))
            run_high = np.int32(max(run_high, key))
        low, high = np.int32(min(low, run_low)), np.int32(max(high, run_high))
        if run_low < np.int32(-0x7F800000) or run_high >= np.int32(0x7F800000):
            run_low, run_high = _finite_extrema(bits, done, stop)
        finite_low = np.int32(min(finite_low, run_low))
        finite_high = np.int32(max(finite_high, run_high))
        lows[channel] = np.int32(min(lows[channel], run_low))
        highs[channel] = np.int32(max(highs[channel], run_high))
        channel += 1
        if channel == n_channels:
            channel = 0
        done = stop
        stop += inner
    return low, high, finite_low, finite_high


@intrinsic  # type: ignore[untyped-decorator]
def _fetch(typing: Any, array: Any, place: Any) -> Any:
    """Ask for the cache line of an element, counted flat, which may lie beyond the array's end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch", (address,), ir.FunctionType(ir.VoidType(), [address, word, word, word])
        )
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), address)
        # To read, for the first-level cache, as data.
        builder.call(fetch, [place, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _bump(typing: Any, bits: Any, place: Any, scratch: Any, table: Any) -> Any:
    """Count an element in one of the four tables."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, counters = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2)
        )
        bits = builder.load(builder.gep(array.data, [arguments[1]]))
        index = builder.zext(builder.lshr(bits, ir.Constant(bits.type, 16)), ir.IntType(64))
        four = ir.ArrayType(ir.IntType(16), 4).as_pointer()
        place = builder.gep(builder.bitcast(counters.data, four), [index, arguments[3]])
        builder.store(builder.add(builder.load(place), ir.Constant(ir.IntType(16), 1)), place)
        return context.get_dummy_value()

    return types.void(bits, types.intp, scratch, types.intp), generate


@compiled
def _count(bits: NDArray[np.uint32], start: int, stop: int, scratch: NDArray[np.uint16]) -> None:
    """Element ``start + i`` counts in table ``i % 4``. Fetches as much of what follows."""
    whole = start + (stop - start) // 64 * 64
    for at in range(start, whole, 64):
        for line in range(4):
            _fetch(bits, at + 4096 + 16 * line)
        # Masks, padding and dead channels: equal values side by side would wait for one counter.
        first = np.uint64(at)
        b = bits[first]
        if b == bits[first + np.uint64(63)] and b == bits[first + np.uint64(31)]:
            differ = np.uint32(0)
            for i in range(first, first + np.uint64(64)):
                differ |= np.uint32(bits[i] ^ b)
            if differ == np.uint32(0):
                place = np.uint64(b >> np.uint32(16)) * np.uint64(4)
                for table in range(4):
                    scratch[place + np.uint64(table)] += np.uint16(16)
                continue
        for j in range(16):
            for table in range(4):
                _bump(bits, at + 4 * j + table, scratch, table)
    for i in range(whole, stop):
        _bump(bits, i, scratch, (i - start) & 3)


@compiled
def _count_constant(bits: Any, n: int, scratch: NDArray[np.uint16]) -> None:
    first = np.int64(bits >> np.uint32(16)) * 4
    for lane in range(4):
        scratch[first + lane] += np.uint16((n + 3 - lane) // 4)


@compiled
def _new_page(
    page_of: NDArray[np.int32], slot: int, pool: NDArray[np.uint64], used: NDArray[np.int64]
) -> int:
    page = used[0]
    used[0] = page + 1
    page_of[slot] = page
    pool[page, :] = 0
    return page


@compiled
def _flush(
    scratch: NDArray[np.uint16],
    expected: int,
    page_of: NDArray[np.int32],
    first_slot: int,
    pool: NDArray[np.uint64],
    used: NDArray[np.int64],
) -> None:
    """Empty the scratch counters, which hold ``expected`` values, into the pages of one row.

    Its pages are emptied first. Only when they did not hold everything are the others looked at.
    """
    words = scratch.view(np.uint64)
    left = np.uint64(expected)
    for turn in range(2):
        slot = 0
        while left > np.uint64(0) and slot < 512:
            page: Any = np.int64(page_of[first_slot + slot])
            if (page >= 0) != (turn == 0):
                slot += 1
                continue
            base = np.uint64(slot * 128)
            some = np.uint64(0)
            for i in range(np.uint64(128)):
                some |= words[base + i]
            if some != np.uint64(0):
                if page < 0:
                    page = _new_page(page_of, first_slot + slot, pool, used)
                at = np.uint64(page)
                for i in range(np.uint64(128)):
                    word = words[base + i]
                    pairs = np.uint64(0x0000FFFF0000FFFF)
                    two = (word & pairs) + ((word >> np.uint64(16)) & pairs)
                    n = (two & np.uint64(0xFFFFFFFF)) + (two >> np.uint64(32))
                    pool[at, i] += n
                    left -= n
                    words[base + i] = np.uint64(0)
            slot += 1


@compiled
def _count_directly(
    bits: NDArray[np.uint32],
    start: int,
    stop: int,
    page_of: NDArray[np.int32],
    first_slot: int,
    pool: NDArray[np.uint64],
    used: NDArray[np.int64],
) -> None:
    for i in range(start, stop):
        b = bits[i]
        slot: Any = first_slot + np.int64(b >> np.uint32(23))
        page: Any = np.int64(page_of[slot])
        if page < 0:
            page = _new_page(page_of, slot, pool, used)
        pool[page, np.int64((b >> np.uint32(16)) & np.uint32(127))] += np.uint64(1)


@compiled
def _keep_largest(top: NDArray[np.uint32], n: int, limit: int) -> Any:
    """Move the ``limit`` largest of ``top[:n]`` to its front, and perhaps a few more.

    Returns a key that at least ``limit`` are not below, and how many were moved. Any other key that
    is not above it is none of the largest. Halving the range of keys and counting what lies above
    its middle takes a ninth of the time of a selection that moves keys about.
    """
    low, high = np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(n):
        low, high = np.uint32(min(low, top[i])), np.uint32(max(high, top[i]))
    enough = limit + (n - limit) // 8
    # At least ``limit`` are not below ``low``; fewer are above ``high``.
    while low < high:
        middle = np.uint32(low + np.uint32(np.uint32(np.uint32(high - low) >> np.uint32(1)) + 1))
        count = np.uint32(0)
        for i in range(n):
            count += np.uint32(top[i] >= middle)
        if count < limit:
            high = np.uint32(middle - np.uint32(1))
        else:
            low = middle
            if count <= enough:
                break
    kept = 0
    for i in range(n):
        key = top[i]
        top[kept] = key
        kept += int(key > low)
    # Of keys equal to the bound, as many as there is room for.
    while kept < limit:
        top[kept] = low
        kept += 1
    return np.int64(low), kept


@compiled
def _push_key(key: Any, top: NDArray[np.uint32], limit: int, state: NDArray[np.int64]) -> None:
    if np.int64(key) <= state[4]:
        return
    n = state[3]
    if n == top.size:
        state[4], n = _keep_largest(top, n, limit)
        state[3] = n
        if np.int64(key) <= state[4]:
            return
    top[n] = key
    state[3] = n + 1


_WIDE = ir.VectorType(ir.IntType(32), 64)


def _sixty_four(builder: Any, data: Any, start: Any) -> Any:
    """64 words from ``start`` on. A few wide instructions on any processor."""
    values = builder.load(builder.bitcast(builder.gep(data, [start]), _WIDE.as_pointer()))
    values.align = 4
    return values


def _everywhere(builder: Any, value: Any) -> Any:
    """A word, 64 times."""
    none, first = ir.Constant(_WIDE, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    one = builder.insert_element(none, value, first)
    return builder.shuffle_vector(one, none, ir.Constant(_WIDE, [0] * 64))


@intrinsic  # type: ignore[untyped-decorator]
def _within(typing: Any, bits: Any, start: Any, floor: Any, span: Any) -> Any:
    """Which of 64 values from ``start`` on have a key of magnitude in ``floor`` to ``floor + span``
    - 1: bit ``i`` of the result is for value ``i``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        values = _sixty_four(builder, array.data, arguments[1])
        left = builder.shl(values, ir.Constant(_WIDE, [1] * 64))
        keys = builder.or_(left, builder.lshr(values, ir.Constant(_WIDE, [31] * 64)))
        above = builder.sub(keys, _everywhere(builder, arguments[2]))
        found = builder.icmp_unsigned("<", above, _everywhere(builder, arguments[3]))
        return builder.bitcast(found, ir.IntType(64))

    return types.uint64(bits, types.intp, types.uint32, types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _at_least(typing: Any, bits: Any, start: Any, floor: Any) -> Any:
    """Which of 64 values from ``start`` on are at least ``floor``, as unsigned integers: bit ``i``
    of the result is for value ``i``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        values = _sixty_four(builder, array.data, arguments[1])
        return builder.bitcast(
            builder.icmp_unsigned(">=", values, _everywhere(builder, arguments[2])), ir.IntType(64)
        )

    return types.uint64(bits, types.intp, types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _lowest_bit(typing: Any, word: Any) -> Any:
    """Place of the lowest bit that is set, of a word that is not zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@compiled
def _push(
    bits: NDArray[np.uint32],
    begin: int,
    end: int,
    top: NDArray[np.uint32],
    limit: int,
    state: NDArray[np.int64],
) -> None:
    """Offer the values ``bits[begin:end]`` to the largest."""
    n, above = state[3], state[4]
    # A key is wanted if it lies in floor..floor + span - 1; the difference of any other wraps.
    floor = np.uint32(above + 1)
    span = np.uint32(np.uint32(0xFF000000) - floor)
    for start in range(begin, end, 64):
        if start + 64 <= end:
            wanted = _within(bits, start, floor, span)
        else:
            wanted = np.uint64(0)
            for i in range(start, end):
                b = bits[i]
                key = np.uint32(np.uint32(b << np.uint32(1)) | np.uint32(b >> np.uint32(31)))
                if np.uint32(key - floor) < span:
                    wanted |= np.uint64(1) << np.uint64(i - start)
        while wanted != np.uint64(0):
            b = bits[start + np.int64(_lowest_bit(wanted))]
            wanted &= wanted - np.uint64(1)
            key = np.uint32(np.uint32(b << np.uint32(1)) | np.uint32(b >> np.uint32(31)))
            if n == top.size:
                above, n = _keep_largest(top, n, limit)
                floor = np.uint32(above + 1)
                span = np.uint32(np.uint32(0xFF000000) - floor)
            if np.int64(key) > above:
                top[n] = key
                n += 1
    state[3], state[4] = n, above


@compiled
def _push_lanes(
    bits: NDArray[np.uint32],
    start: int,
    stop: int,
    most: NDArray[np.float32],
    top: NDArray[np.uint32],
    limit: int,
    state: NDArray[np.int64],
) -> None:
    """Offer whole rows of finite lanes to the largest, of which ``most`` float32[lanes] holds the
    largest |x| of each lane: only lanes that reach the bound are looked at."""
    n, above = state[3], state[4]
    n_lanes = most.size
    magnitudes = most.view(np.uint32)
    for first in range(0, n_lanes, 64):
        if first + 64 <= n_lanes:
            wanted = _at_least(magnitudes, first, np.uint32(above >> 1))
        else:
            wanted = np.uint64(0)
            for i in range(first, n_lanes):
                if np.int64(magnitudes[i]) >= above >> 1:
                    wanted |= np.uint64(1) << np.uint64(i - first)
        while wanted != np.uint64(0):
            lane = first + np.int64(_lowest_bit(wanted))
            wanted &= wanted - np.uint64(1)
            for i in range(np.uint64(start + lane), np.uint64(stop), np.uint64(n_lanes)):
                b = bits[i]
                key = np.uint32(np.uint32(b << np.uint32(1)) | np.uint32(b >> np.uint32(31)))
                if np.int64(key) <= above:
                    continue
                if n == top.size:
                    above, n = _keep_largest(top, n, limit)
                    if np.int64(key) <= above:
                        continue
                top[n] = key
                n += 1
    state[3], state[4] = n, above


@compiled
def _quiet(bits: NDArray[np.uint32], start: int, stop: int, clean: NDArray[np.uint32]) -> Any:
    """Copy ``bits[start:stop]`` with every NaN as the quiet NaN of its sign; returns how many there
    were."""
    n_nan = np.int64(0)
    for i in range(np.uint64(stop - start)):
        b = bits[np.uint64(start) + i]
        nan = np.uint32(b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        quiet = np.uint32(np.uint32(b & np.uint32(0x80000000)) | np.uint32(0x7FC00000))
        clean[i] = quiet if nan else b
        n_nan += np.int64(nan)
    return n_nan


@compiled
def _largest_key(low: Any, high: Any) -> Any:
    """The largest key of magnitude, as the largest values have, of a block of these extrema."""
    most = np.int64(-1)
    if high >= 0:
        most = np.int64(high) << 1
    if low < 0:
        most = max(most, ((-np.int64(low) - 1) << 1) | 1)
    return most


@compiled
def _bound(
    page_of: NDArray[np.int32], first_slot: int, pool: NDArray[np.uint64], limit: int
) -> Any:
    """A key that at least ``limit`` of the values counted in a row lie above; -1 if none is known.

    It lies just below the bin in which the ``limit`` largest |x| end.
    """
    total = np.int64(0)
    for exponent in range(254, -1, -1):
        positive = np.int64(page_of[first_slot + exponent])
        negative = np.int64(page_of[first_slot + 256 + exponent])
        if positive < 0 and negative < 0:
            continue
        for place in range(127, -1, -1):
            if positive >= 0:
                total += np.int64(pool[positive, place])
            if negative >= 0:
                total += np.int64(pool[negative, place])
            if total >= limit:
                return (np.int64(exponent * 128 + place) << 17) - 1
    return np.int64(-1)


@compiled
def _offer(
    bits: NDArray[np.uint32],
    size: int,
    group: int,
    first: int,
    stop: int,
    most: NDArray[np.int64],
    n_blocks: int,
    top: NDArray[np.uint32],
    limit: int,
    state: NDArray[np.int64],
    page_of: NDArray[np.int32],
    first_slot: int,
    pool: NDArray[np.uint64],
) -> None:
    """Offer blocks of ``size`` values from ``group`` to ``stop``, but for what lies before
    ``first``, to the largest.

    They are counted already; ``most``: for each block, a key that none of its values is above.
    The counts bound what can be among the largest before a single value is looked at again.
    """
    some = np.int64(-1)
    for i in range(n_blocks):
        some = max(some, most[i])
    if some <= state[4]:
        return
    state[4] = max(state[4], _bound(page_of, first_slot, pool, limit))
    for i in range(n_blocks):
        if most[i] > state[4]:
            begin = group + size * i
            _push(bits, max(begin, first), min(begin + size, stop), top, limit, state)


@compiled
def sweep(
    bits: NDArray[np.uint32],
    first: int,
    layout: int,
    inner: int,
    lows: NDArray[np.int32],
    highs: NDArray[np.int32],
    row: int,
    states: NDArray[np.int64],
    tops: NDArray[np.uint32],
    limit: int,
    page_of: NDArray[np.int32],
    pool: NDArray[np.uint64],
    used: NDArray[np.int64],
    scratch: NDArray[np.uint16],
    clean: NDArray[np.uint32],
) -> None:
    """Add a flat tensor, given as its bits, to the statistics of ``row``.

    What lies before ``first`` changes extrema and channels alone: it is counted elsewhere.
    ``layout`` and ``inner`` say how channels lie; ``lows`` and ``highs`` int32 are their extreme
    order keys. ``states`` and ``tops`` have one row per tensor; of the largest |x|, ``limit`` are
    kept. ``page_of`` has 512 slots a row, and ``pool`` 512 free pages at least. ``clean`` has room
    for a block. NaNs count in the quiet-NaN bin of their sign; they and the infinities leave the
    extrema and the largest alone.
    """
    state, top = states[row], tops[row]
    first_slot = row * 512
    waiting = n_blocks = group = 0
    held = np.empty(63, np.int64)
    most = _borrowed(held)
    small = bits.size - first < 1536
    n_lanes = lows.size if layout == 1 else 0
    lanes = np.empty((2, n_lanes), np.float32)
    lane_low, lane_high = _borrowed(lanes[0]), _borrowed(lanes[1])
    if layout == 1:
        _lanes_of(lows, highs, lane_low, lane_high)
    signed, values = bits.view(np.int32), bits.view(np.float32)
    for start in range(0, bits.size, 4096):
        stop = min(start + 4096, bits.size)
        is_constant = has_nan = False
        if layout == 1:
            # The lanes' extrema are the tensor's, so that magnitudes are all that is asked here.
            magnitude = _magnitude(bits, start, stop)
            head = (np.int64(magnitude) << 1) | 1
            special = magnitude >= np.uint32(0x7F800000)
            if special:
                has_nan = magnitude > np.uint32(0x7F800000)
                low, high = _finite_extrema(signed, start, stop)
                head = _largest_key(low, high)
            else:
                b = bits[start]
                if b == bits[stop - 1] and b == bits[(start + stop) // 2]:
                    low, high = _extrema(signed, start, stop)
                    is_constant = low == high
            _widen_lanes(values, start, stop, start % n_lanes, special, lane_low, lane_high)
        else:
            if layout == 2:
                low, high, finite_low, finite_high = _widen_runs(
                    signed, start, stop, inner, lows, highs
                )
            else:
                low, high = _extrema(signed, start, stop)
                finite_low, finite_high = low, high
            if low < np.int32(-0x7F800000) or high >= np.int32(0x7F800000):
                has_nan = low < np.int32(-0x7F800001) or high > np.int32(0x7F800000)
                if layout != 2:
                    finite_low, finite_high = _finite_extrema(signed, start, stop)
            state[0] = min(state[0], np.int64(finite_low))
            state[1] = max(state[1], np.int64(finite_high))
            is_constant = low == high
            head = _largest_key(finite_low, finite_high)
        if has_nan:
            state[2] += _quiet(bits, start, stop, clean)
        if stop <= first:
            continue
        if n_blocks == 0:
            group = start
        begin = max(start, first)
        if small:
            if has_nan:
                _count_directly(clean, begin - start, stop - start, page_of, first_slot, pool, used)
            else:
                _count_directly(bits, begin, stop, page_of, first_slot, pool, used)
        else:
            if has_nan:
                _count(clean, begin - start, stop - start, scratch)
            elif is_constant:
                _count_constant(bits[begin], stop - begin, scratch)
            else:
                _count(bits, begin, stop, scratch)
            waiting += stop - begin
        most[n_blocks] = head
        n_blocks += 1
        if n_blocks == 63 or stop == bits.size:
            if waiting:
                _flush(scratch, waiting, page_of, first_slot, pool, used)
            if limit > 0:
                _offer(
                    bits,
                    4096,
                    group,
                    first,
                    stop,
                    most,
                    n_blocks,
                    top,
                    limit,
                    state,
                    page_of,
                    first_slot,
                    pool,
                )
            waiting = n_blocks = 0
    if layout == 1:
        least, largest = _keys_of(lane_low, lane_high, lows, highs)
        state[0] = min(state[0], np.int64(least))
        state[1] = max(state[1], np.int64(largest))
    # What was lent is held until here.
    used[0] += lanes.size * held.size * 0


@compiled
def is_rows(n_elements: int, n_lanes: int) -> bool:
    """Whether `sweep_rows` takes a tensor of so many elements and lanes."""
    return 64 <= n_lanes <= 2048 and n_elements % n_lanes == 0 and n_elements >= SMALL


@compiled
def _widen_rows(
    values: NDArray[np.float32],
    start: int,
    stop: int,
    lows: NDArray[np.float32],
    highs: NDArray[np.float32],
    most: NDArray[np.float32],
) -> Any:
    """Whole rows of finite lanes. Returns a key of magnitude that no value is above.

    ``most`` float32[lanes] becomes the largest |x| of each lane in these rows.
    """
    n = np.uint64(lows.size)
    for i in range(n):
        most[i] = np.float32(0)
    done = np.uint64(start)
    end = np.uint64(stop)
    while done + np.uint64(4) * n <= end:
        # Four rows at once, so that the lanes are read and written once for them.
        second, third, fourth = done + n, done + n + n, done + n + n + n
        for i in range(n):
            a, b, c, d = values[done + i], values[second + i], values[third + i], values[fourth + i]
            ab, cd = a if a < b else b, c if c < d else d
            least = ab if ab < cd else cd
            ab, cd = a if a > b else b, c if c > d else d
            greatest = ab if ab > cd else cd
            lows[i] = least if least < lows[i] else lows[i]
            highs[i] = greatest if greatest > highs[i] else highs[i]
            magnitude = greatest if greatest > -least else -least
            most[i] = magnitude if magnitude > most[i] else most[i]
        done += np.uint64(4) * n
    while done < end:
        for i in range(n):
            x = values[done + i]
            lows[i] = x if x < lows[i] else lows[i]
            highs[i] = x if x > highs[i] else highs[i]
            magnitude = x if x > -x else -x
            most[i] = magnitude if magnitude > most[i] else most[i]
        done += n
    bits = most.view(np.uint32)
    found = np.uint32(0)
    for i in range(n):
        found = np.uint32(max(found, np.uint32(bits[i] & np.uint32(0x7FFFFFFF))))
    return (np.int64(found) << 1) | 1


@compiled
def _has_special(words: NDArray[np.uint64]) -> bool:
    """Whether infinities or NaNs were counted in the scratch tables, given as one word per bin."""
    some = np.uint64(0)
    for i in range(128):
        some |= words[255 * 128 + i] | words[511 * 128 + i]
    return some != np.uint64(0)


@compiled
def _uncount(bits: NDArray[np.uint32], start: int, stop: int, scratch: NDArray[np.uint16]) -> None:
    """Undo `_count`."""
    for i in range(start, stop):
        place = np.uint64(bits[i] >> np.uint32(16)) * np.uint64(4) + np.uint64((i - start) & 3)
        scratch[place] -= np.uint16(1)


@compiled
def sweep_rows(
    bits: NDArray[np.uint32],
    lows: NDArray[np.int32],
    highs: NDArray[np.int32],
    row: int,
    states: NDArray[np.int64],
    tops: NDArray[np.uint32],
    limit: int,
    page_of: NDArray[np.int32],
    pool: NDArray[np.uint64],
    used: NDArray[np.int64],
    scratch: NDArray[np.uint16],
    clean: NDArray[np.uint32],
) -> None:
    """As `sweep` with lanes from the first element on, for whole rows of 64 to 2,048 of them.

    A block is some rows, counted first. That tells whether all is finite, so that one more pass
    finds the extrema of the lanes and bounds on the largest values at once.
    """
    state, top = states[row], tops[row]
    first_slot = row * 512
    n = lows.size
    lanes = np.empty((3, n), np.float32)
    low, high, lane_most = _borrowed(lanes[0]), _borrowed(lanes[1]), _borrowed(lanes[2])
    _lanes_of(lows, highs, low, high)
    size = max(4, 4096 // n // 4 * 4) * n
    per_group = 258048 // size
    held = np.empty(per_group, np.int64)
    most = _borrowed(held)
    signed, values, words = bits.view(np.int32), bits.view(np.float32), scratch.view(np.uint64)
    clean_values = clean.view(np.float32)
    for group in range(0, bits.size, size * per_group):
        group_stop = min(group + size * per_group, bits.size)
        waiting = n_blocks = 0
        for start in range(group, group_stop, size):
            stop = min(start + size, group_stop)
            b = bits[start]
            is_constant: Any = False
            if b == bits[stop - 1] and b == bits[(start + stop) // 2]:
                least, greatest = _extrema(signed, start, stop)
                magnitude = np.uint32(b & np.uint32(0x7FFFFFFF))
                is_constant = least == greatest and magnitude < np.uint32(0x7F800000)
            if is_constant:
                _count_constant(b, stop - start, scratch)
            else:
                _count(bits, start, stop, scratch)
            if not _has_special(words):
                waiting += stop - start
                found = _widen_rows(values, start, stop, low, high, lane_most)
                if limit > 0 and state[4] >= 0 and found > state[4]:
                    _push_lanes(bits, start, stop, lane_most, top, limit, state)
                    found = np.int64(-1)
                # Where no bound is known yet, the counts will give one.
                most[n_blocks] = found
                n_blocks += 1
                continue
            _uncount(bits, start, stop, scratch)
            # No bound: all are looked at.
            most[n_blocks] = 0xFFFFFFFF
            n_blocks += 1
            for piece in range(start, stop, 4096):
                piece_stop = min(piece + 4096, stop)
                state[2] += _quiet(bits, piece, piece_stop, clean)
                n_clean = piece_stop - piece
                _count_directly(clean, 0, n_clean, page_of, first_slot, pool, used)
                _widen_lanes(clean_values, 0, n_clean, (piece - start) % n, True, low, high)
        if waiting:
            _flush(scratch, waiting, page_of, first_slot, pool, used)
        if limit > 0:
            _offer(
                bits,
                size,
                group,
                group,
                group_stop,
                most,
                n_blocks,
                top,
                limit,
                state,
                page_of,
                first_slot,
                pool,
            )
    least, greatest = _keys_of(low, high, lows, highs)
    state[0] = min(state[0], np.int64(least))
    state[1] = max(state[1], np.int64(greatest))
    # What was lent is held until here.
    used[0] += lanes.size * held.size * 0


@intrinsic  # type: ignore[untyped-decorator]
def _pointer_to(typing: Any, address: Any) -> Any:
    """The address of an array as what `numba.carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@compiled
def sweep_many(
    addresses: NDArray[np.int64],
    rows: NDArray[np.int64],
    first: int,
    layouts: NDArray[np.int64],
    starts: NDArray[np.int64],
    all_lows: NDArray[np.int32],
    all_highs: NDArray[np.int32],
    states: NDArray[np.int64],
    tops: NDArray[np.uint32],
    limit: int,
    page_of: NDArray[np.int32],
    pool: NDArray[np.uint64],
    used: NDArray[np.int64],
    scratch: NDArray[np.uint16],
    clean: NDArray[np.uint32],
) -> int:
    """Sweep the contiguous float32 tensors at ``addresses``, from the ``first`` on; which it came
    to: all, or as far as there are free pages.

    ``layouts`` int64[n_rows, 4] says how the tensor of a row is swept, and ``starts`` where its
    lanes are in ``all_lows`` and ``all_highs``.
    """
    # The caller holds all of these; counting references to them takes 5 % of the time.
    lows_of_all, highs_of_all = _borrowed(all_lows), _borrowed(all_highs)
    statistics = (
        _borrowed(states),
        _borrowed(tops),
        limit,
        _borrowed(page_of),
        _borrowed(pool),
        _borrowed(used),
        _borrowed(scratch),
        _borrowed(clean),
    )
    for i in range(first, rows.size):
        if used[0] + 1024 > len(pool):
            return i
        row = rows[i]
        size, layout, inner, n_lanes = layouts[row]
        bits = carray(_pointer_to(addresses[i]), (size,), np.uint32)
        lows = lows_of_all[starts[row] : starts[row] + n_lanes]
        highs = highs_of_all[starts[row] : starts[row] + n_lanes]
        if layout == 1 and is_rows(size, n_lanes):
            sweep_rows(bits, lows, highs, row, *statistics)
            continue
        sweep(bits, 0, layout, inner, lows, highs, row, *statistics)
    return rows.size


@compiled
def widen_kept(
    bits: NDArray[np.uint32],
    keep: NDArray[np.bool_],
    inner: int,
    lows: NDArray[np.int32],
    highs: NDArray[np.int32],
) -> None:
    """Channel extrema of those elements of a flat tensor that ``keep`` says, finite ones."""
    signed = bits.view(np.int32)
    n_channels = lows.size
    for run in range(bits.size // inner):
        channel = run % n_channels
        low, high = lows[channel], highs[channel]
        for i in range(run * inner, run * inner + inner):
            b = signed[i]
            key = np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            finite = np.int32(b & np.int32(0x7FFFFFFF)) < np.int32(0x7F800000)
            wanted = finite & keep[i]
            low = np.int32(min(low, key if wanted else np.int32(0x7FFFFFFF)))
            high = np.int32(max(high, key if wanted else np.int32(-0x80000000)))
        lows[channel], highs[channel] = low, high


NO_VALUE = 0x7F800001
"""What stands for no value in a value table: a NaN that is not quiet, so never counted as such."""


@compiled
def count_values(
    bits: NDArray[np.uint32],
    index: int,
    all_keys: NDArray[np.uint32],
    all_counts: NDArray[np.uint64],
    n_distinct: NDArray[np.int64],
    limit: int,
) -> int:
    """Count the values of a flat tensor in table ``index``; returns how many elements it counted.

    Fewer than there are when a value beyond the ``limit`` of distinct ones came. ``all_keys``
    uint32[tables, size], ``all_counts`` uint64[tables, 2 * size]: open addressing, two counters
    for each value, so that equal values side by side do not wait for one; ``size`` is a power of
    two above ``limit``.
    """
    keys, counts = all_keys[index], all_counts[index]
    n = n_distinct[index]
    last = np.uint64(keys.size - 1)
    shift = np.uint64(32)
    while (np.uint64(1) << (np.uint64(32) - shift)) <= last:
        shift -= np.uint64(1)
    i = 0
    while i < bits.size:
        # Long runs of one value, such as zeros, are counted as one.
        step = 1
        if i + 8 <= bits.size:
            b = bits[i]
            differ = np.uint32(0)
            for j in range(1, 8):
                differ |= np.uint32(bits[i + j] ^ b)
            if differ == np.uint32(0):
                step = 8
                while i + step < bits.size and bits[i + step] == b:
                    step += 1
        few = 8 if step == 1 and i + 8 <= bits.size else 1
        for j in range(few):
            b = bits[i + j]
            if np.uint32(b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
                b = np.uint32(np.uint32(b & np.uint32(0x80000000)) | np.uint32(0x7FC00000))
            slot = ((np.uint64(b) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)) >> shift
            while keys[slot] != b:
                if keys[slot] == np.uint32(0x7F800001):
                    if n == limit:
                        n_distinct[index] = n
                        return i + j
                    n += 1
                    keys[slot] = b
                    break
                slot = (slot + np.uint64(1)) & last
            counts[np.uint64(2) * slot + np.uint64(j & 1)] += np.uint64(step)
        i += max(step, few)
    n_distinct[index] = n
    return bits.size


@compiled
def spill_values(
    keys: NDArray[np.uint32],
    counts: NDArray[np.uint64],
    row: int,
    states: NDArray[np.int64],
    tops: NDArray[np.uint32],
    limit: int,
    page_of: NDArray[np.int32],
    pool: NDArray[np.uint64],
    used: NDArray[np.int64],
) -> None:
    """Move a value table into the histogram and the largest values of ``row``."""
    for slot in range(keys.size):
        n: Any = np.int64(counts[2 * slot] + counts[2 * slot + 1])
        if n == 0:
            continue
        b = keys[slot]
        place: Any = row * 512 + np.int64(b >> np.uint32(23))
        page: Any = np.int64(page_of[place])
        if page < 0:
            page = _new_page(page_of, place, pool, used)
        pool[page, np.int64((b >> np.uint32(16)) & np.uint32(127))] += np.uint64(n)
        key = np.uint32(np.uint32(b << np.uint32(1)) | np.uint32(b >> np.uint32(31)))
        if limit > 0 and key < np.uint32(0xFF000000):
            for _ in range(min(n, limit)):
                _push_key(key, tops[row], limit, states[row])
