"""Kills, damaged files and absurd arguments, counted in docs/robustness.md.

All but the tests of the base of `examples/rl` and of the counts are slow.
"""

import dataclasses
import functools
import inspect
import json
import pydoc
import re
import shutil
import sys
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_matrix as om
from examples.nanogpt import configs, data, train
from examples.rl import base
from tests import killed
from tests.optimizers import test_arguments
from tests.programs import Programs
from tests.test_distributed import free_port

ROOT = Path(__file__).parents[1]

# -------------------------------------------------------------------------- kills

KILLS, STEPS = 20, 50
ARRAYS = 504  # of parameters and states, of all optimizers


class Workers(Programs):
    """`tests.killed` as one process, or as two that train together."""

    def __init__(self, folder, processes):
        commands = [[sys.executable, "-m", "tests.killed", str(folder), str(STEPS)]]
        if processes == 2:
            address = f"localhost:{free_port()}"
            commands = [[*commands[0], address, str(i)] for i in range(2)]
        # Compiling takes most of the time: it is done once, without optimizations, and
        # the programs are kept on disk, see `conftest.py`.
        flags = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        super().__init__(commands, folder, **flags)

    def wait_until(self, ready, limit=300):
        """Waits while no process fails."""
        end = time.monotonic() + limit
        while not ready():
            assert not any(p.poll() for p in self.processes), self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.002)

    def finish(self):
        self.wait_until(lambda: any(p.poll() is not None for p in self.processes))
        for process in self.processes:
            assert process.wait(60) == 0, self.output()

    def kill(self, victim, later):
        """Kills one process, and some seconds later the other one, if there is one."""
        process = self.processes[victim]
        process.kill()
        assert process.wait() == -9, self.output()
        if len(self.processes) > 1:
            time.sleep(later)


def newest(folder):
    """The last step whose checkpoint is complete, 0 if there is none."""
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def is_writing(folder):
    return any(folder.glob("*.orbax-checkpoint-tmp*"))


def differences(a, b):
    """The number of arrays, and the names of those that differ in any bit."""
    with np.load(a / killed.FINAL) as a, np.load(b / killed.FINAL) as b:
        assert a.files == b.files
        assert all(np.isfinite(a[name]).all() for name in a.files)
        wrong = [n for n in a.files if a[n].tobytes() != b[n].tobytes()]
    return len(a.files), wrong


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_runs_that_are_killed_end_as_one_that_is_not(processes, tmp_path):
    whole, torn, rng = tmp_path / "whole", 0, np.random.default_rng(processes)
    with Workers(whole, processes) as workers:
        workers.finish()
    before, last = ((whole / str(step)).stat().st_mtime for step in (STEPS - 1, STEPS))
    folder = tmp_path / "killed"
    # Steps may be a few more than wanted when the kill comes.
    wanted = np.sort(rng.choice(np.arange(1, STEPS - 8), KILLS, replace=False))
    for kill, step in enumerate(wanted):
        step = max(step, newest(folder) + 1)
        with Workers(folder, processes) as workers:
            workers.wait_until(lambda step=step: newest(folder) >= step)
            # Every other kill comes while a checkpoint is being written.
            if kill % 2:
                workers.wait_until(lambda: is_writing(folder))
            else:
                time.sleep(rng.uniform(0, last - before))
            workers.kill(rng.integers(processes), later=rng.uniform(0, 0.3))
        torn += is_writing(folder)
        assert step <= newest(folder) < STEPS, workers.output()
    with Workers(folder, processes) as workers:
        workers.finish()
    assert torn >= KILLS // 4
    assert differences(whole, folder) == (ARRAYS, [])


# ------------------------------------------------------------------ damaged files

SMALL = dataclasses.replace(
    configs.TINY, layers=1, width=16, head_dim=16, context=8, steps=2, batch_size=8,
    optimizer="sgd", log_every=1, val_every=2, val_windows=8, sample=0,
    checkpoint_every=1, quiet=True,
)  # fmt: skip
RUNS = {
    "shards": dataclasses.replace(SMALL, data="data", out="shards"),
    "text": dataclasses.replace(
        SMALL,
        data="text.py",
        tokenizer="bpe",
        bpe_vocab=300,
        optimizer="momentum",
        out="text",
    ),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def put(content):
    """Replaces a file by one of another kind."""
    return lambda path: path.write_bytes(content)


def flip(path):
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def drop_a_merge(path):
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))


def of_the_other_run(path):
    shutil.rmtree(path)
    shutil.copytree("text/checkpoints/2", path)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
# The run, the file, what happens to it, and the error of `--resume`. What is not here
# is in tests/test_nanogpt.py: see docs/robustness.md.
DAMAGES = [
    ("shards", "data/a_train_1.bin", truncate, "a_train_1.bin: truncated"),
    ("shards", "data/a_train_1.bin", put(PNG * 9), "a_train_1.bin: magic number"),
    ("shards", "data/a_train_1.bin", flip, "different .* file a_train_1.bin: "),
    ("shards", "data/a_val_1.bin", flip, "different .* file a_val_1.bin: "),
    ("text", "text.py", truncate, "different .* file text.py: "),
    ("text", "text.py", put(PNG * 999), "different .* file text.py: "),
    ("text", "text.py", flip, "different .* file text.py: "),
    ("text", "text/tokenizer.json", truncate, "text/tokenizer.json is not a tokenizer"),
    ("text", "text/tokenizer.json", put(b"{}"), "tokenizer.json is not a tokenizer"),
    ("text", "text/tokenizer.json", drop_a_merge, "different .* file tokenizer.json: "),
    ("shards", "shards/metrics.jsonl", truncate, "shards/metrics.jsonl has no records"),
    ("shards", "shards/metrics.jsonl", put(PNG), "shards/metrics.jsonl"),
    ("shards", "shards/metrics.jsonl", put(b"[1]\n"), "shards/metrics.jsonl, line 1"),
    (
        *("shards", "shards/metrics.jsonl", put(b'{"kind": "train"}\n')),
        "shards/metrics.jsonl does not begin with the settings",
    ),
    (
        *("shards", "shards/metrics.jsonl", replace('"loss"', '"loss')),
        r"shards/metrics.jsonl, line 2: ",
    ),
    (
        *("shards", "shards/metrics.jsonl", replace('"seed": 0', '"seed": 1')),
        "different from shards/metrics.jsonl: seed: 1 -> 0",
    ),
    (
        *("shards", "shards/checkpoints/2", of_the_other_run),
        "checkpoint 2 in .*shards/checkpoints is of another model",
    ),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two steps, of shards and of a text, in a folder."""
    folder = tmp_path_factory.mktemp("runs")
    tokens = np.random.default_rng(0).integers(0, 50000, 2000)
    (folder / "data").mkdir()
    for split in ("train", "val"):
        data.write_shard(folder / "data" / f"a_{split}_1.bin", tokens)
    shutil.copy(pydoc.__file__, folder / "text.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for config in RUNS.values():
            train.train(config)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_with_intact_files_continue(name, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(runs, tmp_path / "copy"))
    result = train.train(dataclasses.replace(RUNS[name], resume=True))
    assert result["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, path, damage, message",
    DAMAGES,
    ids=[f"{i}-{path}" for i, (_, path, *_) in enumerate(DAMAGES)],
)
def test_damaged_files_are_refused_by_name(
    name, path, damage, message, runs, tmp_path, monkeypatch
):
    monkeypatch.chdir(shutil.copytree(runs, tmp_path / "copy"))
    damage(Path(path))
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        train.train(dataclasses.replace(RUNS[name], resume=True))
    # Nothing is overwritten, so that a file can be put back.
    after = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    assert before == after


BASE_DAMAGES = [truncate, put(PNG), put(b""), Path.unlink]


@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("damage", BASE_DAMAGES, ids=range(len(BASE_DAMAGES)))
def test_a_base_of_another_kind_is_refused_by_name(
    suffix, damage, tmp_path, monkeypatch
):
    monkeypatch.setattr(base, "FOLDER", tmp_path)
    monkeypatch.setattr(base, "train", lambda *_: nnx.split(base.make_model(0)))
    load = functools.partial(base.load, 1, 0, quiet=True, say=lambda _: None)
    load()
    (path,) = tmp_path.glob("*.npz")
    load()
    damage(path.with_suffix(suffix))
    if suffix == ".npz" and not path.exists():
        load()  # It is made again.
    else:
        with pytest.raises(ValueError, match=f"{path.name} is damaged: delete it"):
            load()


# --------------------------------------------------------------- absurd arguments

# What arguments do not take, but for those that `takes` lists.
ABSURD = {
    "text": "nonsense",
    "bytes": b"nonsense",
    "object": object(),
    "class": Path,
    "list": [object()],
    "dict": {"nonsense": object()},
    "set": {1, 2},
    "array": np.full((2, 3, 4), np.nan),
    "NaN": float("nan"),
    "infinity": float("inf"),
    "-infinity": float("-inf"),
    "negative": -1.5,
    "complex": 1j,
    "True": True,
    "None": None,
}
# What is no leaf of a tree of arrays.
NO_LEAVES = ("text", "bytes", "object", "class", "set", "complex")
WEIGHTS = {"mlp": {"kernel": np.ones((4, 3), np.float32)}}
STATE = om.muon(0.02).init(WEIGHTS)
IDENTITY = optax.identity()
# Values of arguments without a default, by name, or by function and name.
VALID = {
    **dict.fromkeys(("after", "base", "before", "params", "tree"), WEIGHTS),
    **dict.fromkeys(("updates", "vector"), WEIGHTS),
    **dict.fromkeys(("like", "saved", "state"), STATE),
    **dict.fromkeys(("auxiliary", "direction", "first", "inner"), IDENTITY),
    **dict.fromkeys(("magnitude", "optimizer", "precondition", "second"), IDENTITY),
    **dict.fromkeys(("axes", "start", "step", "steps"), 1),
    **dict.fromkeys(("learning_rate", "lower_bound", "weight_decay"), 0.1),
    "NewtonSchulz.coefficients": "polar_express",
    "backend": "cpu",
    "check_clipping.params": WEIGHTS | {"bias": np.ones(3, np.float32)},
    "every": 2,
    "factors": 1.0,
    "fn": lambda view, leaf: leaf,
    "key": jax.random.key(0),
    "layer": "attn",
    "limit": 1.0,
    "loss": lambda params: jnp.sum(params["mlp"]["kernel"] ** 2),
    "matrix": lambda layout: IDENTITY,
    "name": "muon",
    "projections": lambda path, leaf: None,
    "run": lambda width: [WEIGHTS, WEIGHTS],
    "signal_to_noise.first": WEIGHTS,
    "signal_to_noise.second": WEIGHTS,
    "tx": IDENTITY,
    "unit": "mup",
    "widths": (8, 16),
    "with_learning_rate_factors.optimizer": lambda factor: IDENTITY,
}
# Public, but nothing to pass absurd arguments to.
NOT_CALLED = {
    "CoordinateCheck": "what `coordinate_check` returns",
    "MatrixView": "what `tree_map` passes to functions",
    "PolarMethod": "a protocol",
}
# Trees that may have any leaves.
ANY_LEAVES = {
    "check_refreshes.state": "of any optimizer",
    "describe.params": "modules of Equinox have functions as leaves",
    "describe_placement.params": "as above",
    "evaluation_params.params": "returned as they are without a wrapper",
    "evaluation_params.state": "of any optimizer",
    "refreshes.state": "of any optimizer",
    "route.params": "modules of Equinox have functions as leaves",
}
# Values that are meant.
MEANT = {
    ("QKProjection.layer", "text"): "any name",
    ("describe_state.params", "complex"): "for any optimizer, of complex numbers too",
}
# Trees whose leaves are not those of parameters, and arguments that are checked where
# they meet the parameters.
LABELS = {"factors", "layout", "routing", "sharding", "weight_decay_mask"}


def public():
    """Every public function and class by name."""
    for module in (om, om.diagnostics):
        for name in module.__all__:
            if callable(value := getattr(module, name)) and name not in NOT_CALLED:
                yield name, value


def is_tree(name, annotation):
    any_tree = annotation is typing.Any or "ArrayTree" in str(annotation)
    return any_tree and name not in LABELS


def takes(kind, name, parameter):
    """Returns whether an argument may take a value of `ABSURD`, by its annotation."""
    kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
    if kind == "None":
        return parameter.default is None or type(None) in kinds
    if kind == "True":
        return bool in kinds or name in ("routing", "weight_decay_mask")
    # A class can be called, as schedules and other functions can.
    function = name in LABELS or "Callable" in str(parameter.annotation)
    return kind == "class" and function


def absurd_values(function, name, parameter):
    """The values for one argument, by their kind."""
    where = f"{function}.{name}"
    if is_tree(name, parameter.annotation):
        if where not in ANY_LEAVES:
            for kind in NO_LEAVES:
                if (where, kind) not in MEANT:
                    yield kind, ABSURD[kind]
                    yield f"leaf: {kind}", {"mlp": {"kernel": ABSURD[kind]}}
        return
    for kind, value in ABSURD.items():
        if (where, kind) not in MEANT and not takes(kind, name, parameter):
            yield kind, value


def arguments(function):
    """The arguments of a function that have names."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.items()
    return {name: p for name, p in found if p.kind not in variadic}


def cases():
    return [
        (function, name, kind, value)
        for function, value in public()
        for name, parameter in arguments(value).items()
        for kind, value in absurd_values(function, name, parameter)
    ]


def required(function, parameters):
    return {
        name: VALID.get(f"{function}.{name}", VALID.get(name))
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty or f"{function}.{name}" in VALID
    }


@pytest.mark.slow
@pytest.mark.parametrize("function, called", [*public()])
def test_absurd_arguments_are_refused_by_name(function, called):
    parameters, failures = arguments(called), []
    given = required(function, parameters)
    called(**given)
    for name, parameter in parameters.items():
        tree = is_tree(name, parameter.annotation)
        # An error names the argument, or the path of the leaf.
        named = rf"`{name}[`\[=(]" + ("|'(mlp/kernel)?'" if tree else "")
        for kind, value in absurd_values(function, name, parameter):
            try:
                made = called(**given | {name: value})
                if isinstance(made, optax.GradientTransformation):
                    made.init(WEIGHTS)
                failures.append(f"{name}: {kind} was accepted")
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                if not isinstance(error, TypeError | ValueError):
                    failures.append(f"{name}: {kind} raised {text}")
                elif not re.search(named, text):
                    failures.append(f"{name}: {kind} is not named in {text}")
                elif len(text) > 500:
                    failures.append(f"{name}: {kind} raised {len(text)} characters")
    assert not failures, "\n".join(failures)


def test_every_exception_is_of_an_argument():
    for listed in (*ANY_LEAVES, *(where for where, _ in MEANT)):
        function, name = listed.split(".")
        assert name in arguments(dict(public())[function]), listed


# ------------------------------------------------------------------------- counts


def test_the_documentation_has_the_counts():
    page = (ROOT / "docs" / "robustness.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (?:more than )?([\d,]+) \w+ \| .* \|$", page, re.M)
    one, two, damages, bases, absurd, ranges, random = (
        int(count.replace(",", "")) for _, count in rows
    )
    assert one == two == KILLS
    assert f" all {len(om.MATRIX_OPTIMIZERS)} matrix optimizers" in page
    assert f"After {STEPS} steps" in page and f"up to {len(ABSURD)} values" in page
    assert page.count(f"0 of {ARRAYS} arrays differ") == 2
    assert damages == len(DAMAGES) and bases == len(BASE_DAMAGES) * 2
    assert absurd < len(cases()) < absurd + 1000
    counted = [
        len(test_arguments.BAD[name]) + (not none)
        for _, name, none in test_arguments.CASES
    ]
    assert ranges < sum(counted) < ranges + 1000
    properties = (ROOT / "tests" / "test_properties.py").read_text()
    assert random == sum(map(int, re.findall(r"^@cases\((\d+)\)$", properties, re.M)))
