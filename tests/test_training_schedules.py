import math
import os
from pathlib import Path

import numpy as np
import pytest

from lsgm.training.schedules import SCHEDULES, Schedule, learning_rate

PARITY = os.environ.get("LSGM_PARITY_DIR")


def test_cosine_rises_to_lr_and_ends_near_the_minimum():
    schedule = Schedule(1e-2, 1e-4, warmup_steps=10, total_steps=1010, steps_per_epoch=50)
    rates = [learning_rate("cosine", schedule, step) for step in range(1011)]
    np.testing.assert_allclose(rates[:10], [1e-2 * (k + 1) / 10 for k in range(10)])
    assert rates[10] == 1e-2
    np.testing.assert_allclose(rates[510], (1e-2 + 1e-4) / 2)
    np.testing.assert_allclose(rates[1010], 1e-4)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_constant_stays_at_lr():
    schedule = Schedule(1e-2, 1e-4, warmup_steps=4, total_steps=100, steps_per_epoch=10)
    rates = [learning_rate("constant", schedule, step) for step in range(6)]
    np.testing.assert_allclose(rates, [0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2, 1e-2])


@pytest.mark.parametrize("warmup_epochs", [0, 1, 5])
def test_published_follows_its_recursion(warmup_epochs):
    lr, low, per_epoch, epochs = 1e-2, 1e-4, 7, 20
    warmup = warmup_epochs * per_epoch
    schedule = Schedule(lr, low, warmup, epochs * per_epoch, per_epoch)
    span = epochs - warmup_epochs - 1
    rate = lr
    for epoch in range(epochs):
        if epoch > warmup_epochs:
            j = epoch - warmup_epochs
            factor = (1 + math.cos(math.pi * j / span)) / (1 + math.cos(math.pi * (j - 1) / span))
            rate = low + factor * (rate - low)
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            if step < warmup:
                rate = lr * step / warmup
            np.testing.assert_allclose(learning_rate("published", schedule, step), rate, rtol=1e-9)


@pytest.mark.skipif(not PARITY, reason="LSGM_PARITY_DIR is not set")
def test_published_reproduces_the_trace_of_the_published_system():
    trace = np.load(Path(PARITY) / "nvae_parts.npz")["lr.trace_12ep_3warm_4it"]
    schedule = Schedule(1e-2, 1e-4, warmup_steps=12, total_steps=48, steps_per_epoch=4)
    rates = [learning_rate("published", schedule, step) for step in range(48)]
    np.testing.assert_allclose(rates, trace, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (5, 5), (9, 4), (0, 3), (3, 40)])
def test_schedules_stay_in_range_whatever_the_length(name, warmup, total):
    schedule = Schedule(1e-2, 1e-4, warmup, total, steps_per_epoch=4)
    assert all(0 <= learning_rate(name, schedule, k) <= 1e-2 + 1e-12 for k in range(total + 5))


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match="cosine, published, constant"):
        learning_rate("linear", Schedule(1, 0, 0, 1, 1), 0)
