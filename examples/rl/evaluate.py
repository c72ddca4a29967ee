"""Measures what a policy can do on held-out problems."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from examples.rl import policy, task
from examples.rl.task import Grade, Problem

CHUNK = 128  # responses at a time, so that one program serves all


def respond(
    graph: nnx.GraphDef,
    params: nnx.State,
    problems: Sequence[Problem],
    keys: jax.Array | None = None,
    temperature: float = 0.0,
) -> list[str]:
    """Returns one response per problem, without its end token.

    A response without an end gets "…" at its end, which is not well-formed.

    Args:
      graph: The model without its parameters.
      params: Its parameters.
      problems: The problems.
      keys: A key for each; None is for temperature 0.
      temperature: 0 takes the most probable token.
    """
    prompts, count = task.prompts_of(problems), len(problems)
    if keys is None:
        keys = jax.random.split(jax.random.key(0), count)
    texts = []
    for begin in range(0, count, CHUNK):
        # Problems are repeated to fill the last chunk.
        place = np.arange(begin, begin + CHUNK) % count
        given = prompts[place], keys[place], task.RESPONSE, temperature
        tokens = np.asarray(policy.sample(graph, params, *given).tokens)
        for row in tokens[: count - begin]:
            text, ended = task.decode(row)
            texts.append(text if ended else text + "…")
    return texts


def grade(response: str, problem: Problem) -> Grade:
    """Grades a response of `respond`."""
    return task.grade(response, not response.endswith("…"), problem.answer)


def summary(by_kind: Mapping[str, float]) -> float:
    """Returns the mean over kinds; the two parallel ones count as one."""
    parallel = (by_kind["par_easy"] + by_kind["par_hard"]) / 2
    others = [by_kind[k] for k in task.KINDS if not k.startswith("par")]
    return float(np.mean([*others, parallel]))


def greedy(
    graph: nnx.GraphDef, params: nnx.State, problems: Sequence[Problem]
) -> dict[str, Any]:
    """Returns accuracy and the share of nonsense, of the most probable responses.

    Accuracy is by kind, by the verb of parallel problems, and in all.
    """
    texts = respond(graph, params, problems)
    grades = [grade(text, p) for text, p in zip(texts, problems, strict=True)]
    correct = np.array([g.correct for g in grades])
    nonsense = float(np.mean([g.nonsense for g in grades]))
    of_verb: dict[str, list[bool]] = {}
    for problem, right in zip(problems, correct, strict=True):
        if problem.kind.startswith("par"):
            verb = next(w for w in problem.prompt.split() if w in task.PARALLEL)
            of_verb.setdefault(verb, []).append(right)
    by_verb = {verb: float(np.mean(found)) for verb, found in sorted(of_verb.items())}
    return {**_shares(correct, problems), "by_verb": by_verb, "nonsense": nonsense}


def _shares(right: np.ndarray, problems: Sequence[Problem]) -> dict[str, Any]:
    """Returns the mean of a number that each problem has, by kind and in all."""
    kinds = np.array([problem.kind for problem in problems])
    by_kind = {kind: float(right[kinds == kind].mean()) for kind in task.KINDS}
    return {"all": summary(by_kind), "by_kind": by_kind}


def sampled(
    graph: nnx.GraphDef,
    params: nnx.State,
    problems: Sequence[Problem],
    *,
    seed: int,
    temperature: float,
    k: int = 8,
) -> dict[str, Any]:
    """Returns pass@1 and pass@k by kind and in all, from k responses per problem."""
    repeated = [problem for problem in problems for _ in range(k)]
    keys = jax.random.split(jax.random.key(seed), len(repeated))
    texts = respond(graph, params, repeated, keys, temperature)
    correct = np.array(
        [grade(t, p).correct for t, p in zip(texts, repeated, strict=True)]
    ).reshape(-1, k)
    rates = {"pass@1": correct.mean(1), f"pass@{k}": correct.max(1)}
    return {name: _shares(found, problems) for name, found in rates.items()}
