"""Runs inline PTX instruction by instruction on the registers of a warp's threads; memory is the register "memory"."""
import re

import numpy as np

COMPARE = {"gt": np.greater, "le": np.less_equal, "ge": np.greater_equal, "lt": np.less, "ne": np.not_equal,
           "neu": np.not_equal, "eq": np.equal}
JOIN = {"and": np.logical_and, "or": np.logical_or}
NAN = np.uint32(0x7FFFFFFF).view(np.float32)
TYPE = {"f32": np.float32, "s32": np.int32, "u32": np.uint32, "b32": np.uint32}
RUN = {"mov": lambda a: a, "selp": lambda a, b, p: np.where(p, a, b), "max": np.fmax, "add": np.add,
       "sub": np.subtract, "not": np.invert, "and": np.bitwise_and, "xor": np.bitwise_xor, "shr": np.right_shift,
       "mad": lambda a, b, c: a * b + c, "mul": np.multiply, "abs": np.abs,
       "fma": lambda a, b, c: (a.astype(float) * b + c).astype(np.float32),
       "shl": lambda a, b: np.where(b < 32, a << np.minimum(b, 31), 0).astype(np.uint32),
       "popc": lambda a: np.array([int(x).bit_count() for x in a], np.uint32), "neg": np.negative, "or": np.bitwise_or,
       "match": lambda a, _: ((a[:, None] == a) * (1 << np.arange(a.size, dtype=np.uint64))).sum(1).astype(np.uint32),
       "shfl": lambda a, lane, last, _: a[lane & last],
       "shf": lambda a, b, c: b << c | a >> 32 - c,  # l.wrap
       "bfind": lambda a: np.where(a > 0, np.log2(np.maximum(a, 1).astype(float)), -1).astype(np.int32)}


def execute(ptx: str, registers: dict[str, np.ndarray]) -> int:
    """Runs the instructions on the registers of a warp's threads; how many were run. Branches must be the warp's."""
    text = re.sub(r"\.reg [^;]*;", "", ptx.strip()[1:-1])
    steps = [x for x in re.split(r"(?<=[;:])\s*", text.strip()) if x]
    at, number, threads = 0, 0, next(iter(registers.values())).size
    labels = {step[:-1]: i for i, step in enumerate(steps) if step.endswith(":")}

    def value(name: str):
        if name in registers:
            return registers[name]
        if name.startswith("0f"):
            return np.full(threads, np.array([int(name[2:], 16)], np.uint32).view(np.float32)[0])
        return np.full(threads, int(name), np.int32)

    while at < len(steps):
        step, at, number = steps[at], at + 1, number + 1
        if step.endswith(":"):
            continue
        guard, name, operands = re.fullmatch(r"(?:@(!?\w+) )?([\w.]+) (.*);", step).groups()
        to, *of = operands.split(", ")
        on = np.ones(threads, bool) if guard is None else value(guard.strip("!")) != guard.startswith("!")
        name, *kinds = name.split(".")
        if name == "bra":
            assert kinds == ["uni"] and on.all() == on.any(), step
            at = labels[to] if on.all() else at
            continue
        if name == "bar":
            continue
        if name == "atom":
            assert kinds == ["global", "add", "u32"]
            memory, address, number_of = registers["memory"], value(of[0].strip("[]")), value(of[1])
            for thread in np.flatnonzero(on):
                registers[to][thread] = memory[address[thread]]
                memory[address[thread]] += number_of[thread]
            continue
        read, kind = [value(x) for x in of], kinds[-1]
        a, *rest = (x if x.dtype == bool else x.view(TYPE.get(kind, x.dtype)) for x in read)
        if name == "setp":
            result = COMPARE[kinds[0]](a, rest[0])
            result = JOIN[kinds[1]](result, rest[1]) if kinds[1] in JOIN else result
        elif name == "vote":
            assert kinds == ["sync", "any", "pred"] and of[1] == "-1"
            result = np.full(threads, a.any())
        elif kind == "pred":
            result = JOIN[name](a, *rest)
        else:
            with np.errstate(all="ignore"):
                result = RUN[name](a, *rest)
            if "sat" in kinds:
                result = np.where(np.isnan(result), 0, result).clip(0, 1).astype(np.float32)
            if kind == "f32":  # the one NaN that a GPU makes
                result[np.isnan(result)] = NAN
            result = result.view(np.uint32)
            result = result if guard is None else np.where(on, result, registers[to].view(np.uint32))
        registers[to] = result
    return number
