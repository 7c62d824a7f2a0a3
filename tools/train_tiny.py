"""Trains the tiny retriever of tests/data on the CPU and writes it as GGUF.

    python -m tools.train_tiny [--steps N] [--out FILE]

A Llama of 256 tokens that finds needles in noise, made so that tests see in seconds whether a table extends it. Needs
PyTorch and gguf (`pip install torch==2.13.0 numpy gguf==0.19.0`) beside this package, one thread, and no data:
tools/tiny_data.py makes it. The same seed gives the same weights on the same PyTorch and processor; the file says what
made it. `--checkpoint FILE` is written every 500 steps, and gone on from if it is there.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools import tiny_data, tiny_gguf
from tools.tiny_model import EPS, Retriever, Shape

if TYPE_CHECKING:
    import torch

DEFAULT = Path(__file__).parent.parent / "tests" / "data" / "retriever-256.gguf"
TOKENS = 2048  # in a batch
WARM = 50  # steps
# lengths of rows and shares of the kinds of text: first short ones, where every needle is near, then up to the window
SHORT = ((32, 48, 64, 96), (2.0, 1.0, 0.5, 0.2))
LONG = ((96, 128, 192, 256, 256), (3.0, 1.0, 0.5, 0.5))
SHORT_PART = 0.2


@dataclass(frozen=True)
class Batch:
    """Token ids (n_rows, n), and of those that are learned: indices into n_rows * n, what comes next, its weight."""

    ids: torch.Tensor
    at: torch.Tensor
    wanted: torch.Tensor
    weights: torch.Tensor


def batches(seed: int, steps: int) -> Iterator[Batch]:
    """All batches of a training, the same for the same arguments."""
    rng = random.Random(seed)
    maker = tiny_data.Maker(rng)
    for step in range(steps):
        lengths, shares = SHORT if step < SHORT_PART * steps else LONG
        length = rng.choice(lengths)
        yield _batch([maker.row(length, shares) for _ in range(TOKENS // length)], rng)


def _batch(rows: list[tiny_data.Row], rng: random.Random) -> Batch:
    import torch

    n = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [tiny_data.EOS_ID] * (n - len(row.ids)) for row in rows])
    at, weights = [], []
    for i, row in enumerate(rows):
        for j, weight in enumerate(row.weights[1:]):
            # of what counts little, a tenth will do
            if weight > tiny_data.FAINT or (weight and rng.random() < 0.1):
                at.append(i * (n - 1) + j)
                weights.append(weight)
    index = torch.tensor(at)
    return Batch(ids[:, :-1], index, ids[:, 1:].flatten()[index], torch.tensor(weights))


def train(model: Retriever, steps: int, seed: int, rate: float, checkpoint: Path | None) -> float:
    """Train in place; the minutes it took. Prints the loss of the answers now and then."""
    import torch
    from torch.nn import functional as F

    matrices = [weight for weight in model.weights.values() if weight.ndim == 2]
    norms = [weight for weight in model.weights.values() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    done, spent = _resume(model, optimizer, checkpoint)
    began = time.monotonic() - spent
    answers: list[float] = []
    for step, batch in enumerate(batches(seed, steps)):
        if step < done:
            continue
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        losses = F.cross_entropy(model.logits(batch.ids, batch.at), batch.wanted, reduction="none")
        loss = (losses * batch.weights).sum() / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*matrices, *norms], 1.0)
        optimizer.step()
        answers.append(float(losses.detach()[batch.weights == 1.0].mean()))
        if step % 50 == 49 or step == steps - 1:
            minutes = (time.monotonic() - began) / 60
            print(f"step {step + 1}/{steps}, {minutes:.1f} min: loss of answers {_mean(answers):.4f}", flush=True)
            answers.clear()
        if checkpoint and step % 500 == 499:
            _save(model, optimizer, checkpoint, step + 1, time.monotonic() - began)
    return (time.monotonic() - began) / 60


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / max(len(known), 1)


def _save(model: Retriever, optimizer: Any, path: Path, step: int, seconds: float) -> None:
    import torch

    beside = path.with_name(path.name + ".part")
    state = {"step": step, "seconds": seconds, "weights": model.weights, "optimizer": optimizer.state_dict()}
    torch.save(state, beside)
    os.replace(beside, path)


def _resume(model: Retriever, optimizer: Any, path: Path | None) -> tuple[int, float]:
    """Steps and seconds that a checkpoint already holds."""
    import torch

    if path is None or not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.restore(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"])


def accuracy(model: Retriever, n: int, seed: int) -> float:
    """Share of `n` needles in texts of the whole window whose every token is the likeliest."""
    import torch

    right = 0
    maker = tiny_data.Maker(random.Random(seed))
    with torch.no_grad():
        for _ in range(n):
            row = maker.needle(model.shape.n_ctx)
            at = torch.tensor([j for j, weight in enumerate(row.weights[1:]) if weight == 1.0])
            ids = torch.tensor([row.ids])
            right += bool((model.logits(ids[:, :-1], at).argmax(-1) == ids[0, at + 1]).all())
    return right / n


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3, help="of AdamW, at its highest")
    parser.add_argument("--check", type=int, default=500, help="needles that the trained model is asked for")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("this needs PyTorch: pip install torch==2.13.0", file=sys.stderr)
        return 1
    torch.set_num_threads(1)  # sums in one order; and matrices this small gain nothing from two
    torch.use_deterministic_algorithms(True)
    shape = Shape(n_vocab=len(tiny_data.vocabulary()))
    model = Retriever(shape, args.seed)
    minutes = train(model, args.steps, args.seed, args.rate, args.checkpoint)
    share = accuracy(model, args.check, seed=10**6)
    description = (
        f"Finds needles in noise within {shape.n_ctx} tokens; made by tools/train_tiny.py of mrrope-gguf, for tests. "
        f"Data: tools/tiny_data.py, synthetic, seed {args.seed}. {args.steps} steps of {TOKENS} tokens, AdamW at "
        f"{args.rate:g}, {minutes:.0f} minutes on one {platform.machine()} thread, PyTorch {torch.__version__}. "
        f"{share:.1%} of {args.check} needles exact at {shape.n_ctx} tokens, in float32."
    )
    print(description)
    tiny_gguf.write(args.out, shape, model.arrays(), eps=EPS, description=description)
    return 0


if __name__ == "__main__":
    sys.exit(main())
