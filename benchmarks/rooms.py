"""Lines of code by room: each folder of the package, and the modules beside them."""
from __future__ import annotations

import argparse

from . import ROOT, report

PACKAGE = "moba_megatron"
LIMIT = 16_000
"""Lines that the package may have in all."""


def lines_by_room() -> dict[str, int]:
    """Room -> lines of its Python files; a module that lies beside the folders is of the room ``.``."""
    found: dict[str, int] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        inside = path.relative_to(ROOT / PACKAGE).parts
        room = inside[0] if len(inside) > 1 else "."
        found[room] = found.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return found


def add_rooms(subcommands) -> None:
    p = subcommands.add_parser("rooms", help="lines of the package by room")
    p.set_defaults(run=run_rooms)


def run_rooms(arguments: argparse.Namespace) -> int:
    """Prints the rooms, the largest first, and their sum; 1 where that is above the limit."""
    rooms = lines_by_room()
    total = sum(rooms.values())
    lines = [{"room": f"{PACKAGE}/{room}".removesuffix("/."), "lines": f"{lines:,}".rjust(6)}
             for room, lines in sorted(rooms.items(), key=lambda item: -item[1])]
    print(report.as_text([*lines, {"room": "all", "lines": f"{total:,} of at most {LIMIT:,}"}]))
    return int(total > LIMIT)
