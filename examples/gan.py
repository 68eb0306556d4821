"""A GAN with two optimizers: each has a loss scale of its own, and there is no order to keep.

The generator learns to draw from a normal distribution around (2, -1).
Run it: python examples/gan.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep import DynamicLossScale
from halfstep.torch import LossScaleOptimizer, apply_policy

GOAL = torch.tensor([2.0, -1.0])


def network(inputs: int, outputs: int) -> nn.Module:
    """A small perceptron that computes in float16."""
    layers = nn.Sequential(nn.Linear(inputs, 32), nn.LeakyReLU(0.2), nn.Linear(32, outputs))
    return apply_policy(layers, "mixed_float16")


def real(logits: Tensor) -> Tensor:
    """The loss of calling these samples real."""
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def fake(logits: Tensor) -> Tensor:
    """The loss of calling these samples fake."""
    return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))


def train(steps: int = 150) -> tuple[Tensor, LossScaleOptimizer, LossScaleOptimizer]:
    """Return the mean of what the generator draws, and both optimizers."""
    torch.manual_seed(0)
    generator, critic = network(2, 2), network(2, 1)
    betas = (0.5, 0.9)
    make = LossScaleOptimizer(torch.optim.Adam(generator.parameters(), lr=5e-3, betas=betas))
    judge = LossScaleOptimizer(
        torch.optim.Adam(critic.parameters(), lr=5e-3, betas=betas),
        # far too large on purpose: the critic skips its first steps, the generator does not
        DynamicLossScale(initial_scale=2.0**24),
    )
    for _ in range(steps):
        samples = GOAL + 0.5 * torch.randn(64, 2)
        drawn = generator(torch.randn(64, 2))

        judge.zero_grad()
        judge.backward(real(critic(samples)) + fake(critic(drawn.detach())))
        judge.step()

        make.zero_grad()
        # inputs=: the critic's gradients stay out, they would be of the generator's scale
        make.backward(real(critic(drawn)), inputs=list(generator.parameters()))
        make.step()

    with torch.no_grad():
        mean = generator(torch.randn(500, 2)).mean(0)
    print(f"mean of what is drawn {[round(m, 2) for m in mean.tolist()]}, goal {GOAL.tolist()}")
    for name, optimizer in (("generator", make), ("critic", judge)):
        scale, skipped = optimizer.current_scale, optimizer.skipped_steps
        print(f"{name}: scale 2**{torch.tensor(scale).log2().item():.0f}, {skipped} steps skipped")
    return mean, make, judge


if __name__ == "__main__":
    train()
