"""DeepSpeed on two CPU ranks: ZeRO, Ulysses and context parallelism train as plain torch does, resume, convert."""
import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, torchrun

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")
import pretrain_deepspeed as job  # noqa: E402
from prepare_data import main as prepare_data  # noqa: E402
from pretraining import data  # noqa: E402
from pretraining.agreement import SharedError  # noqa: E402
from pretraining.monitor import read_log  # noqa: E402
from pretraining.torch_gpt import GPT, GPTConfig  # noqa: E402

from benchmarks import compare_deepspeed, report, zero  # noqa: E402
from moba_megatron import MoBAConfig  # noqa: E402
from moba_megatron.deepspeed import MoBAAttention, SequenceParallel  # noqa: E402
from moba_megatron.ops import moba_attention  # noqa: E402

# Four sequences a step: two micro batches for each of two ranks, four where both share each sequence.
FLAGS = ["--num-layers", "3", "--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2",
         "--seq-length", "128", "--moba-chunk-size", "16", "--moba-topk", "3", "--moba-full-attention-layers", "last:1",
         "--train-iters", "4", "--lr", "1e-2", "--lr-warmup-iters", "1", "--weight-decay", "0.1", "--log-interval", "1",
         "--split", "1,0,0"]
SHARED = {"ulysses": ["--sequence-parallel", "ulysses", "--sequence-parallel-size", "2"],
          "zigzag": ["--sequence-parallel", "zigzag", "--sequence-parallel-size", "2"]}
RECOMPUTE = ["--activation-checkpointing"]
RUNS = {
    "zero0": ["--zero-stage", "0"],
    "zero1": ["--zero-stage", "1"],
    "zero2": ["--zero-stage", "2", *RECOMPUTE],
    "zero3": ["--zero-stage", "3"],
    "zero1-ulysses": ["--zero-stage", "1", *SHARED["ulysses"]],
    "zero3-ulysses": ["--zero-stage", "3", *SHARED["ulysses"], *RECOMPUTE],
    "zero2-zigzag": ["--zero-stage", "2", *SHARED["zigzag"]],
    "zero3-zigzag": ["--zero-stage", "3", *SHARED["zigzag"], *RECOMPUTE],
}
RESUMED = ("zero1-ulysses", "zero2-zigzag", "zero3-zigzag")
UNIVERSAL = {"zero1-ulysses": "zero2-zigzag", "zero3-zigzag": "zero3"}  # saved as: loaded as
BF16 = ("zero2-zigzag", "zero3-ulysses")
COMPARED = ("torch/none/512", "zero3/none/512", "zero2/zigzag/512")


OTHERWISE = {
    ("--ffn-hidden-size", "64"): "--ffn-hidden-size 128, this run has 64",
    ("--zero-stage", "3"): "written with --zero-stage 1, this run has 3: give the checkpoint's value, or convert it",
    ("--bf16",): "written with --bf16 False, this run has True",
    ("--universal-checkpoint",): "there is no .*latest_universal; make it with",
}
RETUNED = ("zero0", "zero3-zigzag")
RETUNING = ("--lr", "3e-2", "--min-lr", "1e-3", "--weight-decay", "0.5")  # from the third step on


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    words = "the quick brown fox jumps over the lazy dog and the dog sleeps on".split()
    (directory / "words.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 1500)))
    prefix = directory / "words"
    assert prepare_data(["--input", str(directory / "words.txt"), "--output-prefix", str(prefix)]) == 0
    return prefix


def flags(data_path: Path, *more: str) -> list[str]:
    return [*FLAGS, "--data-path", str(data_path), "--global-batch-size", "4", *more]


def work(rank, size, data_path, directory):
    """Everything that needs two ranks, in the same two processes: starting them takes longer than most of it."""
    train(rank, data_path, directory)
    compare_deepspeed.compare(compare_deepspeed.parse_args([
        "--data-path", str(data_path), "--json", f"{directory}/compared.json", "--rows", *COMPARED]),
        torch.device("cpu"))
    return attend(rank, size), train_llama(rank, size)


def train(rank, data_path, directory):
    """All runs of the example, one after the other; what they did is in their logs."""
    from deepspeed.checkpoint import ds_to_universal

    device = job.moba_deepspeed.init_distributed()

    def run(name, *more):
        log = ["--log-jsonl", f"{directory}/{name}.jsonl"]
        job.pretrain(job.parse_args(flags(data_path, *log, *more)), device)

    for name, settings in RUNS.items():
        run(name, *settings)
    for name in BF16:
        run(f"bf16-{name}", *RUNS[name], "--bf16")
    for name in RESUMED:
        place = f"{directory}/{name}"
        run(f"resumed-{name}", *RUNS[name], "--save", place, "--exit-interval", "2")
        run(f"resumed-{name}", *RUNS[name], "--load", place)
    run("zero1-as-2", "--zero-stage", "2", *SHARED["ulysses"], "--load", f"{directory}/zero1-ulysses")
    for more, message in OTHERWISE.items():
        with pytest.raises(SharedError, match=message):
            run("other", *RUNS["zero1-ulysses"], "--load", f"{directory}/{RESUMED[0]}", *more)
    settings = Path(directory, f"settings{rank}.json")
    settings.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}, "bf16": {},
                                    "gradient_accumulation_steps": "auto"}))
    run("merged", *RUNS["zero2"], "--deepspeed-config", str(settings))
    for name in RETUNED:
        place = f"{directory}/retuned-{name}"
        run(f"retuned-{name}", *RUNS[name], "--save", place, "--save-interval", "1", "--exit-interval", "2")
        run(f"retuned-{name}", *RUNS[name], "--load", place, *RETUNING)
        damage(rank, place)
        run(f"damaged-{name}", *RUNS[name], "--load", place)
    for saved, loaded in UNIVERSAL.items():
        place = f"{directory}/{saved}"
        if rank == 0:
            ds_to_universal.main(argparse.Namespace(
                input_folder=f"{place}/iter_0000002", output_folder=f"{place}/universal", num_extract_workers=1,
                num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False))
        dist.barrier()
        run(f"universal-{saved}", *RUNS[loaded], "--load", place, "--universal-checkpoint")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, data_path) -> tuple[Path, list]:
    """The directory of the logs, and each rank's results."""
    directory = tmp_path_factory.mktemp("logs")
    return directory, run_ranks(work, 2, tmp_path_factory.mktemp("ranks"), data_path, str(directory))


@pytest.fixture(scope="module")
def logs(ranks) -> Path:
    return ranks[0]


def damage(rank, place):
    """Cuts the largest file of the last checkpoint short."""
    if rank == 0:
        file = max(Path(place, "iter_0000002").iterdir(), key=lambda file: file.stat().st_size)
        with open(file, "r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
    dist.barrier()


@pytest.fixture(scope="module")
def plain(data_path) -> list[tuple]:
    return train_plainly(data_path)


def train_plainly(data_path, changes=()) -> list[tuple]:
    """The same training in one process by torch alone: (loss, gradient norm, learning rate) of each step.

    With other flags from the third step on, if given.
    """
    args = job.parse_args(flags(data_path, "--micro-batch-size", "4"))
    blend, tokenizer = data.read_tokenizer(args.data_path)
    dataset, _ = data.build_datasets(args, blend, tokenizer)
    torch.manual_seed(args.seed)
    sizes = GPTConfig(vocab_size=tokenizer.vocab_size, **{name: getattr(args, name) for name in job.ARCHITECTURE})
    model = GPT(sizes, partial(MoBAAttention, args.moba_config, num_layers=args.num_layers))
    groups = [{"params": [p for name, p in model.named_parameters() if ("norm" in name) == norm],
               "weight_decay": 0.0 if norm else args.weight_decay} for norm in (False, True)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.adam_beta1, args.adam_beta2))
    curve = []
    for batch in torch.utils.data.DataLoader(dataset, batch_sampler=data.Samples(args, 0, 0, args.train_iters)):
        if len(curve) == 2 and changes:
            args = job.parse_args(flags(data_path, "--micro-batch-size", "4", *changes))
        for group, weight_decay in zip(groups, (args.weight_decay, 0.0)):
            group.update(lr=args.lr * job._lr_factor(args, len(curve)), weight_decay=weight_decay)
        loss = model(batch["tokens"], batch["position_ids"], batch["labels"]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        curve.append((loss.item(), norm.item(), optimizer.param_groups[0]["lr"]))
        optimizer.step()
        optimizer.zero_grad()
    return curve


def curve(logs: Path, name: str) -> list[tuple]:
    return [(r["loss"], r["grad_norm"], r["lr"]) for r in read_log(logs / f"{name}.jsonl")["step"]]


class TestTraining:
    def test_plain_torch_learns(self, plain):
        assert len(plain) == 4 and plain[-1][0] < plain[0][0] - 0.5

    @pytest.mark.parametrize("name", RUNS)
    def test_loss_and_gradient_equal_plain_torch(self, logs, plain, name):
        # Sums in another order differ by fp32 rounding, which Adam enlarges where a gradient is near zero.
        assert np.array(curve(logs, name)) == pytest.approx(np.array(plain), rel=1e-4)

    @pytest.mark.parametrize("name", BF16)
    def test_bf16_follows(self, logs, plain, name):
        got, want = ([loss for loss, _, _ in c] for c in (curve(logs, f"bf16-{name}"), plain))
        assert got == pytest.approx(want, rel=2e-2)  # the weights are rounded to 2^-9

    @pytest.mark.parametrize("name", RESUMED)
    def test_resumed_run_is_bitwise_the_uninterrupted_one(self, logs, name):
        records = read_log(logs / f"resumed-{name}.jsonl")
        assert [r["iteration"] for r in records["start"]] == [0, 2]
        assert curve(logs, f"resumed-{name}") == curve(logs, name)

    def test_zero_1_resumes_as_2(self, logs, plain):
        assert np.array(curve(logs, "zero1-as-2")) == pytest.approx(np.array(plain[2:]), rel=1e-4)

    @pytest.mark.parametrize("name", RETUNED)
    def test_resuming_obeys_the_flags(self, logs, data_path, name):
        got, want = np.array(curve(logs, f"retuned-{name}")), np.array(train_plainly(data_path, RETUNING))
        assert got == pytest.approx(want, rel=1e-4)
        assert want[2, 2] > 2 * want[1, 2] and want[3, 0] != train_plainly(data_path, RETUNING[:4])[3][0]

    @pytest.mark.parametrize("name", RETUNED)
    def test_a_damaged_checkpoint_is_passed_over(self, logs, name):
        records = read_log(logs / f"damaged-{name}.jsonl")
        assert [r["iteration"] for r in records["start"]] == [1]
        assert curve(logs, f"damaged-{name}") == curve(logs, name)[1:]

    def test_settings_are_merged_into_sections(self, logs, plain):
        """A bucket size leaves the stage as it is, an empty section the dtype."""
        assert np.array(curve(logs, "merged")) == pytest.approx(np.array(plain), rel=1e-4)
        engine = read_log(logs / "merged.jsonl")["start"][0]["engine"]
        assert engine == {"ZeRO stage": 2, "bf16": False, "micro batch": 1, "accumulation": 2,
                          "gradient clipping": 1.0, "reduce bucket": 1000}

    @pytest.mark.parametrize("name", UNIVERSAL)
    def test_universal_checkpoint_resumes_otherwise(self, logs, plain, name):
        assert np.array(curve(logs, f"universal-{name}")) == pytest.approx(np.array(plain[2:]), rel=1e-4)

    def test_universal_checkpoint_resumes_on_one_rank_under_torchrun(self, logs, plain, data_path):
        log = logs / "one.jsonl"
        result = torchrun(1, "pretrain_deepspeed", *flags(
            data_path, "--zero-stage", "2", "--log-jsonl", str(log), "--load", str(logs / "zero1-ulysses"),
            "--universal-checkpoint"))
        assert result.returncode == 0, result.stderr[-4000:]
        assert np.array(curve(logs, "one")) == pytest.approx(np.array(plain[2:]), rel=1e-4)


def test_comparison_of_zero_stages(logs):
    result = report.load(logs / "compared.json")
    plain, *others = result["rows"]
    assert {row["name"] for row in result["rows"]} == set(COMPARED) and plain["zero_stage"] is None
    assert plain["steps"][-1]["loss"] < plain["steps"][0]["loss"] - 1e-3
    for row in others:
        assert row["status"] == "ok" and len(row["steps"]) == 6
        assert zero.loss_difference(row, plain, 1) < 1e-3 and zero.loss_difference(row, plain) < 5e-3  # bf16
    lines = zero.TABLE.lines(result)
    assert [line["ZeRO"] for line in lines] == ["plain torch", "3", "2"]
    assert [bool(line["in any step by"]) for line in lines] == [False, True, True]


def attend(rank, size):
    """Outputs and gradients of whole sequences and of sequences over two ranks, this rank's part of them."""
    config, found = MoBAConfig(8, 2, full_attention_from_step=5), {}
    for method in SHARED:
        parallel = SequenceParallel.over_ranks(method, size)
        for kv_heads, iteration in ((1, 0), (2, 0), (4, 0), (2, 5)):
            torch.manual_seed(0)
            qkv = [torch.randn(2, 64, heads, dim, dtype=torch.float64)
                   for heads, dim in ((4, 16), (kv_heads, 16), (kv_heads, 8))]
            do = torch.randn(2, 64, 4, 8, dtype=torch.float64)
            found[method, kv_heads, iteration] = [
                _attend(config, who, iteration, qkv, do, parallel) for who in (SequenceParallel(), parallel)]
    return found


def _attend(config, who, iteration, qkv, do, parallel):
    qkv = [x.clone().requires_grad_() for x in qkv]
    module = MoBAAttention(config, 1, 2, who)
    module.iteration = iteration
    o = module(*(who.part(x) for x in qkv))
    o.backward(who.part(do))
    if who is not parallel:
        return [parallel.part(x) for x in (o.detach(), *(x.grad for x in qkv))]
    return [o.detach(), *(parallel.part(x.grad) for x in qkv)]


def test_sequences_over_ranks_equal_whole_ones(ranks):
    for result, _ in ranks[1]:
        assert len(result) == 8
        for whole, shared in result.values():
            for want, got in zip(whole, shared):
                assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dense", (True, False))
def test_whole_sequences_are_known_to_be_of_one_length(monkeypatch, dense):
    """Without that knowledge dense layers would lose cuDNN."""
    calls = []
    monkeypatch.setattr(job.moba_deepspeed.attention, "moba_attention",
                        lambda *args, **options: (calls.append(args[3]), moba_attention(*args, **options))[1])
    config = MoBAConfig(8, 2, full_attention_layers="all" if dense else "none")
    assert MoBAAttention(config, 1, 1)(*(torch.randn(2, 40, 2, 16) for _ in range(3))).shape == (2, 40, 2, 16)
    (segments,) = calls
    assert segments.exact and segments.packed and segments.chunk_size == (40 if dense else 8)


def train_llama(rank, size):
    """(loss, gradient norm) of a Llama's steps by torch on whole sequences, and by Ulysses for Transformers under ZeRO.

    The second sequence of tokens is two packed documents: their positions say so.
    """
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from huggingface_models import model, tokens

    from moba_megatron import register_moba

    config = MoBAConfig(4, 3, full_attention_layers="last:1")
    register_moba(config)
    ids = tokens(3, 65)
    positions = torch.arange(64).repeat(3, 1)
    positions[1, 40:] -= 40

    def steps(llama, part, loss_of, step):
        curve = []
        for i in range(3):
            inputs, labels, at = (part(x[i:i + 1]) for x in (ids[:, :-1], ids[:, 1:], positions))
            logits = llama(input_ids=inputs, position_ids=at, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            curve.append(step(loss_of(losses)))
        return curve

    def plain():
        llama = model(dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)

        def step(loss):
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item(), norm.item()

        return steps(llama, lambda x: x, torch.mean, step)

    def ulysses(stage):
        llama = model(dtype=torch.float32)
        optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=llama, optimizer=optimizer, config={
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}})
        engine.train()

        def step(loss):
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            return mean.item() / size, float(engine.get_global_grad_norm())

        return steps(engine, parallel.part,
                     lambda losses: job.moba_deepspeed.mean_over_ranks(losses, torch.ones_like(losses)), step)

    want = plain()
    register_moba(MoBAConfig(8, 1))  # Ulysses keeps the function that it finds, which must not keep these settings
    UlyssesSPAttentionHF.register_with_transformers(
        model(dtype=torch.float32), core_attn_implementation="moba", sequence_parallel_size=size, micro_batch_size=1)
    register_moba(config)
    parallel = SequenceParallel("ulysses", size, rank)  # its parts of sequences; the groups are DeepSpeed's here
    return want, [ulysses(stage) for stage in (1, 3)]


def test_ulysses_for_transformers_trains_as_plain_torch(ranks):
    for _, (want, found) in ranks[1]:
        assert want[-1][0] != want[0][0]
        for got in found:
            assert np.array(got) == pytest.approx(np.array(want), rel=1e-4)


OUT_OF_RANGE = {
    "--global-batch-size -4": "1, got -4", "--num-query-groups -2": "1, got -2", "--ffn-hidden-size -3": "1, got -3",
    "--save-interval -1": "1, got -1", "--exit-interval 0": "1, got 0", "--clip-grad -1": "0 and finite, got -1.0",
    "--adam-beta1 2": "0 and below 1, got 2.0", "--weight-decay nan": "0 and finite, got nan",
    "--lr inf": "0 and finite, got inf", "--rotary-base 0": "1 and finite, got 0.0"}


class TestBadInput:
    def test_heads_that_ulysses_cannot_split(self):
        module = MoBAAttention(MoBAConfig(8, 2), 1, 1)
        object.__setattr__(module, "parallel", SequenceParallel("ulysses", 2))
        module.ulysses = object
        with pytest.raises(ValueError, match="got 3 and 3: use zigzag"):
            module(*(torch.randn(1, 8, 3, 4) for _ in range(3)))

    @pytest.mark.parametrize("name", ["k", "v"])
    def test_batch_and_sequence_that_change_places(self, name):
        shapes = {"q": (2, 8, 4, 16), "k": (2, 8, 2, 16), "v": (2, 8, 2, 16), name: (8, 2, 2, 16)}
        with pytest.raises(ValueError, match=name + " must have q's batch and sequence .2, 8., got .8, 2."):
            MoBAAttention(MoBAConfig(4, 2), 1, 1)(*map(torch.randn, shapes.values()))

    @pytest.mark.parametrize("method, length, message", [
        pytest.param("ulysses", 9, "multiple of the 2 ranks", id="ulysses"),
        pytest.param("zigzag", 10, "multiple of 2 \\* context_parallel_size", id="zigzag")])
    def test_lengths_that_do_not_divide(self, method, length, message):
        with pytest.raises(ValueError, match=message):
            SequenceParallel(method, 2).part(torch.zeros(1, length))

    @pytest.mark.parametrize("more, message", [
        pytest.param(["--sequence-parallel-size", "2"], "goes with --sequence-parallel-size", id="size without method"),
        pytest.param([*SHARED["zigzag"], "--seq-length", "126"], "--seq-length must be a multiple of 4", id="length"),
        pytest.param([*SHARED["ulysses"][:3], "3"], "must divide the 2 processes", id="processes"),
        pytest.param(["--num-query-groups", "3"], "--num-query-groups must divide", id="groups"),
        pytest.param(["--hidden-size", "36"], "--hidden-size must be an even multiple", id="hidden size"),
        pytest.param(["--global-batch-size", "3"], "--global-batch-size must be a multiple", id="batch"),
        pytest.param(["--zero-stage", "0", "--bf16"], "--bf16 needs --zero-stage", id="bf16 without ZeRO"),
        pytest.param(["--save-interval", "2"], "needs --save", id="save interval"),
        pytest.param(["--min-lr", "1"], "--min-lr must be between", id="lr"),
        pytest.param(["--lr-warmup-iters", "4"], "--lr-warmup-iters must be below", id="warmup"),
        pytest.param(["--moba-key-conv", "3"], "MoBAConfig.key_conv must be 0 under DeepSpeed", id="key conv"),
        pytest.param(["--moba-cp-head-groups", "2"], "MoBAConfig.cp_head_groups must be None", id="head groups"),
        pytest.param(["--deepspeed-config", "none.json"], "none.json must be a JSON file", id="no settings"),
        *((flag.split(), f"{flag.split()[0]} must be at least {message}") for flag, message in OUT_OF_RANGE.items()),
    ], ids=str)
    def test_flags_are_judged_before_anything_starts(self, monkeypatch, capsys, more, message):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SystemExit) as exit:
            job.parse_args(flags(Path("x"), *more))
        assert exit.value.code == 2 and message in capsys.readouterr().err

    @pytest.mark.parametrize("settings, message", [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage must be 1, as the flags make it, got 2: change "
                                              "--zero-stage instead"),
        ({"bf16": {"enabled": True}}, "bf16.enabled must be False, as the flags make it, got True: change --bf16"),
        ({"bf16": True}, "bf16 must be an object, got True"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps must be 2, as the flags make it, got 1"),
        ({"train_batch_size": 8}, "train_batch_size must be absent, as the flags make it, got 8: change --global"),
        ({"gradient_clipping": 0.5}, "gradient_clipping must be 1.0, as the flags make it, got 0.5: change --clip"),
        ({"optimizer": {"type": "SGD"}}, "optimizer must be absent"),
        ([], "must hold an object, got []"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 must be absent, as the flags make it, got {'enabled': True}: "
                                          "change --bf16 instead"),
        ({"fp16": {"enabled": True}}, "fp16.enabled must be False, as the flags make it, got True: change --bf16"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled must be False"),
        ({"amp": {"enabled": True}}, "amp must be absent, as the flags make it"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size must be absent, as the flags make it, got 2: change"),
        ({"data_parallel_size": 3}, "data_parallel_size must be absent, as the flags make it, got 3: change the "),
        ({"unknown_key": 1, "timers": {}, "gradient_cliping": 1}, "DeepSpeed knows no gradient_cliping, unknown_key"),
    ], ids=str)
    def test_settings_that_contradict_the_flags(self, monkeypatch, capsys, tmp_path, settings, message):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(settings))
        with pytest.raises(SystemExit):
            job.parse_args(flags(Path("x"), "--deepspeed-config", str(file)))
        assert message in capsys.readouterr().err

    def test_settings_that_only_repeat_the_flags_or_that_deepspeed_knows_pass(self, monkeypatch, tmp_path):
        monkeypatch.setenv("WORLD_SIZE", "2")
        settings = {"fp16": {"enabled": False, "loss_scale": 0}, "bf16": {"enabled": "auto"}, "torch_autocast": {},
                    "activation_checkpointing": {"cpu_checkpointing": False}, "aio": {}, "flops_profiler": {},
                    "tensorboard": {"enabled": False}, "comms_logger": {}, "wall_clock_breakdown": True,
                    "zero_allow_untested_optimizer": True, "compile": {}, "autotuning": {"enabled": False}}
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(settings))
        made = job.parse_args(flags(Path("x"), "--deepspeed-config", str(file))).deepspeed_settings
        assert not made["fp16"]["enabled"] and not made["bf16"]["enabled"] and made["wall_clock_breakdown"]
        assert settings.keys() <= made.keys()
