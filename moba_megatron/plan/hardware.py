"""The card table: what each GPU can do, with the source of every figure and whether it was measured."""
from dataclasses import dataclass, fields

TERA, GIGA = 1e12, 1e9

VENDOR, MEASURED, DERIVED, ASSUMED = "vendor", "measured", "derived", "assumed"


@dataclass(frozen=True)
class Figure:
    """One number and why to believe it."""

    value: float  # in the unit of the field that holds it
    kind: str  # vendor (data sheet), measured (here), derived (from others), assumed (typical; a flag gives your own)
    source: str  # document, or how it was measured or derived


@dataclass(frozen=True)
class Card:
    """A GPU and the machine that it usually comes in."""

    name: str  # for people
    peak: Figure  # dense bf16 matrix products with fp32 sums, operations/s
    memory: Figure  # bytes
    bandwidth: Figure  # of that memory, bytes/s
    issue: Figure  # streaming multiprocessors times clock, 1/s: what the integer work of gate and routing scales with
    link: Figure  # to the other GPUs of the machine, bytes/s, one direction
    network: Figure  # to other machines, bytes/s a GPU, one direction
    node: Figure  # GPUs in a machine
    reached: Figure | None = None  # matrix products that were reached, operations/s; None where nobody measured
    reached_bandwidth: Figure | None = None  # bytes/s that a large copy reached

    @property
    def flops(self) -> float:
        """Operations/s of large matrix products: measured, or the peak times what the H200 reaches of its own."""
        return self.reached.value if self.reached else self.peak.value * REACHED_SHARE.value

    @property
    def bytes_per_second(self) -> float:
        """Bytes/s of memory: measured, or the data sheet's times what the H200 reaches of its own."""
        reached = self.reached_bandwidth
        return reached.value if reached else self.bandwidth.value * REACHED_BANDWIDTH_SHARE.value

    def figures(self) -> dict[str, Figure]:
        """Field name -> figure, those that are set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Figure)}


UNITS = {"peak": (TERA, "TFLOP/s"), "memory": (GIGA, "GB"), "bandwidth": (GIGA, "GB/s"), "issue": (GIGA, "SM GHz"),
         "link": (GIGA, "GB/s"), "network": (GIGA, "GB/s"), "node": (1, "GPUs"), "reached": (TERA, "TFLOP/s"),
         "reached_bandwidth": (GIGA, "GB/s")}  # field -> (divisor, unit) for printing

REACHED_SHARE = Figure(790 / 989.5, DERIVED, "H200: 790 TFLOP/s of cuBLAS in bf16 over the data sheet's 989.5")
REACHED_BANDWIDTH_SHARE = Figure(4.3 / 4.8, DERIVED, "H200: 4.3 TB/s of a large copy over the data sheet's 4.8")

_A6000 = "NVIDIA RTX A6000 data sheet (309.7 TFLOP/s with sparsity, 48 GB, 768 GB/s, NVLink 112.5 GB/s both ways)"
_A100 = "NVIDIA A100 data sheet, 80 GB SXM (312 TFLOP/s bf16, 2039 GB/s, NVLink 600 GB/s both ways)"
_H100 = "NVIDIA H100 data sheet, SXM (1979 TFLOP/s bf16 with sparsity, 3.35 TB/s, NVLink 900 GB/s both ways)"
_H200 = "NVIDIA H200 data sheet, SXM (1979 TFLOP/s bf16 with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways)"
_B200 = "NVIDIA HGX B200 data sheet (eight GPUs: 18 PFLOP/s bf16 dense, 1.44 TB; 8 TB/s, NVLink 1.8 TB/s both ways)"
_PRO = "NVIDIA RTX PRO 6000 Blackwell Workstation data sheet and architecture paper (188 SMs, 96 GB, 1792 GB/s)"
_PCIE = "PCIe {} x16 and no NVLink switch: {} GB/s one way"


def _card(name: str, sheet: str, peak: float, memory: float, bandwidth: float, issue: tuple, link: float | tuple,
          network: tuple, node: tuple, **reached: Figure) -> Card:
    """A row of the table, in UNITS: numbers are the data sheet's, others are (value, kind, source)."""
    figures = [x if isinstance(x, tuple) else (x, VENDOR, sheet) for x in (peak, memory, bandwidth, issue, link,
                                                                           network, node)]
    return Card(name, *(Figure(value * unit, kind, source)
                        for (value, kind, source), (unit, _) in zip(figures, UNITS.values())), **reached)


def _dgx(name: str, gbits: int) -> tuple[tuple, tuple]:
    return (gbits / 8, VENDOR, f"{name}: one {gbits} Gbit/s port a GPU"), (8, VENDOR, name)


CARDS = {
    "a6000": _card("RTX A6000", _A6000, 154.8, 48, 768, (84 * 1.80, VENDOR, "84 SMs, 1.80 GHz boost"),
                   (25, ASSUMED, _PCIE.format("4.0", 25) + " (a pair on an NVLink bridge has 56)"),
                   (12.5, ASSUMED, "one 100 Gbit/s port a GPU"), (4, ASSUMED, "workstations, small servers")),
    "a100": _card("A100 80GB SXM", _A100, 312, 80, 2039, (108 * 1.41, VENDOR, "108 SMs, 1.41 GHz boost"), 300,
                  *_dgx("DGX A100", 200)),
    "h100": _card("H100 SXM", _H100, 989.5, 80, 3350, (132 * 1.98, VENDOR, "132 SMs, 1.98 GHz boost"), 450,
                  *_dgx("DGX H100", 400)),
    "h200": _card("H200 SXM", _H200, 989.5, 141, 4800, (132 * 1.98, VENDOR, "132 SMs, 1.98 GHz boost"), 450,
                  *_dgx("DGX H200", 400), reached=Figure(790 * TERA, MEASURED, "bf16 matrix products of cuBLAS"),
                  reached_bandwidth=Figure(4300 * GIGA, MEASURED, "bytes read and written by a large copy")),
    "b200": _card("B200 (HGX)", _B200, 2250, 180, 8000, (148 * 1.965, DERIVED, "148 SMs, 1.965 GHz as devices report"),
                  900, *_dgx("DGX B200", 400)),
    "rtxpro6000": _card("RTX PRO 6000 Blackwell", _PRO, 503.8, 96, 1792,
                        (188 * 2.6, DERIVED, "188 SMs; 2.6 GHz from 125 TFLOP/s of fp32"),
                        (50, ASSUMED, _PCIE.format("5.0", 50)), (25, ASSUMED, "one 200 Gbit/s port a GPU"),
                        (8, ASSUMED, "servers with eight cards"))}


def find_card(name: str) -> Card:
    """The card of that name (ValueError where there is none); case, blanks and hyphens do not count."""
    key = "".join(c for c in name.lower() if c.isalnum())
    key = {"rtxpro": "rtxpro6000", "rtxa6000": "a6000", "a10080": "a100"}.get(key, key)
    if key not in CARDS:
        raise ValueError(f"--card must be one of {', '.join(CARDS)}; got {name!r}")
    return CARDS[key]


def as_rows() -> list[dict[str, str]]:
    """Every figure of every card, for a table."""
    return [{"card": key, "figure": name.replace("_", " "), "value": f"{x.value / UNITS[name][0]:g} {UNITS[name][1]}",
             "kind": x.kind, "source": x.source} for key, card in CARDS.items() for name, x in card.figures().items()]
