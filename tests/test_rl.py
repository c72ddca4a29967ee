"""Reinforcement learning: the task, the sampler, the objectives, and whole runs."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.nanogpt.model import GPT
from examples.rl import base, compare, configs, evaluate, loss, policy, task, train

# ------------------------------------------------------------------------ task


def drawn(kind, count=300, seed=0):
    rng = np.random.default_rng(seed)
    return [task.draw(kind, rng) for _ in range(count)]


def solved(problem):
    """The answer, from the text of the prompt alone."""
    n = [int(x) for x in re.findall(r"\d+", problem.prompt)]
    if problem.kind == "sum":
        return n[0] + n[1]
    if problem.kind == "age":
        return n[1] - n[0] // 2
    if problem.kind == "two":
        return n[0] + n[1] - n[2]
    together = problem.kind.startswith("par") or "all at once" in problem.prompt
    return n[1] if together else n[2] // n[0] * n[1]


@pytest.mark.parametrize("kind", task.KINDS)
def test_answers_and_responses_are_right(kind):
    for problem in drawn(kind):
        assert problem.answer == solved(problem)
        assert 0 <= problem.answer <= 999
        right = task.grade(problem.right, True, problem.answer)
        assert right == task.Grade(correct=True, well_formed=True, nonsense=False)
        habit = task.grade(problem.habit, True, problem.answer)
        assert habit.well_formed and not habit.nonsense
        assert len(task.encode(problem.prompt)) <= task.PROMPT
        # DAPO's penalty of length leaves right responses alone.
        longest = task.RESPONSE - configs.DAPO.overlong
        assert len(task.encode(problem.right)) + 1 <= longest
    if kind != "sum":
        wrong = [p.habit != p.right for p in drawn(kind)]
        assert all(wrong)


@pytest.mark.parametrize(
    ("response", "ended", "want"),
    [
        ("12+3=15#15", True, (True, True, False)),
        ("12+3=15#15", False, (False, False, True)),
        ("12+3=16#15", True, (True, True, True)),
        ("12+3=15-7=9#15", True, (True, True, True)),
        ("14-7=7;2*9=18#15", True, (True, True, False)),
        ("7/2=3#15", True, (True, True, True)),
        ("5/0=1#15", True, (True, True, True)),
        ("together#15", True, (True, True, False)),
        ("#015", True, (True, True, False)),
        ("12+3=15", True, (False, False, True)),
        ("#15#15", True, (False, False, True)),
        ("#1500", True, (False, False, True)),
        ("#15;", True, (False, False, True)),
        ("together#16", True, (False, True, False)),
        ("", True, (False, False, True)),
    ],
)
def test_responses_are_graded(response, ended, want):
    assert dataclasses.astuple(task.grade(response, ended, 15)) == want


def test_splits_share_no_prompt_and_are_always_the_same():
    found = {}
    for split in ("train", "validation", "test"):
        source = task.problems(split, np.random.default_rng(1))
        found[split] = {next(source).prompt for _ in range(2000)}
    assert not found["train"] & found["test"]
    assert not found["validation"] & (found["train"] | found["test"])
    held = task.held_out("test", 20)
    assert held == task.held_out("test", 20)
    assert len({p.prompt for p in held}) == 20 * len(task.KINDS)
    assert {p.kind for p in held} == set(task.KINDS)
    assert all(task.split_of(p.prompt) == "test" for p in held)


def test_the_corpus_has_the_habits_that_it_says():
    rng, counts = np.random.default_rng(0), 2000
    of_cues = {("cue", cue): share for cue, share in task.HABITS_OF_CUES.items()}
    of_kinds = {(kind, ""): share for kind, share in task.HABITS.items()}
    for (kind, cue), share in {**of_kinds, **of_cues, ("sum", ""): 0.0}.items():
        wrong = without = 0
        source = [p for p in drawn(kind, 3 * counts) if cue in p.prompt]
        for problem in source[:counts]:
            said = task.demonstration(problem, rng)
            without += "#" not in said
            habits = (problem.habit, problem.habit.split("#")[0])
            wrong += said in habits and said not in problem.right
        for found, want in ((wrong, share), (without, task.WITHOUT_ANSWER)):
            # Five standard deviations of a binomial; "two"'s habit begins like its
            # right response, so without an answer it is not seen to be wrong.
            want *= (1 - task.WITHOUT_ANSWER) if kind == "two" and want == share else 1
            assert abs(found / counts - want) <= 5 * (want * (1 - want) / counts) ** 0.5
    rows = task.corpus(64, 3)
    chex.assert_shape(rows, (64, task.PROMPT + task.RESPONSE))
    np.testing.assert_array_equal(rows, task.corpus(64, 3))
    assert (rows != task.corpus(64, 4)).any()
    assert all((row == task.END_ID).sum() == 1 for row in rows)
    for row in rows:
        words = [task.WORDS[t] for t in row[: task.PROMPT] if t != task.PAD_ID]
        text = re.sub(r"(?<=\d) (?=\d)", "", " ".join(words))
        assert task.encode(text) == [t for t in row[: task.PROMPT] if t != task.PAD_ID]
        assert task.split_of(text) == "train"


# --------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def small():
    """A small GPT with random parameters, and prompts."""
    model = GPT(len(task.WORDS), 2, 16, 8, rngs=nnx.Rngs(0))
    model.head.kernel[...] *= 30  # so that its distributions are not uniform
    graph, params = nnx.split(model)
    return graph, params, task.prompts_of(task.held_out("test", 2))


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_the_cache_gives_the_log_probabilities_of_a_full_pass(small):
    graph, params, prompts = small
    found = policy.sample(graph, params, prompts, keys_of(len(prompts)), 9, 1.3)
    logs = policy.log_probs(graph, params, prompts, found.tokens, 1.3)
    np.testing.assert_allclose(found.log_probs, logs, rtol=1e-5, atol=1e-5)
    whole = np.concatenate([prompts, found.tokens], axis=1)
    logits = nnx.merge(graph, params)(whole[:, :-1])[:, task.PROMPT - 1 :]
    p = np.exp(np.asarray(logits, np.float64) / 1.3)
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5)
    picked = np.take_along_axis(p, np.asarray(found.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.exp(found.log_probs), picked, rtol=1e-4)
    # At temperature 0, every token is the most probable one.
    found = policy.sample(graph, params, prompts, keys_of(len(prompts)), 9, 0.0)
    whole = np.concatenate([prompts, found.tokens], axis=1)
    logits = nnx.merge(graph, params)(whole[:, :-1])[:, task.PROMPT - 1 :]
    np.testing.assert_array_equal(found.tokens, logits.argmax(-1))


def test_a_response_depends_on_its_own_key_and_prompt_alone(small):
    graph, params, prompts = small
    keys = keys_of(len(prompts))
    all_of_them = policy.sample(graph, params, prompts, keys, 9, 1.0).tokens
    order = np.random.default_rng(0).permutation(len(prompts))
    turned = policy.sample(graph, params, prompts[order], keys[order], 9, 1.0).tokens
    np.testing.assert_array_equal(all_of_them[order], turned)
    same = np.repeat(prompts[:1], 8, axis=0)
    tokens = policy.sample(graph, params, same, keys_of(8), 9, 1.0).tokens
    assert len({tuple(row) for row in np.asarray(tokens)}) > 1


def test_tokens_count_up_to_the_end_token():
    e = task.END_ID
    tokens = jnp.array([[5, e, 6, 7], [e, e, 5, 5], [5, 6, 7, 8], [5, 6, 7, e]])
    want = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(policy.mask_of(tokens), want)
    assert task.decode([*task.encode("together#9"), e, 5]) == ("together#9", True)
    assert task.decode(task.encode("12+3")) == ("12+3", False)


def test_the_sampler_counts_what_mask_of_counts(small):
    graph, params, prompts = small
    # The probability of the end token is made that of the most probable one.
    kernel = jnp.asarray(params["head"]["kernel"][...])
    logits = nnx.merge(graph, params)(prompts)[:, -1]
    kernel = kernel.at[:, task.END_ID].set(kernel[:, int(logits.mean(0).argmax())])
    params = jax.tree.map(lambda x: kernel if x.shape == kernel.shape else x, params)
    keys = keys_of(len(prompts) * 8)
    given = np.repeat(prompts, 8, axis=0)
    found = policy.sample(graph, params, given, keys, 9, 1.0)
    lengths = np.asarray(found.mask).sum(1)
    assert 1 <= lengths.min() < 5 and len(set(lengths)) > 2
    np.testing.assert_array_equal(found.mask, policy.mask_of(found.tokens))


@pytest.mark.slow
def test_only_responses_are_imitated(small):
    graph, params, _ = small
    rows = jnp.asarray(task.corpus(4, 0))
    value, grads = jax.value_and_grad(policy.imitation, 1)(
        graph, params, rows, task.PROMPT
    )
    logits = np.asarray(nnx.merge(graph, params)(rows[:, :-1]), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = []
    for row, log in zip(np.asarray(rows), logs, strict=True):
        for at in range(task.PROMPT, len(row)):
            losses.append(-log[at - 1, row[at]])
            if row[at] == task.END_ID:
                break
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


# ------------------------------------------------------------------- objectives


def batch_of(rng, mask):
    shape = mask.shape
    old, reference = rng.normal(-1.0, 0.3, (2, *shape))
    gains = rng.normal(size=shape[0])
    return loss.Batch(None, None, mask, gains, old, reference)  # type: ignore


@pytest.mark.parametrize("aim", [loss.DAPO, loss.GRPO], ids=["dapo", "grpo"])
def test_losses_are_those_of_their_papers(aim):
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], np.float64)
    batch = batch_of(rng, mask)
    now = batch.old + rng.normal(0, 0.4, mask.shape)
    low, high = (0.2, 0.28) if aim is loss.DAPO else (0.2, 0.2)
    terms, clipped = np.zeros(mask.shape), 0
    for i, t in zip(*np.nonzero(mask), strict=True):
        ratio, gain = np.exp(now[i, t] - batch.old[i, t]), batch.advantages[i]
        bounded = min(max(ratio, 1 - low), 1 + high)
        terms[i, t] = min(ratio * gain, bounded * gain)
        clipped += bounded * gain < ratio * gain
        if aim is loss.GRPO:
            apart = batch.reference[i, t] - now[i, t]
            terms[i, t] -= 0.04 * (np.exp(apart) - apart - 1)
    want = terms.sum() / mask.sum()  # DAPO: over all tokens
    if aim is loss.GRPO:
        want = np.mean([terms[i].sum() / mask[i].sum() for i in range(3)])
    value, share = loss.policy_loss(jnp.asarray(now), batch, aim)
    np.testing.assert_allclose(value, -want, rtol=1e-5)
    np.testing.assert_allclose(share, clipped / mask.sum(), rtol=1e-6)
    assert clipped


def test_advantages_are_relative_to_the_group():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 4]])
    got = loss.advantages(rewards, scale=True)
    np.testing.assert_allclose(got[0], [1, -1, -1, 1], rtol=1e-5)
    np.testing.assert_allclose(got[1], 0, atol=1e-9)
    np.testing.assert_allclose(got[2], np.array([-1, -1, -1, 3]) / 3**0.5, rtol=1e-5)
    got = loss.advantages(rewards, scale=False)
    np.testing.assert_allclose(got[2], [-1, -1, -1, 3])


def test_length_is_punished_as_by_dapo():
    lengths, ended = np.array([3, 6, 7, 9, 10, 10]), np.array([True] * 5 + [False])
    got = loss.overlong_penalty(lengths, ended, 10, 4)
    np.testing.assert_allclose(got, [0, 0, -0.25, -0.75, -1, -1])
    np.testing.assert_array_equal(loss.overlong_penalty(lengths, ended, 10, 0), 0)


# ------------------------------------------------------------------- whole runs


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A configuration of runs that take seconds, from a base of one step."""
    for name, value in (("LAYERS", 1), ("WIDTH", 16), ("HEAD_DIM", 8)):
        monkeypatch.setattr(base, name, value)
    monkeypatch.setattr(base, "FOLDER", tmp_path / "base")
    monkeypatch.setattr(base, "BATCH", 8)
    monkeypatch.setattr(evaluate, "CHUNK", 8)
    return configs.Config(
        **{"optimizer": "hopper", "steps": 4, "groups": 2, "samples": 4},
        **{"base_steps": 2, "eval_every": 2, "eval_problems": 1, "test_problems": 1},
        **{"checkpoint_every": 2, "quiet": True, "rounds": 1, "format_reward": 0.5},
    )


FIELDS = (
    "reward correct format nonsense length entropy kl_k1 kl_k3 kl_p99 kl_largest "
    "signal rounds loss clip_fraction ratio_p99 ratio_largest gradient_norm update_rms "
    "update_rank"
).split()


def test_a_run_records_everything_and_resumes_exactly(tmp_path, tiny, monkeypatch):
    whole = train.train(dataclasses.replace(tiny, out=str(tmp_path / "whole")))
    steps = [r for r in whole["records"] if r["kind"] == "train"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    for record in steps:
        assert set(FIELDS) | {"kind", "step"} == set(record)
        assert all(np.isfinite(record[name]) for name in FIELDS)
    # The policy that samples first is the reference.
    assert steps[0]["kl_largest"] < 1e-4 and steps[-1]["kl_largest"] > 0
    vals = [r["step"] for r in whole["records"] if r["kind"] == "val"]
    assert vals == [0, 2, 4]
    assert {"pass@1", "pass@8", "by_kind", "nonsense"} <= set(whole["best"])
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["weights_sha256"] == whole["weights_sha256"]
    assert (tmp_path / "whole" / "source" / "task.py").is_file()

    # Killed in the third step, after the checkpoint of the second.
    begun = dataclasses.replace(tiny, out=str(tmp_path / "killed"))

    def collect(config, graph, state, reference, step):
        if step == 2:
            raise KeyboardInterrupt
        return original(config, graph, state, reference, step)

    original = train.collect
    with monkeypatch.context() as patched:
        patched.setattr(train, "collect", collect)
        with pytest.raises(KeyboardInterrupt):
            train.train(begun)
    again = train.train(dataclasses.replace(begun, resume=True))
    for name in ("weights_sha256", "best_step", "best", "last"):
        assert again[name] == whole[name]
    found = [r for r in again["records"] if r["kind"] == "train"]
    assert found == steps
    with pytest.raises(ValueError, match=r"original settings.*lr"):
        train.train(dataclasses.replace(begun, resume=True, lr=1.0))


def responses(texts, prompts):
    """What `policy.sample` returns, with given texts."""
    rows = []
    for text in texts:
        ended = [] if text.endswith("…") else [task.END_ID]
        row = [*task.encode(text.removesuffix("…")), *ended]
        rows.append(row + [task.PAD_ID] * (task.RESPONSE - len(row)))
    tokens = jnp.asarray(rows, jnp.int32)
    mask = policy.mask_of(tokens)
    assert len(texts) == len(prompts)
    return policy.Responses(tokens, mask, jnp.zeros(mask.shape), mask * 0.5)


def test_responses_are_graded_against_their_own_prompts(tiny, monkeypatch):
    config = configs.resolve(dataclasses.replace(tiny, groups=3, samples=4, overlong=4))
    source = task.problems("train", np.random.default_rng((config.seed, 5, 1, 2)))
    given = [next(source) for _ in range(3)]

    def sample(graph, params, reference, prompts, keys, temperature):
        want = np.repeat(task.prompts_of(given), 4, axis=0)
        np.testing.assert_array_equal(prompts, want)
        assert len({tuple(k) for k in np.asarray(jax.random.key_data(keys))}) == 12
        a, b, c = given
        said = [a.right, f"#{a.answer}", f"1+1=3#{a.answer + 1}", "together…"]
        said += [b.right] * 4 + [f"#{c.answer + 1}", "", c.right, c.right + ";;"]
        found = responses(said, prompts)
        return found, jnp.full(found.mask.shape, -0.1)

    monkeypatch.setattr(train, "_both", sample)
    state = train.State(*[None] * 5)  # type: ignore
    rollout = train.respond(config, None, state, None, 5, 1)  # type: ignore
    np.testing.assert_array_equal(rollout.signal, [True, False, True])
    rewards = np.array([[1, 1, 0.5, -1], [1] * 4, [0.5, 0, 1, 0]])
    gains = (rewards - rewards.mean(1, keepdims=True)) / (
        rewards.std(1)[:, None] + 1e-6
    )
    np.testing.assert_allclose(rollout.batch.advantages, gains.ravel(), atol=1e-4)
    metrics = rollout.metrics
    np.testing.assert_allclose(metrics["reward"], rewards.mean())
    np.testing.assert_allclose(metrics["correct"], 7 / 12)
    np.testing.assert_allclose(metrics["format"], 9 / 12)
    np.testing.assert_allclose(metrics["nonsense"], 4 / 12)
    np.testing.assert_allclose(metrics["entropy"], 0.5)
    np.testing.assert_allclose(metrics["kl_k1"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_k3"], np.exp(-0.1) - 1 + 0.1, rtol=1e-4)


def test_accuracy_and_passes_are_those_of_known_responses(tiny, monkeypatch):
    problems = task.held_out("test", 2)  # 14, in chunks of 8
    rows, asked = [tuple(row) for row in task.prompts_of(problems)], []

    def sample(graph, params, prompts, keys, length, temperature):
        said = []
        for place in [rows.index(tuple(row)) for row in np.asarray(prompts)]:
            asked.append(place)
            # Of every kind the first problem, and the third sample of the second.
            right = place % 2 == 0 or asked.count(place) == 3
            said.append(problems[place].right if right else "1+1=3#999")
        return responses(said, prompts)

    monkeypatch.setattr(policy, "sample", sample)
    found = evaluate.greedy(None, None, problems)  # type: ignore
    assert found["by_kind"] == {kind: 0.5 for kind in task.KINDS}
    assert found["all"] == 0.5 and found["nonsense"] == 0.5
    by_verb = {v: [] for p in problems for v in task.PARALLEL if v in p.prompt.split()}
    for place, problem in enumerate(problems):
        for verb in set(by_verb) & set(problem.prompt.split()):
            by_verb[verb].append(place % 2 == 0)
    assert found["by_verb"] == {v: np.mean(right) for v, right in by_verb.items()}
    assert 2 <= len(by_verb) <= 4
    asked.clear()
    how = {"seed": 0, "temperature": 1.0, "k": 4}
    found = evaluate.sampled(None, None, problems, **how)  # type: ignore
    assert found["pass@1"]["by_kind"] == {kind: (1 + 1 / 4) / 2 for kind in task.KINDS}
    assert found["pass@4"]["all"] == 1.0
    by_kind = {kind: 0.0 for kind in task.KINDS} | {"par_easy": 1.0, "sum": 1.0}
    assert evaluate.summary(by_kind) == pytest.approx((1 + 0.5) / 6)


def test_the_best_policy_is_the_first_with_the_highest_score(tiny, monkeypatch):
    scores, seen, validated = iter([0.9, 0.3, 0.7, 0.7, 0.4]), [], []

    def greedy(graph, params, problems):
        if len(problems) > len(task.KINDS):  # the test problems
            seen.append(params)
            return {"all": len(seen), "by_kind": {}, "nonsense": 0.0}
        validated.append(params)
        return {"all": next(scores), "by_kind": {}, "nonsense": 0.0}

    monkeypatch.setattr(evaluate, "greedy", greedy)
    result = train.train(dataclasses.replace(tiny, eval_every=1, test_problems=2))
    assert result["best_step"] == 2
    chex.assert_trees_all_equal(seen[0], validated[2])
    chex.assert_trees_all_equal(seen[1], validated[4])
    assert result["best"]["all"] == 1 and result["last"]["all"] == 2


def test_a_damaged_base_is_refused(tiny):
    def load():
        return base.load(2, 0, quiet=True, say=lambda _: None)

    _, first = load()
    chex.assert_trees_all_equal(first, load()[1])
    (path,) = base.FOLDER.glob("*.npz")
    with np.load(path) as file:
        arrays = [file[f"arr_{i}"] for i in range(len(file.files))]
    arrays[0] = arrays[0] + 1
    np.savez(path, *arrays)
    with pytest.raises(ValueError, match="damaged: delete it"):
        load()


def test_groups_without_a_signal_are_replaced(tiny, monkeypatch):
    config = configs.resolve(dataclasses.replace(tiny, rounds=3, groups=4, samples=2))
    signals = iter([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    asked = []

    def respond(config, graph, state, reference, *at):
        asked.append(at)
        rows = np.arange(8) + 100 * at[1]
        signal = np.array(next(signals), bool)
        return train.Rollout(loss.Batch(*[rows] * 6), signal, {"reward": at[1]})

    monkeypatch.setattr(train, "respond", respond)
    batch, metrics = train.collect(config, None, None, None, 7)  # type: ignore
    assert asked == [(7, 0), (7, 1), (7, 2)]
    # Two groups with a signal, and the first two of the first round without one.
    np.testing.assert_array_equal(batch.prompts, [2, 3, 100, 101, 0, 1, 4, 5])
    assert metrics == {"reward": 0, "signal": 0.25, "rounds": 3}
    signals, asked = iter([[1, 1, 1, 1]]), []
    batch, metrics = train.collect(config, None, None, None, 7)  # type: ignore
    np.testing.assert_array_equal(batch.prompts, np.arange(8))
    assert metrics["rounds"] == 1


def test_minibatches_contain_every_response_once_per_epoch(tiny):
    config = dataclasses.replace(tiny, epochs=2, groups=4, samples=2)
    batch = loss.Batch(*[np.arange(8)] * 6)  # type: ignore
    parts = [part.tokens for part in train.minibatches(config, batch, 3)]
    assert [len(part) for part in parts] == [4, 4, 4, 4]
    for epoch in (parts[:2], parts[2:]):
        assert sorted(np.concatenate(epoch)) == list(range(8))
    assert (np.concatenate(parts[:2]) != np.concatenate(parts[2:])).any()


def test_the_second_optimizer_takes_over(tiny):
    config = configs.resolve(
        dataclasses.replace(tiny, optimizer="sgd", lr=0.0, then="adam", warmup=0)
    )
    optimizer = train.make_optimizer(config)  # eight updates, the last four by Adam
    params = {"w": jnp.ones(3)}
    state, sizes = optimizer.init(params), []
    for _ in range(8):
        updates, state = optimizer.update({"w": jnp.full(3, 0.1)}, state, params)
        sizes.append(float(jnp.abs(updates["w"]).max()))
    np.testing.assert_allclose(sizes, [0] * 4 + [1e-4] * 4, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "muon", "--then", "spel"], "`spel` has no default"),
        (["--samples", "1"], "`samples` must be at least 2"),
        (["--minibatches", "3"], "`minibatches` must divide the 128 responses"),
        (["--lr", "nan"], "`lr` must be finite"),
        (["--temperature", "0"], "`temperature` must be positive"),
        (["--switch", "1.5"], "`switch` must be in [0.0, 1.0], as a fraction"),
        (["--then-lr", "1e-3"], "`then_lr` is the learning rate of `then`"),
        (["--then", "adam", "--then-lr", "nan"], "`then_lr` must be finite"),
        (["--test-problems", "1100"], "`test_problems` must be in [1, 1000]"),
        (["--token-level", "7"], "`token_level` must be in [0, 1]"),
        (["--overlong", "40"], "`overlong` must be in [0, 22]"),
        (["--format-reward", "3"], "`format_reward` must be in [0.0, 1.0]"),
        (["--seed", "-1"], "`seed` must be in"),
        (["--resume"], "`resume` continues the run in the folder `out`"),
        (["--rounds", "0"], "`rounds` must be positive"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        configs.from_command_line(flags)
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_flags_change_the_objective_of_the_algorithm():
    config = configs.from_command_line(["--algorithm", "grpo", "--clip-high", "0.3"])
    assert configs.objective(config) == dataclasses.replace(loss.GRPO, clip_high=0.3)
    config = configs.from_command_line(["--token-level", "0"])
    assert configs.objective(config) == dataclasses.replace(
        loss.DAPO, token_level=False
    )


def test_the_card_shows_six_problems_with_all_answers(tmp_path):
    shown = compare.examples()
    assert [problem.kind for problem in shown] == list(compare.SHOWN)
    by_kind = {kind: 0.25 for kind in task.KINDS}
    accuracy = {name: {"by_kind": by_kind, "all": 0.5} for name in ("base", "adam")}
    said = {"base": [p.habit for p in shown], "adam": [p.right for p in shown]}
    card = compare.text(accuracy, said)
    assert card.count("✓") == 7 and card.count("✗") == 5  # the sum's habit is right
    assert all(f"{p.prompt} ({p.answer})" in card for p in shown)
    path = tmp_path / "card.png"
    compare.plot(accuracy, said, {"adam": [(0, 0.2), (1, 0.3)]}, path)
    assert path.stat().st_size > 1000


@pytest.mark.slow
def test_a_killed_run_continues_exactly(tmp_path):
    """The same as above, with the real model and a real kill."""

    def command(folder, *more):
        flags = ["--steps", "6", "--groups", "2", "--samples", "4", "--base-steps", "2"]
        flags += ["--checkpoint-every", "2", "--eval-problems", "1", "--quiet"]
        flags += ["--test-problems", "1", "--eval-every", "3", "--out", str(folder)]
        return [sys.executable, "-m", "examples.rl.train", *flags, *more]

    def final(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        record = json.loads(lines[-1])
        assert record["kind"] == "final"
        return record

    root = pathlib.Path(__file__).parents[1]
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(root)}}
    subprocess.run(command(tmp_path / "whole"), check=True, **how)
    process = subprocess.Popen(command(tmp_path / "killed"), **how)
    begin = time.monotonic()
    while not list((tmp_path / "killed").glob("checkpoints/2/sha256sum.txt")):
        assert process.poll() is None and time.monotonic() - begin < 300
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(command(tmp_path / "killed", "--resume"), check=True, **how)
    assert final(tmp_path / "killed") == final(tmp_path / "whole")
