"""Whose uninitialised reads initcheck reported: the package's kernels', or others'. Run by launch/sanitize.sh.

Status 0 where every report names a kernel that is not the package's, or a copy, and all reports are in the log.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 2)]
import launched

HEAD = re.compile(r"========= (\S.*)")
PLACE = re.compile(r"=========\s+(?:at |Device Frame: |.* on access by )(?:void )?(.+)")
TOTAL = re.compile(r"ERROR SUMMARY: (\d+) errors?$")
OTHER = re.compile(r"COMPUTE-SANITIZER|ERROR SUMMARY: ")


def reports(log: str) -> list[list[str]]:
    """Every report of a log: its first line, then the kernels, device functions or copies that it names."""
    found = []
    for line in log.splitlines():
        if head := HEAD.match(line):
            found.append([head[1]])
        elif found and (place := PLACE.match(line)):
            found[-1].append(re.split(r"[<+(]", place[1].replace("(anonymous namespace)::", ""))[0])
    return [report for report in found if not OTHER.match(report[0])]


def judge(log: str, names: set[str]) -> tuple[str, bool]:
    """What the summary says of a log, and whether it clears the kernels of these names."""
    found = reports(log)
    totals = [int(total[1]) for line in log.splitlines() if (total := TOTAL.search(line))]
    if totals != [len(found)]:
        return f"{len(found)} reports in the log, by its summary {totals}: not decided", False
    ours = [report for report in found if not report[1:] or names.intersection(report[1:])]
    others = Counter(report[1] for report in found if report not in ours)
    text = f"{len(ours)} reports in the package's kernels or without a kernel, {others.total()} in others"
    lines = [f"{text}: {', '.join(f'{name} {n}' for name, n in others.most_common())}" if others else text]
    lines += [f"    {n} x {' in '.join(report)}" for report, n in Counter(map(tuple, ours)).most_common()]
    return "\n".join(lines), not ours


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path, help="of compute-sanitizer --tool initcheck --print-limit 0")
    text, clear = judge(parser.parse_args().log.read_text(errors="replace"),
                        {name for _, name in launched.jit_functions()})
    print(text)
    sys.exit(not clear)
