"""The commands that train: ``train-vae``, ``train-lsgm`` and ``train-score``.

Each reads its command line before it loads PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

from lsgm.commands.presets import PRESET, SHORT_OPTIONS, lsgm_base, rewritten, vae_base
from lsgm.config.command_line import (
    LSGM_RUN,
    OUT,
    RESUME,
    VAE_RUN,
    parse_command_line,
    take_data_from_run,
)
from lsgm.config.training import LSGMTrainConfig, NCSNTrainConfig, VAETrainConfig

__all__ = ["SHOWN", "lsgm", "score", "vae"]

_LOOP = (
    "train.seed train.epochs train.max_steps train.batch_size train.accumulate train.precision "
    "train.device train.eval_every train.checkpoint_every"
)

SHOWN: dict[type, tuple[str, ...]] = {
    VAETrainConfig: tuple(
        "name data.name data.root vae.num_channels_enc vae.num_channels_dec vae.num_latent_scales "
        "vae.num_groups_per_scale vae.num_latent_per_group vae.decoder_dist "
        f"objective.kl_anneal_portion optim_vae.lr {_LOOP}".split()
    ),
    LSGMTrainConfig: tuple(
        "name data.root prior.network.num_channels prior.network.num_scales prior.sde.kind "
        "prior.mixed prior.weighting_p prior.proposal_p prior.training optim_vae.lr "
        f"optim_prior.lr {_LOOP}".split()
    ),
    NCSNTrainConfig: tuple(
        "name kind data.name data.root score.network score.sde.kind score.class_conditional "
        "objective.estimator objective.weighting objective.proposal sampler.solver sampler.nfe "
        f"optim.lr {_LOOP}".split()
    ),
}
"""The options of each schema that ``--help`` shows."""


def vae(argv: Sequence[str], prog: str) -> None:
    """Train the hierarchical VAE, the first stage of LSGM. With no arguments: handwritten digits,
    minutes on a CPU. With --data alone: a preset that fits images and device.
    """
    full = rewritten(argv)
    line = parse_command_line(
        VAETrainConfig,
        full,
        extra=(*SHORT_OPTIONS, PRESET, OUT, RESUME),
        default_config="digits/vae",
        base=vae_base(argv, full),
        prog=prog,
        description=vae.__doc__,
        shown=SHOWN[VAETrainConfig],
    )
    from lsgm.training.runs.latent import train_vae

    train_vae(line.config, line.options["out"], resume=line.options["resume"])


def lsgm(argv: Sequence[str], prog: str) -> None:
    """Train the score-based prior of LSGM end-to-end with a trained VAE, the second stage (arXiv
    2106.05931).
    """
    full = rewritten(argv)
    line = parse_command_line(
        LSGMTrainConfig,
        full,
        extra=(VAE_RUN, LSGM_RUN, PRESET, OUT, RESUME),
        default_config="digits/lsgm",
        base=lsgm_base(argv, full),
        prepare=take_data_from_run,
        prog=prog,
        description=lsgm.__doc__,
        shown=SHOWN[LSGMTrainConfig],
    )
    from lsgm.training.runs.latent import train_lsgm

    train_lsgm(line.config, line.options["out"], resume=line.options["resume"])


def score(argv: Sequence[str], prog: str) -> None:
    """Train a score model of the images themselves: NCSN (arXiv 1907.05600) or a score-SDE model
    (arXiv 2011.13456), or a classifier to guide or judge one; ``kind`` in the configuration says
    which. With no arguments: NCSN on handwritten digits, minutes on a CPU.
    """
    line = parse_command_line(
        NCSNTrainConfig,
        rewritten(argv),
        extra=(*SHORT_OPTIONS, OUT, RESUME),
        default_config="digits/ncsn",
        prog=prog,
        description=score.__doc__,
        shown=SHOWN[NCSNTrainConfig],
    )
    from lsgm.training.runs.images import train_ncsn

    train_ncsn(line.config, line.options["out"], resume=line.options["resume"])
