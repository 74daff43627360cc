"""What MoBA does with each field of Megatron's configuration: stored judgements, their page, what nobody has judged.

    python -m benchmarks fields             # fields of the installed Megatron that are not in megatron_fields.json
    python -m benchmarks fields --write     # docs/megatron_fields.md anew
"""
from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path

from . import ROOT

STORED = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs/megatron_fields.md"
ABOUT_ATTENTION = re.compile("attention|mask|pack(ing|ed)|position|rotary|rope|flash|sft|document|hybrid_|^spec$")
"""Names of Megatron-LM's arguments that are judged; parts of dynamic batching are refused as a whole."""
REFUSED_WHERE = {
    "core_attention": "when the layer is built",
    "check_model": "with launch or patch, when the model is built: a layer would attend through another class",
    "inference": "at the call"}
HEAD = """# Fields of Megatron's configuration

What MoBA does with each field of `TransformerConfig`, `MLATransformerConfig` and `ModelParallelConfig`, and with the
arguments of Megatron-LM that are about attention, read in Megatron-Core {versions}.
`python -m benchmarks fields` names the fields of the installed Megatron-Core that nobody has judged, and with `--write`
makes this page.
"""


def judgements() -> dict:
    """The stored list: ``refused`` name -> value, by, why; ``honoured`` and ``irrelevant`` reason -> names; the same
    under ``arguments``."""
    return json.loads(STORED.read_text(encoding="utf-8"))


def judged(part: dict) -> set[str]:
    """All names of the list, or of its ``arguments``."""
    return {*part["refused"], *(name for kind in ("honoured", "irrelevant") for names in part[kind].values()
                                for name in names)}


def installed_fields() -> set[str]:
    """The fields of the installed Megatron-Core's three classes."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    return {field.name for kind in (ModelParallelConfig, TransformerConfig, MLATransformerConfig)
            for field in fields(kind)}


def installed_arguments() -> set[str]:
    """Megatron-LM's arguments about attention, as its source names them; none where only megatron.core is installed."""
    core = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0])
    source, found = core.parent / "training/arguments.py", set()
    if not source.is_file():
        return found
    for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            words = [word.value for word in call.args if isinstance(word, ast.Constant)]
            named = [word.value.value for word in call.keywords
                     if word.arg == "dest" and isinstance(word.value, ast.Constant)]
            name = (named or [str((words or [""])[0]).lstrip("-").replace("-", "_")])[0]
            if ABOUT_ATTENTION.search(name) and not name.startswith("inference_dynamic_batching_"):
                found.add(name)
    return found - installed_fields()


def unjudged() -> list[str]:
    """Names of the installed Megatron that are not in the list."""
    stored = judgements()
    return sorted((installed_fields() - judged(stored))
                  | (installed_arguments() - judged(stored["arguments"]) - judged(stored)))


def page() -> str:
    """The page's markdown."""
    stored = judgements()
    *versions, last = stored["checked"]
    text = HEAD.format(versions=f"{', '.join(versions)} and {last}")
    for title, part in (("Fields", stored), ("Arguments of Megatron-LM", stored["arguments"])):
        text += f"\n## {title}\n\n### Refused by name\n\n| | value | when | |\n|---|---|---|---|\n"
        text += "".join(f"| `{name}` | `{entry['value']!r}` | {REFUSED_WHERE[entry['by']]} | {_why(name, entry)} |\n"
                        for name, entry in part["refused"].items())
        text += "\n### Honoured\n\n| | |\n|---|---|\n"
        text += "".join(f"| {_names(names)} | {what} |\n" for what, names in part["honoured"].items())
        text += "\n### Irrelevant to attention\n"
        text += "".join(f"\n{reason}: {_names(sorted(names))}.\n" for reason, names in part["irrelevant"].items())
    return text


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _why(name: str, entry: dict) -> str:
    from moba_megatron.megatron.refusals import _UNSUPPORTED_FIELDS

    return entry.get("why") or next(reason for field, _, reason in _UNSUPPORTED_FIELDS if field == name)


def add_fields(subcommands) -> None:
    p = subcommands.add_parser("fields", help="fields of Megatron's configuration that nobody has judged")
    p.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)} from the stored list")
    p.set_defaults(run=run_fields)


def run_fields(arguments: argparse.Namespace) -> int:
    """Prints what is not judged, or writes the page; 1 where something is not judged."""
    if arguments.write:
        PAGE.write_text(page(), encoding="utf-8")
    from moba_megatron.megatron.host import megatron_version

    missing = unjudged()
    print(f"Megatron-Core {megatron_version()}: {len(installed_fields())} fields and {len(installed_arguments())} "
          f"arguments about attention, not judged: {', '.join(missing) or 'none'}")
    return int(bool(missing))
