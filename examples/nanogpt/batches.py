"""Reads the windows for training and validation and places them on the devices."""

import jax
from jax.sharding import Mesh

from examples.nanogpt import sharding
from examples.nanogpt.configs import Config
from examples.nanogpt.data import Dataset


def micro_batch_size(config: Config, mesh: Mesh) -> int:
    """Returns the sequences per micro-batch; raises if devices get unequal shares."""
    size, rest = divmod(config.batch_size, config.accumulate)
    devices = sharding.batch_devices(mesh)
    if rest or size % devices:
        raise ValueError(
            "`batch_size` must be a multiple of `accumulate` times the number of "
            f"devices on data and fsdp, {config.accumulate} times {devices}; got "
            f"{config.batch_size}"
        )
    return size


class Batches:
    """Provides the windows of one run, placed on a mesh.

    Every process reads all windows and places those of its own devices.
    """

    def __init__(self, dataset: Dataset, config: Config, mesh: Mesh):
        self.dataset, self.config, self.mesh = dataset, config, mesh
        self.size = micro_batch_size(config, mesh)
        rows = dataset.val.fixed(config.val_windows, config.context)
        if len(rows) < self.size:
            raise ValueError(
                f"{len(rows)} validation windows do not fill a micro-batch of "
                f"{self.size}: raise `val_windows` ({config.val_windows}), lower "
                "`batch_size`, or use a longer text"
            )
        # A list of (B, T + 1); windows that do not fill a last micro-batch are dropped.
        starts = range(0, len(rows) - self.size + 1, self.size)
        self.val = [sharding.place_batch(rows[i : i + self.size], mesh) for i in starts]

    def train(self, step: int) -> jax.Array:
        """Returns the windows (A, B, T + 1) of one step."""
        config = self.config
        order = config.seed, step, config.batch_size, config.context
        rows = self.dataset.train.batch(*order)
        if rows.max() >= self.dataset.vocab_size:
            raise ValueError(
                f"{config.data} contains token {rows.max()}, but the vocabulary size "
                f"is {self.dataset.vocab_size}: were the shards written with another "
                "tokenizer?"
            )
        rows = rows.reshape(config.accumulate, self.size, config.context + 1)
        return sharding.place_batch(rows, self.mesh)
