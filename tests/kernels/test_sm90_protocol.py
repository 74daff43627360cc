"""The barriers of the Gluon kernels as a model: every interleaving of loader, copies and both groups, at small sizes.

A buffer is never filled while it is read or before it has been read, never read before it is filled, and nobody waits
for ever. The model follows ``_loader`` and ``_consumer`` of the kernels by hand; their code, and time, are tested by
tests/gpu/test_sm90_delays.py, whose broken kernels are here too: they go wrong, and none of them can hang.
"""
import pytest

# What a thread does, one after the other: ("wait", barrier, parity), ("arrive", barrier), and with a buffer and the
# number of its use ("fill", ...), ("filled", ...), ("read", ...), ("done", ...).


def explore(threads, arrivals):
    """All reachable states: how many there are, and how many steps touch a buffer that they must not."""
    names = sorted({step[1] for steps in threads for step in steps})
    index = {name: i for i, name in enumerate(names)}
    threads = [[(what, index[name], *number) for what, name, *number in steps] for steps in threads]
    whole = [arrivals.get(name) for name in names]
    # a barrier: (phase, arrivals that it still needs); a buffer: (number of the use it holds, being filled, readers)
    start = (0,) * len(threads), tuple((0, n) if n else (-1, False, 0) for n in whole)
    seen, todo, wrong = {start}, [start], 0
    while todo:
        at, things = todo.pop()
        moved = False
        for i, steps in enumerate(threads):
            if at[i] == len(steps):
                continue
            what, thing, *number = steps[at[i]]
            now = then = things[thing]
            if what == "wait":
                if now[0] % 2 == number[0]:  # that phase has not ended
                    continue
            elif what == "arrive":
                then = (now[0], now[1] - 1) if now[1] > 1 else (now[0] + 1, whole[thing])
            else:
                allowed, then = touched(what, number[0], now)
                wrong += not allowed
            moved = True
            after = at[:i] + (at[i] + 1,) + at[i + 1:], things[:thing] + (then,) + things[thing + 1:]
            if after not in seen:
                seen.add(after)
                todo.append(after)
        assert moved or all(n == len(steps) for n, steps in zip(at, threads)), f"everybody waits: {at}"
    return len(seen), wrong


def touched(what, number, buffer):
    """Whether that is allowed, and the buffer after it."""
    holds, filling, readers = buffer
    if what == "fill":
        return not filling and not readers, (holds, True, readers)
    if what == "filled":
        return not readers, (number, False, readers)
    return holds == number and not filling, (holds, filling, readers + (1 if what == "read" else -1))


class Ring:
    """Buffers that take turns, with ``full`` and ``empty`` barriers; copies land in order, whenever they like."""

    def __init__(self, name, size, arrivals, announced_early=False):
        self.name, self.size, self.early = name, size, announced_early
        self.landing = [[] for _ in range(size)]
        for i in range(size):
            arrivals |= {f"{name} full {i}": 1, f"{name} empty {i}": 2, f"{name} started {i}": 1}

    def at(self, kind, use):
        return f"{self.name} {kind} {use % self.size}"

    def wait(self, kind, use):
        return "wait", self.at(kind, use), (use // self.size + (kind == "empty")) % 2

    def copy(self, use):
        """What the loader does to start a copy; its end is a thread of its own."""
        fill = ("fill", self.at("buffer", use), use)
        if self.early:
            return [("arrive", self.at("full", use)), fill]
        self.landing[use % self.size] += [self.wait("started", use), ("filled", self.at("buffer", use), use),
                                          ("arrive", self.at("full", use))]
        return [fill, ("arrive", self.at("started", use))]

    def read(self, use, what="read"):
        return what, self.at("buffer", use), use

    def free(self, use):
        return "arrive", self.at("empty", use)


def threads_for_dk_dv(blocks, listed, broken, arrivals):
    """attention_bwd_dkdv_sm90.py: ``blocks`` of rows, for the ``listed`` first of them partial dq."""
    rows = Ring("rows", 3, arrivals, broken == "rows announced")
    arrivals |= {"ds full 0": 2, "ds full 1": 2, "ds empty 0": 1, "ds empty 1": 1}
    loader = [step for n in range(blocks) for step in (rows.wait("empty", n), *rows.copy(n))]
    groups = [[], []]
    for part, steps in enumerate(groups):
        for n in range(blocks):
            turn, parity, writes_dq = n % 2, n // 2 % 2, n < listed
            announce = [("arrive", f"ds full {turn}")] * writes_dq
            half = f"ds {turn} {part}"
            free = [("wait", f"ds empty {turn}", 1 - parity)] * writes_dq
            steps += [rows.wait("full", n), *[rows.free(n)] * (broken == "rows given back"), rows.read(n)]
            steps += free + announce * (broken == "ds announced") + [("fill", half, n), ("filled", half, n)] * writes_dq
            steps += announce * (broken != "ds announced")
            steps += [rows.read(n, "done"), *[rows.free(n)] * (broken != "rows given back")]
            late = [n - 1] * writes_dq + [n] * (n + 1 == listed)  # partial dq follows the next block
            for m in late:
                if m >= 0 and m % 2 == part:
                    halves = [f"ds {part} {i}" for i in range(2)]
                    steps += [("wait", f"ds full {part}", m // 2 % 2), *(("read", x, m) for x in halves),
                              *(("done", x, m) for x in halves), ("arrive", f"ds empty {part}")]
    return [loader, *rows.landing, *groups]


def threads_for_64_keys(blocks, listed, broken, arrivals):
    """One group has dv and partial dq, and hands its weights to the group of dk, which gives back ds."""
    rows, p, ds = (Ring(name, 2, arrivals) for name in ("rows", "p", "ds"))
    arrivals |= {f"{name} empty {i}": 1 for name in ("p", "ds") for i in range(2)}
    loader = [step for n in range(blocks) for step in (rows.wait("empty", n), *rows.copy(n))]
    values, keys = [], []
    for n in range(blocks):
        announce, fill = [("arrive", p.at("full", n))], [p.read(n, "fill"), p.read(n, "filled")]
        values += [rows.wait("full", n), rows.read(n), p.wait("empty", n),
                   *(announce + fill if broken == "p announced" else fill + announce), rows.read(n, "done"),
                   rows.free(n)]
        for m in [n - 1] * (0 < n < listed) + [n] * (n + 1 == listed):  # partial dq follows the next block
            values += [ds.wait("full", m), ds.read(m), ds.read(m, "done"), ds.free(m)]
        keys += [rows.wait("full", n), rows.read(n), p.wait("full", n), p.read(n), p.read(n, "done"), p.free(n)]
        if n < listed:
            keys += [ds.wait("empty", n), ds.read(n, "fill"), ds.read(n, "filled"), ("arrive", ds.at("full", n))]
        keys += [rows.read(n, "done"), rows.free(n)]
    return [loader, *rows.landing, values, keys]


def loads(rows, k, v, tiles, keys, wait_for_v):
    """The loader of the forward's and of dq's kernel: ``tiles`` of rows, each against ``keys`` tiles of keys."""
    steps = rows.copy(0)
    for n in range(tiles * keys):
        if n == 0 or keys > 1 or not wait_for_v:  # forward keeps a chunk that is one tile
            steps += [k.wait("empty", n), *k.copy(n), *[v.wait("empty", n)] * wait_for_v, *v.copy(n)]
        tile = n // keys + 1
        if n % keys == 0 and tile < tiles:
            steps += [rows.wait("empty", tile), *rows.copy(tile)]
    return steps


def threads_for_forward(tiles, keys, broken, arrivals, buffers=2):
    rows, k, v = Ring("rows", buffers, arrivals, broken == "rows announced"), *(Ring(x, 2, arrivals) for x in "kv")

    def begin(tile):
        n = tile * keys * (keys > 1)
        return [rows.wait("full", tile), *[rows.free(tile)] * (broken == "rows given back"), rows.read(tile),
                k.wait("full", n), k.read(n)]

    def begun(tile):
        n = tile * keys * (keys > 1)
        return [k.read(n, "done"), k.free(n)]

    group = begin(0) + begun(0)
    for tile in range(tiles):
        another = tile + 1 < tiles
        for n in range(tile * keys, (tile + 1) * keys):
            if n + 1 < (tile + 1) * keys:
                group += [k.wait("full", n + 1), k.read(n + 1), v.wait("full", n), v.read(n), k.read(n + 1, "done"),
                          k.free(n + 1)]
            else:
                n *= keys > 1
                group += [v.wait("full", n), v.read(n), *(begin(tile + 1) if another else ())]
            group += [v.read(n, "done"), v.free(n)]
        group += [rows.read(tile, "done"), *[rows.free(tile)] * (broken != "rows given back")]
        group += begun(tile + 1) if another else []
    return [loads(rows, k, v, tiles, keys, True), *rows.landing, *k.landing, *v.landing, group, group]


def threads_for_dq(tiles, keys, broken, arrivals):
    rows, k, v = Ring("rows", 2, arrivals), *(Ring(x, 3, arrivals) for x in "kv")

    def start(n):
        return [k.wait("full", n), k.read(n), v.wait("full", n), *[k.free(n)] * (broken == "keys given back"),
                v.read(n)]

    group = [rows.wait("full", 0), rows.read(0), *start(0)]
    for tile in range(tiles):
        for n in range(tile * keys, (tile + 1) * keys):
            group += start(n) if n % keys else []
            group += [v.read(n, "done"), k.read(n, "done"), *[k.free(n)] * (broken != "keys given back")]
        if tile + 1 < tiles:
            group += [rows.wait("full", tile + 1), rows.read(tile + 1), *start((tile + 1) * keys)]
        group += [rows.read(tile, "done"), rows.free(tile)]
    return [loads(rows, k, v, tiles, keys, False), *rows.landing, *k.landing, *v.landing, group, group]


def threads_for_gate(tiles, ahead, broken, arrivals):
    """gating_sm90.py: the first of two groups starts the copies, so many tiles ahead."""
    means, groups = Ring("means", 3, arrivals), []
    for part in range(2):
        copies = [[means.wait("empty", n), *means.copy(n)] if part == 0 else [] for n in range(tiles)]
        steps = sum(copies[:ahead], [])
        for n in range(tiles):
            steps += copies[n + ahead] if n + ahead < tiles else []
            steps += [means.wait("full", n), *[means.free(n)] * (broken == "means given back"), means.read(n),
                      means.read(n, "done"), *[means.free(n)] * (broken != "means given back")]
        groups.append(steps)
    return [*means.landing, *groups]


SIZES = [(threads_for_dk_dv, n, listed) for n in range(8) for listed in {0, n // 2, n}]
SIZES += [(threads_for_64_keys, n, listed) for n in range(8) for listed in {0, n // 2, n}]
SIZES += [(threads_for_forward, *size) for size in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1))]
SIZES += [(threads_for_dq, *size) for size in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4))]
SIZES += [(threads_for_gate, n, ahead) for n in (0, 1, 4, 7) for ahead in (1, 2)]
BROKEN = [(threads_for_gate, 6, 1, "means given back"), (threads_for_dk_dv, 6, 0, "rows announced"),
          (threads_for_dk_dv, 6, 0, "rows given back"),
          (threads_for_dk_dv, 5, 5, "ds announced"), (threads_for_64_keys, 3, 0, "p announced"),
          (threads_for_dq, 1, 4, "keys given back"),
          (threads_for_forward, 2, 1, "rows announced"), (threads_for_forward, 3, 1, "rows given back")]


def model(make, *size, broken=None, **options):
    arrivals = {}
    threads = make(*size, broken, arrivals, **options)
    return explore(threads, arrivals)


@pytest.mark.parametrize("make, first, second", SIZES)
def test_every_interleaving(make, first, second):
    states, wrong = model(make, first, second)
    assert states and not wrong


@pytest.mark.parametrize("make, first, second, broken", BROKEN)
def test_broken_barriers_go_wrong_and_do_not_hang(make, first, second, broken):
    assert model(make, first, second, broken=broken)[1]


def test_one_buffer_for_rows_would_hang():
    """Which the kernels refuse (``static_assert``)."""
    with pytest.raises(AssertionError, match="everybody waits"):
        model(threads_for_forward, 2, 3, buffers=1)
