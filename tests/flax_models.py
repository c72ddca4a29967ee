"""Small Flax models, Linen and NNX, whose parameter trees the routing must read."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

D, HEADS, HEAD_DIM, HIDDEN, LAYERS, VOCAB, LENGTH = 8, 2, 3, 12, 5, 11, 4


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(HIDDEN)(x))
        x = nn.LayerNorm()(x)
        return nn.Dense(3, use_bias=False, name="head")(x)


class LinenCNN(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):  # (batch, 6, 6, 3)
        x = nn.Conv(4, (3, 2), use_bias=self.use_bias)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4, use_bias=self.use_bias)(x)
        x = nn.Conv(6, (3,), use_bias=self.use_bias, name="conv_time")(x[:, 0])
        return nn.Dense(3, name="classifier")(x)


class LinenGeneral(nn.Module):
    """DenseGeneral in both directions, under names that say nothing."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((HEADS, HEAD_DIM), name="mix", use_bias=self.use_bias)(x)
        return nn.DenseGeneral(D, axis=(-2, -1), name="merge", use_bias=self.use_bias)(
            x
        )


class LinenBlock(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(use_bias=self.use_bias)(x)
        x = x + nn.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * HEAD_DIM, use_bias=self.use_bias, name="attn"
        )(y)
        y = nn.RMSNorm()(x)
        y = nn.gelu(nn.Dense(HIDDEN, use_bias=self.use_bias, name="up")(y))
        return x + nn.Dense(D, use_bias=self.use_bias, name="down")(y), None


class LinenTransformer(nn.Module):
    use_bias: bool = True
    scanned: bool = True
    scan_axis: int = 0

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, D, name="tokens")(tokens)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, LENGTH, D))
        if self.scanned:
            layers = nn.scan(
                LinenBlock,
                variable_axes={"params": self.scan_axis},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = layers(self.use_bias, name="layers")(x, None)
        else:
            for _ in range(2):
                x, _ = LinenBlock(self.use_bias)(x)
        x = nn.LayerNorm(name="ln_f")(x)
        return nn.Dense(VOCAB, use_bias=self.use_bias, name="lm_head")(x)


class LinenExperts(nn.Module):
    """A soft mixture: its expert weights are plain params, its router a Dense."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        w_in = self.param("w_in", init, (3, D, HIDDEN))
        w_out = self.param("w_out", init, (3, HIDDEN, D))
        gates = nn.softmax(nn.Dense(3, use_bias=False, name="router")(x))
        y = nn.gelu(jnp.einsum("bd,edh->beh", x, w_in))
        return jnp.einsum("beh,ehd,be->bd", y, w_out, gates)


class LinenMoE(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LinenExperts(name="moe")(nn.Dense(D)(x))


def linen_init(model: nn.Module, *args: jax.Array):
    """Real parameters."""
    return jax.jit(model.init)(jax.random.key(0), *args)["params"]


def linen_shapes(model: nn.Module, *args: jax.Array):
    """Their shapes, without the time."""
    return jax.eval_shape(model.init, jax.random.key(0), *args)["params"]


def tokens() -> jax.Array:
    return jnp.zeros((1, LENGTH), jnp.int32)


def filled(shapes):
    """Arrays of these shapes: compiling random initialisers takes most of a test."""

    def fill(leaf):
        rng = np.random.default_rng(leaf.size)
        return jnp.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype))

    return jax.tree.map(fill, shapes)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, use_bias: bool = True):
        self.norm = nnx.LayerNorm(D, use_bias=use_bias, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            HEADS,
            D,
            HEADS * HEAD_DIM,
            use_bias=use_bias,
            decode=False,
            rngs=rngs,
        )
        self.fc = nnx.Linear(D, HIDDEN, use_bias=use_bias, rngs=rngs)
        self.proj = nnx.Linear(HIDDEN, D, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.proj(nnx.gelu(self.fc(x)))


class NnxTransformer(nnx.Module):
    """An embedding, a convolution over time, blocks in a list or stacked, a head."""

    def __init__(self, rngs: nnx.Rngs, stacked: bool = False, use_bias: bool = True):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.conv = nnx.Conv(D, D, (3,), rngs=rngs)
        self.stacked = stacked
        if stacked:

            @nnx.split_rngs(splits=LAYERS)
            @nnx.vmap
            def make(rngs):
                return NnxBlock(rngs, use_bias)

            self.blocks: Any = make(rngs)
        else:
            self.blocks = nnx.List([NnxBlock(rngs, use_bias) for _ in range(2)])
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.conv(self.embed(tokens))
        if self.stacked:

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def apply(x, block):
                return block(x)

            x = apply(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))


# Flax renamed it; `nnx.Optimizer` hands `tx.update` what it returns.
as_pure = getattr(nnx, "as_pure", None) or nnx.pure
