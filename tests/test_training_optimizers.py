import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lsgm.config.training import OptimConfig
from lsgm.errors import UserError
from lsgm.training.ema import EMA
from lsgm.training.optimizers import make_optimizer

ADAMAX = OptimConfig(optimizer="adamax", lr=1e-2, eps=1e-3, weight_decay=3e-4)
ADAM = OptimConfig(optimizer="adam", lr=1e-2, eps=1e-3, weight_decay=0.1)


def _gradients(steps=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(steps)]


def _run(config, start, gradients):
    p = nn.Parameter(start.clone())
    optimizer = make_optimizer([p], config)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_adamax_is_the_published_update():
    start, gradients = torch.linspace(-1, 1, 6, dtype=torch.float64), _gradients()
    p, m, u = start.clone(), torch.zeros(6).double(), torch.zeros(6).double()
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + ADAMAX.weight_decay * p
        m = 0.9 * m + 0.1 * g
        u = torch.maximum(0.999 * u, g.abs() + ADAMAX.eps)
        p = p - ADAMAX.lr / (1 - 0.9**t) * m / u
    torch.testing.assert_close(_run(ADAMAX, start, gradients), p)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_adds_its_decay_and_adamw_decouples_it(decoupled):
    config = replace(ADAM, optimizer="adamw" if decoupled else "adam")
    start, gradients = torch.linspace(-1, 1, 6, dtype=torch.float64), _gradients()
    p, m, v = start.clone(), torch.zeros(6).double(), torch.zeros(6).double()
    for t, gradient in enumerate(gradients, start=1):
        g = gradient if decoupled else gradient + config.weight_decay * p
        p = p * (1 - config.lr * config.weight_decay) if decoupled else p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - config.lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + config.eps)
    torch.testing.assert_close(_run(config, start, gradients), p)


def test_apex_that_is_missing_is_a_users_mistake():
    with pytest.raises(UserError, match="NVIDIA apex"):
        make_optimizer([nn.Parameter(torch.zeros(1))], replace(ADAM, impl="apex"))


def test_frozen_parameters_are_left_out():
    frozen, free = nn.Parameter(torch.zeros(1), requires_grad=False), nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([frozen, free], ADAMAX)
    assert optimizer.param_groups[0]["params"] == [free]
    with pytest.raises(ValueError, match="requires a gradient"):
        make_optimizer([frozen], ADAMAX)


def test_average_starts_at_the_first_update_and_follows_the_recursion():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = EMA(module, 0.9)
    expected = None
    for _ in range(4):
        module(torch.randn(5, 3))
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        live = [p.detach().clone() for p in module.parameters()]
        pairs = zip(live if expected is None else expected, live, strict=True)
        expected = [0.9 * e + 0.1 * p for e, p in pairs]
        ema.update(module)
        for mine, wanted in zip(ema.module.parameters(), expected, strict=True):
            torch.testing.assert_close(mine, wanted)
            assert not mine.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), live, strict=True))
    for mine, buffer in zip(ema.module.buffers(), module.buffers(), strict=True):
        assert torch.equal(mine, buffer)
    ema.train()
    assert not ema.module.training


@pytest.mark.parametrize(("warmup", "share"), [(False, 0.999**99), (True, None)])
def test_a_warm_up_forgets_the_first_weights(warmup, share):
    """Weights 1 at the first update and 0 after it: what is left is the share of the first."""
    module = nn.Linear(1, 1)
    ema = EMA(module, 0.999, warmup=warmup)
    for step in range(100):
        with torch.no_grad():
            module.weight.fill_(float(step == 0))
        ema.update(module)
    if share is None:  # prod (1 + n) / (10 + n) over n = 1..99 is a ratio of factorials
        share = math.factorial(100) * math.factorial(10) / math.factorial(109)
    assert ema.module.weight.item() == pytest.approx(share, rel=1e-4)


def test_without_warm_up_the_average_is_the_published_weighted_sum():
    """Created after the first step: ``d^(n-1) p_1 + (1 - d) sum_(k=2..n) d^(n-k) p_k``."""
    decay, steps = 0.9999, 50
    module = nn.Linear(3, 2).double()
    ema, seen = EMA(module, decay, warmup=False), []
    for _ in range(steps):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))
        ema.update(module)
        seen.append(module.weight.detach().clone())
    shares = [decay ** (steps - 1)] + [(1 - decay) * decay ** (steps - k) for k in range(2, 51)]
    assert sum(shares) == pytest.approx(1.0, rel=1e-12)
    exact = sum(share * p for share, p in zip(shares, seen, strict=True))
    torch.testing.assert_close(ema.module.weight, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_average_rejects_decays_outside_its_range(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(nn.Linear(1, 1), decay)
