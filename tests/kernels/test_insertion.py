"""The PTX of the gate's insertion, run instruction by instruction on a warp of 8 rows and 4 lanes, against sorting."""
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import execute

from moba_megatron.kernels.gating import insertion

ROWS, LANES, WIDTH = 8, 4, 16


def best(values, chunks, number):
    """Values and chunks of the best, among equals of the latest."""
    order = np.lexsort((-chunks, -values))[:number]
    return values[order], chunks[order]


def select(scores, number, last=None, until=None, refreshed=lambda tile: True):
    """What a warp chooses of scores ``[ROWS, tiles, LANES, WIDTH]``, the latest tile first; the instructions a tile."""
    ptx, constraints = insertion(WIDTH, number, LANES, last is not None)
    if last is None:
        last, until = np.full(ROWS, -np.inf, np.float32), np.zeros(ROWS, np.int32)
    state = 2 * number + 2
    threads = [np.full(ROWS * LANES, -np.inf, np.float32)] * (number + 1)
    threads += [np.full(ROWS * LANES, -1, np.int32)] * (number + 1)
    threshold, counts = np.full(ROWS, -np.inf, np.float32), []

    def rows(parts, i):  # of a row's lists
        return np.stack(parts).reshape(-1, ROWS, LANES)[:, i].ravel()

    for tile in reversed(range(scores.shape[1])):
        x = scores[:, tile].reshape(ROWS * LANES, WIDTH)
        lane_chunk = np.tile(np.arange(LANES, dtype=np.int32) * 2 + tile * WIDTH * LANES, ROWS)
        inputs = [*threads, *x.T, threshold.repeat(LANES), lane_chunk, last.repeat(LANES), until.repeat(LANES)]
        assert constraints.split(",")[state:] == ["r" if x.dtype == np.int32 else "f" for x in inputs]
        registers = {f"${state + i}": operand for i, operand in enumerate(inputs)}
        counts.append(execute(ptx, registers))
        threads = [registers[f"${i}"].view(x.dtype) for i, x in enumerate(threads)]
        if refreshed(tile):
            threshold = np.array([best(rows(threads[:number], i), rows(threads[number + 1:-1], i), number)[0][-1]
                                  for i in range(ROWS)])
    values, chunks = threads[:number + 1], threads[number + 1:]
    found = []
    for i in range(ROWS):
        value, chunk = best(rows(values, i), rows(chunks, i), number)
        found.append(np.where(value > -np.inf, chunk, -1))
    return np.stack(found), counts


def expected(scores, number, last=None, until=None):
    found = np.full((ROWS, number), -1)
    for i in range(ROWS):
        value = scores[i].reshape(-1, LANES, WIDTH // 2, 2).transpose(0, 2, 1, 3).ravel()
        chunk = np.arange(len(value))
        keep = value > -np.inf
        if last is not None:
            keep &= (value < last[i]) | ((value == last[i]) & (chunk < until[i]))
        chosen = best(value[keep], chunk[keep], number)[1]
        found[i, :len(chosen)] = chosen
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_warp_chooses_what_sorting_chooses(data):
    special = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 3.4028235e38, -3.4028235e38, 1e-45])
    palette = data.draw(st.one_of(st.none(), st.lists(special, min_size=1, max_size=6)))
    random = np.random.default_rng(data.draw(st.integers(0, 2 ** 20)))
    shape = ROWS, data.draw(st.integers(1, 5)), LANES, WIDTH
    if palette is None:
        scores = random.standard_normal(shape).astype(np.float32)
    else:  # the larger, the rarer: else all that is chosen is the largest
        weight = data.draw(st.sampled_from([1, 4, 16])) ** -np.argsort(np.argsort(palette)).astype(float)
        scores = random.choice(np.array(palette, np.float32), shape, p=weight / weight.sum())
    number, seldom = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 3))
    found, _ = select(scores, number, refreshed=lambda tile: tile % seldom == 0)
    assert np.array_equal(found, expected(scores, number))
    last, until = np.full(ROWS, -np.inf, np.float32), np.zeros(ROWS, np.int32)
    flat = scores.reshape(ROWS, -1, LANES, WIDTH // 2, 2).transpose(0, 1, 3, 2, 4).reshape(ROWS, -1)
    for i in range(ROWS):
        if found[i, -1] >= 0:
            last[i], until[i] = flat[i, found[i, -1]], found[i, -1]
    again, _ = select(scores, number, last, until, refreshed=lambda tile: tile % seldom == 0)
    assert np.array_equal(again, expected(scores, number, last, until))
    assert np.array_equal(np.concatenate([found, again], 1), expected(scores, 2 * number))


def test_widths_whose_bits_a_float_does_not_hold_have_no_ptx():
    assert [bool(insertion(width, 7, LANES, False)[0]) for width in (1, 2, 4, 8, 16, 32, 64)] == [0, 1, 1, 1, 1, 0, 0]


def test_a_tile_in_which_nothing_passes_takes_few_instructions():
    scores = np.zeros((ROWS, 3, LANES, WIDTH), np.float32)
    scores[:, 2] = np.random.default_rng(0).random((ROWS, LANES, WIDTH))
    _, counts = select(scores, 7)
    assert counts[0] > 500 and max(counts[1:]) < 110
