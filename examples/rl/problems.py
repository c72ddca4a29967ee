"""Problems for models that have learned to read: GSM8K, and reasoning-gym's.

A source is the path of a file in GSM8K's format, or `gym:` and the name of a task of
reasoning-gym (https://github.com/open-thought/reasoning-gym), such as
`gym:basic_arithmetic`. Whatever the source, a response gives its answer after `####`,
as those of GSM8K do.
"""

# The extras `tunix` and `gym` need not be installed.
# pyright: reportMissingImports=false

import dataclasses
import decimal
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

INSTRUCTION = "Think step by step, and give only the final answer after ####."
GYM = "gym:"
ANSWER = re.compile(r"####[ \t]*(\S.*)")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, its answer, and what other answers are worth, from 0 to 1."""

    question: str
    answer: str
    score: Callable[[str], float]


def load(source: str, count: int, seed: int) -> list[Problem]:
    """Returns problems of a source in random order.

    A file that is exhausted is reshuffled and reused.

    Args:
      source: A path, or `gym:` and the name of a task.
      count: How many.
      seed: The seed of the order, or of what reasoning-gym draws.

    Raises:
      ValueError: If the file has no problems, or a line that is not one.
      ModuleNotFoundError: If reasoning-gym is needed and not installed.
    """
    if source.startswith(GYM):
        return gym(source.removeprefix(GYM), count, seed)
    known = gsm8k(Path(source))
    if not known:
        raise ValueError(f"{source} has no problems")
    rng, taken = np.random.default_rng(seed), []
    while len(taken) < count:
        taken += [known[place] for place in rng.permutation(len(known))]
    return taken[:count]


def gsm8k(path: Path) -> list[Problem]:
    """Reads a file with a JSON object per line: `question`, and `answer` with ####."""
    problems = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    for place, line in enumerate(text.splitlines(), 1):
        problem = _of_line(line)
        if problem is None:
            raise ValueError(
                f"line {place} of {path} must be a JSON object with `question` and an "
                f"`answer` that ends in #### and a number, got {line[:80]}"
            )
        problems.append(problem)
    return problems


def _of_line(line: str) -> Problem | None:
    try:
        fields = json.loads(line)
        question, answer = fields["question"], final_answer(fields["answer"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    value = number(answer or "")
    if answer is None or value is None:
        return None
    return Problem(question, answer, lambda given: float(number(given) == value))


def gym(task: str, count: int, seed: int) -> list[Problem]:
    """Draws problems of a task of reasoning-gym."""
    if not importlib.util.find_spec("reasoning_gym"):
        raise ModuleNotFoundError(
            "reasoning-gym is not installed: pip install 'optax-matrix[gym]'"
        )
    import reasoning_gym

    # Problem i of a seed is problem 0 of seed + i, so seeds are to be far apart.
    seed = int(np.random.default_rng(seed).integers(2**31))
    made: Any = reasoning_gym.create_dataset(task, size=count, seed=seed)

    def problem(entry: Any) -> Problem:
        score = lambda given: float(made.score_answer(given, entry))  # noqa: E731
        return Problem(entry["question"], entry["answer"], score)

    return [problem(made[place]) for place in range(count)]


def final_answer(response: str) -> str | None:
    """Returns what follows the last ####, or None."""
    found = ANSWER.findall(response)
    return found[-1].strip() if found else None


def number(text: str) -> decimal.Decimal | None:
    """Reads a number, as in "1,234", "$18." or "-0.50"; None if it is not one."""
    plain = text.strip().removesuffix(".").replace(",", "").replace("$", "")
    try:
        value = decimal.Decimal(plain)
    except decimal.InvalidOperation:
        return None
    return value if value.is_finite() else None


def reward(response: str, problem: Problem, well_formed: float) -> float:
    """Returns what a response earns.

    Args:
      response: Its text.
      problem: The problem.
      well_formed: The least that a response with an answer earns.
    """
    answer = final_answer(response)
    return 0.0 if answer is None else max(well_formed, problem.score(answer))
