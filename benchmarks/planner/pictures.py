"""Pictures of the simulation (scaling against ranks) and of what ``plan-measure`` measured."""
from __future__ import annotations

from pathlib import Path

from moba_megatron import plotting
from moba_megatron.plotting import LIGHT


def simulated(result: dict, folder: Path) -> list[Path]:
    """Draws a simulation's efficiencies of a layer against ranks, a picture a length, a line a comm type.

    Chunks travel as the first recorded routing has it, or else the first made-up one.

    Args:
        result: what ``scenarios.write`` stores.
        folder: where ``exchange_LENGTH.png`` goes.

    Returns:
        the files.
    """
    layer, drawn = result["layer"], []
    for tokens in dict.fromkeys(row["tokens"] for row in result["rows"]):
        name = f"{tokens / 2**20:g}M"
        drawn.append(folder / f"exchange_{name}.png")
        _efficiency([row for row in result["rows"] if row["tokens"] == tokens],
                    f"Simulated efficiency of an attention layer,\n{name} tokens, ({layer['chunk_size']}, "
                    f"{layer['topk']}), {result['card']}", drawn[-1])
    return drawn


def _efficiency(rows: list[dict], title: str, path: Path) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    shown = sorted((row["routing"] for row in rows if row["routing"] != "any"), key=lambda x: not x.startswith("layer"))
    for row in rows:
        if row["routing"] in ("any", *shown[:1]):
            lines.setdefault(row["comm"], []).append((row["ranks"], row["efficiency"]))
    with plotting.figure(path, height=3.4) as (_, axes):
        labels = []
        for (name, points), colour in zip(lines.items(), (LIGHT.ink, LIGHT.muted, LIGHT.accent, *LIGHT.others)):
            axes.plot(*zip(*points), color=colour, linewidth=2 if name in ("all_gather", "a2a") else 1.5, marker="o",
                      markersize=3)
            at = "" if points[-1][0] == rows[-1]["ranks"] else f" (to {points[-1][0]})"
            labels.append((points[-1][1], f"{name}{at}: {points[-1][1]:.2f}", colour))
        axes.set_xscale("log", base=2)
        ticks = sorted({ranks for points in lines.values() for ranks, _ in points})[::2]
        axes.set_xticks(ticks, [str(ranks) for ranks in ticks])
        axes.minorticks_off()
        axes.set_xlabel("ranks", loc="left")
        axes.set_ylim(0, 1.05)
        axes.set_title(title)
        plotting.label_ends(axes, labels)


def measured_variants(result: dict, path: Path) -> None:
    """Draws what ``plan-measure`` measured: milliseconds of every variant, a panel a routing.

    Args:
        result: its JSON.
        path: .png or .svg.
    """
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    names, routings = (list(dict.fromkeys(row[key] for row in rows)) for key in ("way", "routing"))
    with plotting.figure(path, rows=len(routings), height=0.4 + 1.25 * len(routings), sharex=True) as (drawn, panels):
        for axes, routing in zip([panels] if len(routings) == 1 else panels, routings):
            for row in (row for row in rows if row["routing"] == routing):
                at, ms = names.index(row["way"]), row["ms"]["median"]
                axes.barh(at, ms, height=0.7, color=LIGHT.accent if "selective" in row["way"] else LIGHT.muted)
                axes.text(ms, at, f" {ms:.0f} ms", va="center", fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{routing} routing")
        axes.set_xlim(0, 1.15 * max(row["ms"]["median"] for row in rows))
        axes.set_xlabel("ms, forward + backward", loc="right")
