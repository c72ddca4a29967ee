"""The objectives of GRPO (arXiv:2402.03300) and DAPO (arXiv:2503.14476)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is maximized; the defaults are DAPO's.

    Attributes:
      clip_low: Ratios below 1 - clip_low earn no more.
      clip_high: Ratios above 1 + clip_high earn no more.
      kl: Coefficient of the KL divergence from the reference; 0 is without.
      token_level: Whether each token has the same weight, or each response.
      scale: Whether advantages are divided by their standard deviation in the group.
      rounds: How often a step may sample more prompts to replace groups whose rewards
        are all equal; 1 does not replace them.
      overlong: The number of last tokens of the longest response over which the reward
        falls linearly by 1; 0 is without.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0
    token_level: bool = True
    scale: bool = True
    rounds: int = 4
    overlong: int = 4


DAPO = Objective()
GRPO = Objective(clip_high=0.2, kl=0.04, token_level=False, rounds=1, overlong=0)


def overlong_penalty(lengths: np.ndarray, ended: np.ndarray, longest: int, over: int):
    """Returns DAPO's reward for length, in [-1, 0].

    Args:
      lengths: Tokens of the responses, end tokens included.
      ended: Whether they ended.
      longest: The most tokens a response may have.
      over: The number of last tokens over which the reward falls; 0 is without.
    """
    if not over:
        return np.zeros(len(lengths))
    soft = np.minimum(0.0, (longest - over - lengths) / over)
    return np.where(ended, soft, -1.0)


def advantages(rewards: np.ndarray, scale: bool) -> np.ndarray:
    """Returns rewards (groups, samples) less their group's mean, in its deviations."""
    centered = rewards - rewards.mean(1, keepdims=True)
    if not scale:
        return centered
    return centered / (rewards.std(1, keepdims=True) + 1e-6)


class Batch(NamedTuple):
    """Responses to learn from."""

    prompts: jax.Array  # (B, P)
    tokens: jax.Array  # (B, R)
    mask: jax.Array  # (B, R)
    advantages: jax.Array  # (B,)
    old: jax.Array  # (B, R) log-probabilities of the policy that sampled
    reference: jax.Array  # (B, R) those of the reference


def weights(mask: jax.Array, token_level: bool) -> jax.Array:
    """Returns the weight of each token; they sum to 1."""
    if token_level:
        return mask / jnp.maximum(mask.sum(), 1.0)
    lengths = jnp.maximum(mask.sum(1, keepdims=True), 1.0)
    return mask / lengths / mask.shape[0]


def k3(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns an estimate of KL(policy ‖ reference) per token, never negative."""
    gap = reference - log_probs
    return jnp.expm1(gap) - gap


def policy_loss(
    log_probs: jax.Array, batch: Batch, objective: Objective
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss, and the share of tokens whose ratio is clipped.

    Args:
      log_probs: Log-probabilities (B, R) of the policy that learns.
      batch: The responses.
      objective: What is maximized.
    """
    ratio = jnp.exp(log_probs - batch.old)
    gain = batch.advantages[:, None]
    clipped = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
    earned = jnp.minimum(ratio * gain, clipped * gain)
    if objective.kl:
        earned = earned - objective.kl * k3(log_probs, batch.reference)
    acts = (clipped * gain < ratio * gain) * batch.mask
    share = acts.sum() / jnp.maximum(batch.mask.sum(), 1.0)
    return -jnp.sum(weights(batch.mask, objective.token_level) * earned), share
