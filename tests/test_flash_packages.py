"""flash-attn 4, 3 and 2 as dense kernels: stand-ins with the packages' signatures show how they are called."""
import logging
import sys

import pytest
import torch

from moba_megatron import doctor
from moba_megatron.ops import dense, flash_packages
from moba_megatron.ops.dense import CUDNN, FLASH, FLASH_2, FLASH_3, FLASH_4, dense_kernel
from moba_megatron.ops.flash_packages import Variant
from moba_megatron.ops.moba_attention import causal_attn_varlen

CARD = {FLASH_2: (8, 6), FLASH_3: (9, 0), FLASH_4: (10, 0)}
SETTING = {FLASH_2: "flash2", FLASH_3: "fa3", FLASH_4: "fa4"}
SCALE = 0.21


class StandIns:
    """The packages' functions, computed by plain torch; ``calls`` holds what each call was given besides tensors."""

    def __init__(self):
        self.calls, self.spoil = [], lambda name, results: results

    # flash_attn/flash_attn_interface.py of flash-attn 2.8.3; 2.7 lacks zero_tensors
    def _flash_attn_varlen_forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                   softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
                                   alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
                                   seqused_k=None, zero_tensors=False):
        assert dropout_p == 0 and not return_softmax
        return self.forward(FLASH_2, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                            causal, (window_size_left, window_size_right)) + (q[:0], q[:0])

    def _flash_attn_varlen_backward(self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                                    max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                                    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
                                    zero_tensors=False):
        assert dropout_p == softcap == 0 and alibi_slopes is None
        grads = self.backward(FLASH_2, dout, None, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                              max_seqlen_k, softmax_scale, causal, (window_size_left, window_size_right), deterministic)
        for place, grad in zip((dq, dk, dv), grads):
            place.copy_(grad)
        return softmax_lse

    # hopper/flash_attn_interface.py, version 3.0.0, commit 0251105a
    def _flash_attn_forward(self, q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None,
                            cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
                            max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
                            rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None,
                            softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
                            attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
                            num_splits=1, pack_gqa=None, sm_margin=0):
        return self.forward(FLASH_3, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                            causal, (window_size_left, window_size_right)) + (q[:0], q[:0])

    def _flash_attn_backward(self, dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
                             sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
                             softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
                             softcap=0.0, deterministic=False, sm_margin=0):
        grads = self.backward(FLASH_3, dout, None, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                              max_seqlen_k, softmax_scale, is_causal, (window_size_left, window_size_right),
                              deterministic)
        for place, grad in zip((dq, dk, dv), grads):
            place.copy_(grad)
        return softmax_lse

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
        return self.forward(FLASH_4, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                            causal, (window_size_left, window_size_right)) + (None, None, None)

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
                        window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128,
                        num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
                        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2,
                        V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
                        score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
                        block_sparse_tensors=None, dlse=None, learnable_sink=None):
        return self.backward(FLASH_4, dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                             max_seqlen_k, softmax_scale, causal, (window_size_left, window_size_right), deterministic)

    def forward(self, package, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window):
        self.note(package, "forward", cu_q, cu_k, max_q, max_k, causal, window)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        o, lse = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype), torch.zeros(q.shape[1], q.shape[0])
        for rows, q, k, v in parts(cu_q, q, k, v):
            scores = masked(scale * q @ k.mT)
            o[rows] = (scores.softmax(2) @ v).transpose(0, 1).to(o.dtype)
            lse[:, rows] = scores.logsumexp(2).float()
        return self.spoil("forward", (o, lse))

    def backward(self, package, do, dlse, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, scale, causal, window,
                 deterministic):
        assert lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32 and lse.is_contiguous()
        assert dlse is None or dlse.shape == lse.shape and dlse.is_contiguous()
        self.note(package, "backward", cu_q, cu_k, max_q, max_k, causal, window, deterministic, dlse is not None)
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
        group, dlse = q.shape[1] // k.shape[1], torch.zeros_like(lse) if dlse is None else dlse
        for rows, q, k, v, do, o in parts(cu_q, q, k, v, do, o):
            p = masked(scale * q @ k.mT - lse[:, rows, None]).exp()
            ds = scale * p * (do @ v.mT - (do * o).sum(2, keepdim=True) + dlse[:, rows, None])
            dq[rows] = (ds @ k).transpose(0, 1).to(dq.dtype)
            for place, x in ((dk, ds.mT @ q), (dv, p.mT @ do)):
                place[rows] = x.unflatten(0, (-1, group)).sum(1).transpose(0, 1).to(place.dtype)
        return self.spoil("backward", (dq, dk, dv))

    def note(self, package, way, cu_q, cu_k, max_q, max_k, causal, window, *options):
        assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and causal and window in ((-1, -1), (None, None))
        assert max_q == max_k >= cu_q.diff().max()
        self.calls.append((package, way, *options))


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
    """``install(package, ...)`` puts stand-ins on this machine, on the first one's card; returns them."""
    names = {FLASH_2: ["flash_attn.flash_attn_interface"], FLASH_3: ["flash_attn_interface"],
             FLASH_4: ["cutlass", "flash_attn.cute.interface"]}
    flash_packages.module_of.cache_clear()
    dense._say.cache_clear()
    monkeypatch.setattr(flash_packages, "_checked", {})
    monkeypatch.delenv("MOBA_DENSE", raising=False)
    caplog.set_level(logging.INFO, "moba_megatron")

    def put(*packages, card=None):
        stand_ins = StandIns()
        for module in (name for package in packages for name in names[package]):
            monkeypatch.setitem(sys.modules, module, stand_ins)
        monkeypatch.setattr(dense, "_capability", lambda device: card or CARD[packages[0]])
        monkeypatch.setattr(dense, "_cudnn_takes", lambda *_: False)
        return stand_ins

    yield put
    flash_packages.module_of.cache_clear()


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
CANNOT = {(FLASH_2, "latent"), (FLASH_2, "lse"), (FLASH_3, "lse")}


@pytest.mark.parametrize("package", CARD)
@pytest.mark.parametrize("case", CASES)
def test_results_and_arguments(case, package, install, monkeypatch, caplog):
    stand_ins = install(package)
    monkeypatch.setitem(dense.CHOICES, "flash2", (FLASH_2,))  # without torch's own
    monkeypatch.setenv("MOBA_DENSE", SETTING[package])
    results = run(**CASES[case])
    assert_right(results, **CASES[case])
    options = CASES[case].get("deterministic", False), "lse_weight" in CASES[case]
    if (package, case) == (FLASH_2, "latent"):
        assert not stand_ins.calls
    elif (package, case) in CANNOT:
        assert stand_ins.calls[-1][:2] == (package, "forward")  # gradients from the project's own stages
    else:
        assert stand_ins.calls[-1] == (package, "backward", *options)
        assert f"by {package}" in caplog.text
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
    stand_ins = install(FLASH_3)
    stand_ins.spoil = SPOILED[name]
    variant = Variant(torch.device("cpu"), torch.float16, 16, 16, 2)
    assert not flash_packages.usable(FLASH_3, variant) and not flash_packages.usable(FLASH_3, variant)
    said = "goes on without flash-attn 3 (torch.float16, head dim 16 and 16, 2 q heads a kv head, deterministic=False"
    assert caplog.text.count(said) == 1 and f"the relative error of {name} is" in caplog.text
    assert len(stand_ins.calls) <= 3  # one check


def test_a_lost_scale_declines(install, monkeypatch, caplog):
    install(FLASH_4)
    right = StandIns.forward
    monkeypatch.setattr(StandIns, "forward", lambda self, *arguments: right(self, *arguments[:8], None, *arguments[9:]))
    assert not flash_packages.usable(FLASH_4, Variant(torch.device("cpu"), torch.float16, 16, 16, 2))
    assert "the relative error of" in caplog.text


def test_gradients_that_only_claim_to_be_deterministic_decline(install, caplog):
    stand_ins = install(FLASH_3)
    stand_ins.spoil = lambda way, x: (x[0] * (1 + 1e-3 * torch.rand(1, dtype=torch.float16)), *x[1:])
    variant = Variant(torch.device("cpu"), torch.float16, 16, 16, 2)
    assert flash_packages.usable(FLASH_3, variant)
    assert not flash_packages.usable(FLASH_3, variant._replace(deterministic=True))
    assert "deterministic gradients differ between two runs" in caplog.text


def test_another_signature_declines_and_the_results_stay_right(install, monkeypatch, caplog):
    install(FLASH_3, FLASH_4)
    monkeypatch.setattr(StandIns, "_flash_attn_backward", lambda self, dout, q, k, v, out, softmax_lse, dq, dk, dv: dq)
    assert_right(run())
    assert caplog.text.count("without flash-attn 3") == 1 and "TypeError" in caplog.text
    assert "by flash-attn 4" in caplog.text


def test_absence_is_silent_and_a_broken_installation_is_said(monkeypatch, install, tmp_path, caplog):
    install(FLASH_4)
    assert flash_packages.module_of(FLASH_3) is None and not caplog.text
    flash_packages.module_of.cache_clear()
    (tmp_path / "flash_attn_interface.py").write_text("import flash_attn_3_that_is_not_built")
    monkeypatch.syspath_prepend(tmp_path)
    assert flash_packages.module_of(FLASH_3) is flash_packages.module_of(FLASH_3) is None
    assert caplog.text.count("without flash-attn 3: ModuleNotFoundError: No module named 'flash_attn_3_that") == 1
    monkeypatch.setenv("MOBA_DENSE", "fa3")
    monkeypatch.setattr(dense, "_capability", lambda device: (9, 0))
    with pytest.raises(ImportError, match="MOBA_DENSE=fa3 asks for flash-attn 3, which cannot be imported"):
        run()


def test_nothing_is_checked_while_a_graph_is_captured(install, monkeypatch):
    stand_ins = install(FLASH_4)
    variant = Variant(torch.device("cpu"), torch.bfloat16, 16, 16, 1)
    with monkeypatch.context() as patched:
        patched.setattr(flash_packages, "is_capturing", lambda device: True)
        assert not flash_packages.usable(FLASH_4, variant) and not stand_ins.calls
    assert flash_packages.usable(FLASH_4, variant)
    monkeypatch.setattr(flash_packages, "is_capturing", lambda device: True)
    assert flash_packages.usable(FLASH_4, variant)


ORDER = [  # card, sequences of one length, deterministic, MOBA_DENSE, kernel
    ((9, 0), False, False, "", FLASH_3), ((9, 0), True, False, "", CUDNN), ((9, 0), True, True, "", FLASH_3),
    ((10, 0), False, False, "auto", FLASH_4), ((10, 0), False, True, "", FLASH_4), ((8, 0), False, False, "", FLASH),
    ((8, 6), False, True, "", FLASH_2), ((12, 0), True, True, "", FLASH_2), ((12, 0), False, False, "", FLASH),
    ((9, 0), False, False, "flash2", FLASH), ((9, 0), True, True, "flash2", FLASH_2),
    ((9, 0), True, False, "fa4", FLASH_4), ((8, 0), True, False, "fa3", None), ((9, 0), False, False, "cudnn", None),
    ((9, 0), True, False, "own", None),
]


@pytest.mark.parametrize("card, one_length, deterministic, setting, expected", ORDER)
def test_order(card, one_length, deterministic, setting, expected, install, monkeypatch):
    install(FLASH_2, FLASH_3, FLASH_4, card=card)
    monkeypatch.setattr(dense, "_cudnn_takes", lambda *_: one_length)
    monkeypatch.setenv("MOBA_DENSE", setting)
    q = torch.zeros(64, 2, 16, dtype=torch.bfloat16)
    kernel = dense_kernel(q, q, q, torch.tensor([0, 32, 64], dtype=torch.int32), 32, deterministic=deterministic,
                          exact=True)
    assert kernel == expected


def test_sizes():
    def fits(package, card, dim, dim_v, group=1, **options):
        return flash_packages.fits(package, card, Variant(torch.device("cpu"), torch.float16, dim, dim_v, group,
                                                          **options))

    assert fits(FLASH_4, (9, 0), 256, 256, 4) and fits(FLASH_4, (10, 3), 256, 256)
    assert fits(FLASH_4, (10, 0), 192, 128, 4)
    assert not fits(FLASH_4, (10, 0), 192, 192) and not fits(FLASH_4, (9, 0), 192, 128, 4)
    assert not fits(FLASH_4, (12, 0), 64, 64) and not fits(FLASH_4, (9, 0), 64, 128)
    assert fits(FLASH_3, (9, 0), 256, 256) and not fits(FLASH_3, (9, 0), 256, 256, deterministic=True)
    assert fits(FLASH_3, (9, 0), 192, 128, 4) and not fits(FLASH_3, (10, 0), 64, 64)
    assert not fits(FLASH_3, (9, 0), 64, 64, with_dlse=True) and not fits(FLASH_2, (9, 0), 192, 128)
    assert fits(FLASH_2, (8, 0), 64, 64) and not fits(FLASH_2, (7, 5), 64, 64)


def test_an_unknown_setting_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("MOBA_DENSE", "fa5")
    said = "environment variable MOBA_DENSE must be one of auto, cudnn, flash2, fa3, fa4, own; got 'fa5'"
    with pytest.raises(ValueError, match=said):
        run()
    assert doctor.main(["--no-self-test"]) == 1 and f"FAIL: {said}" in capsys.readouterr().out
