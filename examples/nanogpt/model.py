"""Defines a GPT like that of the modded-nanogpt optimization track.

It has RMSNorm with gains, rotary embeddings on half of the channels, normalized queries
and keys, squared ReLU, soft-capped logits, separate q, k, v and o, and an untied head.

Shapes: B batch, T positions, D width, H heads, K head_dim, V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

# The track multiplies q k^T by 0.12 at head_dim 128. The norm of q and k is
# sqrt(head_dim), so this is the largest attention logit, for any head_dim.
MAX_ATTENTION_LOGIT = 0.12 * 128
LOGIT_CAP = 15.0


def _normal(scale: float = 1.0) -> Callable:
    """Returns a normal initializer with the standard deviation of the track.

    It is `scale * sqrt(1 / (3 inputs))`. The track initializes `o` and `proj` to zero.
    Here they are small, as in GPT-2, because hyperball optimizers keep the initial norm
    of each matrix.
    """
    return nnx.initializers.variance_scaling(scale**2 / 3, "fan_in", "normal")


def rotary(x: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """Rotates pairs of channels according to their position, from `first` on.

    Of the head_dim / 2 pairs, pair i is rotated by 1024^(-i / (head_dim / 4 - 1))
    radians per position if i < head_dim / 4; the other pairs are not rotated.
    """
    positions, head_dim = x.shape[1], x.shape[3]
    turning = head_dim // 4
    frequency = (1 / 1024) ** jnp.linspace(0, 1, turning, dtype=jnp.float32)
    frequency = jnp.concatenate([frequency, jnp.zeros_like(frequency)])  # (K/2,)
    angle = jnp.outer(first + jnp.arange(positions, dtype=jnp.float32), frequency)
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # (B, T, H, K/2)
    turned = [first * cos + second * sin, second * cos - first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class MaxLogits(nnx.Intermediate):
    """The largest attention logit of each head (H,), over batch and positions."""


class Attention(nnx.Module):
    def __init__(
        self,
        width: int,
        head_dim: int,
        layers: int,
        *,
        qk_norm: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def linear(scale: float = 1.0) -> nnx.Linear:
            init = _normal(scale)
            return nnx.Linear(
                width, width, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs
            )

        self.head_dim, self.qk_norm = head_dim, qk_norm
        self.q, self.k, self.v = linear(), linear(), linear()
        self.o = linear((2 * layers) ** -0.5)
        # Without gains, which would change the norm of queries and keys.
        self.unit = nnx.RMSNorm(head_dim, use_scale=False, dtype=dtype, rngs=rngs)

    def heads(self, x: jax.Array, first: jax.Array | int = 0) -> list[jax.Array]:
        """Returns q, k and v (B, T, H, K) of inputs whose first position is `first`."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (f(x).reshape(shape) for f in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = self.unit(q), self.unit(k)
        return [rotary(q, first), rotary(k, first), v]

    @property
    def scale(self) -> float:
        """What the product of a query and a key is multiplied by."""
        if self.qk_norm:
            return MAX_ATTENTION_LOGIT / self.head_dim
        return self.head_dim**-0.5

    def attend(self, q, k, v, mask: jax.Array | None = None) -> jax.Array:
        """Returns the outputs (B, T, D); without a mask, attention is causal."""
        y = jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=self.scale, is_causal=mask is None
        )
        return self.o(y.reshape(*y.shape[:2], -1))

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, T, D)
        q, k, v = self.heads(x)
        if not self.qk_norm:
            self.largest = MaxLogits(self.max_logits(q, k))
        return self.attend(q, k, v)

    def max_logits(self, q: jax.Array, k: jax.Array) -> jax.Array:  # (H,)
        """Returns the largest logit of each head, masked positions left out.

        It materializes all logits; a fused kernel could return the maxima directly.
        """
        q, k = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (q, k))
        logits = self.scale * jnp.einsum("bthk,bshk->bhts", q, k)
        seen = jnp.tri(q.shape[1], dtype=bool)[None, None]
        return jnp.max(logits, axis=(0, 2, 3), where=seen, initial=-jnp.inf)


class MLP(nnx.Module):
    def __init__(self, width, layers, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, scale: float) -> nnx.Linear:
            init = _normal(scale)
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                kernel_init=init,
                dtype=dtype,
                rngs=rngs,
            )

        self.fc = linear(width, 4 * width, 1.0)
        self.proj = linear(4 * width, width, (2 * layers) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, T, D)
        return self.proj(jnp.square(nnx.relu(self.fc(x))))


class Block(nnx.Module):
    def __init__(
        self,
        width: int,
        head_dim: int,
        layers: int,
        *,
        qk_norm: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attn = Attention(
            width, head_dim, layers, qk_norm=qk_norm, dtype=dtype, rngs=rngs
        )
        self.norm2 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, layers, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # (B, T, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nnx.Module):
    """A GPT with float32 parameters; `dtype` is the dtype of matrix products.

    Without `qk_norm`, queries and keys are not normalized, nothing bounds attention
    logits, and each call stores the largest ones as `MaxLogits`.
    """

    def __init__(
        self,
        vocab_size: int,
        layers: int,
        width: int,
        head_dim: int,
        *,
        qk_norm: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width % head_dim or head_dim % 4:
            raise ValueError(
                f"`width` must be a multiple of `head_dim`, and `head_dim` of 4; got "
                f"width={width} and head_dim={head_dim}"
            )
        normal = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(
            vocab_size, width, embedding_init=normal, dtype=dtype, rngs=rngs
        )
        self.norm1 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            Block(width, head_dim, layers, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
            for _ in range(layers)
        )
        self.norm2 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        # Near zero, as in the track, so that the first loss is log(vocab_size).
        small = nnx.initializers.normal(1 / width)
        self.head = nnx.Linear(
            width, vocab_size, use_bias=False, kernel_init=small, dtype=dtype, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:  # (B, T) integers
        x = self.norm1(self.embed(tokens))  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)

    def logits(self, x: jax.Array) -> jax.Array:  # (B, T, V)
        """Returns the capped logits of what the last block returns."""
        logits = self.head(self.norm2(x)).astype(jnp.float32)
        return LOGIT_CAP * logits * jax.lax.rsqrt(jnp.square(logits) + LOGIT_CAP**2)


@functools.partial(nnx.jit, static_argnums=(2, 3))
def generate(
    model: GPT,
    prompt: jax.Array,
    tokens: int,
    context: int,
    temperature: float,
    key: jax.Array,
) -> jax.Array:
    """Samples `tokens` tokens after `prompt` (P,), each from the last `context` ones.

    Each token takes a full forward pass: the sampler is short rather than fast.
    """
    prompt = prompt[-context:]
    window = jnp.zeros((context,), jnp.int32).at[: len(prompt)].set(prompt)
    graph, params = nnx.split(model)

    def one_more(carry, key):
        window, length = carry
        # A new model, because a call may store something in it.
        gpt = nnx.merge(graph, params)
        logits = gpt(window[None])[0, length - 1]  # later positions are masked
        token = jax.random.categorical(key, logits / temperature).astype(jnp.int32)
        full = length == context
        window = jnp.where(full, jnp.roll(window, -1), window)
        position = jnp.where(full, context - 1, length)
        return (window.at[position].set(token), position + 1), token

    carry = (window, jnp.asarray(len(prompt), jnp.int32))
    return jax.lax.scan(one_more, carry, jax.random.split(key, tokens))[1]
