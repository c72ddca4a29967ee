"""Adapts a GPT to another text by LoRA, with Muon on the product of the factors.

python -m examples.nanogpt.lora
python -m examples.nanogpt.lora --optimizer adamw --lr 0.01
python -m examples.nanogpt.lora --text FILE --rank 16

A base is trained on the source of Python's standard library. Then it is frozen, every
hidden matrix W becomes W + A B, and the factors are trained on another text, by default
the source of JAX.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

import optax_matrix as om
from examples.nanogpt import batches, configs, data, model, sharding, train

LEARNING_RATES = {"lora_muon": 0.04, "adamw": 0.01}


def jax_text() -> bytes:
    """Returns the source of JAX, its files sorted by path."""
    root = Path(jax.__file__).parent
    return b"\n".join(path.read_bytes() for path in sorted(root.rglob("*.py")))


def make_optimizer(name: str, lr: float, steps: int) -> optax.GradientTransformation:
    """Returns an optimizer of the factors, with a linear decay of its rate to zero."""
    rate = optax.linear_schedule(lr, 0.0, steps)
    if name == "adamw":
        return optax.adamw(rate, b2=0.95, weight_decay=0.0)
    return optax.chain(
        om.ema_momentum(0.95),
        om.orthogonalize_factors(),
        optax.scale_by_learning_rate(rate),
    )


def add_factors(gpt: model.GPT, rank: int, rngs: nnx.Rngs) -> None:
    """Gives every hidden matrix of a model two factors, the second one zero."""
    for block in gpt.blocks:
        for module, names in ((block.attn, "qkvo"), (block.mlp, ("fc", "proj"))):
            for name in names:
                base = getattr(module, name)
                inputs, outputs = base.in_features, base.out_features
                factors = nnx.LoRA(inputs, rank, outputs, base_module=base, rngs=rngs)
                setattr(module, name, factors)


def trained_base(config: configs.Config, mesh: jax.sharding.Mesh) -> model.GPT:
    """Returns a model of the standard library."""
    dataset = data.load("stdlib")
    windows = batches.Batches(dataset, config, mesh)
    graph, optimizer, state = train.initial(config, dataset.vocab_size, mesh)
    step = train.make_step(graph, optimizer, mesh, like=state)
    for i in tqdm(range(config.steps), "base", disable=config.quiet):
        state, *_ = step(state, windows.train(i))
    return nnx.merge(graph, state.params)


def adapt(
    gpt: model.GPT,
    windows: batches.Batches,
    optimizer: optax.GradientTransformation,
    steps: int,
    quiet: bool = False,
) -> tuple[float, float]:
    """Trains the factors of a model; returns validation losses before and after."""
    graph, factors, frozen = nnx.split(gpt, nnx.LoRAParam, ...)

    def loss_of(factors: nnx.State, frozen: nnx.State, rows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, factors, frozen)(rows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return jnp.mean(losses)

    @jax.jit
    def step(factors, state, frozen, rows):
        grads = jax.grad(loss_of)(factors, frozen, rows)  # of the factors alone
        updates, state = optimizer.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state

    loss = jax.jit(loss_of)

    def validate() -> float:
        losses = [float(loss(factors, frozen, rows)) for rows in windows.val]
        return sum(losses) / len(losses)

    before, state = validate(), optimizer.init(factors)
    for i in tqdm(range(steps), "factors", disable=quiet):
        factors, state = step(factors, state, frozen, windows.train(i)[0])
    after = validate()
    nnx.update(gpt, factors)
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="a text file; default: the source of JAX")
    parser.add_argument("--rank", type=int, default=8, help="rank of the factors (8)")
    parser.add_argument("--optimizer", choices=LEARNING_RATES, default="lora_muon")
    parser.add_argument("--lr", type=float, help="default: see LEARNING_RATES")
    parser.add_argument("--steps", type=int, default=150, help="of the factors (150)")
    parser.add_argument("--base-steps", type=int, default=250, help="(250)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    config = configs.resolve(
        dataclasses.replace(
            configs.TINY, steps=given.base_steps, seed=given.seed, val_windows=256
        )
    )
    mesh = sharding.make_mesh("", "auto")
    gpt = trained_base(config, mesh)
    add_factors(gpt, given.rank, nnx.Rngs(given.seed))
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(b"" if given.text else jax_text())
        file.flush()
        dataset = data.load(given.text or file.name)
    windows = batches.Batches(dataset, config, mesh)
    rate = LEARNING_RATES[given.optimizer] if given.lr is None else given.lr
    optimizer = make_optimizer(given.optimizer, rate, given.steps)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(gpt, kind)))
        for kind in (nnx.LoRAParam, nnx.Param)
    ]
    print(
        f"{given.optimizer} at {rate:g} trains {sizes[0]:,} of {sizes[1]:,} parameters"
    )
    before, after = adapt(gpt, windows, optimizer, given.steps)
    print(f"validation loss before {before:.4f}, after {after:.4f}")


if __name__ == "__main__":
    main()
