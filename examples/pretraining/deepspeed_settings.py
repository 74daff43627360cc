"""DeepSpeed's settings: what the flags make, joined with the file of --deepspeed-config."""
import json
import sys
from pathlib import Path

from deepspeed import DeepSpeedConfig

FLAG_OF = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size",
    "gradient_clipping": "--clip-grad",
    "bf16.enabled": "--bf16",
    "bfloat16": "--bf16",  # DeepSpeed's older name, which it reads where bf16 is absent
    "fp16.enabled": "--bf16",
    "torch_autocast.enabled": "--bf16",
    "amp": "--bf16",
    "sequence_parallel_size": "--sequence-parallel-size",
    "data_parallel_size": "the number of processes or --sequence-parallel-size",
    "elasticity": "--global-batch-size and --micro-batch-size",
    "zero_optimization.stage": "--zero-stage",
    "checkpoint.load_universal": "--universal-checkpoint",
    "optimizer": "--lr, --weight-decay, --adam-beta1 and --adam-beta2",
    "scheduler": "--lr, --min-lr and --lr-warmup-iters",
}
"""What --deepspeed-config may only repeat: the program reads it from flags."""


def deepspeed_config(args) -> dict:
    """The settings for `deepspeed.initialize`: the flags', and those of --deepspeed-config in every section.

    Raises:
        ValueError: the file cannot be read, contradicts a flag, or has a section that DeepSpeed does not know.
    """
    config = {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
        "gradient_clipping": args.clip_grad,
        "bf16": {"enabled": args.bf16},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": args.zero_stage},
        "checkpoint": {"load_universal": args.universal_checkpoint},
        "steps_per_print": sys.maxsize,
    }
    if args.deepspeed_config:
        try:
            given = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--deepspeed-config {args.deepspeed_config} must be a JSON file: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"--deepspeed-config {args.deepspeed_config} must hold an object, got {given!r}")
        _merge(config, given, args.deepspeed_config)
        unknown = sorted(given.keys() - known_settings())
        if unknown:
            raise ValueError(f"--deepspeed-config {args.deepspeed_config}: DeepSpeed knows no {', '.join(unknown)}, "
                             "and would ignore it")
    return config


class _Lookups(dict):
    """Notes the names that are looked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.names = set(self)

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def keys(self):
        return self


def known_settings() -> set[str]:
    """The top-level names that the installed DeepSpeed looks for (it has no list of them), and those of FLAG_OF."""
    lookups = _Lookups({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(lookups)
    return lookups.names | {path.split(".")[0] for path in FLAG_OF}


def _merge(config: dict, given: dict, file: str, section: str = "") -> None:
    for name, value in given.items():
        path, old = section + name, config.get(name)
        if isinstance(old, dict):
            if not isinstance(value, dict):
                raise ValueError(f"--deepspeed-config {file}: {path} must be an object, got {value!r}")
            _merge(old, value, file, path + ".")
        elif path not in FLAG_OF:
            config[name] = value
        elif value not in (old, "auto"):
            made = "absent" if old is None else repr(old)
            raise ValueError(f"--deepspeed-config {file}: {path} must be {made}, as the flags make it, got {value!r}: "
                             f"change {FLAG_OF[path]} instead")
