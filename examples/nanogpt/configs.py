"""Defines the settings of a run, three configurations and the command line."""

import argparse
import dataclasses
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import optax_matrix as om
from examples import flags
from examples.flags import flag

# Learning rates for `tiny` at the optimizers' default momenta, from a few short runs;
# larger models need smaller ones. Tuned rates and momenta are in docs/convergence.md.
# Units depend on the optimizer: a `muon` step has a spectral norm of about `lr`, an
# `adamw` step changes each entry by about `lr`, and a `muonh` step rotates a matrix by
# about `lr` radians.
LEARNING_RATES = {
    "sgd": 0.3,
    "momentum": 0.1,
    "adagrad": 0.02,
    "rmsprop": 1e-3,
    "adam": 3e-3,
    "adam_l2": 3e-3,
    "adamw": 8e-3,
    "sign_sgd": 5e-4,
    "lion": 1.6e-3,
    "muon": 0.04,
    "muonw": 0.04,
    "muonh": 0.06,
    "adamh": 0.01,
    "adamuon": 3e-3,
    "normuon": 0.06,
    "dion": 0.02,
    "muown": 3e-3,
    "hopper": 3e-3,
    "halley_muon": 0.024,
    "muon_vs": 6e-3,
    "muon_nsr": 6e-3,
    "muon_squared": 0.04,
    "mano": 3e-3,
    "shampoo": 4e-3,
    "distributed_shampoo": 4e-3,
    "soap": 4e-3,
    "kl_soap": 4e-3,
    "soap_muon": 0.03,
    "nanochat_muon": 0.06,
    "track3": 0.0375,
    "spectral_sphere": 0.1,
    "spel": 0.12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Every field is a flag of `train.py`; the defaults are `tiny`."""

    config: str = flag("tiny", "the configuration that the other flags modify")
    # Model
    layers: int = flag(3, "number of transformer blocks")
    width: int = flag(128, "channels of the residual stream")
    head_dim: int = flag(32, "channels per attention head; heads = width / head_dim")
    context: int = flag(128, "context length in tokens")
    qk_norm: int = flag(
        1, "1 normalizes queries and keys, which bounds attention logits; 0 does not"
    )
    dtype: str = flag(
        "auto",
        "dtype of matrix products: float32, bfloat16, or auto = bfloat16 on a GPU or "
        "TPU; parameters are float32",
    )
    # Data
    data: str = flag(
        "stdlib",
        "stdlib (the source of Python's standard library), sotu, fineweb, a text "
        "file, or a folder of .bin shards",
    )
    tokenizer: str = flag(
        "bytes",
        "tokenizer for text: bytes, bpe (trained on the text), or the path of a "
        "tokenizer.json",
    )
    bpe_vocab: int = flag(4096, "vocabulary size of `--tokenizer bpe`")
    data_dir: str = flag(
        "data/fineweb10B", "folder for fineweb; missing shards are downloaded into it"
    )
    shards: int = flag(
        1, "number of fineweb training shards, 100M tokens and 200 MB each"
    )
    # Optimization
    optimizer: str = flag("muon", "a name from optax_matrix.OPTIMIZERS")
    lr: float | None = flag(
        None, "learning rate; default: see LEARNING_RATES in configs.py"
    )
    aux_lr: float = flag(
        3e-3,
        "learning rate of AdamW, which trains all parameters but the hidden matrices "
        "if the optimizer is a matrix optimizer; same schedule",
    )
    settings: dict[str, Any] = flag(  # noqa: RUF009 (copied for each instance)
        {},
        "further arguments of the optimizer, as a JSON object, such as "
        '{"refresh": 5, "preconditioner": {"stagger": true}}',
    )
    steps: int = flag(250, "optimizer steps")
    batch_size: int = flag(16, "sequences per step, over all devices and micro-batches")
    accumulate: int = flag(
        1, "micro-batches per step; more save memory without changing the step"
    )
    warmup: int = flag(0, "steps of linear warmup of the learning rate")
    cooldown: float = flag(
        0.7, "fraction of the steps, at the end, with a linear decay to zero"
    )
    clip: float = flag(
        0.0, "maximum global norm of the raw gradient; 0 disables clipping"
    )
    qk_clip: float = flag(
        0.0,
        "attention logit above which `om.qk_clip` shrinks the projections of a head; "
        "0 disables it",
    )
    seed: int = flag(0, "seed of the initial parameters and of the order of the data")
    # Devices
    mesh: str = flag(
        "",
        "mesh axes and their sizes, from data, fsdp and tensor, such as "
        "data=2,fsdp=4; default: all devices on data",
    )
    mesh_axes: str = flag("auto", "type of the mesh axes: auto or explicit")
    distributed: bool = flag(
        False,
        "run as one of several processes, each with its own devices; JAX detects the "
        "cluster (Slurm, TPU pod, ...) unless the next three flags describe it",
    )
    coordinator: str | None = flag(
        None, "host:port of process 0, the same in all processes"
    )
    processes: int | None = flag(None, "number of processes")
    process: int | None = flag(None, "index of this process, from 0")
    # Reporting
    log_every: int = flag(10, "steps between records of the training loss")
    val_every: int = flag(100, "steps between validations")
    val_windows: int = flag(256, "windows per validation, always the same ones")
    sample: int = flag(200, "tokens to sample at the end; 0 disables sampling")
    prompt: str = flag("def ", "prompt of the sample")
    temperature: float = flag(0.8, "sampling temperature; lower is less random")
    out: str | None = flag(
        None,
        "folder for metrics, checkpoints and the plot; none: write nothing; default: "
        "runs/CONFIG-OPTIMIZER-SEED, with a number appended if that exists",
    )
    checkpoint_every: int = flag(
        100, "steps between checkpoints; 0 disables checkpoints"
    )
    resume: bool = flag(
        False,
        "continue the run in the output folder exactly; the default folder is then "
        "the newest",
    )
    overwrite: bool = flag(False, "delete the contents of the output folder first")
    compare: tuple[str, ...] = flag((), "folders of other runs to add to the plot")
    quiet: bool = flag(False, "print nothing")


# Fields that may differ between a run and its continuation. They do not affect the
# training, except that mesh and processes change the order of summation.
PRESENTATION = {
    *("mesh", "mesh_axes", "distributed", "coordinator", "processes", "process"),
    *("sample", "prompt", "temperature", "out", "checkpoint_every", "resume"),
    *("overwrite", "compare", "quiet", "data_dir"),
}

# Optimizers whose steps return to a norm of the weights.
FIXED_NORM = {"muonh", "adamh", "spectral_sphere", "spel"}

POSITIVE = (
    *("layers", "width", "head_dim", "context", "bpe_vocab", "shards", "steps"),
    *("batch_size", "accumulate", "log_every", "val_every", "val_windows"),
    "temperature",
)
NOT_NEGATIVE = (
    *("lr", "aux_lr", "warmup", "cooldown", "clip", "qk_clip", "seed", "sample"),
    "checkpoint_every",
)

TINY = Config()

PRESETS = {
    # 0.66M parameters.
    "tiny": TINY,
    # 6.8M parameters, for a GPU or TPU.
    "small": dataclasses.replace(
        TINY,
        config="small",
        layers=6,
        width=256,
        head_dim=64,
        context=256,
        steps=2000,
        batch_size=64,
        tokenizer="bpe",
        val_every=250,
        checkpoint_every=500,
    ),
    # 124M parameters, 162M with the untied head. As in the track, a step has 0.5M
    # tokens; the float32 logits of a micro-batch take 3.3 GB.
    "gpt2-small": dataclasses.replace(
        TINY,
        config="gpt2-small",
        layers=12,
        width=768,
        head_dim=128,
        context=1024,
        data="fineweb",
        shards=18,
        steps=3375,
        batch_size=512,
        accumulate=32,
        val_every=125,
        val_windows=10240,
        checkpoint_every=500,
        prompt="The ",
    ),
}


def identity(config: Config) -> dict[str, Any]:
    """Returns the fields that determine the numbers of a run."""
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in fields if name not in PRESENTATION}


def resolve(config: Config) -> Config:
    """Checks a configuration and fills in the default learning rate."""
    if config.optimizer not in om.OPTIMIZERS:
        names = ", ".join(sorted(om.OPTIMIZERS))
        raise ValueError(
            f"`optimizer` must be one of {names}; got {config.optimizer!r}"
        )
    if config.lr is None:
        if config.optimizer not in LEARNING_RATES:
            raise ValueError(f"`{config.optimizer}` has no default: pass `--lr`")
        config = dataclasses.replace(config, lr=LEARNING_RATES[config.optimizer])
    # Here, because the optimizers cannot check learning rates inside schedules.
    # Comparisons with NaN are false.
    for name in POSITIVE:
        if not 0 < getattr(config, name) < math.inf:
            given = getattr(config, name)
            raise ValueError(f"`{name}` must be positive and finite, got {given}")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(config, name) < math.inf:
            given = getattr(config, name)
            raise ValueError(f"`{name}` must be finite and at least 0, got {given}")
    if config.cooldown > 1:
        raise ValueError(
            f"`cooldown` must be a fraction of the steps, from 0 to 1, got "
            f"{config.cooldown}"
        )
    if config.qk_norm not in (0, 1):
        raise ValueError(f"`qk_norm` must be 0 or 1, got {config.qk_norm}")
    if config.qk_clip and config.qk_norm:
        raise ValueError(
            "`qk_clip` has no effect on the logits of normalized queries and keys: add "
            f"`--qk-norm 0`, or leave out `--qk-clip {config.qk_clip:g}`"
        )
    if config.qk_clip and config.optimizer in FIXED_NORM:
        raise ValueError(
            f"`{config.optimizer}` restores the norms that `qk_clip` lowers: leave out "
            f"`--qk-clip {config.qk_clip:g}`, or choose another optimizer"
        )
    if config.sample and not config.prompt:
        raise ValueError("`prompt` must not be empty if `sample` is positive")
    which = (config.coordinator, config.processes, config.process)
    if which != (None, None, None) and (not config.distributed or None in which):
        raise ValueError(
            "`coordinator`, `processes` and `process` must be given together and with "
            f"`distributed`; got {which} and distributed={config.distributed}"
        )
    return config


def built(optimizer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with objects of `optax_matrix` built from JSON objects.

    `preconditioner` changes fields of the optimizer's default, such as `SOAP()`.
    `orthogonalize` has the fields of `NewtonSchulz`; for `dion` it changes those of
    `LargestSlices`, whose `method` has the fields of `NewtonSchulz`.
    """
    settings = dict(given)
    fields = settings.get("preconditioner")
    parameters = inspect.signature(om.OPTIMIZERS[optimizer]).parameters
    if isinstance(fields, dict) and "preconditioner" in parameters:
        default = parameters["preconditioner"].default
        settings["preconditioner"] = dataclasses.replace(default, **fields)
    fields = settings.get("orthogonalize")
    if isinstance(fields, dict):
        default = getattr(parameters.get("orthogonalize"), "default", None)
        settings["orthogonalize"] = _method(default, fields)
    return settings


def _method(default: Any, fields: dict[str, Any]) -> om.PolarMethod:
    if not isinstance(default, om.LargestSlices):
        return om.NewtonSchulz(**fields)
    if isinstance(fields.get("method"), dict):
        fields = fields | {"method": om.NewtonSchulz(**fields["method"])}
    return dataclasses.replace(default, **fields)


def compute_dtype(config: Config) -> str:
    """Returns the dtype of matrix products."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if jax.default_backend() in ("gpu", "tpu") else "float32"


def parser() -> argparse.ArgumentParser:
    """Returns a parser with one flag per field of `Config`."""
    result = argparse.ArgumentParser(
        prog="python -m examples.nanogpt.train",
        description="Trains a GPT with any optimizer of optax_matrix.",
        epilog="Defaults in brackets are those of `tiny`; `--config` changes them.",
    )
    choices = {
        "config": PRESETS,
        "dtype": ("auto", "float32", "bfloat16"),
        "mesh_axes": ("auto", "explicit"),
        "optimizer": sorted(om.OPTIMIZERS),
    }
    flags.add(result, TINY, choices)
    result.set_defaults(config="tiny")
    return result


def from_command_line(arguments: list[str] | None = None) -> Config:
    """Returns the configuration of the command line; exits if a flag is invalid."""
    given = vars(parser().parse_args(arguments))
    config = dataclasses.replace(PRESETS[given.pop("config")], **given)
    config = dataclasses.replace(config, compare=tuple(config.compare))
    if config.out == "none":
        config = dataclasses.replace(config, out=None)
    elif config.out is None:
        base = f"runs/{config.config}-{config.optimizer}-{config.seed}"
        newest, free, number = base, base, 1
        while Path(free).exists():
            number += 1
            newest, free = free, f"{base}-{number}"
        old = config.resume or config.overwrite
        config = dataclasses.replace(config, out=newest if old else free)
    try:
        return resolve(config)
    except ValueError as error:
        parser().error(str(error))
