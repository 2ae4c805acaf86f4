"""Published checkpoints as run folders that :func:`lsgm.load` opens.

A checkpoint answers everything itself: its options say which model and which data, its keys which
stage it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, SDEConfig, VAEConfig
from lsgm.config.command_line import save_config
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    VAETrainConfig,
)
from lsgm.data.spec import DataSpec
from lsgm.errors import MALFORMED, UserError, malformed
from lsgm.importers.official import (
    OfficialCheckpoint,
    load_official_vae,
    read_official_checkpoint,
    vae_arguments,
)
from lsgm.importers.official_prior import (
    SDE_FIELDS,
    PriorArguments,
    load_official_prior,
    prior_arguments,
)
from lsgm.models.latent import LSGM, VAEModel
from lsgm.models.release import save
from lsgm.score import MixedNormalScore
from lsgm.system.files import RunFolder
from lsgm.system.integrity import file_sha256

__all__ = ["OWN_SPECS", "ImportedRun", "Weights", "import_official_lsgm"]

Weights = Literal["raw", "ema"]
T = TypeVar("T")

OWN_SPECS = {
    "cifar10": DataSpec("cifar10", 3, 32, 0, binary=False, num_classes=10, flip=True),
    "mnist": DataSpec("mnist", 1, 28, 2, binary=True, num_classes=10),
    "omniglot": DataSpec("omniglot", 1, 28, 2, binary=True, num_classes=50),
}
"""Datasets that we know by the published name; any other is a folder of colour images."""

PUBLISHED_PRIOR = {
    "frozen_statistics": "batch",
    "kl_scales_prior": True,
    "inactive_mask": "training",
    "q_ema_dropout": True,
    "control_variate": False,
    "stratified_times": False,
}
"""How every published second stage was trained, where our default is another."""


@dataclass(frozen=True)
class ImportedRun:
    """What an import has written.

    Attributes:
        path: The run folder.
        kind: Of model: ``"vae"``, ``"lsgm"``, ``"score_sde"`` or ``"ncsn"``.
        dataset: Published name of the dataset.
        parameters: Number of trainable values.
        weights: Which weights of the VAE (``"vae"``), the prior (``"lsgm"``) or the score model
            were taken; ``"released"``: a file's only ones.
        steps: Optimizer steps behind them, or None where the file does not say.
        said: What else there is to say, such as how a configuration was found.
        sha256: Hash of the file.
    """

    path: Path
    kind: str
    dataset: str
    parameters: int
    weights: Weights | Literal["released"]
    steps: int | None
    said: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        trained = "" if self.steps is None else f", {self.steps} steps of training"
        names = {"raw": "last weights", "ema": "averaged weights", "released": "released weights"}
        which = names[self.weights]
        two = self.kind == LSGM.kind and self.weights != "released"
        of = " of the prior, last of the VAE" if two else ""
        return (
            f"{self.path}: {self.kind} of {self.dataset}, {self.parameters:,} parameters, "
            f"{which}{of}{trained}{self.said and '; '}{self.said}"
            f"{self.sha256 and '; sha256 of the file '}{self.sha256}"
        )


def import_official_lsgm(
    file: str | Path, out: str | Path, weights: Weights | None = None
) -> ImportedRun:
    """Turn a published checkpoint of either stage into the run folder ``out``.

    Args:
        file: The checkpoint. Nothing in it is executed.
        out: Folder of the run to write.
        weights: Last (``"raw"``) or averaged (``"ema"``) weights, of the prior where there is one
            and else of the VAE. None: the prior's averaged, the VAE's last. Under a prior the VAE's
            are always its last: no average of them was kept.

    Raises:
        UserError: If the file is not a published checkpoint, does not hold the weights asked for,
            or describes something that does not fit; the message names it. Or if ``out`` already
            holds a run.
    """
    try:
        checkpoint = read_official_checkpoint(file)
        has_prior = "dae_state_dict" in checkpoint.raw
        chosen: Weights = weights or ("ema" if has_prior else "raw")
        steps = checkpoint.raw.get("global_step")
        model, data, config = (_lsgm if has_prior else _vae)(checkpoint, chosen, Path(out).name)
        steps = None if steps is None else int(steps)
    except MALFORMED as error:
        raise malformed(f"checkpoint {file}", "what a published run writes", error) from error
    sha256 = file_sha256(Path(file))
    run = RunFolder.create(out)
    source = {"file": Path(file).name, "sha256": sha256, "weights": chosen}
    notes = {"steps": steps, "imported": source}
    save_config(config, run.config)
    save(model, run.path, data, notes)
    size = sum(p.numel() for p in model.parameters())
    dataset = checkpoint.args["dataset"]
    return ImportedRun(run.path, model.kind, dataset, size, chosen, steps, sha256=sha256)


def _vae(
    checkpoint: OfficialCheckpoint, weights: Weights, name: str
) -> tuple[VAEModel, DataConfig, VAETrainConfig]:
    args = checkpoint.args
    vae_config, spec, data = _vae_and_data(checkpoint)
    model = VAEModel(load_official_vae(checkpoint, weights), spec, vae_config)
    objective = {
        "kl_anneal_portion": "kl_anneal_portion",
        "kl_const_portion": "kl_const_portion",
        "kl_const_coeff": "kl_const_coeff",
        "kl_max_coeff": "kl_max_coeff",
        "spectral_regularization": "weight_decay_norm",
    }
    config = VAETrainConfig(
        name=name,
        data=data,
        vae=vae_config,
        objective=_checked(ObjectiveConfig, {"kl_balance_sync": False, **_given(args, objective)}),
        optim_vae=_optimizer(args, "vae", "adamax", eps=1e-3),
        train=_train(args),
    )
    return model, data, config


def _lsgm(
    checkpoint: OfficialCheckpoint, weights: Weights, name: str
) -> tuple[LSGM, DataConfig, LSGMTrainConfig]:
    args = checkpoint.args
    vae_config, spec, data = _vae_and_data(checkpoint)
    if weights == "raw" and "dae_optimizer" not in checkpoint.raw:
        raise UserError("checkpoint: holds only the prior's averaged weights; leave out --weights")
    vae = load_official_vae(checkpoint, "raw")
    score, arguments = _prior(checkpoint, weights)
    if vae.top_shape != (score.channels, arguments.resolution, arguments.resolution):
        raise UserError(
            f"checkpoint: its prior is for latents {score.channels} x {arguments.resolution} x "
            f"{arguments.resolution}, its VAE has {' x '.join(map(str, vae.top_shape))}"
        )
    prior = _prior_config(args, arguments)
    model = LSGM(vae, score, spec, vae_config, prior)
    objective = {
        "kl_anneal_portion": "kl_anneal_portion_vada",
        "kl_const_portion": "kl_const_portion_vada",
        "kl_const_coeff": "kl_const_coeff_vada",
        "kl_max_coeff": "kl_max_coeff_vada",
        "kl_balance": "kl_balance_vada",
        "spectral_regularization": "weight_decay_norm_vae",
    }
    values = {"kl_balance_sync": False, **_given(args, objective)}
    if not args.get("cont_kl_anneal"):
        values |= {"kl_const_coeff": 1.0, "kl_max_coeff": 1.0}
    ema_decay = float(args.get("ema_decay", 0.0))
    config = LSGMTrainConfig(
        name=name,
        data=data,
        prior=prior,
        objective=_checked(ObjectiveConfig, values),
        optim_vae=_optimizer(args, "vae", "adamw", eps=1e-3),
        optim_prior=_optimizer(args, "dae", "adamw", eps=1e-4, ema_decay=ema_decay),
        train=_train(args),
    )
    return model, data, config


def _vae_and_data(checkpoint: OfficialCheckpoint) -> tuple[VAEConfig, DataSpec, DataConfig]:
    """The VAE's configuration, and the images that it is for."""
    values = vae_arguments(checkpoint.args, checkpoint.vae_state)
    channels, size, crop = (values.pop(k) for k in ("image_channels", "image_size", "crop"))
    if values["cell"] not in ("res_mbconv", "res_bnswish"):
        raise UserError(
            f"checkpoint: arch_instance {checkpoint.args['arch_instance']!r} is not among the "
            f"cells of a configuration (res_mbconv and res_bnswish are)"
        )
    config = _checked(VAEConfig, values)
    dataset = checkpoint.args.get("dataset")
    if dataset is None:
        raise UserError("checkpoint: its options lack dataset")
    spec = OWN_SPECS.get(dataset)
    if spec is None:
        spec = DataSpec("folder", channels, size, 0, binary=False, flip=True)
        data = DataConfig(name="folder", image_size=size, channels=channels)
    else:
        data = DataConfig(name=dataset)
    own = (spec.channels, *spec.network_shape)
    if own != (channels, size, size) or spec.padding != crop:
        raise UserError(
            f"checkpoint: {dataset} has images {' x '.join(map(str, own))}, "
            f"the VAE's weights are for {channels} x {size} x {size}"
        )
    if spec.binary != (config.decoder_dist == "bin"):
        raise UserError(f"checkpoint: decoder_dist {config.decoder_dist!r} does not fit {dataset}")
    return config, spec, data


def _prior(
    checkpoint: OfficialCheckpoint, weights: Weights
) -> tuple[MixedNormalScore, PriorArguments]:
    try:
        score = load_official_prior(checkpoint.raw, weights)
        return score, prior_arguments(checkpoint.args)
    except ValueError as error:
        raise UserError(f"checkpoint: {error}") from error


def _prior_config(args: Mapping[str, Any], arguments: PriorArguments) -> PriorConfig:
    trained_with_vae = args.get("train_vae", True)
    disjoint = bool(args.get("disjoint_training", False))
    training = ("disjoint" if disjoint else "joint") if trained_with_vae else "frozen"
    sde = {name: float(args[name]) for name in SDE_FIELDS}
    penalty = float(args.get("weight_decay_norm_dae", 0.0))
    values = {
        "network": _checked(PriorNetworkConfig, arguments.network),
        "sde": _checked(SDEConfig, {"kind": arguments.sde_kind, **sde}),
        "mixed": arguments.mixed,
        "mixing_init": arguments.mixing_init,
        "weighting_p": arguments.weighting_p,
        "proposal_p": arguments.proposal_p,
        "proposal_q": arguments.proposal_q,
        "training": training,
        "drop_inactive": bool(args.get("drop_inactive_var", False)),
        "update_q_ema": bool(args.get("update_q_ema", False)) and training == "disjoint",
        **PUBLISHED_PRIOR,
        # With custom_conv_dae the published search finds no convolution of the prior.
        "spectral_regularization": 0.0 if args.get("custom_conv_dae") else penalty,
        "norm_regularization": penalty,
    }
    return _checked(PriorConfig, values)


def _optimizer(
    args: Mapping[str, Any], side: str, optimizer: str, eps: float, ema_decay: float = 0.0
) -> OptimConfig:
    names = {
        "lr": f"learning_rate_{side}",
        "lr_min": f"learning_rate_min_{side}",
        "weight_decay": "weight_decay",
        "clip_norm": "grad_clip_max_norm",
    }
    values = _given(args, names)
    values["lr_min"] = min(values.get("lr_min", 0.0), values.get("lr", 0.0))
    total, epochs = args.get("num_total_iter", 0), args.get("epochs", 1)
    return _checked(
        OptimConfig,
        {
            "optimizer": optimizer,
            "eps": eps,
            "schedule": "published",
            "warmup_steps": args.get("warmup_epochs", 0) * total // max(epochs, 1),
            "ema_decay": ema_decay,
            "ema_warmup": False,
            **values,
        },
    )


def _train(args: Mapping[str, Any]) -> TrainConfig:
    processes = args.get("num_proc_node", 1) * args.get("num_process_per_node", 1)
    values = _given(args, {"seed": "seed", "epochs": "epochs"})
    batch_size = args.get("batch_size", 1) * processes
    return _checked(TrainConfig, values | {"batch_size": batch_size, "release": "best"})


def _given(args: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Values of those published options, by our names, that the file has."""
    return {ours: args[theirs] for ours, theirs in names.items() if theirs in args}


def _checked(section: Callable[..., T], values: Mapping[str, Any]) -> T:
    try:
        return section(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint: its options do not fit a configuration ({error})") from error
