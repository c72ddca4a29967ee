"""_routing: decisions on real Flax trees, explicit labels, partition, describe."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_matrix as om
from optax_matrix import _layout, _paths
from optax_matrix._layout import MatrixLayout
from optax_matrix._routing import describe, partition, route
from tests import flax_models as models

MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers
L = models.LAYERS
QKV = (1, models.D, models.HEADS * models.HEAD_DIM)
OUT = (1, models.HEADS * models.HEAD_DIM, models.D)
UP, DOWN = (1, models.D, models.HIDDEN), (1, models.HIDDEN, models.D)


def matrices(params, routing=None):
    """The (count, in, out) of every matrix leaf, by path."""
    layouts = route(params, routing)
    found = {}

    def note(path, layout, leaf):
        if layout != "auxiliary":
            (stack,) = _layout.view(leaf.shape, layout).matrices
            found[_paths.path_name(path)] = stack

    jax.tree_util.tree_map_with_path(note, layouts, params)
    return found


def stacked(matrix):
    return (L * matrix[0], *matrix[1:])


def block(prefix, up, down, layers=1):
    attention = dict.fromkeys(("query", "key", "value"), QKV) | {"out": OUT}
    found = {f"{prefix}/attn/{name}/kernel": m for name, m in attention.items()}
    found |= {f"{prefix}/{up}/kernel": UP, f"{prefix}/{down}/kernel": DOWN}
    return {path: (layers * m[0], *m[1:]) for path, m in found.items()}


def zeros(**shapes):
    """A tree from paths with '/' written '__'."""
    tree = {}
    for path, shape in shapes.items():
        *modules, name = path.split("__")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


# --- Linen ---


def test_linen_mlp():
    params = models.linen_init(models.LinenMLP(), jnp.ones((1, 4)))
    assert matrices(params) == {"Dense_0/kernel": (1, 4, models.HIDDEN)}
    assert route(params)["head"]["kernel"] == "auxiliary"
    assert route(params)["LayerNorm_0"]["scale"] == "auxiliary"


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen_convolutions(use_bias):
    params = models.linen_shapes(models.LinenCNN(use_bias), jnp.ones((1, 6, 6, 3)))
    assert matrices(params) == {
        "Conv_0/kernel": (1, 18, 4),
        "Conv_1/kernel": (1, 9, 4),
        "conv_time/kernel": (1, 12, 6),
    }


def test_linen_dense_general_needs_its_bias():
    x = jnp.ones((1, models.D))
    params = models.linen_init(models.LinenGeneral(), x)
    assert matrices(params) == {"mix/kernel": QKV, "merge/kernel": OUT}
    assert route(params)["mix"]["bias"] == "auxiliary"
    bare = models.linen_shapes(models.LinenGeneral(use_bias=False), x)
    message = r"(?s)'merge/kernel' \(2, 3, 8\): no name, .*'mix/kernel' \(8, 2, 3\)"
    with pytest.raises(ValueError, match=message):
        route(bare)


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen_transformer_in_a_loop(use_bias):
    model = models.LinenTransformer(use_bias, scanned=False)
    params = models.linen_shapes(model, models.tokens())
    want = block("LinenBlock_0", "up", "down") | block("LinenBlock_1", "up", "down")
    assert matrices(params) == want


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen_scanned_transformer(use_bias):
    params = models.linen_shapes(models.LinenTransformer(use_bias), models.tokens())
    assert params["layers"]["up"]["kernel"].shape == (L, *UP[1:])
    assert matrices(params) == block("layers", "up", "down", layers=L)
    layouts = route(params)
    for path in (("tokens", "embedding"), ("lm_head", "kernel"), ("ln_f", "scale")):
        assert layouts[path[0]][path[1]] == "auxiliary"
    # Two axes, and yet no matrices.
    assert layouts["layers"]["RMSNorm_0"]["scale"] == "auxiliary"
    assert layouts["pos_embedding"] == "auxiliary"
    if use_bias:
        assert layouts["layers"]["up"]["bias"] == "auxiliary"
        assert layouts["layers"]["attn"]["query"]["bias"] == "auxiliary"
        assert layouts["layers"]["LayerNorm_0"]["bias"] == "auxiliary"


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen_layers_scanned_on_axis_1(use_bias):
    leading, second = (
        models.linen_shapes(
            models.LinenTransformer(use_bias, scan_axis=axis), models.tokens()
        )
        for axis in (0, 1)
    )
    assert matrices(second) == matrices(leading)

    def same_stacks(layout, want, leaf):
        if want == "auxiliary":
            return
        moved = jnp.moveaxis(leaf, 0, 1)
        (got,) = _layout.view(moved.shape, layout).to_stacks(moved)
        (stack,) = _layout.view(leaf.shape, want).to_stacks(leaf)
        np.testing.assert_array_equal(got, stack)

    for row in describe(second).rows:
        is_stacked = row.path.startswith("layers") and row.optimizer == "matrix"
        assert row.reason.endswith("norms stacked (5,) on axis 1") == is_stacked
    layouts, wants = route(second), route(leading)
    leaves = models.filled(leading["layers"])
    jax.tree.map(same_stacks, layouts["layers"], wants["layers"], leaves)


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen_layers_scanned_on_another_axis_are_not_guessed(use_bias):
    model = models.LinenTransformer(use_bias, scan_axis=-1)
    params = models.linen_shapes(model, models.tokens())
    with pytest.raises(ValueError, match="cannot tell") as error:
        route(params)
    for path in block("layers", "up", "down"):
        assert f"'{path}'" in str(error.value)


def test_linen_experts():
    params = models.linen_shapes(models.LinenMoE(), jnp.ones((2, models.D)))
    assert matrices(params) == {
        "Dense_0/kernel": (1, models.D, models.D),
        "moe/w_in": (3, *UP[1:]),
        "moe/w_out": (3, *DOWN[1:]),
    }
    assert route(params)["moe"]["router"]["kernel"] == "auxiliary"


def test_linen_boxes_have_the_names_of_what_they_hold():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    params = models.linen_init(nn.Dense(3, kernel_init=init), jnp.ones((1, 2)))
    boxed = {"Dense_0": params, "lm_head": params}
    assert isinstance(params["kernel"], nn.Partitioned)
    assert matrices(boxed) == {"Dense_0/kernel": (1, 2, 3)}
    assert matrices(nn.unbox(boxed)) == {"Dense_0/kernel": (1, 2, 3)}


def test_linen_modules_with_several_matrices():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.ConvTranspose(4, (3,))(x)
            x = nn.GRUCell(4)(jnp.ones((1, 4)), x[:, 0])[1]
            return nn.WeightNorm(nn.Dense(5))(x)

    params = models.linen_shapes(Model(), jnp.ones((1, 6, 2)))
    found = matrices(params)
    assert found["ConvTranspose_0/kernel"] == (1, 6, 4)
    assert found["Dense_0/kernel"] == (1, 4, 5)
    assert sum(path.startswith("GRUCell_0") for path in found) == 6
    assert len(found) == 8


# --- MaxText's trees, by the names and shapes of its releases ---

# A leaf of one layer, one letter per axis: (batch) (inputs)>(outputs), or auxiliary.
SIZES = {"v": 50, "d": 16, "f": 24, "h": 4, "g": 2, "k": 3, "e": 5, "s": 7}
SIZES |= {"q": 8, "r": 6, "a": 9, "b": 11, "L": 4}  # as many layers as heads


def norms(*names):
    return {f"{name}/scale": "d" for name in names}


def inside(module, leaves):
    return {f"{module}/{name}": spec for name, spec in leaves.items()}


NORMS = norms("pre_self_attention_layer_norm", "post_self_attention_layer_norm")
ATTENTION = {
    "self_attention/query/kernel": "d>hk",
    "self_attention/key/kernel": "d>gk",
    "self_attention/value/kernel": "d>gk",
    "self_attention/out/kernel": "hk>d",
}
ATTENTION_BIASES = {
    "self_attention/query/bias": "hk",
    "self_attention/key/bias": "gk",
    "self_attention/value/bias": "gk",
}
QK_NORMS = {f"self_attention/{name}_norm/scale": "k" for name in ("query", "key")}
MLA = {
    "self_attention/wkv_a/kernel": "d>a",
    "self_attention/kv_norm/scale": "r",
    "self_attention/wkv_b/kernel": "r>hb",
    "self_attention/out/kernel": "hk>d",
}
QUERY = {"self_attention/query/kernel": "d>hk"}
LOW_RANK_QUERY = {
    "self_attention/wq_a/kernel": "d>q",
    "self_attention/q_norm/scale": "q",
    "self_attention/wq_b/kernel": "q>hk",
}
MLP = {"mlp/wi_0/kernel": "d>f", "mlp/wi_1/kernel": "d>f", "mlp/wo/kernel": "f>d"}
EXPERTS = {"gate/kernel": "de", "wi_0": "e d>f", "wi_1": "e d>f", "wo": "e f>d"}
SHARED = {"wi_0/kernel": "d>s", "wi_1/kernel": "d>s", "wo/kernel": "s>d"}
DEEPSEEK_MOE = inside(
    "DeepSeekMoeBlock_0",
    inside("MoeBlock_0", EXPERTS) | inside("shared_experts", SHARED),
)
GEMMA = norms("pre_self_attention_norm", "pre_ffw_norm") | ATTENTION | MLP
MAXTEXT = {
    "llama2": {"layers": NORMS | ATTENTION | MLP},
    "qwen2": {"layers": NORMS | ATTENTION | ATTENTION_BIASES | MLP},
    "qwen3": {"layers": NORMS | ATTENTION | QK_NORMS | MLP},
    "qwen3_moe": {
        "layers": NORMS | ATTENTION | QK_NORMS | inside("moe_block", EXPERTS)
    },
    "gemma": {"layers": GEMMA},
    "gemma2": {
        "layers": {
            name.replace("/", f"_{kind}/", 1): spec
            for kind in ("local", "global")
            for name, spec in GEMMA.items()
        }
    },
    "gemma3": {
        "layers": inside("layers_0", GEMMA | QK_NORMS)
        | inside("layers_1", GEMMA | QK_NORMS)
    },
    "mixtral": {"layers": NORMS | ATTENTION | inside("MoeBlock_0", EXPERTS)},
    "deepseek2": {
        "dense_layers": NORMS | MLA | QUERY | MLP,
        "moe_layers": NORMS | MLA | QUERY | DEEPSEEK_MOE,
    },
    "deepseek3": {
        "dense_layers": NORMS | MLA | LOW_RANK_QUERY | MLP,
        "moe_layers": NORMS | MLA | LOW_RANK_QUERY | DEEPSEEK_MOE,
    },
}


def maxtext(family, scan_axis):
    """Shapes by path, and what to expect there: "auxiliary" or (inputs, outputs)."""
    specs = {"token_embedder/embedding": ("vd", None)}
    specs["decoder/decoder_norm/scale"] = ("d", None)
    if "gemma" not in family:
        specs["decoder/logits_dense/kernel"] = ("dv", None)
    for layers, leaves in MAXTEXT[family].items():
        # Some layers of a scanned model may not be part of the scan.
        modules = {f"{layers}_0": None, f"{layers}_remainder/layers_0": None}
        if scan_axis is not None:
            modules[layers] = scan_axis
        for module, axis in modules.items():
            for name, spec in leaves.items():
                specs[f"decoder/{module}/{name}"] = (spec, axis)
    shapes, want = {}, {}
    for path, (spec, axis) in specs.items():
        letters = [letter for letter in spec if letter.isalpha()]
        if axis is not None:
            letters.insert(axis, "L")
        shapes[path] = tuple(SIZES[letter] for letter in letters)
        want[path] = "auxiliary"
        if ">" in spec:
            sides = spec.split()[-1].split(">")
            want[path] = tuple(tuple(map(letters.index, side)) for side in sides)
    return shapes, want


@pytest.mark.parametrize("scan_axis", [None, 0, 1])
@pytest.mark.parametrize("family", MAXTEXT)
def test_maxtext(family, scan_axis):
    shapes, want = maxtext(family, scan_axis)
    params = zeros(**{path.replace("/", "__"): shapes[path] for path in shapes})
    flat, _ = jax.tree_util.tree_flatten_with_path(route(params))
    got = {_paths.path_name(path): layout for path, layout in flat}
    for path, layout in got.items():
        if layout != "auxiliary":
            view = _layout.view(shapes[path], layout)
            got[path] = (view.inputs, view.outputs)
    assert got == want


# --- NNX ---


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("is_stacked", [True, False])
def test_nnx_transformer(is_stacked, use_bias):
    model = nnx.eval_shape(
        lambda: models.NnxTransformer(nnx.Rngs(0), is_stacked, use_bias)
    )
    want = {"conv/kernel": (1, 3 * models.D, models.D)}
    if is_stacked:
        want |= block("blocks", "fc", "proj", layers=L)
    else:
        want |= block("blocks/0", "fc", "proj") | block("blocks/1", "fc", "proj")
    boxed = nnx.state(model, nnx.Param)
    assert matrices(boxed) == want
    assert matrices(models.as_pure(boxed)) == want
    layouts = models.as_pure(route(boxed))
    assert layouts["embed"]["embedding"] == "auxiliary"
    assert layouts["head"]["kernel"] == "auxiliary"


@pytest.mark.parametrize("use_bias", [True, False])
def test_nnx_layers_stacked_without_norms(use_bias):
    @nnx.split_rngs(splits=L)
    @nnx.vmap
    def linear(rngs):
        return nnx.Linear(3, 4, use_bias=use_bias, rngs=rngs)

    model = nnx.eval_shape(lambda: nnx.Dict(linear1=linear(nnx.Rngs(0))))
    params = nnx.state(model, nnx.Param)
    assert matrices(params) == {"linear1/kernel": (L, 3, 4)}


# --- the rules, one by one ---


@pytest.mark.parametrize(
    "name",
    """bias scale gain gamma rel_pos_bias embedding embeddings pos_embedding wpe wte
    pos_embed cls cls_token mask_token position_table biases""".split(),
)
def test_leaf_names_that_are_never_matrices(name):
    params = zeros(**{f"block__{name}": (5, 6), "block__kernel": (4, 6)})
    assert list(matrices(params)) == ["block/kernel"]


@pytest.mark.parametrize(
    "module",
    """head lm_head LMHead_0 policy_head value_head_1 logits logits_dense to_logits
    classifier unembed embed_out token_embedder patch_embed embedding Embed_0 wte
    router moe_router""".split(),
)
def test_module_names_that_are_auxiliary(module):
    params = zeros(**{f"{module}__kernel": (4, 6), f"{module}__bias": (6,)})
    assert matrices(params) == {}
    # Also around the module that holds the kernel.
    if "router" not in module:
        assert matrices(zeros(**{f"{module}__Dense_0__kernel": (4, 6)})) == {}


@pytest.mark.parametrize(
    "module",
    """heads header ahead MultiHead_0 AttentionHead_0 attn_head pre_logits embed_proj
    unembedded_proj decoder output gate_proj normal qkv""".split(),
)
def test_module_names_that_only_look_alike(module):
    assert matrices(zeros(**{f"{module}__kernel": (4, 6)})) == {
        f"{module}/kernel": (1, 4, 6)
    }


@pytest.mark.parametrize("module", ["norm", "ln_1", "LayerNorm_0", "pre_RMSNorm"])
def test_norm_modules_are_auxiliary_whatever_the_leaf(module):
    assert matrices(zeros(**{f"{module}__weight": (5, 6)})) == {}


@pytest.mark.parametrize(
    "shapes, want",
    [
        # A Dense: stacked; by its bias, its name, the norms of its block.
        ({"b__up__kernel": (5, 4, 6), "b__up__bias": (5, 6)}, (5, 4, 6)),
        ({"b__Dense_0__kernel": (5, 4, 6)}, (5, 4, 6)),
        ({"b__linear1__kernel": (2, 5, 4, 6)}, (10, 4, 6)),
        ({"b__up__kernel": (5, 4, 6), "b__ln__scale": (5, 4)}, (5, 4, 6)),
        # On axis 1, because the leading axes of the two kernels differ; a bias agrees.
        (
            {"b__fc__kernel": (4, 5, 6), "b__proj__kernel": (6, 5, 4)}
            | {"b__fc__bias": (6, 5), "b__ln__scale": (4, 5)},
            (5, 4, 6),
        ),
        # The leaves of the inner module alone would fit a stack on axis 0.
        (
            {"b__a__fc__kernel": (4, 5, 6), "b__a__ln__scale": (4, 5)}
            | {"b__proj__kernel": (6, 5, 4)},
            (5, 4, 6),
        ),
        # On axis 1 twice: a scan within a scan.
        (
            {"b__fc__kernel": (4, 2, 5, 6), "b__proj__kernel": (6, 2, 5, 4)}
            | {"b__ln__scale": (4, 2, 5)},
            (10, 4, 6),
        ),
        # A scan on axis 1 around a scan on axis 0.
        (
            {"b__a__fc__kernel": (5, 2, 4, 6), "b__a__proj__kernel": (5, 2, 6, 4)}
            | {"b__a__ln__scale": (5, 2, 4), "b__ln__scale": (3, 2)}
            | {"b__fc__kernel": (3, 2, 7), "b__proj__kernel": (7, 2, 3)},
            (10, 4, 6),
        ),
        # Stacked twice.
        ({"b__up__kernel": (2, 5, 4, 6), "b__ln__scale": (2, 5, 4)}, (10, 4, 6)),
        # The stack as large as the input: the bias fits both ways, a norm decides.
        (
            {
                "b__up__kernel": (5, 5, 6),
                "b__up__bias": (5, 6),
                "b__ln__scale": (5, 5),
            },
            (5, 5, 6),
        ),
        # The bias fits both ways, but the norms show the whole batch.
        (
            {"b__up__kernel": (2, 5, 5, 6), "b__up__bias": (2, 5, 6)}
            | {"b__ln__scale": (2, 5)},
            (2, 5, 30),
        ),
        # In the stack, the norms of attention have an axis of heads.
        (
            {f"b__attn__{x}__kernel": (5, 8, 2, 3) for x in ("query", "key", "value")}
            | {"b__attn__query_norm__scale": (5, 2, 3), "b__ln__scale": (5, 8)},
            (5, 8, 6),
        ),
        # DenseGeneral, either way, stacked and with several inputs.
        ({"b__mix__kernel": (4, 2, 3), "b__mix__bias": (2, 3)}, (1, 4, 6)),
        ({"b__mix__kernel": (2, 3, 4), "b__mix__bias": (4,)}, (1, 6, 4)),
        ({"b__mix__kernel": (5, 4, 2, 3), "b__mix__bias": (5, 2, 3)}, (5, 4, 6)),
        ({"b__mix__kernel": (7, 4, 2, 3), "b__mix__bias": (2, 3)}, (1, 28, 6)),
        # Convolutions: stacked, local.
        ({"b__Conv_0__kernel": (5, 3, 4, 6), "b__Conv_0__bias": (5, 6)}, (5, 12, 6)),
        ({"b__conv1__kernel": (5, 3, 4, 6), "b__ln__scale": (5, 4)}, (5, 12, 6)),
        ({"b__ConvLocal_0__kernel": (9, 4, 6), "b__ConvLocal_0__bias": (9, 6)}, None),
        # Experts, stacked too.
        ({"b__experts__wi__kernel": (7, 4, 6)}, (7, 4, 6)),
        ({"b__MoE_0__Dense_0__kernel": (5, 7, 4, 6)}, (35, 4, 6)),
        ({"b__experts__up_proj": (5, 7, 4, 6)}, (35, 4, 6)),
        ({"b__moe__w1": (7, 4, 6), "b__moe__w2": (7, 6, 4)}, (7, 4, 6)),
        (
            {"moe__w1": (7, 4, 6), "moe__w2": (7, 6, 4), "moe__ln__scale": (4,)},
            (7, 4, 6),
        ),
        (
            {"b__moe__wi": (7, 2, 5, 4, 6), "b__moe__expert_scale": (7, 2, 5)}
            | {"b__ln__scale": (4, 2, 5)},
            (70, 4, 6),
        ),
        # `gate` is a router only where its outputs are the experts.
        ({"moe__gate__kernel": (4, 6), "moe__wi": (7, 4, 6)}, (1, 4, 6)),
        ({"moe__up__kernel": (4, 7), "moe__wi": (7, 4, 6)}, (1, 4, 7)),
        ({"moe__gate__kernel": (7, 4, 7), "moe__wi__kernel": (7, 6, 7)}, (7, 4, 7)),
        ({"mlp__gate__kernel": (4, 7), "mlp__linear1__kernel": (7, 4, 6)}, (1, 4, 7)),
    ],
)
def test_evidence_for_kernels_of_many_axes(shapes, want):
    found = matrices(zeros(**shapes))
    if want is None:  # one matrix per position
        want = (9, 4, 6)
    assert next(iter(found.values())) == want


def test_the_gate_of_experts_is_a_router():
    for wi in ("moe__wi", "moe__experts__wi__kernel"):
        params = zeros(**{wi: (7, 4, 6), "moe__gate__kernel": (4, 7)})
        assert matrices(params) == {wi.replace("__", "/"): (7, 4, 6)}


def test_dense_attention_projections_are_told_from_headed_ones():
    names = ("query", "key", "value")
    dense = {f"layers__attn__{name}__kernel": (5, 8, 6) for name in names}
    dense["layers__attn__out__kernel"] = (5, 6, 8)
    norms = {"layers__ln__scale": (5, 8)}
    assert matrices(zeros(**dense, **norms))["layers/attn/query/kernel"] == (5, 8, 6)
    assert matrices(zeros(**dense, **norms))["layers/attn/out/kernel"] == (5, 6, 8)
    biases = {f"layers__attn__{name}__bias": (5, 6) for name in names}
    found = matrices(zeros(**dense, **biases))
    assert found["layers/attn/query/kernel"] == (5, 8, 6)


@pytest.mark.parametrize(
    "shapes, reason",
    [
        ({"a__kernel": (4, 2, 3)}, "no name, bias or norm says"),
        # Fits a stack and a DenseGeneral.
        ({"a__kernel": (5, 5, 6), "a__bias": (5, 6)}, "several readings fit"),
        ({"a__kernel": (4, 2, 3), "a__bias": (7,)}, r"contradictory: bias \(7,\)"),
        (
            {"Dense_0__kernel": (4, 2, 3), "Dense_0__bias": (2, 3)},
            r"contradictory: module 'Dense_0' \(stacked dense layers\), bias \(2, 3\)",
        ),
        (
            {"Conv_0__kernel": (4, 2, 3), "Conv_0__bias": (2, 3)},
            r"contradictory: module 'Conv_0' \(convolution\), bias \(2, 3\)",
        ),
        (
            {"b__a__kernel": (5, 4, 5), "b__a__bias": (5,), "b__ln__scale": (5, 4)},
            r"contradictory: bias \(5,\), norms stacked \(5,\)",
        ),
        ({"b__kernel": (5, 4), "b__ln__scale": (5, 4)}, "axis 0 is a stack"),
        (
            {"b__kernel": (7, 5), "b__up__kernel": (4, 5, 6), "b__ln__scale": (4, 5)},
            "axis 1 is a stack",
        ),
        (
            {"b__kernel": (2, 5, 4), "b__ln__scale": (2, 5, 4)},
            r"contradictory: norms stacked \(2, 5\)",
        ),
        (
            {"b__a__kernel": (5, 4, 2, 3), "b__ln__scale": (5, 4)},
            "several readings fit: norms stacked",
        ),
        ({"b__Dense_0__kernel": (4, 5, 6), "b__ln__scale": (3, 5)}, "not on axis 0"),
        (
            {"b__Dense_0__kernel": (4, 5, 6), "b__Dense_1__kernel": (6, 7, 4)}
            | {"b__ln__scale": (4, 5)},
            "norms in 'b' are stacked, but not on axis 0",
        ),
        (
            {"b__up__kernel": (4, 5, 6), "b__down__kernel": (6, 4)}
            | {"b__ln__scale": (4, 5)},
            "norms in 'b' are stacked, but not on axis 0",
        ),
        # A norm per head, as many heads as head_dim: no stack on axis 1.
        (
            {
                f"b__attn__{name}__kernel": (8, 4, 4)
                for name in ("query", "key", "value")
            }
            | {"b__attn__query_norm__scale": (4, 4), "b__ln__scale": (8,)},
            "norms in 'b/attn' are stacked, but not on axis 0",
        ),
        # Layers on the last axis, where a bias or the name of experts would mislead.
        (
            {"b__up__kernel": (4, 6, 5), "b__up__bias": (6, 5), "b__ln__scale": (4, 5)},
            "not on axis 0",
        ),
        ({"b__moe__wi": (7, 4, 6, 5), "b__ln__scale": (4, 5)}, "not on axis 0"),
        (
            {"b__moe__Dense_0__kernel": (7, 4, 6, 5), "b__ln__scale": (4, 5)},
            "not on axis 0",
        ),
        ({"LayerNorm_0__kernel": (4, 6)}, "a kernel in module 'LayerNorm_0'"),
        (
            {"head__Dense_0__kernel": (4, 6), "head__Dense_1__kernel": (6, 2)},
            "one of several matrices in module 'head'",
        ),
        (
            {"t_embed__Dense_0__kernel": (4, 6), "t_embed__Dense_1__kernel": (6, 2)},
            "one of several matrices in module 't_embed'",
        ),
        ({"a__w": (4, 6)}, "no rule knows a leaf named 'w'"),
        ({"a__lora_a": (4, 6)}, "a factor of LoRA: see `orthogonalize_factors`"),
        ({"experts__weight": (7, 4, 6)}, "no rule knows a leaf named 'weight'"),
        ({"moe__gate": (4, 7)}, "no rule knows a leaf named 'gate'"),
        ({"b__moe__gate": (5, 4, 7), "b__ln__scale": (5, 4)}, "leaf named 'gate'"),
        (
            {"moe__gate": (5, 4, 7), "moe__wi": (5, 7, 4, 6)},
            "expert stacks of different batch axes",
        ),
    ],
)
def test_ambiguous_leaves_raise(shapes, reason):
    with pytest.raises(ValueError, match=reason) as error:
        route(zeros(**shapes))
    path, shape = next(iter(shapes.items()))
    assert f"'{path.replace('__', '/')}' {shape}" in str(error.value)


def test_the_error_lists_ambiguous_leaves_and_two_ways_out():
    params = zeros(**{f"layers__{i:02}__weight": (4, 6) for i in range(13)})
    with pytest.raises(ValueError, match="and 3 more") as error:
        route(params)
    message = str(error.value)
    assert "layers/09/weight" in message and "layers/10/weight" not in message
    assert "routing=lambda path, leaf: om.MatrixLayout(inputs=-1, outputs=-2)" in (
        message
    )
    lines = [line for line in message.splitlines() if "routing=" in line]
    # What it says to paste works.
    scope = {"jax": jax, "params": params}
    tree = eval(lines[1].strip().removeprefix("routing="), scope)
    assert len(matrices(params, tree)) == 13
    predicate = eval(lines[0].strip().removeprefix("routing="), scope)
    with pytest.raises(ValueError, match="and 2 more"):
        route(params, predicate)


def test_the_way_out_of_a_many_axed_kernel_spells_its_axes():
    with pytest.raises(ValueError) as error:
        route(zeros(a__kernel=(4, 2, 3)))
    want = "om.MatrixLayout(inputs=(0, 1), outputs=2) if path == 'a/kernel' else None"
    assert want in str(error.value)


# --- other libraries, explicit labels ---


def test_equinox_with_a_function():
    make = eqx.filter_jit(lambda key: eqx.nn.MLP(3, 2, 5, 1, key=key))
    mlp = eqx.filter(make(jax.random.key(0)), eqx.is_array)
    with pytest.raises(ValueError, match=r"'layers/0/weight' \(5, 3\).*named 'weight'"):
        route(mlp)
    flipped = MatrixLayout(inputs=-1, outputs=-2)
    got = matrices(mlp, lambda path, leaf: flipped)
    assert got == {"layers/0/weight": (1, 3, 5), "layers/1/weight": (1, 5, 2)}
    got = matrices(mlp, lambda path, leaf: flipped if "0/w" in path else False)
    assert got == {"layers/0/weight": (1, 3, 5)}
    # A module is a tree, though it can be called: of parameters, and of labels.
    tx = om.muon(0.1, routing=lambda path, leaf: flipped)
    updates, _ = jax.jit(tx.update)(mlp, tx.init(mlp), mlp)
    step = np.asarray(updates.layers[1].weight)
    np.testing.assert_allclose(np.linalg.norm(step, 2), 0.1, rtol=0.2)
    labels = jax.tree.map(lambda x: flipped if x.ndim == 2 else "auxiliary", mlp)
    assert callable(labels)
    assert len(matrices(mlp, labels)) == 2


def test_haiku_with_a_function():
    def forward(tokens):
        x = hk.Embed(7, 3)(tokens)
        x = hk.nets.MLP([4, 5])(x)
        return hk.LayerNorm(-1, True, True)(x)

    init = jax.jit(hk.transform(forward).init)
    params = init(jax.random.key(0), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="mlp/~/linear_0/w"):
        route(params)
    got = matrices(params, lambda path, _: "matrix" if path.endswith("/w") else None)
    assert got == {"mlp/~/linear_0/w": (1, 3, 4), "mlp/~/linear_1/w": (1, 4, 5)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: jax.Array
    value: jax.Array


@pytest.mark.parametrize("container", [list, tuple])
def test_plain_pytrees_with_labels(container):
    params = {"layers": container([Layer(jnp.ones((3, 4)), jnp.ones(4)), None])}
    labels = {"layers": container([Layer("matrix", "auxiliary"), None])}  # pyright: ignore[reportArgumentType]
    assert matrices(params, labels) == {"layers/0/weight": (1, 3, 4)}
    assert matrices(params, {"layers": container([True, None])}) == {
        "layers/0/weight": (1, 3, 4)
    }
    assert matrices(jnp.ones((2, 3)), "matrix") == {"": (1, 2, 3)}


TREE = zeros(a__w=(3, 4), a__b=(4,), c__w=(2, 3, 4), d__w=(3, 4))


@pytest.mark.parametrize(
    "routing",
    [
        {
            "a": {"w": MuonDimensionNumbers(), "b": None},
            "c": {"w": MuonDimensionNumbers((0, 1), 2)},
            "d": None,
        },
        {
            "a": "matrix",
            "c": MatrixLayout((0, 1), 2),
            "d": {"w": "auxiliary"},
        },
        {"a": True, "c": MuonDimensionNumbers([0, 1], [2]), "d": False},
        lambda path, leaf: {
            "a": True,
            "c": MatrixLayout((0, 1), 2),
            "d": "auxiliary",
        }[path[0]],
        lambda path, leaf: (
            MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
            if path in ("a/w", "c/w")
            else False
        ),
    ],
)
def test_ways_to_say_the_same(routing):
    assert matrices(TREE, routing) == {"a/w": (1, 3, 4), "c/w": (1, 6, 4)}


@pytest.mark.parametrize(
    "routing, found",
    [
        ("matrix", 3),
        (True, 3),
        (MatrixLayout(), 3),
        (MuonDimensionNumbers(-2, -1), 3),
        ("auxiliary", 0),
        (False, 0),
    ],
)
def test_one_label_for_the_whole_tree(routing, found):
    assert len(matrices(TREE, routing)) == found


def test_labels_made_for_optax_contrib_muon_split_the_tree_alike():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "k": jnp.ones((2, 3, 4))}
    numbers = {"w": MuonDimensionNumbers(), "b": None, "k": MuonDimensionNumbers(1, 2)}
    theirs = optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers)
    state: Any = theirs.init(params)
    state = state.inner_states["muon"].inner_state[0].mu
    ours = route(params, numbers)
    for name in params:
        masked = isinstance(state[name], optax.MaskedNode)
        assert (ours[name] == "auxiliary") == masked


@pytest.mark.parametrize(
    "routing, message",
    [
        (lambda path, leaf: "muon", r"`routing` must say .* got 'muon' at 'a/b'"),
        ({"a": "muon", "c": None, "d": None}, r"`routing` must say .* 'muon'"),
        ({"a": 1, "c": None, "d": None}, r"`routing` must say .* got 1 at"),
        ({"a": None, "c": None}, r"`routing` has no entry for 'd/w'"),
        ({"a": None, "c": None, "d": None, "e": True}, r"has no leaf, at 'e'"),
        (
            {"a": {"w": True, "b": True}, "c": None, "d": None},
            r"at least 2 axes, got one at 'a/b'",
        ),
        (
            lambda path, leaf: MatrixLayout(0, 5),
            r"`outputs` names axis 5, .* at 'a/w', shape \(3, 4\)",
        ),
        (
            lambda path, leaf: MatrixLayout(split_outputs=3),
            r"`split_outputs=3` does not divide .* at 'a/w'",
        ),
    ],
)
def test_labels_that_do_not_fit_raise(routing, message):
    with pytest.raises(ValueError, match=message):
        route(TREE, routing)


@pytest.mark.parametrize("routing", [None, lambda path, leaf: None, "matrix"])
def test_empty_nodes_stay(routing):
    params = {"up": zeros(kernel=(3, 4)), "a": None, "b": optax.MaskedNode(), "c": {}}
    layouts = route(params, routing)
    assert layouts == params | {"up": {"kernel": MatrixLayout()}}
    assert len(describe(params, routing).rows) == 1


# --- partition ---


def marked(factor, seen=None):
    """Scales by `factor` and keeps a trace, which must have the leaves' shapes."""

    def make(layouts):
        if seen is not None:
            seen.append(layouts)

        def init(params):
            return optax.tree.zeros_like(params)

        def update(updates, state, params=None, **extra_args):
            def one(view, u, s):
                assert u.shape == s.shape == view.shape
                return factor * u

            return _layout.tree_map(one, layouts, updates, state), state

        return optax.GradientTransformationExtraArgs(init, update)

    return make


def marking(routing=None, seen=None):
    return partition(marked(2.0, seen), optax.scale(3.0), routing)


def assert_marks(updates, grads, routing=None):
    """Twice the gradient where a leaf is a matrix, thrice elsewhere, both present."""
    layouts = route(grads, routing)

    def one(layout, u, g):
        factor = 3.0 if layout == "auxiliary" else 2.0
        np.testing.assert_array_equal(u, factor * g)
        return factor

    factors = jax.tree.leaves(jax.tree.map(one, layouts, updates, grads))
    assert set(factors) == {2.0, 3.0}


def test_partition_on_linen():
    params = models.filled(
        models.linen_shapes(models.LinenTransformer(), models.tokens())
    )
    seen = []
    tx = marking(seen=seen)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert_marks(updates, params)
    assert set(state.inner_states) == {"matrix", "auxiliary"}
    assert seen[0] == seen[1]
    assert seen[0].views.keys() == matrices(params).keys()
    up = params["layers"]["up"]["kernel"]
    want = _layout.view(up.shape, None, "layers/up/kernel")
    assert seen[0].views["layers/up/kernel"] == want


# Optax's own Adam and `MultiSteps` mix integers with floats.
def as_optax_promotes():
    return jax.numpy_dtype_promotion("standard")


@pytest.fixture(scope="module")
def nnx_model():
    model = nnx.eval_shape(lambda: models.NnxTransformer(nnx.Rngs(0), stacked=True))
    graph, state = nnx.split(model)
    return nnx.merge(graph, models.filled(state))


@nnx.jit
def nnx_step(model, optimizer):
    def loss_fn(model):
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        return sum(jnp.sum((leaf - 1.0) ** 2) for leaf in leaves)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def test_partition_through_the_nnx_optimizer(nnx_model):
    model = nnx.clone(nnx_model)
    optimizer = nnx.Optimizer(model, marking(), wrt=nnx.Param)
    for _ in range(2):
        before = models.as_pure(nnx.state(nnx.clone(model), nnx.Param))
        nnx_step(model, optimizer)
        after = models.as_pure(nnx.state(model, nnx.Param))

        def one(layout, a, b):
            factor = 3.0 if layout == "auxiliary" else 2.0
            want = b + factor * 2.0 * (b - 1.0)
            # Three roundings of numbers below 100, fused or not.
            np.testing.assert_allclose(a, want, rtol=1e-6, atol=2e-5)

        jax.tree.map(one, route(before), after, before)


def test_partition_through_the_nnx_optimizer_with_optax_chains(nnx_model):
    with as_optax_promotes():
        model = nnx.clone(nnx_model)
        tx = partition(
            lambda layouts: optax.chain(optax.trace(0.9), optax.scale(-0.1)),
            optax.adamw(0.01),
            routing=route(nnx.state(model, nnx.Param)),  # boxes, for bare gradients too
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        losses = [float(nnx_step(model, optimizer)) for _ in range(3)]
        assert losses[2] < losses[1] < losses[0]
        labels = optimizer.opt_state.inner_states
        assert set(labels) == {"matrix", "auxiliary"}


def small_params() -> Any:
    return {
        "up": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        "head": {"kernel": jnp.ones((4, 2))},
    }


def updated(tx: Any, params: Any) -> Any:
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    return updates


def test_partition_leaves_empty_nodes_alone():
    params = small_params() | {"frozen": None, "masked": optax.MaskedNode()}
    updates = updated(marking(), params)
    assert_marks(updates, params)
    assert updates["frozen"] is None and updates["masked"] == optax.MaskedNode()


def test_partition_inside_masks():
    params = small_params()
    mask = {"up": True, "head": False}
    tx = optax.masked(marking(), mask)
    updates = updated(tx, params)
    np.testing.assert_array_equal(updates["up"]["kernel"], 2.0 * jnp.ones((3, 4)))
    np.testing.assert_array_equal(updates["head"]["kernel"], jnp.ones((4, 2)))
    # No matrix is left for it: fine, as others hold them.
    tx = optax.masked(marking(), {"up": False, "head": True})
    updates = updated(tx, params)
    np.testing.assert_array_equal(updates["head"]["kernel"], 3.0 * jnp.ones((4, 2)))
    labels = {"up": "ours", "head": "theirs"}
    tx = optax.partition({"ours": marking(), "theirs": optax.scale(5.0)}, labels)
    updates = updated(tx, params)
    np.testing.assert_array_equal(updates["up"]["bias"], 3.0 * jnp.ones(4))
    np.testing.assert_array_equal(updates["head"]["kernel"], 5.0 * jnp.ones((4, 2)))


def test_partition_initialises_on_shapes():
    with as_optax_promotes():
        params = small_params()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        tx = partition(lambda layouts: optax.trace(0.9), optax.adam(0.1))
        abstract = jax.eval_shape(tx.init, shapes)
        state = tx.init(params)
        assert jax.tree.structure(abstract) == jax.tree.structure(state)
        updates = jax.eval_shape(tx.update, shapes, abstract, shapes)[0]
        assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_partition_under_multi_steps_and_injected_hyperparameters():
    with as_optax_promotes():
        params = small_params()

        def make(learning_rate):
            return partition(
                lambda layouts: optax.scale_by_learning_rate(2.0 * learning_rate),
                optax.scale_by_learning_rate(3.0 * learning_rate),
            )

        tx = optax.MultiSteps(optax.inject_hyperparams(make)(learning_rate=-1.0), 2)
        state = tx.init(params)
        update = jax.jit(tx.update)
        updates, state = update(params, state, params)
        assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
        updates, state = update(params, state, params)
        assert_marks(updates, params)


def test_partition_state_can_be_mapped_by_parameter():
    params = small_params()
    tx = partition(lambda layouts: optax.trace(0.9), optax.adam(0.1))
    state = tx.init(params)
    mapped: Any = optax.tree.map_params(tx, lambda x: x + 1.0, state)
    trace = mapped.inner_states["matrix"].inner_state.trace
    np.testing.assert_array_equal(trace["up"]["kernel"], jnp.ones((3, 4)))


def test_partition_passes_extra_arguments_on():
    def needs_value(layouts):
        def update(updates, state, params=None, **extra_args):
            return jax.tree.map(lambda u: extra_args["value"] * u, updates), state

        return optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(), update
        )

    params = small_params()
    tx: Any = partition(needs_value, optax.scale(3.0))
    updates, _ = tx.update(params, tx.init(params), params, value=2.0)
    assert_marks(updates, params)


def test_partition_refuses_the_state_of_another_optimizer():
    params = {"up": {"kernel": jnp.ones((4, 3))}}
    tx = om.muon(0.1)
    for other in (optax.adam(0.1), optax.partition({"a": optax.sgd(0.1)}, "a")):
        with pytest.raises(ValueError, match="`state` must be what `init` of this"):
            tx.update(params, other.init(params), params)


@pytest.mark.parametrize("routing", [None, "auxiliary"])
def test_partition_without_matrices_raises(routing):
    params = {"head": zeros(kernel=(3, 4)), "b": jnp.ones(4)}
    message = r"No leaf takes the matrix optimizer: all 2 .*'b' \(.*Pass `routing`"
    with pytest.raises(ValueError, match=message):
        marking(routing).init(params)
    assert jax.tree.leaves(marking(routing).init({})) == []


def test_partition_raises_on_ambiguous_leaves_at_init():
    with pytest.raises(ValueError, match=r"'w' \(3, 4\)"):
        marking().init({"w": jnp.ones((3, 4))})


# --- describe ---


def test_describe_lists_each_leaf_once():
    params = models.linen_shapes(models.LinenTransformer(), models.tokens())
    description = describe(params)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    assert [row.path for row in description.rows] == [
        _paths.path_name(path) for path, _ in flat
    ]
    for row, (_, leaf) in zip(description.rows, flat, strict=True):
        assert row.shape == leaf.shape and row.parameters == leaf.size
        assert row.reason
        assert (row.view != "") == (row.optimizer == "matrix")
    total = sum(leaf.size for _, leaf in flat)
    matrix = sum(np.prod(m) for m in matrices(params).values())
    assert description.totals == {
        "matrix": matrix,
        "auxiliary": total - matrix,
        "total": total,
    }
    (row,) = (r for r in description.rows if r.path == "layers/attn/query/kernel")
    times, arrow = "\N{MULTIPLICATION SIGN}", "\N{RIGHTWARDS ARROW}"
    assert row.view == f"5 {times} (8 {arrow} 6)"
    assert row.reason == (
        "kernel: module 'query' (attention projection), bias (5, 2, 3), "
        "norms stacked (5,)"
    )


def test_describe_prints_a_table():
    params = zeros(up__kernel=(40, 60), up__bias=(60,), qkv__kernel=(3, 8))
    routing = {"up": True, "qkv": MatrixLayout(split_outputs=(4, 2, 2))}
    got = str(describe(params, routing))
    want = """\
path        shape     matrices               optimizer  parameters  reason
---------------------------------------------------------------------------------
qkv/kernel  (3, 8)    1 x (3 > 4) + 2 x (3 > 2)  matrix             24  routing tree
up/bias     (60,)     -                      auxiliary          60  fewer than 2 axes
up/kernel   (40, 60)  1 x (40 > 60)          matrix          2,400  routing tree
---------------------------------------------------------------------------------
            2 leaves                         matrix          2,424
            1 leaves                         auxiliary          60
total       3 leaves                                         2,484"""
    want = want.replace(" x ", " \N{MULTIPLICATION SIGN} ")
    want = want.replace(" > ", " \N{RIGHTWARDS ARROW} ")
    squeezed = [" ".join(line.split()).strip("-") for line in got.splitlines()]
    assert squeezed == [" ".join(line.split()).strip("-") for line in want.splitlines()]
    # The columns line up.
    lines = [line for line in got.splitlines() if "leaves" in line]
    assert len({line.index("leaves") for line in lines}) == 1


def test_describe_takes_no_leaf_and_shapes():
    assert describe({}).totals == {"matrix": 0, "auxiliary": 0, "total": 0}
    assert "total" in str(describe({}))
    assert describe(zeros(up__kernel=(3, 4))).totals["matrix"] == 12
