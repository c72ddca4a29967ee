"""The nanoGPT example on meshes: as on one device, each leaf where it belongs."""

import dataclasses
import pydoc
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_matrix as om
from examples.nanogpt import configs, data, model, sharding, train

P = jax.sharding.PartitionSpec

SMALL = configs.resolve(dataclasses.replace(
    configs.TINY, layers=1, width=32, head_dim=16, context=16, steps=10, batch_size=8,
    data=pydoc.__file__, val_every=10, val_windows=8, log_every=1, sample=0,
    checkpoint_every=0, quiet=True, optimizer="muonh",
))  # fmt: skip

# Sizes, kind of axes, micro-batches.
MESHES = [
    pytest.param("", "auto", 1, marks=pytest.mark.slow),
    pytest.param("data=2,fsdp=4", "auto", 1, marks=pytest.mark.slow),
    pytest.param("data=2,fsdp=4", "explicit", 1, marks=pytest.mark.slow),
    pytest.param("fsdp=8", "auto", 1, marks=pytest.mark.slow),
    pytest.param("data=2,fsdp=2,tensor=2", "auto", 1, marks=pytest.mark.slow),
    ("data=2,fsdp=2,tensor=2", "explicit", 2),
]


def run(mesh, config=SMALL):
    """The losses of a few steps, and the state after them."""
    dataset = data.load(config.data)
    graph, optimizer, state = train.initial(config, 256, mesh)
    step = train.make_step(graph, optimizer, mesh, like=state)
    losses = []
    for i in range(config.steps):
        rows = dataset.train.batch(0, i, config.batch_size, config.context)
        rows = rows.reshape(config.accumulate, -1, config.context + 1)
        state, loss, _ = step(state, sharding.place_batch(rows, mesh))
        losses.append(float(loss))
    return losses, state


def layout(leaf):
    """What is sharded over what, written one way."""
    return (*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))


def assert_lies_like_its_parameter(state):
    """Every leaf of the optimizer with a parameter's path and shape."""

    def names(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    params = {
        "/" + names(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        ends = [name for name in params if names(path).endswith(name)]
        param = params[max(ends, key=len)] if ends else None
        if param is not None and leaf.shape == param.shape:
            assert layout(leaf) == layout(param), names(path)
            found += 1
    # One momentum a matrix, two moments any other leaf.
    matrices = sum("blocks" in name and p.ndim == 2 for name, p in params.items())
    assert found == 2 * len(params) - matrices


@pytest.fixture(scope="module")
def one_device():
    return run(sharding.make_mesh("", "auto", jax.devices()[:1]))


@pytest.mark.parametrize(("mesh", "axes", "accumulate"), MESHES)
def test_a_mesh_trains_as_one_device_does(mesh, axes, accumulate, one_device):
    mesh = sharding.make_mesh(mesh, axes)
    assert mesh.size == 8
    losses, state = run(mesh, dataclasses.replace(SMALL, accumulate=accumulate))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-4)
    assert losses[-1] < losses[0] - 0.2
    assert_lies_like_its_parameter(state)
    specs = sharding.specs(state.params, mesh)
    found = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)
    assert jax.tree.leaves(found) == jax.tree.leaves(specs)
    # It is there that memory is saved, so the pieces themselves are looked at.
    parts = mesh.shape.get("fsdp", 1) * mesh.shape.get("tensor", 1)
    for leaf in jax.tree.leaves(state.params):
        expected = leaf.size // parts if leaf.ndim == 2 else leaf.size
        assert {s.data.size for s in leaf.addressable_shards} == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
@pytest.mark.parametrize("optimizer", ["soap", "shampoo"])
def test_preconditioners_train_as_on_one_device(optimizer, axes):
    config = dataclasses.replace(SMALL, optimizer=optimizer, lr=None)
    config = configs.resolve(dataclasses.replace(config, width=48, steps=6))
    want, _ = run(sharding.make_mesh("", "auto", jax.devices()[:1]), config)
    losses, state = run(sharding.make_mesh("data=2,fsdp=4", axes), config)
    # Bases of first statistics with a null space are rounding, and with them losses.
    np.testing.assert_allclose(losses, want, rtol=1e-3)
    assert losses[-1] < losses[0] - 0.1
    # Four of a shape and one of two others, on eight devices.
    leaves = jax.tree.leaves(state.optimizer)
    matrices = [leaf for leaf in leaves if leaf.ndim == 3]
    assert matrices
    for leaf in matrices:
        assert len({str(s.index) for s in leaf.addressable_shards}) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "axes"),
    [("soap", "auto"), ("soap", "explicit"), ("distributed_shampoo", "auto")],
)
def test_a_preconditioned_run_continues_on_another_mesh(optimizer, axes, tmp_path):
    settings = {"refresh": 2, "preconditioner": {"stagger": True}}
    config = configs.resolve(dataclasses.replace(
        SMALL, optimizer=optimizer, lr=None, settings=settings, width=48, steps=8,
        val_every=8, checkpoint_every=4, out=str(tmp_path / "whole"), mesh_axes=axes,
    ))  # fmt: skip
    whole = train.train_on(sharding.make_mesh("data=2,fsdp=4", axes), config)
    want = [r["loss"] for r in whole["records"] if r["kind"] == "train"]
    # On the first, matrices of one shape are in two stacks instead of one.
    meshes = {"fsdp=4,tensor=2": 8, "data=2,fsdp=2": 4, "fsdp=2": 2, "data=1": 1}
    for sizes, devices in meshes.items():
        folder = tmp_path / sizes
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "checkpoints" / "8")
        mesh = sharding.make_mesh(sizes, axes, jax.devices()[:devices])
        changed = dataclasses.replace(config, out=str(folder), resume=True)
        records = train.train_on(mesh, changed)["records"]
        assert [r["step"] for r in records if r["kind"] == "resume"] == [4]
        found = [r["loss"] for r in records if r["kind"] == "train"]
        # Four steps after the checkpoint, with sums in another order.
        np.testing.assert_allclose(found, want, rtol=1e-5, err_msg=sizes)


def test_a_whole_run_on_explicit_axes(one_device, capsys):
    config = dataclasses.replace(
        SMALL, sample=5, quiet=False, accumulate=2,
        mesh="data=2,fsdp=2,tensor=2", mesh_axes="explicit",
    )  # fmt: skip
    result = train.train(config)
    assert "--- sample ---" in capsys.readouterr().out
    assert result["records"][0]["config"]["mesh"] == config.mesh
    found = [r["loss"] for r in result["records"] if r["kind"] == "train"]
    np.testing.assert_allclose(found, one_device[0], rtol=1e-4)


# ------------------------------------------------------------------ where things lie


@pytest.fixture(scope="module")
def shapes():
    def make():
        return model.GPT(256, 1, 32, 16, rngs=nnx.Rngs(0))

    return nnx.state(nnx.eval_shape(make))


def test_each_matrix_has_its_axes(shapes):
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2", "auto")
    block = sharding.specs(shapes, mesh)["blocks"][0]
    reads, writes = P(("fsdp",), ("tensor",)), P(("tensor", "fsdp"), None)
    found = {name: leaf["kernel"].get_value() for name, leaf in block["attn"].items()}
    assert found == {"q": reads, "k": reads, "v": reads, "o": writes}
    assert block["mlp"]["fc"]["kernel"].get_value() == reads
    assert block["mlp"]["proj"]["kernel"].get_value() == writes
    assert block["norm1"]["scale"].get_value() == P()
    gathered = sharding.specs(shapes, mesh, gathered=True)["blocks"][0]
    assert gathered["attn"]["q"]["kernel"].get_value() == P(None, ("tensor",))
    assert gathered["attn"]["o"]["kernel"].get_value() == P(("tensor",), None)


@pytest.mark.parametrize("name", sorted(om.MATRIX_OPTIMIZERS))
def test_matrix_optimizers_know_the_placement(name, shapes):
    mesh = sharding.make_mesh("data=2,fsdp=4", "auto")
    placement = om.Placement(sharding.shardings(shapes, mesh))
    config = configs.resolve(dataclasses.replace(SMALL, optimizer=name, lr=None))
    optimizer = train.make_optimizer(config, placement)
    assert jax.eval_shape(optimizer.init, shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": "date=8"}, r"sizes of data, fsdp, tensor.*got 'date=8' in 'date=8'"),
        ({"mesh": "data=2,data=4"}, "at most once.*got 'data=4'"),
        ({"mesh": "data=8,"}, "got '' in 'data=8,'"),
        ({"mesh": "data=two"}, "as data=2,fsdp=4; got 'data=two'"),
        ({"mesh": "data=2,fsdp=2"}, "needs 4 devices, but there are 8: choose sizes"),
        ({"mesh": "data=8", "mesh_axes": "manual"}, "`mesh_axes` must be auto or exp"),
        ({"mesh": "fsdp=8", "width": 36, "head_dim": 12},
         r"fsdp=8 does not divide 36, an axis of blocks/0/attn/k/kernel of shape \(36"),
        ({"mesh": "tensor=8", "width": 36, "head_dim": 12},
         r"tensor=8 does not divide 36, an axis of blocks/0/attn/k/kernel of shape"),
        ({"mesh": "data=2,fsdp=4", "batch_size": 4}, "data and fsdp, 1 times 8; got 4"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        train.train(dataclasses.replace(SMALL, **change))


def test_processes_are_named_together():
    with pytest.raises(ValueError, match="given together and with `distributed`"):
        configs.resolve(dataclasses.replace(SMALL, coordinator="localhost:1234"))


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_the_largest_attention_logits_are_those_of_all_devices(axes):
    mesh = sharding.make_mesh("data=4,tensor=2", axes)
    config = dataclasses.replace(SMALL, qk_norm=0)
    graph, _, state = train.initial(config, 256, mesh)
    rows = data.load(config.data).train.batch(0, 0, 8, config.context)
    found = jax.jit(
        lambda params, w: sharding.spread(train.loss_and_max_logits, mesh)(
            params, graph, w
        )
    )(state.params, sharding.place_batch(rows, mesh))
    params = sharding.fetch(state.params, mesh)
    alone = train.loss_and_max_logits(params, graph, jnp.asarray(rows))
    chex.assert_trees_all_close(jax.device_get(found), alone, rtol=1e-5)
