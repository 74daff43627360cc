"""Says what of MoBA works on this machine: versions, cards, backends, Megatron, settings, and a self-test of seconds.

    python -m moba_megatron.doctor

Exit status 0: what is installed works. 1: kernels cannot be imported, a self-test failed, or a setting cannot be read.
"""
import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
import warnings

import torch

from . import __version__, moba_attn_varlen
from .config import MoBAConfig
from .megatron.arguments import config_from_environment
from .megatron.host import CHECKED_VERSIONS, is_known_version, megatron_version
from .ops import flash_attn_4
from .ops.dense import dense_setting

PACKAGES = (  # distribution, module, what it is for
    ("triton", "triton", "the kernels, on CUDA"),
    ("megatron-core", "megatron.core", "the Megatron adapter"),
    ("transformer-engine", "transformer_engine", "Transformer Engine layer specs, fp8 linears"),
    ("flash-attn-4", "flash_attn.cute", "dense layers with packed sequences, on Hopper and Blackwell"),
    ("deepspeed", "deepspeed", "the DeepSpeed integration"),
    ("transformers", "transformers", "the Hugging Face integration"))
SWITCHES = ("MOBA_CP_COPY_ENGINES", "MOBA_PREPARED_LAUNCHES", "MOBA_CHECK_INPUTS")  # 0 or 1
OTHER_VARIABLES = {*SWITCHES, "MOBA_WORKSPACE_MIB", "MOBA_TUNING_FILE", "MOBA_TUNING_ARCH", "MOBA_COMMIT", "MOBA_DENSE",
                   "MOBA_FP32_PRODUCTS"}
STAGES = {  # of the tuning table
    "chunk_means": "chunk means", "gate": "gate and top-k", "route": "route", "attention_fwd": "sparse forward",
    "attention_fwd_diagonal": "diagonal and merge, forward", "attention_bwd_delta": "delta, backward",
    "attention_bwd_dkdv": "sparse dk and dv, backward", "attention_bwd_dq": "sparse dq, backward",
    "attention_bwd_dq_diagonal": "diagonal dq, backward", "decode_gate": "gate and top-k, decoding",
    "decode": "attention, decoding"}
HEAD_DIM = 128
FLASH_4 = flash_attn_4.Variant(torch.device("cuda"), torch.bfloat16, HEAD_DIM, HEAD_DIM, 2)
LIMIT_BF16 = 0.02  # relative RMS error of kernels against the reference: 5 bf16 roundings (2^-8) at worst


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moba_megatron.doctor", description="Says what of MoBA works here.")
    parser.add_argument("--no-self-test", action="store_true", help="only look, compute nothing")
    arguments = parser.parse_args(argv)
    print(f"moba_megatron {__version__}, Python {platform.python_version()}, torch {torch.__version__} "
          f"(CUDA {torch.version.cuda or 'none'}), {platform.system()}")
    report_machine()
    report_megatron()
    healthy = all([report_stages(), report_environment(), arguments.no_self_test or self_test()])  # each of them runs
    print("healthy" if healthy else "NOT healthy: see the lines with FAIL")
    return 0 if healthy else 1


def report_machine() -> None:
    print("cards")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        _line(card.name, f"sm_{card.major}{card.minor}, {card.total_memory / 2 ** 30:.0f} GiB")
    if not torch.cuda.device_count():
        _line("none", "torch sees no CUDA device: everything runs in plain torch (backend torch), on the CPU")
    print("packages")
    for distribution, module, purpose in PACKAGES:
        _line(distribution, f"{_version(distribution, module)} - {purpose}")


def _version(distribution: str, module: str) -> str:
    try:
        return importlib.metadata.version(distribution) if importlib.util.find_spec(module) else "not installed"
    except importlib.metadata.PackageNotFoundError:
        return "found, version unknown"
    except (ImportError, ValueError):
        return "not installed"


def report_megatron() -> None:
    print("Megatron")
    if problem := _import_problem("megatron.core"):
        return _line("megatron.core", f"unusable: {problem}")
    version = megatron_version()
    known = ("checked" if is_known_version(version) else
             f"not checked (checked: {CHECKED_VERSIONS[0]} to {CHECKED_VERSIONS[-1]})")
    _line("megatron.core", f"{version}, {known}, from {os.path.dirname(sys.modules['megatron.core'].__file__)}")
    problem = ("not here: run python -m moba_megatron.launch with the path of a script in a Megatron-LM checkout"
               if importlib.util.find_spec("megatron.training") is None else _import_problem("megatron.training"))
    _line("megatron.training", problem or "found: python -m moba_megatron.launch works from anywhere")
    problem = _import_problem("transformer_engine.pytorch")
    _line("layer specs", f"local (Transformer Engine unusable: {problem})" if problem else "local, Transformer Engine")


def report_stages() -> bool:
    """Which kernels each stage runs on this machine, and why; False where kernels cannot be imported."""
    try:
        config = config_from_environment()
    except (TypeError, ValueError):  # reported with the settings
        config = MoBAConfig()
    print(f"kernels by stage (bf16, heads of {HEAD_DIM}, chunk_size={config.chunk_size}, topk={config.topk})")
    if problem := _import_problem("moba_megatron.kernels"):
        _line("Triton kernels", f"FAIL: cannot be imported: {problem}")
    instead = config.backend if config.backend in ("torch", "reference") else None
    reason = (f"backend={instead}" if instead else "Triton cannot be used" if problem else
              "no CUDA device" if not torch.cuda.is_available() else
              "the kernels need sm_80 (Ampere) or later" if torch.cuda.get_device_capability() < (8, 0) else None)
    for stage, name in STAGES.items():
        _line(name, f"{instead or 'torch'}: {reason}" if reason else _kernel_of(stage, config))
    if reason or torch.cuda.get_device_capability() != (9, 0):
        return not problem
    if (problem := importlib.import_module(".kernels.sm90", __package__).unusable()) is None:
        return True
    _line("Hopper kernels", f"{'' if 'written for' in problem else 'FAIL: '}not used: {problem}")
    return "written for" in problem


def _kernel_of(stage: str, config: MoBAConfig) -> str:
    """Hopper or portable, by the look-ups that the launchers do."""
    from .kernels import sm90, tuning
    from .kernels.tuning_table import is_gluon
    q = torch.empty(16, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    gluon = sm90.takes(q, q, q, q)
    options = tuning.config(stage, q.device, head_dim=HEAD_DIM, itemsize=2, chunk_size=config.chunk_size,
                            choices=config.topk - 1, gluon=gluon)
    arch = tuning.arch_of(q.device)
    if is_gluon(options):
        return f"Hopper (Gluon), by the tuning table's rows for {arch}"
    has_any = any(is_gluon(row.config) for row in tuning.rows(stage))
    why = ("the stage has no others" if not has_any else f"the Hopper kernels need sm_90, this is {arch}"
           if torch.cuda.get_device_capability() != (9, 0) else "the Hopper kernels cannot be used (below)" if not gluon
           else "the tuning table prefers them for these sizes")
    return f"portable Triton: {why}"


def report_environment() -> bool:
    print("settings (MOBA_* environment variables)")
    fields = {"MOBA_" + name.upper() for name in MoBAConfig.__dataclass_fields__}
    for name in sorted(name for name in os.environ if name.startswith("MOBA_")):
        _line(name, os.environ[name] + ("" if name in fields | OTHER_VARIABLES else "  (unknown: nothing reads it)"))
    try:
        _line("used by --spec", config_from_environment().describe())
        _line("dense kernels", f"MOBA_DENSE={dense_setting()}")
    except (TypeError, ValueError) as error:
        _line("used by --spec", f"FAIL: {error}")
        return False
    wrong = [name for name in SWITCHES if os.environ.get(name, "") not in ("", "0", "1")]
    for name in wrong:
        _line(name, f"FAIL: must be 0 or 1, got {os.environ[name]!r}")
    return not wrong


def self_test() -> bool:
    print("self-test")
    checks = [("reference = definition", lambda: check_definition("reference")),
              # with topk covering every chunk MoBA is causal attention
              ("reference = torch, where dense", lambda: _compare(
                  _operator(16, 7, "reference"), lambda q, k, v, cu_seqlens: _torchs(q, k, v), 1e-10)),
              ("backend torch = definition", lambda: check_definition("torch"))]
    if torch.cuda.is_available():
        checks.append(("kernels = reference, bf16", lambda: _compare(
            _operator(64, 4, "triton"), _operator(64, 4, "reference"), LIMIT_BF16, 1000, torch.bfloat16, "cuda", 64)))
        if flash_attn_4.fits(torch.cuda.get_device_capability(), FLASH_4) and flash_attn_4.module():
            checks.append(("flash-attn 4 = definition", check_flash_attn_4))
    if not _import_problem("megatron.core"):
        checks.append(("Megatron core attention", check_core_attention))
    healthy = True
    for name, check in checks:
        start = time.perf_counter()
        try:
            _line(name, f"ok, {check()} ({time.perf_counter() - start:.1f} s)")
        except Exception as error:  # a report, not a traceback: any failure is a finding
            _line(name, f"FAIL: {flash_attn_4.said(error)}")
            healthy = False
    return healthy


def check_definition(backend: str) -> str:
    """MoBA against a masked softmax that is written straight from the definition."""
    chunk, topk = 16, 3

    def definition(q, k, v, cu_seqlens):
        means = torch.stack([part.mean(0) for part in k.split(chunk)]).repeat_interleave(2, 1)
        own = torch.arange(len(q)) // chunk
        scores = torch.einsum("thd,chd->htc", q, means).detach()
        scores.masked_fill_(torch.arange(len(means)) >= own[:, None], -torch.inf)
        best = scores.topk(topk - 1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True) & (scores > -torch.inf)
        return _torchs(q, k, v, (chosen[:, :, own] | (own[:, None] == own)).tril())

    return _compare(_operator(chunk, topk, backend), definition, 1e-10)


def _torchs(q, k, v, mask=None):
    """torch's attention, causal or masked by bool ``[h, t, t]``."""
    heads = (x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    return torch.nn.functional.scaled_dot_product_attention(*heads, mask, is_causal=mask is None)[0].transpose(0, 1)


def check_flash_attn_4() -> str:
    """Forward and backward, as before its first use."""
    if problem := flash_attn_4.disagreement(FLASH_4):
        raise AssertionError(f"{problem}: dense layers go on without it")
    return f"bf16, head dim {HEAD_DIM}"


def check_core_attention() -> str:
    """A MoBA layer of the installed Megatron-Core, one process."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from .megatron.core_attention import MoBACoreAttention
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2,
                               attention_dropout=0.0)
    core = MoBACoreAttention(config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self",
                             moba_config=MoBAConfig(chunk_size=16, topk=3))
    where = (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float64, "cpu")
    return _compare(lambda q, k, v, cu_seqlens: core(q[:, None], k[:, None], v[:, None])[:, 0],
                    lambda *packed: _operator(16, 3)(*packed).flatten(1), 1e-12, 100, *where)


def _operator(chunk_size: int, topk: int, backend: str = "auto"):
    return lambda q, k, v, cu_seqlens: moba_attn_varlen(q, k, v, cu_seqlens, len(q), chunk_size, topk, backend=backend)


def _compare(ours, expected, limit: float, tokens: int = 100, dtype: torch.dtype = torch.float64, device: str = "cpu",
             head_dim: int = 16) -> str:
    """The largest relative RMS error of o, dq, dk and dv between two ways to attend, with 4 query and 2 kv heads."""
    results = []
    for attend in (ours, expected):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(tokens, heads, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
                   .requires_grad_() for heads in (4, 2, 2))
        o = attend(q, k, v, torch.tensor([0, tokens], dtype=torch.int32, device=device)).double()
        results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    error = torch.stack([(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(*results)]).max().item()
    if not error <= limit:  # NaN too
        raise AssertionError(f"relative error {error:.2e}, at most {limit:.0e} expected")
    return f"relative error {error:.1e}"


def _import_problem(module: str) -> str | None:
    """Why a module cannot be imported, None if it can. Broken installations raise all kinds of errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return flash_attn_4.said(error)
    return None


def _line(name: str, text: str) -> None:
    print(f"    {name:<30} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
