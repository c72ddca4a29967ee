"""Named Newton-Schulz coefficient tables, which check themselves on construction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Literal

import numpy as np

from optax_matrix import _check

Row = tuple[float, float, float]
Rows = tuple[Row, ...]
Normalization = Literal["frobenius", "schatten4", "aol"]

NORMALIZATIONS: tuple[Normalization, ...] = ("frobenius", "schatten4", "aol")


def compose(rows: Sequence[Row], sigma: np.ndarray) -> np.ndarray:
    """Applies ``σ ← aσ + bσ³ + cσ⁵`` with each row in turn, in float64 NumPy.

    The matrix iteration does the same to every singular value.

    Args:
      rows: The coefficients ``(a, b, c)`` of each step, in the order of the steps.
      sigma: Singular values, in an array of any shape.

    Returns:
      The mapped values, in a float64 array of the same shape.
    """
    y = np.asarray(sigma, np.float64)
    for a, b, c in rows:
        square = y * y
        y = y * (a + square * (b + square * c))
    return y


@dataclass(frozen=True)
class CoefficientTable:
    """A schedule of odd quintics ``p(σ) = aσ + bσ³ + cσ⁵`` with guaranteed bounds.

    The constructor checks the bounds in float64: ``default_steps`` steps, including
    ``safety``, map ``domain`` into ``band``. They map singular values below ``domain``
    into [0, upper end of ``band``], so that none changes sign or diverges.

    Args:
      name: The name under which `resolve` finds the table.
      rows: The published ``(a, b, c)`` of each step, in the order of the steps.
      source: Where the numbers were published.
      domain: The interval of singular values that the bounds hold for, within (0, 1].
        If its upper end is below 1, `take` scales the input down to it: where the rows
        fail above it, or for a margin.
      band: The interval into which ``default_steps`` steps map ``domain``.
      default_steps: The number of steps if none is given.
      repeats_last: Whether the last row is repeated if there are more steps than rows.
      prefix: Whether the first k rows are a valid schedule of k steps.
      safety: The default s of ``(a/s, b/s³, c/s⁵)``, at least 1. It shrinks singular
        values that rounding has pushed out of the interval that a row was designed for.
        It does not apply to the last row.
      normalization: The normalization of the input, which ensures σ_max ≤ 1.

    Raises:
      ValueError: If a row is not three finite numbers, if a count or an interval is out
        of range, or if the bounds do not hold.
    """

    name: str
    rows: Rows
    source: str
    domain: tuple[float, float]
    band: tuple[float, float]
    default_steps: int
    repeats_last: bool = False
    prefix: bool = False
    safety: float = 1.0
    normalization: Normalization = "frobenius"

    def __post_init__(self) -> None:
        """Checks that the rows keep the stated bounds."""
        _as_rows(self.rows, f"table {self.name!r}")
        _check.one_of("normalization", self.normalization, NORMALIZATIONS)
        low, high = self.domain
        if not 0.0 < low < high <= 1.0:
            raise ValueError(
                f"The `domain` of table {self.name!r} must satisfy 0 < low < high <= 1,"
                f" got {self.domain}."
            )
        rows = self.take(self.default_steps)

        # Linear spacing resolves the extrema of the map, log spacing its rise from 0.
        inside = np.concatenate(
            [np.geomspace(low, high, 2001), np.linspace(low, high, 2001)]
        )
        # A divergent table overflows; the comparison with NaN or inf then fails.
        with np.errstate(over="ignore", invalid="ignore"):
            mapped = compose(rows, inside / high)
        if not (self.band[0] <= mapped.min() and mapped.max() <= self.band[1]):
            raise ValueError(
                f"Table {self.name!r} claims to map {self.domain} into {self.band}, but"
                f" maps it onto [{mapped.min():.6f}, {mapped.max():.6f}]."
            )
        below = compose(rows, np.geomspace(1e-9, low, 1001) / high)
        if below.min() < 0.0 or below.max() > self.band[1]:
            raise ValueError(
                f"Table {self.name!r} maps singular values below {low:g} onto"
                f" [{below.min():.6f}, {below.max():.6f}], outside [0, {self.band[1]}]."
            )

    def take(self, steps: int | None = None, safety: float | None = None) -> Rows:
        """Returns the rows of `steps` steps, for singular values in [0, 1].

        Args:
          steps: The number of steps, at least 1. None: ``default_steps``.
          safety: The factor s, at least 1. None: the default of the table. It applies
            to every row except the last row of the table.

        Returns:
          The published rows, divided by powers of `safety`. If ``domain`` ends below 1,
          the first row is rescaled so that it accepts singular values up to 1.

        Raises:
          ValueError: If the table does not support `steps` steps, or if `safety` is
            below 1.
          TypeError: If `steps` is not an int.
        """
        length = len(self.rows)
        if steps is None:
            steps = self.default_steps
        _check.static_int("steps", steps, 1)
        too_long = steps > length and not self.repeats_last
        too_short = steps < length and not self.prefix
        if too_long or too_short:
            wanted = f"steps<={length}" if self.prefix else f"steps={length}"
            raise ValueError(
                f"`coefficients={self.name!r}` is a {length}-step table; got "
                f"`steps={steps}`. Pass `{wanted}`, or a table of your own."
            )
        s = self.safety if safety is None else safety
        _check.number("safety", s, 1.0)

        scaled = [(a / s, b / s**3, c / s**5) for a, b, c in self.rows[:-1]]
        rows = [*scaled, self.rows[-1]][:steps]
        rows += [self.rows[-1]] * (steps - len(rows))
        h = self.domain[1]
        a, b, c = rows[0]
        rows[0] = (a * h, b * h**3, c * h**5)
        return tuple(rows)


def _as_rows(rows: Sequence[Sequence[float]], name: str) -> Rows:
    """Returns `rows` as a tuple of float triples; errors mention `name`."""
    try:
        # The sum is so that "1.5" is not parsed.
        triples = tuple(tuple(float(0.0 + v) for v in row) for row in rows)
    except TypeError:
        triples = ()
    if not triples or not all(len(t) == 3 and all(map(isfinite, t)) for t in triples):
        raise ValueError(
            f"{name} must be one or more rows of three finite numbers (a, b, c), got "
            f"{rows!r}."
        )
    return tuple((a, b, c) for a, b, c in triples)


_JORDAN = CoefficientTable(
    name="jordan",
    rows=((3.4445, -4.7750, 2.0315),),
    source="Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/",
    # Singular values grow fast and then oscillate around 1 without converging.
    domain=(2e-3, 1.0),
    band=(0.681, 1.203),
    default_steps=5,
    repeats_last=True,
)

_QUINTIC = CoefficientTable(
    name="quintic",
    rows=(
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    source=(
        "You Jiacheng, 2025, https://x.com/YouJiacheng/status/1905861218138804534; "
        "`dion` in optax.contrib, `quintic` in NVIDIA Emerging-Optimizers"
    ),
    domain=(3e-3, 1.0),
    band=(0.977, 1.146),
    default_steps=5,
)

_POLAR_EXPRESS = CoefficientTable(
    name="polar_express",
    rows=(
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
    source=(
        "Amsel et al., 2025, https://arxiv.org/abs/2505.16932, algorithm 1 and its "
        "listing: safety 1.01 on every row except the last, which repeats"
    ),
    domain=(1e-3, 1.0),
    band=(0.9999, 1.0001),
    default_steps=8,
    repeats_last=True,
    # Each row is optimal for the interval that the previous rows map onto.
    prefix=True,
    safety=1.01,
)

_POLAR_EXPRESS5 = CoefficientTable(
    name="polar_express5",
    rows=(
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    source=(
        "Amsel et al., 2025, https://arxiv.org/abs/2505.16932, for five steps with a "
        "cushion of 2 and a safety factor of 1.02; in modded-nanogpt, in "
        "https://github.com/karpathy/nanochat and in https://github.com/microsoft/dion"
    ),
    # Dion divides the matrix by 1.02 times its norm.
    domain=(2e-3, 1 / 1.02),
    band=(0.858, 1.142),
    default_steps=5,
)

_CANS = CoefficientTable(
    name="cans",
    rows=(
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    source=(
        "Grishina et al., 2025, https://arxiv.org/abs/2506.10935 (Remez on the "
        "interval that the previous rows leave), as tabulated in NVIDIA "
        "Emerging-Optimizers"
    ),
    domain=(1e-3, 1.0),
    # In bfloat16 the published rows diverge; a `safety` of 1.01 prevents it.
    band=(0.884, 1.120),
    default_steps=5,
    repeats_last=True,
    prefix=True,
)

_AOL = CoefficientTable(
    name="aol",
    rows=(
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ),
    source=(
        "Boissin et al., 2025, https://arxiv.org/abs/2512.04632 (Turbo-Muon), rows "
        "from https://github.com/thib-s/flash-newton-schulz"
    ),
    # The first row changes sign at σ = 0.884. After the AOL normalization σ is close to
    # 1 if the rows of the matrix are nearly orthogonal; with the published rows, the
    # result of a 1×n matrix has the wrong sign.
    domain=(0.015, 0.85),
    band=(0.987, 1.085),
    default_steps=4,
    normalization="aol",
)

_TRACK3 = CoefficientTable(
    name="track3",
    rows=((2.0, -1.5, 0.5),),
    source=(
        "Jordan et al., 2025, https://github.com/KellerJordan/modded-nanogpt, "
        "records/track_3_optimization/train_gpt_simple.py"
    ),
    domain=(5e-4, 1.0),
    band=(0.996, 1.002),
    default_steps=12,
    repeats_last=True,
)

_CUBIC = CoefficientTable(
    name="cubic",
    rows=((1.5, -0.5, 0.0),),
    source=(
        "Björck and Bowie, 1971, https://doi.org/10.1137/0708036; Higham, 2008, "
        "Functions of Matrices, section 8.3: the classical Newton-Schulz iteration"
    ),
    domain=(1e-3, 1.0),
    band=(0.9999, 1.0001),
    default_steps=20,
    repeats_last=True,
)

_CUBIC5 = CoefficientTable(
    name="cubic5",
    rows=(
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ),
    source=(
        "https://arxiv.org/abs/2606.00371, relaxed cubic schedule, as tabulated in "
        "NVIDIA Emerging-Optimizers"
    ),
    domain=(7e-3, 1.0),
    band=(0.739, 1.301),
    default_steps=5,
)

TABLES: Mapping[str, CoefficientTable] = MappingProxyType(
    {
        table.name: table
        for table in (
            _JORDAN,
            _QUINTIC,
            _POLAR_EXPRESS,
            _POLAR_EXPRESS5,
            _CANS,
            _AOL,
            _TRACK3,
            _CUBIC,
            _CUBIC5,
        )
    }
)


def resolve(
    coefficients: str | Sequence[Sequence[float]],
    steps: int | None = None,
    safety: float | None = None,
) -> Rows:
    """Returns the rows of every step, from the name of a table or from custom rows.

    An unsupported number of steps raises an error and is never changed silently.

    Args:
      coefficients: A key of `TABLES`, or rows ``(a, b, c)`` in the order of the steps.
        A single row is repeated for every step.
      steps: The number of steps, at least 1. None: the default of the table, or the
        number of custom rows.
      safety: The factor s of ``(a/s, b/s³, c/s⁵)``, at least 1. Only the tables whose
        rows are optimized interval by interval have one: ``"polar_express"`` (default
        1.01) and ``"cans"`` (default 1). Larger values tolerate coarser rounding, but
        small singular values grow more slowly.

    Returns:
      `steps` rows of Python floats, for singular values in [0, 1].

    Raises:
      ValueError: If the name is unknown, if a row is not three finite numbers, if the
        table does not support `steps` steps, or if `safety` is given for another table
        or for custom rows.
      TypeError: If `steps` is not an int.
    """
    if isinstance(coefficients, str):
        _check.one_of("coefficients", coefficients, tuple(TABLES))
        table = TABLES[coefficients]
        if safety is not None and not table.prefix:
            raise ValueError(
                f"`coefficients={coefficients!r}` takes no safety factor; got "
                f"`safety={safety}`. Leave it None, or divide rows of your own."
            )
        return table.take(steps, safety)

    rows = _as_rows(coefficients, "`coefficients`")
    if safety is not None:
        raise ValueError(
            f"`safety` belongs to named tables; got `safety={safety}` with rows of your"
            " own. Leave it None, or divide the rows."
        )
    if steps is None:
        return rows
    _check.static_int("steps", steps, 1)
    if len(rows) == 1:
        return rows * steps
    if steps != len(rows):
        raise ValueError(
            f"`coefficients` has {len(rows)} rows; got `steps={steps}`. Pass "
            f"`steps={len(rows)}` or None, or as many rows as steps."
        )
    return rows
