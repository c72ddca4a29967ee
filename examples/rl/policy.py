"""Samples responses from a GPT with a key-value cache, and scores them.

Prompts are padded on the left to one length, and the model is trained on them as they
are, so padding needs no mask. Everything that a response contains counts, its end token
included; what follows it does not.

Shapes: B responses, P and R tokens of a prompt and of a response, V vocabulary, H
heads, K head_dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.nanogpt.model import GPT
from examples.rl.task import END_ID

Cache = list[tuple[jax.Array, jax.Array]]


class Responses(NamedTuple):
    """Responses, the mask of their tokens, and what the policy said of these."""

    tokens: jax.Array  # (B, R) integers
    mask: jax.Array  # (B, R) float32
    log_probs: jax.Array  # (B, R) float32
    entropy: jax.Array  # (B, R) float32, of the distributions they come from


def advance(
    model: GPT, tokens: jax.Array, cache: Cache, first: jax.Array | int
) -> tuple[jax.Array, Cache]:
    """Returns the logits (B, V) after some tokens, and the cache with their keys.

    Args:
      model: The GPT.
      tokens: The tokens (B, T) at positions `first` to `first + T - 1`.
      cache: The keys and values (B, P + R, H, K) of each block.
      first: The number of tokens before them.
    """
    x = model.norm1(model.embed(tokens))
    positions = jnp.arange(cache[0][0].shape[1])[None, :]
    mask = positions <= first + jnp.arange(tokens.shape[1])[:, None]  # (T, P + R)
    filled = []
    for block, (keys, values) in zip(model.blocks, cache, strict=True):
        q, k, v = block.attn.heads(block.norm1(x), first)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, first, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, first, axis=1)
        x = x + block.attn.attend(q, keys, values, mask[None, None])
        x = x + block.mlp(block.norm2(x))
        filled.append((keys, values))
    return model.logits(x[:, -1:])[:, 0], filled


@functools.partial(jax.jit, static_argnums=(0, 4))
def sample(
    graph: nnx.GraphDef,
    params: nnx.State,
    prompts: jax.Array,
    keys: jax.Array,
    length: int,
    temperature: jax.Array | float = 1.0,
) -> Responses:
    """Samples a response to each prompt.

    Args:
      graph: The model without its parameters.
      params: Its parameters.
      prompts: The prompts (B, P).
      keys: A key (B,) for each of them.
      length: R, the most tokens that a response may have.
      temperature: What logits are divided by; 0 takes the most probable token.
    """
    model = nnx.merge(graph, params)
    count, width = prompts.shape
    heads = model.embed.embedding.shape[1] // model.blocks[0].attn.head_dim
    empty = jnp.zeros((count, width + length, heads, model.blocks[0].attn.head_dim))
    logits, cache = advance(model, prompts, [(empty, empty)] * len(model.blocks), 0)

    def one_more(carry, position):
        logits, cache, done = carry
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        scaled = logits / jnp.maximum(temperature, 1e-6)
        drawn = jax.vmap(jax.random.categorical)(step_keys, scaled)
        token = jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)
        out = Responses(token, 1.0 - done, *_of(scaled, token))
        logits, cache = advance(model, token[:, None], cache, width + position)
        done = jnp.maximum(done, token == END_ID)
        return (logits, cache, done), out

    carry = (logits, cache, jnp.zeros(count))
    _, found = jax.lax.scan(one_more, carry, jnp.arange(length))
    return Responses(*(x.swapaxes(0, 1) for x in found))


def _of(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probabilities of tokens, and the entropies."""
    logs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logs, tokens[..., None], -1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logs) * logs, -1)


def log_probs(
    graph: nnx.GraphDef,
    params: nnx.State,
    prompts: jax.Array,
    tokens: jax.Array,
    temperature: float,
) -> jax.Array:
    """Returns the log-probabilities (B, R) of given responses, in one pass.

    Args:
      graph: The model without its parameters.
      params: Its parameters.
      prompts: The prompts (B, P).
      tokens: The responses (B, R).
      temperature: What logits are divided by: that of the sampling.
    """
    whole = jnp.concatenate([prompts, tokens], axis=1)
    logits = nnx.merge(graph, params)(whole[:, :-1])[:, prompts.shape[1] - 1 :]
    return _of(logits / temperature, tokens)[0]


def imitation(graph: nnx.GraphDef, params: nnx.State, rows: jax.Array, prompt: int):
    """Returns the mean cross-entropy of the responses of demonstrations (B, P + R)."""
    tokens = rows[:, prompt:]
    logits = nnx.merge(graph, params)(rows[:, :-1])[:, prompt - 1 :]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    mask = mask_of(tokens)
    return jnp.sum(losses * mask) / jnp.sum(mask)


def mask_of(tokens: jax.Array) -> jax.Array:
    """Returns 1 for tokens up to the first end token, which is included, else 0."""
    ended = jnp.cumsum(tokens == END_ID, axis=1) - (tokens == END_ID)
    return (ended == 0).astype(jnp.float32)
