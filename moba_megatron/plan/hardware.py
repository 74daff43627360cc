"""The card table: what each GPU can do, with the source of every figure and whether it was measured."""
from __future__ import annotations

from dataclasses import dataclass, fields

TERA, GIGA = 1e12, 1e9

VENDOR = "vendor"
MEASURED = "measured"
DERIVED = "derived"
ASSUMED = "assumed"


@dataclass(frozen=True)
class Figure:
    """One number and why to believe it."""

    value: float  # in the unit of the field that holds it
    # `vendor` (a data sheet), `measured` (for this project), `derived` (from other figures) or `assumed`
    # (typical of machines with this card; give your own by a flag)
    kind: str
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
        if self.reached_bandwidth:
            return self.reached_bandwidth.value
        return self.bandwidth.value * REACHED_BANDWIDTH_SHARE.value

    def figures(self) -> dict[str, Figure]:
        """Field name -> figure, those that are set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Figure)}


UNITS = {"peak": (TERA, "TFLOP/s"), "memory": (GIGA, "GB"), "bandwidth": (GIGA, "GB/s"), "issue": (GIGA, "SM GHz"),
         "link": (GIGA, "GB/s"), "network": (GIGA, "GB/s"), "node": (1, "GPUs"), "reached": (TERA, "TFLOP/s"),
         "reached_bandwidth": (GIGA, "GB/s")}
"""Field -> (divisor, unit) for printing."""

REACHED_SHARE = Figure(790 / 989.5, DERIVED, "H200: 790 TFLOP/s of cuBLAS in bf16 over the data sheet's 989.5")
REACHED_BANDWIDTH_SHARE = Figure(4.3 / 4.8, DERIVED, "H200: 4.3 TB/s of a large copy over the data sheet's 4.8")

_A6000 = "NVIDIA RTX A6000 data sheet (309.7 TFLOP/s with sparsity, 48 GB, 768 GB/s, NVLink 112.5 GB/s both ways)"
_A100 = "NVIDIA A100 data sheet, 80 GB SXM (312 TFLOP/s bf16, 2039 GB/s, NVLink 600 GB/s both ways)"
_H100 = "NVIDIA H100 data sheet, SXM (1979 TFLOP/s bf16 with sparsity, 3.35 TB/s, NVLink 900 GB/s both ways)"
_H200 = "NVIDIA H200 data sheet, SXM (1979 TFLOP/s bf16 with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways)"
_B200 = "NVIDIA HGX B200 data sheet (eight GPUs: 18 PFLOP/s bf16 dense, 1.44 TB; 8 TB/s, NVLink 1.8 TB/s both ways)"
_PRO = "NVIDIA RTX PRO 6000 Blackwell Workstation data sheet and architecture paper (188 SMs, 96 GB, 1792 GB/s)"
_PCIE = "PCIe {} x16 and no NVLink switch: {} GB/s one way"


def _vendor(value: float, source: str) -> Figure:
    return Figure(value, VENDOR, source)


CARDS = {
    "a6000": Card(
        "RTX A6000", _vendor(154.8 * TERA, _A6000), _vendor(48 * GIGA, _A6000), _vendor(768 * GIGA, _A6000),
        Figure(84 * 1.80 * GIGA, VENDOR, "84 SMs, 1.80 GHz boost"),
        Figure(25 * GIGA, ASSUMED, _PCIE.format("4.0", 25) + " (a pair on an NVLink bridge has 56)"),
        Figure(12.5 * GIGA, ASSUMED, "one 100 Gbit/s port a GPU"), Figure(4, ASSUMED, "workstations, small servers")),
    "a100": Card(
        "A100 80GB SXM", _vendor(312 * TERA, _A100), _vendor(80 * GIGA, _A100), _vendor(2039 * GIGA, _A100),
        Figure(108 * 1.41 * GIGA, VENDOR, "108 SMs, 1.41 GHz boost"), _vendor(300 * GIGA, _A100),
        Figure(25 * GIGA, VENDOR, "DGX A100: one 200 Gbit/s port a GPU"), Figure(8, VENDOR, "DGX A100")),
    "h100": Card(
        "H100 SXM", _vendor(989.5 * TERA, _H100), _vendor(80 * GIGA, _H100), _vendor(3350 * GIGA, _H100),
        Figure(132 * 1.98 * GIGA, VENDOR, "132 SMs, 1.98 GHz boost"), _vendor(450 * GIGA, _H100),
        Figure(50 * GIGA, VENDOR, "DGX H100: one 400 Gbit/s port a GPU"), Figure(8, VENDOR, "DGX H100")),
    "h200": Card(
        "H200 SXM", _vendor(989.5 * TERA, _H200), _vendor(141 * GIGA, _H200), _vendor(4800 * GIGA, _H200),
        Figure(132 * 1.98 * GIGA, VENDOR, "132 SMs, 1.98 GHz boost"), _vendor(450 * GIGA, _H200),
        Figure(50 * GIGA, VENDOR, "DGX H200: one 400 Gbit/s port a GPU"), Figure(8, VENDOR, "DGX H200"),
        reached=Figure(790 * TERA, MEASURED, "bf16 matrix products of cuBLAS"),
        reached_bandwidth=Figure(4300 * GIGA, MEASURED, "bytes read and written by a large copy")),
    "b200": Card(
        "B200 (HGX)", _vendor(2250 * TERA, _B200), _vendor(180 * GIGA, _B200), _vendor(8000 * GIGA, _B200),
        Figure(148 * 1.965 * GIGA, DERIVED, "148 SMs, 1.965 GHz as devices report"), _vendor(900 * GIGA, _B200),
        Figure(50 * GIGA, VENDOR, "DGX B200: one 400 Gbit/s port a GPU"), Figure(8, VENDOR, "DGX B200")),
    "rtxpro6000": Card(
        "RTX PRO 6000 Blackwell", _vendor(503.8 * TERA, _PRO), _vendor(96 * GIGA, _PRO), _vendor(1792 * GIGA, _PRO),
        Figure(188 * 2.6 * GIGA, DERIVED, "188 SMs; 2.6 GHz from 125 TFLOP/s of fp32"),
        Figure(50 * GIGA, ASSUMED, _PCIE.format("5.0", 50)),
        Figure(25 * GIGA, ASSUMED, "one 200 Gbit/s port a GPU"), Figure(8, ASSUMED, "servers with eight cards")),
}


def find_card(name: str) -> Card:
    """The card of that name (ValueError where there is none); case, blanks and hyphens do not count."""
    key = "".join(c for c in name.lower() if c.isalnum())
    key = {"rtxpro": "rtxpro6000", "rtxa6000": "a6000", "a10080": "a100"}.get(key, key)
    if key not in CARDS:
        raise ValueError(f"--card must be one of {', '.join(CARDS)}; got {name!r}")
    return CARDS[key]


def as_rows() -> list[dict[str, str]]:
    """Every figure of every card, for a table."""
    rows = []
    for key, card in CARDS.items():
        for name, figure in card.figures().items():
            divisor, unit = UNITS[name]
            rows.append({"card": key, "figure": name.replace("_", " "), "value": f"{figure.value / divisor:g} {unit}",
                         "kind": figure.kind, "source": figure.source})
    return rows
