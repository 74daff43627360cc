"""flash-attn 4 as a dense kernel: stand-ins with its functions' signatures show how they are called."""
import logging
import sys

import pytest
import torch

from moba_megatron import doctor
from moba_megatron.ops import dense, flash_attn_4
from moba_megatron.ops.dense import CUDNN, FLASH, FLASH_4, dense_kernel
from moba_megatron.ops.flash_attn_4 import Variant
from moba_megatron.ops.moba_attention import causal_attn_varlen

SCALE = 0.21
VARIANT = Variant(torch.device("cpu"), torch.float16, 16, 16, 2)


class StandIns:
    """Its functions, computed by plain torch; ``calls`` holds what each call was given besides tensors."""

    def __init__(self):
        self.calls, self.spoil = [], lambda name, results: results

    # flash_attn/cute/interface.py of flash-attn-4 4.0.0b36
    def _flash_attn_fwd(self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
                        causal=False, softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None,
                        tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384, num_splits=1,
                        pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None,
                        return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
                        k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
                        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False):
        assert return_lse  # without it there is none where no input needs a gradient
        return self.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                            causal, (window_size_left, window_size_right)) + (None, None, None)

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
                        window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128,
                        num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
                        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2,
                        V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
                        score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
                        block_sparse_tensors=None, dlse=None, learnable_sink=None):
        return self.backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                             max_seqlen_k, softmax_scale, causal, (window_size_left, window_size_right), deterministic)

    def forward(self, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window):
        self.note("forward", cu_q, cu_k, max_q, max_k, causal, window)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        o, lse = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype), torch.zeros(q.shape[1], q.shape[0])
        for rows, q, k, v in parts(cu_q, q, k, v):
            scores = masked(scale * q @ k.mT)
            o[rows] = (scores.softmax(2) @ v).transpose(0, 1).to(o.dtype)
            lse[:, rows] = scores.logsumexp(2).float()
        return self.spoil("forward", (o, lse))

    def backward(self, do, dlse, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, scale, causal, window, deterministic):
        assert lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32 and lse.is_contiguous()
        assert dlse is None or dlse.shape == lse.shape and dlse.is_contiguous()
        self.note("backward", cu_q, cu_k, max_q, max_k, causal, window, deterministic, dlse is not None)
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
        group, dlse = q.shape[1] // k.shape[1], torch.zeros_like(lse) if dlse is None else dlse
        for rows, q, k, v, do, o in parts(cu_q, q, k, v, do, o):
            p = masked(scale * q @ k.mT - lse[:, rows, None]).exp()
            ds = scale * p * (do @ v.mT - (do * o).sum(2, keepdim=True) + dlse[:, rows, None])
            dq[rows] = (ds @ k).transpose(0, 1).to(dq.dtype)
            for place, x in ((dk, ds.mT @ q), (dv, p.mT @ do)):
                place[rows] = x.unflatten(0, (-1, group)).sum(1).transpose(0, 1).to(place.dtype)
        return self.spoil("backward", (dq, dk, dv))

    def note(self, way, cu_q, cu_k, max_q, max_k, causal, window, *options):
        assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and causal and window in ((-1, -1), (None, None))
        assert max_q == max_k >= cu_q.diff().max()
        self.calls.append((way, *options))


def parts(cu, q, *others):
    """Each sequence's slice and its heads' rows ``[H, n, *]``, fp64, kv heads repeated."""
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        rows = slice(start, end)
        yield rows, *(x[rows].double().transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0)
                      for x in (q, *others))


def masked(scores):
    return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)


@pytest.fixture
def install(monkeypatch, caplog):
    """``install()`` puts stand-ins on this machine, and a card into it; returns them."""
    flash_attn_4.module.cache_clear()
    dense._say.cache_clear()
    monkeypatch.setattr(flash_attn_4, "_checked", {})
    monkeypatch.delenv("MOBA_DENSE", raising=False)
    caplog.set_level(logging.INFO, "moba_megatron")

    def put(card=(10, 0)):
        stand_ins = StandIns()
        for name in ("cutlass", "flash_attn.cute.interface"):
            monkeypatch.setitem(sys.modules, name, stand_ins)
        monkeypatch.setattr(dense, "_capability", lambda device: card)
        monkeypatch.setattr(dense, "_cudnn_takes", lambda *_: False)
        return stand_ins

    yield put
    flash_attn_4.module.cache_clear()


def run(backend="auto", dtype=torch.float16, dims=(16, 16), heads=(4, 2), lengths=(70, 0, 1, 33), lse_weight=0.0,
        deterministic=False):
    """o, lse, dq, dk, dv of the public operator; ``reference`` computes in fp64."""
    generator = torch.Generator().manual_seed(7)
    leaves = [torch.randn(sum(lengths), number, dim, generator=generator).to(dtype) for number, dim in
              ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))]
    weights = torch.randn(sum(lengths), heads[0], dims[1], generator=generator, dtype=torch.float64)
    leaves = [x.to(torch.float64 if backend == "reference" else dtype).requires_grad_() for x in leaves]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    o, lse = causal_attn_varlen(*leaves, cu_seqlens, max(lengths), softmax_scale=SCALE, return_lse=True,
                                backend=backend, deterministic=deterministic)
    loss = (o.double() * weights.to(dtype)).sum()
    if lse_weight:
        loss = loss + lse_weight * lse.double().square().sum()
    return [o, lse, *torch.autograd.grad(loss, leaves)]


def assert_right(results, **options):
    for name, ours, exact in zip(("o", "lse", "dq", "dk", "dv"), results, run("reference", **options)):
        error = ((ours.double() - exact).norm() / exact.norm()).item()
        assert error < 2e-3, f"{name}: {error:.1e}"  # fp16: 2^-11 a rounding, o's again in the backward


CASES = {
    "packed": dict(heads=(2, 2)),
    "gqa": dict(heads=(6, 2)),
    "mqa": dict(heads=(3, 1)),
    "latent": dict(heads=(2, 2), dims=(192, 128)),
    "deterministic": dict(deterministic=True),
    "lse": dict(lse_weight=0.3),
}


@pytest.mark.parametrize("case", CASES)
def test_results_and_arguments(case, install, monkeypatch, caplog):
    stand_ins = install()
    monkeypatch.setenv("MOBA_DENSE", "fa4")
    assert_right(run(**CASES[case]), **CASES[case])
    options = CASES[case].get("deterministic", False), "lse_weight" in CASES[case]
    assert stand_ins.calls[-1] == ("backward", *options) and f"by {FLASH_4}" in caplog.text
    checked = len(stand_ins.calls)
    run(**CASES[case])
    assert len(stand_ins.calls) == checked + 2  # checked once, then forward and backward alone
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


SPOILED = {
    "o": lambda way, x: (x[0] * 1.05, x[1]) if way == "forward" else x,
    "lse": lambda way, x: (x[0], x[1] / 0.6931) if way == "forward" else x,  # log2
    "dk": lambda way, x: (x[0], x[1].roll(1, 0), x[2]) if way == "backward" else x,
    "dv": lambda way, x: (x[0], x[1], x[2] * torch.nan) if way == "backward" else x,
}


@pytest.mark.parametrize("name", SPOILED)
def test_wrong_results_decline(name, install, caplog):
    stand_ins = install()
    stand_ins.spoil = SPOILED[name]
    assert not flash_attn_4.usable(VARIANT) and not flash_attn_4.usable(VARIANT)
    said = "goes on without flash-attn 4 (torch.float16, head dim 16 and 16, 2 q heads a kv head, deterministic=False"
    assert caplog.text.count(said) == 1 and f"the relative error of {name} is" in caplog.text
    q, k = torch.zeros(32, 4, 16, dtype=torch.float16), torch.zeros(32, 2, 16, dtype=torch.float16)
    assert dense_kernel(q, k, k, torch.tensor([0, 32], dtype=torch.int32), 32) == FLASH
    assert len(stand_ins.calls) <= 3  # one check


def test_a_lost_scale_declines(install, monkeypatch, caplog):
    install()
    right = StandIns.forward
    monkeypatch.setattr(StandIns, "forward", lambda self, *arguments: right(self, *arguments[:7], None, *arguments[8:]))
    assert not flash_attn_4.usable(VARIANT)
    assert "the relative error of" in caplog.text


def test_gradients_that_only_claim_to_be_deterministic_decline(install, caplog):
    stand_ins = install()
    stand_ins.spoil = lambda way, x: (x[0] * (1 + 1e-3 * torch.rand(1, dtype=torch.float16)), *x[1:])
    assert flash_attn_4.usable(VARIANT)
    assert not flash_attn_4.usable(VARIANT._replace(deterministic=True))
    assert "deterministic gradients differ between two runs" in caplog.text


def test_another_signature_declines_and_the_results_stay_right(install, monkeypatch, caplog):
    install()
    monkeypatch.setenv("MOBA_DENSE", "fa4")
    monkeypatch.setattr(StandIns, "_flash_attn_bwd", lambda self, q, k, v, out, dout, lse, dq, dk, dv: (dq, dk, dv))
    assert_right(run())
    assert caplog.text.count("without flash-attn 4") == 1 and "TypeError" in caplog.text
    assert "by the project's own kernels" in caplog.text


def test_without_dlse_only_gradients_of_lse_decline(install, monkeypatch, caplog):
    """As the first betas are."""
    install()
    right = StandIns._flash_attn_bwd

    def without_dlse(self, *arguments, **options):
        if "dlse" in options:
            raise TypeError("unexpected keyword argument 'dlse'")
        return right(self, *arguments, **options)

    monkeypatch.setattr(StandIns, "_flash_attn_bwd", without_dlse)
    assert flash_attn_4.usable(VARIANT) and not caplog.text
    assert not flash_attn_4.usable(VARIANT._replace(with_dlse=True)) and "'dlse'" in caplog.text


@pytest.mark.parametrize("missing", flash_attn_4.MODULES)
def test_absence_is_silent(missing, install, monkeypatch, caplog):
    """Also where only its compiler is there, or only flash-attn 2."""
    install()
    monkeypatch.delitem(sys.modules, "flash_attn.cute.interface")
    monkeypatch.setitem(sys.modules, missing.split(".")[0], None)
    assert flash_attn_4.module() is None and not caplog.text
    monkeypatch.setenv("MOBA_DENSE", "fa4")
    with pytest.raises(ImportError, match="MOBA_DENSE=fa4 asks for flash-attn 4, which cannot be imported"):
        run()


def test_a_broken_installation_is_said(monkeypatch, install, tmp_path, caplog):
    install()
    monkeypatch.delitem(sys.modules, "cutlass")
    (tmp_path / "cutlass.py").write_text("import cutlass_that_is_not_built")
    monkeypatch.syspath_prepend(tmp_path)
    assert flash_attn_4.module() is flash_attn_4.module() is None
    assert caplog.text.count("without flash-attn 4: ModuleNotFoundError: No module named 'cutlass_that_is") == 1


@pytest.mark.parametrize("place, name", [(flash_attn_4, "is_capturing"), (torch.compiler, "is_compiling")],
                         ids=["captured", "compiled"])
def test_nothing_is_checked_while_others_look_on(place, name, install, monkeypatch):
    stand_ins = install()
    with monkeypatch.context() as patched:
        patched.setattr(place, name, lambda *_: True)
        assert not flash_attn_4.usable(VARIANT) and not stand_ins.calls
    assert flash_attn_4.usable(VARIANT)
    monkeypatch.setattr(place, name, lambda *_: True)
    assert flash_attn_4.usable(VARIANT)


ORDER = [  # card, sequences of one length, deterministic, MOBA_DENSE, kernel
    ((9, 0), False, False, "", FLASH_4), ((9, 0), True, False, "", CUDNN), ((9, 0), True, True, "", FLASH_4),
    ((10, 0), False, False, "auto", FLASH_4), ((10, 0), False, True, "", FLASH_4), ((8, 0), False, False, "", FLASH),
    ((8, 6), False, True, "", None), ((12, 0), True, True, "", None), ((12, 0), False, False, "", FLASH),
    ((9, 0), False, False, "flash2", FLASH), ((9, 0), True, True, "flash2", None),
    ((9, 0), True, False, "fa4", FLASH_4), ((8, 0), True, False, "fa4", None), ((9, 0), False, False, "cudnn", None),
    ((9, 0), True, False, "own", None),
]


@pytest.mark.parametrize("card, one_length, deterministic, setting, expected", ORDER)
def test_order(card, one_length, deterministic, setting, expected, install, monkeypatch):
    install(card)
    monkeypatch.setattr(dense, "_cudnn_takes", lambda *_: one_length)
    monkeypatch.setenv("MOBA_DENSE", setting)
    q = torch.zeros(64, 2, 16, dtype=torch.bfloat16)
    kernel = dense_kernel(q, q, q, torch.tensor([0, 32, 64], dtype=torch.int32), 32, deterministic=deterministic,
                          exact=True)
    assert kernel == expected


def test_sizes():
    def fits(card, dim, dim_v, group=1):
        return flash_attn_4.fits(card, VARIANT._replace(dim=dim, dim_v=dim_v, group=group))

    assert fits((9, 0), 256, 256, 4) and fits((10, 3), 256, 256) and fits((10, 0), 192, 128, 4)
    assert not fits((10, 0), 192, 192) and not fits((9, 0), 192, 128, 4)
    assert not fits((12, 0), 64, 64) and not fits((8, 0), 64, 64) and not fits((9, 0), 64, 128)


@pytest.mark.parametrize("setting", ["fa3", "fa5"])
def test_an_unknown_setting_is_refused(setting, monkeypatch, capsys):
    monkeypatch.setenv("MOBA_DENSE", setting)
    said = f"environment variable MOBA_DENSE must be one of auto, cudnn, flash2, fa4, own; got '{setting}'"
    with pytest.raises(ValueError, match=said):
        run()
    assert doctor.main(["--no-self-test"]) == 1 and f"FAIL: {said}" in capsys.readouterr().out


def test_the_doctor_tests_it(install, monkeypatch):
    stand_ins = install()
    monkeypatch.setattr(doctor, "FLASH_4", doctor.FLASH_4._replace(device=torch.device("cpu")))
    assert doctor.check_flash_attn_4() == "bf16, head dim 128"
    stand_ins.spoil = SPOILED["dk"]
    with pytest.raises(AssertionError, match="the relative error of dk is .*: dense layers go on without it"):
        doctor.check_flash_attn_4()
