"""Latent score-based generative models (arXiv 2106.05931).

``lsgm.load(RUN)`` opens a finished run folder anywhere; ``lsgm.fit(MODEL, DATA, out=RUN)`` trains
one in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lsgm.system.threads import wait_briefly

__version__ = "0.1.0"

__all__ = ["__version__", "fit", "load"]

wait_briefly()  # here, because every script and every process comes by before it loads PyTorch

if TYPE_CHECKING:
    from lsgm.models.loading import load
    from lsgm.training.fit import fit


def __getattr__(name: str) -> Any:
    # Late, so that `import lsgm.sde` stays light.
    if name == "load":
        from lsgm.models.loading import load

        return load
    if name == "fit":
        from lsgm.training.fit import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
