"""Trains nanoGPT with any optimizer, a few steps at a time."""

import time

import jax
import optax
from flax import nnx

import optax_matrix as om
from examples.nanogpt import batches, data, sharding, train
from examples.nanogpt.configs import Config


class Trial:
    """A training run that can be continued by any number of steps.

    Attributes:
      config: The configuration. Its optimizer is not used.
      dataset: The data.
      state: Parameters and the state of the optimizer.
      count: The number of steps taken.
    """

    def __init__(self, config: Config, optimizer: optax.GradientTransformation):
        mesh = sharding.make_mesh(config.mesh, config.mesh_axes)
        self.config = config
        self.dataset = data.load(
            config.data,
            tokenizer=config.tokenizer,
            bpe_vocab=config.bpe_vocab,
            folder=config.data_dir,
            shards=config.shards,
        )
        self.windows = batches.Batches(self.dataset, config, mesh)
        self.graph, _, first = train.initial(config, self.dataset.vocab_size, mesh)
        self.state = train.State(first.params, optimizer.init(first.params))  # type: ignore
        self.count = 0
        self._step = train.make_step(self.graph, optimizer)
        self._loss = jax.jit(lambda params, w: train.loss_fn(params, self.graph, w))
        self._gradient = jax.jit(jax.grad(self._loss))

    def advance(self, steps: int) -> float:
        """Takes steps and returns the seconds they took."""
        given = [self.windows.train(self.count + i) for i in range(steps)]
        begin = time.perf_counter()
        for windows in given:
            self.state, *_ = self._step(self.state, windows)
        jax.block_until_ready(self.state)
        self.count += steps
        return time.perf_counter() - begin

    def gradient(self) -> nnx.State:
        """Returns the gradient of the next step, of its first micro-batch."""
        return self._gradient(self.state.params, self.windows.train(self.count)[0])

    def validate(self) -> float:
        """Returns the mean loss of the validation windows."""
        params = om.evaluation_params(self.state.optimizer, self.state.params)
        losses = [float(self._loss(params, w)) for w in self.windows.val]
        return sum(losses) / len(losses)
