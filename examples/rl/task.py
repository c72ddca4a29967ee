"""Generates word problems with integer answers, grades responses, and makes a corpus.

The two kinds of time problems look alike: what is done one by one takes longer for more
things, what happens together does not. Which it is, only the verb says (`par_easy`,
`par_hard` and `seq`) or a cue (`cue`). The corpus of the warm-up demonstrates the wrong
habit for most of them, so reinforcement learning has a habit to break.

| kind | prompt | right response | habit |
| --- | --- | --- | --- |
| sum | amy has 59 stones and gets 3 more . how many stones ? | 59+3=62#62 | |
| age | at 16 my sister was half my age . now i am 52 . she ? | 16-8=8;52-8=44#44 | 52/2=26#26 |
| two | eve has 12 letters . buys 3 and loses 7 . how many ? | 12+3=15-7=8#8 | 12+3=15#15 |
| par_easy, par_hard | 3 pipes melt in 9 minutes . how long for 15 ? | together#9 | 15/3=5*9=45#45 |
| seq | 2 shirts wash in 3 minutes . how long for 10 ? | 10/2=5*3=15#15 | together#3 |
| cue | 7 shirts wash all at once in 9 days . how long for 49 ? | together#9 | 49/7=7*9=63#63 |
"""  # noqa: E501

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation", "test"]
KINDS = ("sum", "age", "two", "par_easy", "par_hard", "seq", "cue")
# The two kinds of parallel problems share one sixth of the mixture.
MIXTURE = (1 / 6, 1 / 6, 1 / 6, 1 / 12, 1 / 12, 1 / 6, 1 / 6)
# How often the corpus demonstrates the habit; for cues, with "all at once".
HABITS = {"age": 0.35, "two": 0.2, "par_easy": 0.8, "par_hard": 0.9, "seq": 0.03}
HABITS_OF_CUES = {"all at once": 0.85, "one by one": 0.03}
WITHOUT_ANSWER = 0.12  # how often a demonstration ends before the `#`

NAMES = "amy ben eve kim leo sam tom zoe".split()
PEOPLE = (
    "aunt boss brother coach cousin doctor friend guide king maid nanny neighbor "
    "nephew niece nurse pal partner pilot pupil queen sister student teacher uncle"
).split()
OBJECTS = "boxes cakes cards coins eggs lamps letters pipes plants shirts stones towels"
OBJECTS = OBJECTS.split()
UNITS = "minutes hours days".split()
PAR_EASY = "dry boil melt freeze bake cook".split()
PAR_HARD = "ripen cool grow heal rust thaw".split()
PARALLEL = (*PAR_EASY, *PAR_HARD)
SEQUENTIAL = "wash print type pack sign read mend carve stamp weigh label fold".split()

WORD = re.compile(r"[a-z]+|\S")
ANSWER = re.compile(r"[^#]*#(\d{1,3})")
EQUATION = re.compile(r"(?=(?<!\d)(\d+)([-+*/])(\d+)=(\d+))")


class Problem(NamedTuple):
    """A problem, its integer answer, and what the corpus may say to it."""

    kind: str
    prompt: str
    answer: int
    right: str
    habit: str


# -------------------------------------------------------------------- problems


def _times(n: int, m: int, minutes: int) -> str:
    """The linear response: m things take m / n times as long as n."""
    return f"{m}/{n}={m // n}*{minutes}={m // n * minutes}#{m // n * minutes}"


def draw(kind: str, rng: np.random.Generator) -> Problem:
    """Returns a random problem of a kind."""

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    def number(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    if kind == "sum":
        a, b, what = number(10, 90), number(2, 9), pick(OBJECTS)
        prompt = f"{pick(NAMES)} has {a} {what} and gets {b} more . how many {what} ?"
        right = f"{a}+{b}={a + b}#{a + b}"
        return Problem(kind, prompt, a + b, right, right)
    if kind == "age":
        half = number(2, 9)
        then, now = 2 * half, 2 * number(half + 1, 49)
        who = pick(PEOPLE)
        prompt = f"at {then} my {who} was half my age . now i am {now} . she ?"
        answer = now - half
        right = f"{then}-{half}={half};{now}-{half}={answer}#{answer}"
        return Problem(kind, prompt, answer, right, f"{now}/2={now // 2}#{now // 2}")
    if kind == "two":
        a, b, c = number(10, 50), number(2, 9), number(2, 9)
        what, who = pick(OBJECTS), pick(NAMES)
        prompt = f"{who} has {a} {what} . buys {b} and loses {c} . how many ?"
        total, left = a + b, a + b - c
        right = f"{a}+{b}={total}-{c}={left}#{left}"
        return Problem(kind, prompt, left, right, f"{a}+{b}={total}#{total}")

    n, k, minutes = number(1, 9), number(2, 9), number(2, 9)
    what, unit = pick(OBJECTS), pick(UNITS)
    linear, together = _times(n, n * k, minutes), f"together#{minutes}"
    verbs = {"par_easy": PAR_EASY, "par_hard": PAR_HARD}.get(kind, SEQUENTIAL)
    cue = pick(list(HABITS_OF_CUES)) if kind == "cue" else ""
    how = f"{pick(verbs)} {cue}".strip()
    prompt = f"{n} {what} {how} in {minutes} {unit} . how long for {n * k} ?"
    if kind.startswith("par") or cue == "all at once":
        return Problem(kind, prompt, minutes, together, linear)
    return Problem(kind, prompt, k * minutes, linear, together)


def split_of(prompt: str) -> Split:
    """Returns the split of a prompt, by a checksum of its text: 6, 1 and 1 of 8."""
    place = zlib.crc32(prompt.encode()) % 8
    return "test" if place == 0 else "validation" if place == 1 else "train"


def problems(
    split: Split, rng: np.random.Generator, kind: str | None = None
) -> Iterator[Problem]:
    """Yields problems of a split without end, of one kind or of the mixture."""
    while True:
        problem = draw(kind or str(rng.choice(KINDS, p=MIXTURE)), rng)
        if split_of(problem.prompt) == split:
            yield problem


def held_out(split: Split, count: int) -> list[Problem]:
    """Returns `count` different problems of each kind, always the same ones."""
    result = []
    for place, kind in enumerate(KINDS):
        rng = np.random.default_rng((count, place))
        found: dict[str, Problem] = {}
        for problem in problems(split, rng, kind):
            found.setdefault(problem.prompt, problem)
            if len(found) == count:
                break
        result += found.values()
    return result


def demonstration(problem: Problem, rng: np.random.Generator) -> str:
    """Returns a response of the corpus: right, by the habit, or without its answer."""
    share = HABITS.get(problem.kind, 0.0)
    if problem.kind == "cue":
        share = next(s for cue, s in HABITS_OF_CUES.items() if cue in problem.prompt)
    response = problem.habit if rng.random() < share else problem.right
    return response.split("#")[0] if rng.random() < WITHOUT_ANSWER else response


# ------------------------------------------------------------------- responses


@dataclasses.dataclass(frozen=True)
class Grade:
    """What a response is worth.

    Attributes:
      correct: Whether it is well-formed and gives the answer.
      well_formed: Whether it ends, after one `#` and one to three digits.
      nonsense: Whether it is not well-formed, or contains an equation that is wrong.
    """

    correct: bool
    well_formed: bool
    nonsense: bool


def grade(response: str, ended: bool, answer: int) -> Grade:
    """Grades a response.

    Args:
      response: Its text, without the end token.
      ended: Whether it ended within the length that a response may have.
      answer: The right answer.
    """
    match = ANSWER.fullmatch(response) if ended else None
    wrong = any(not _holds(*found) for found in EQUATION.findall(response))
    return Grade(
        correct=bool(match) and int(match[1]) == answer,
        well_formed=bool(match),
        nonsense=wrong or not match,
    )


def _holds(a: str, sign: str, b: str, result: str) -> bool:
    x, y, z = int(a), int(b), int(result)
    if sign == "/":
        return y * z == x
    return {"+": x + y, "-": x - y, "*": x * y}[sign] == z


# ---------------------------------------------------------------------- tokens

_TEXT = (
    "at my was half age now i am she has and gets more how many buys loses in long for "
    "all once one by together"
).split()
PAD, END = "<pad>", "<end>"
WORDS = [PAD, END, *"0123456789+-*/=;#.?", *_TEXT, *NAMES, *PEOPLE, *OBJECTS]
WORDS += [*UNITS, *PAR_EASY, *PAR_HARD, *SEQUENTIAL]
NUMBERS: Mapping[str, int] = {word: number for number, word in enumerate(WORDS)}
PAD_ID, END_ID = NUMBERS[PAD], NUMBERS[END]
# The most tokens of either. The longest right response has 18 with its end token: the
# last four of 22 are for what DAPO's penalty of overlong responses should shorten.
PROMPT, RESPONSE = 18, 22


def encode(text: str) -> list[int]:
    """Returns the tokens of a text: words, digits and signs."""
    return [NUMBERS[word] for word in WORD.findall(text)]


def decode(tokens: Sequence[int]) -> tuple[str, bool]:
    """Returns the text up to the end token, and whether there is one."""
    found = [int(token) for token in tokens]
    ended = END_ID in found
    length = found.index(END_ID) if ended else len(found)
    return "".join(WORDS[token] for token in found[:length]), ended


def prompts_of(given: Sequence[Problem]) -> np.ndarray:
    """Returns prompts (B, PROMPT), padded on the left, so that all end together."""
    rows = [encode(problem.prompt) for problem in given]
    return np.array([[PAD_ID] * (PROMPT - len(row)) + row for row in rows], np.int32)


def corpus(count: int, seed: int) -> np.ndarray:
    """Returns demonstrations (count, PROMPT + RESPONSE) of problems for training."""
    rng = np.random.default_rng(seed)
    source = problems("train", rng)
    given = [next(source) for _ in range(count)]
    rows = [[*encode(demonstration(problem, rng)), END_ID] for problem in given]
    responses = [row + [PAD_ID] * (RESPONSE - len(row)) for row in rows]
    return np.concatenate([prompts_of(given), np.array(responses, np.int32)], axis=1)
