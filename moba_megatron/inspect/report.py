"""A report of the router's statistics as JSON, as TensorBoard's scalars and in a line. Needs no Megatron-Core."""
from collections.abc import Mapping
from statistics import fmean

Report = Mapping[int, Mapping[str, list[float]]]
"""For each layer that has a choice, by its number: each statistic by its name, a value a head."""


def as_record(report: Report) -> dict:
    """The report for a line of JSON: for each layer the mean over its heads, and under ``heads`` each head's value."""
    def rounded(x: float) -> float:
        return float(f"{x:.4g}")

    return {str(layer): {**{name: rounded(fmean(values)) for name, values in heads.items()},
                         "heads": {name: list(map(rounded, values)) for name, values in heads.items()}}
            for layer, heads in report.items()}


def as_scalars(report: Report) -> dict[str, float]:
    """The report for TensorBoard: each statistic's mean over heads, by layer and over all layers."""
    scalars = {}
    for name in next(iter(report.values()), {}):
        layers = {layer: fmean(heads[name]) for layer, heads in report.items()}
        scalars[f"router/{name}"] = fmean(layers.values())
        scalars.update({f"router-{name}/layer-{layer:03d}": value for layer, value in layers.items()})
    return scalars


def summary(report: Report) -> str:
    """The report in a line: means over all layers and heads."""
    if not report:
        return "router: no query has a choice, since topk chunks cover every sequence or every layer attends densely"
    means = {name.removeprefix("router/"): x for name, x in as_scalars(report).items() if name.startswith("router/")}
    return "router: " + ", ".join(f"{name.replace('_', ' ')} {mean:.3f}" for name, mean in means.items())


def as_table(report: Report) -> str:
    """The report as text: a line a layer, means over heads."""
    from ..environment import as_text  # which needs Triton
    return as_text([{"layer": str(layer), **{name.replace("_", " "): f"{fmean(heads[name]):.3f}" for name in heads}}
                    for layer, heads in sorted(report.items())])
