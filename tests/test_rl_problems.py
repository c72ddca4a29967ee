"""Problems of GSM8K and of reasoning-gym, and what responses to them earn."""

import json

import pytest

from examples.rl import problems


def gsm8k(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROW = {"question": "Two and three?", "answer": "2+3=<<2+3=5>>5\n#### 1,005"}


@pytest.mark.parametrize(
    ("response", "want"),
    [
        ("It is #### 1005", 1.0),
        ("#### 7\nno: #### $1,005.", 1.0),
        ("#### 1005.00", 1.0),
        ("#### -1005", 0.1),
        ("#### 1005 apples", 0.1),
        ("#### NaN", 0.1),
        ("#### sNaN", 0.1),
        ("1005", 0.0),
        ("####", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_after_the_mark_counts(tmp_path, response, want):
    (problem,) = problems.load(gsm8k(tmp_path / "file", [ROW]), 1, 0)
    assert (problem.question, problem.answer) == ("Two and three?", "1,005")
    assert problems.reward(response, problem, 0.1) == want


def test_problems_of_a_file_are_in_random_order_and_all_are_taken(tmp_path):
    rows = [{"question": str(n), "answer": f"#### {n}"} for n in range(5)]
    source = gsm8k(tmp_path / "file", rows)
    found = [problem.question for problem in problems.load(source, 12, 3)]
    assert found == [problem.question for problem in problems.load(source, 12, 3)]
    assert found != [problem.question for problem in problems.load(source, 12, 4)]
    assert sorted(found[:5]) == sorted(found[5:10]) == list("01234")
    assert found[:5] != found[5:10]
    for problem in problems.load(source, 12, 3):
        assert problem.score(problem.question) == 1 and problem.score("9") == 0


@pytest.mark.parametrize(
    "line", ["{", '{"question": "?"}', '["a"]', '{"question": "?", "answer": "5"}']
)
def test_lines_that_are_not_problems_are_named(tmp_path, line):
    path = tmp_path / "file"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*must be a JSON object"):
        problems.load(str(path), 1, 0)
    path.write_text("")
    with pytest.raises(ValueError, match="has no problems"):
        problems.load(str(path), 1, 0)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(problems.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'optax-matrix\[gym\]'"):
        problems.load("gym:basic_arithmetic", 1, 0)


def test_reasoning_gym_grades_its_own_problems():
    pytest.importorskip("reasoning_gym", reason="the extra `gym` is not installed")
    found, again, other = (
        problems.load("gym:basic_arithmetic", 20, seed) for seed in (0, 0, 1)
    )
    assert [p.question for p in found] == [p.question for p in again]
    assert not {p.question for p in found} & {p.question for p in other}
    for problem in found:
        right = problems.reward(f"so #### {problem.answer}", problem, 0.1)
        assert right == 1 and problems.reward("#### no", problem, 0.1) == 0.1
    with pytest.raises(ValueError, match="not registered"):
        problems.load("gym:unknown", 1, 0)
