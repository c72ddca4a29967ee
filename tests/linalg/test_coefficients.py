"""Coefficient tables: the published numbers, their promises, and step counts."""

import dataclasses

import numpy as np
import pytest

from optax_matrix._linalg import TABLES, CoefficientTable, resolve
from tests.references import polar as reference

JORDAN = (3.4445, -4.7750, 2.0315)


def run(rows, sigma):
    for a, b, c in rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def valid_table(**changes):
    arguments = {
        "name": "mine",
        "rows": ((1.5, -0.5, 0.0),),
        "source": "here",
        "domain": (0.1, 1.0),
        "band": (0.9, 1.0),
        "default_steps": 10,
        "repeats_last": True,
    }
    return CoefficientTable(**{**arguments, **changes})


def test_every_asked_for_table_is_there():
    assert set(TABLES) == set(reference.PUBLISHED)


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_the_published_ones(name):
    table = TABLES[name]
    rows = list(table.rows)
    rows += [rows[-1]] * (table.default_steps - len(rows))
    assert rows == reference.PUBLISHED[name]
    assert "http" in table.source


@pytest.mark.parametrize("name", TABLES)
def test_band_is_kept_and_not_generous(name):
    table = TABLES[name]
    low, high = table.domain
    grid = np.concatenate([np.geomspace(low, high, 7001), np.linspace(low, high, 7001)])
    rows = reference.PUBLISHED[name]
    if name == "polar_express":
        rows = reference.safe_rows(name)
    mapped = run(rows, grid)
    assert table.band[0] <= mapped.min() and mapped.max() <= table.band[1]
    # Stated bands are rounded outwards in the third decimal, cubic5's lower end too.
    assert mapped.min() - table.band[0] < 0.0365 and table.band[1] - mapped.max() < 2e-3


@pytest.mark.parametrize("name", TABLES)
def test_resolved_rows_take_the_unit_interval(name):
    # Where the published rows fail near 1 (aol) the domain's end is folded in.
    table = TABLES[name]
    grid = np.linspace(table.domain[0], 1.0, 999)
    want = run(table.take(), grid)
    assert want.min() > 0 and want.max() <= table.band[1]


def test_aol_rows_as_published_flip_the_sign_near_one():
    # The reason for its domain; should the rows be replaced, it can go.
    assert run(reference.PUBLISHED["aol"], 1.0) < -0.9
    assert 0.9 < run(resolve("aol"), 1.0) < 1.1


def test_safety_spares_the_last_row():
    got = resolve("polar_express", safety=1.05)
    # Rounding of a division and a power in float64.
    np.testing.assert_allclose(
        got, reference.safe_rows("polar_express", 1.05), rtol=1e-14
    )
    np.testing.assert_allclose(
        resolve("polar_express"), reference.safe_rows("polar_express", 1.01), rtol=1e-14
    )
    np.testing.assert_allclose(
        resolve("cans", safety=1.02), reference.safe_rows("cans", 1.02), rtol=1e-14
    )
    assert resolve("cans") == tuple(reference.PUBLISHED["cans"])


@pytest.mark.parametrize("steps", [1, 5, 6, 12])
def test_one_row_tables_repeat(steps):
    assert resolve("jordan", steps) == (JORDAN,) * steps
    assert resolve([JORDAN], steps) == (JORDAN,) * steps


@pytest.mark.parametrize("name", ["polar_express", "cans"])
def test_last_row_repeats_and_a_prefix_is_a_schedule(name):
    own = resolve(name)
    assert resolve(name, len(own) + 3) == own + own[-1:] * 3
    assert resolve(name, 3) == own[:3]


@pytest.mark.parametrize("name, length", [("quintic", 5), ("aol", 4), ("cubic5", 5)])
@pytest.mark.parametrize("difference", [-1, 1, 5])
def test_other_counts_raise(name, length, difference):
    steps = length + difference
    message = (
        rf"`coefficients='{name}'` is a {length}-step table; got `steps={steps}`. "
        rf"Pass `steps={length}`, or a table of your own."
    )
    with pytest.raises(ValueError, match=message):
        resolve(name, steps)
    assert len(resolve(name, length)) == length


def test_a_prefix_table_that_does_not_repeat_says_so():
    table = valid_table(
        rows=((1.5, -0.5, 0.0),) * 12, default_steps=12, repeats_last=False, prefix=True
    )
    with pytest.raises(ValueError, match=r"got `steps=13`\. Pass `steps<=12`"):
        table.take(13)
    assert len(table.take(7)) == 7


@pytest.mark.parametrize("name", TABLES)
def test_default_is_the_tables_own_length(name):
    assert len(resolve(name)) == len(reference.PUBLISHED[name])


def test_own_rows_are_taken_as_they_are():
    rows = [[1.5, -0.5, 0], [2, -1.5, 0.5]]
    assert resolve(rows) == ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5))
    assert resolve(rows, 2) == resolve(rows)
    assert resolve(np.array(rows).tolist()) == resolve(rows)
    for steps in (1, 3):
        with pytest.raises(ValueError, match=rf"has 2 rows; got `steps={steps}`"):
            resolve(rows, steps)


@pytest.mark.parametrize(
    "rows", [[], [(1.0, 2.0)], [1.0, 2.0, 3.0], [(1.0, float("nan"), 0.0)], 3]
)
def test_malformed_rows_raise(rows):
    with pytest.raises(ValueError, match="rows of three finite numbers"):
        resolve(rows)


def test_other_bad_arguments_raise():
    with pytest.raises(ValueError, match="`coefficients` must be one of 'jordan', "):
        resolve("nope")
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        resolve("jordan", 0)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        resolve([JORDAN], 0)
    with pytest.raises(TypeError, match=r"`steps` must be an int, got 2\.5"):
        resolve("jordan", 2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`safety` must lie in \[1, inf\), got 0\.9"):
        resolve("polar_express", safety=0.9)
    with pytest.raises(ValueError, match="'jordan'` takes no safety factor"):
        resolve("jordan", safety=1.01)
    with pytest.raises(ValueError, match="`safety` belongs to named tables"):
        resolve([JORDAN], safety=1.01)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": ()}, "table 'mine' must be one or more rows"),
        ({"rows": ((1.5, -0.5),)}, "rows of three finite numbers"),
        ({"rows": ((1.5, 0.5, 0.0),)}, "claims to map"),
        ({"band": (0.9, 0.99)}, r"claims to map \(0.1, 1.0\) into \(0.9, 0.99\)"),
        ({"band": (0.99999999, 1.0), "default_steps": 3}, "claims to map"),
        ({"domain": (0.0, 1.0)}, "must satisfy 0 < low < high <= 1"),
        ({"domain": (0.1, 1.5)}, "must satisfy 0 < low < high <= 1"),
        ({"default_steps": 0}, "`steps` must be at least 1"),
        ({"repeats_last": False}, "is a 1-step table; got `steps=10`"),
        ({"normalization": "max"}, "`normalization` must be one of"),
        ({"safety": 0.5}, "`safety` must lie in"),
        # As published, track3 overshoots 1 just below where it has settled.
        (
            {
                "rows": ((2.0, -1.5, 0.5),),
                "default_steps": 12,
                "domain": (1e-3, 1.0),
                "band": (0.9999, 1.0001),
            },
            "maps singular values below 0.001 onto",
        ),
    ],
)
def test_a_table_checks_itself(changes, message):
    valid_table()
    with pytest.raises(ValueError, match=message):
        valid_table(**changes)


def test_a_changed_row_of_a_table_is_noticed():
    rows = list(TABLES["quintic"].rows)
    rows[2] = (rows[2][0], -rows[2][1], rows[2][2])
    with pytest.raises(ValueError, match="'quintic' claims to map"):
        dataclasses.replace(TABLES["quintic"], rows=tuple(rows))
