"""The windows that steps and validations see, on the devices."""

import jax
from jax.sharding import Mesh

from examples.nanogpt import sharding
from examples.nanogpt.configs import Config
from examples.nanogpt.data import Dataset


def micro_batch_size(config: Config, mesh: Mesh) -> int:
    """Sequences of one micro-batch; raises unless every device gets as many."""
    size, rest = divmod(config.batch_size, config.accumulate)
    devices = sharding.batch_devices(mesh)
    if rest or size % devices:
        raise ValueError(
            f"`batch_size` must be a multiple of `accumulate` times devices (on data "
            f"and fsdp), got {config.batch_size} for {config.accumulate} times "
            f"{devices}"
        )
    return size


class Batches:
    """Every process reads all windows, and places those of its own devices."""

    def __init__(self, dataset: Dataset, config: Config, mesh: Mesh):
        self.dataset, self.config, self.mesh = dataset, config, mesh
        self.size = micro_batch_size(config, mesh)
        rows = dataset.val.fixed(config.val_windows, config.context)
        if len(rows) < self.size:
            raise ValueError(
                f"{len(rows)} validation windows fill no micro-batch of {self.size}. "
                f"Raise `val_windows` ({config.val_windows}), lower `batch_size`, or "
                "give a longer text."
            )
        # A list of (B, T + 1); what fills no micro-batch is left out.
        starts = range(0, len(rows) - self.size + 1, self.size)
        self.val = [sharding.place_batch(rows[i : i + self.size], mesh) for i in starts]

    def train(self, step: int) -> jax.Array:
        """The windows (A, B, T + 1) of one step."""
        config = self.config
        order = config.seed, step, config.batch_size, config.context
        rows = self.dataset.train.batch(*order)
        if rows.max() >= self.dataset.vocab_size:
            raise ValueError(
                f"token {rows.max()} in {config.data}, whose vocabulary is "
                f"{self.dataset.vocab_size}: were the shards made by another tokenizer?"
            )
        rows = rows.reshape(config.accumulate, self.size, config.context + 1)
        return sharding.place_batch(rows, self.mesh)
