from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, VAEConfig
from lsgm.config.command_line import (
    LSGM_RUN,
    OUT,
    RESUME,
    VAE_RUN,
    load_config,
    load_run_config,
    parse_command_line,
    save_config,
    take_data_from_run,
)
from lsgm.config.help import field_docs
from lsgm.config.keys import schema_keys
from lsgm.config.packaged import config_summary, packaged_configs
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    NCSNTrainConfig,
    OptimConfig,
    VAETrainConfig,
)
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.latent import build_prior, build_vae
from lsgm.system.memory import build_within_memory


def message(function, *args, **kwargs) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def test_yaml_replaces_only_what_it_names(tmp_path):
    path = write(
        tmp_path, "optim_vae: {lr: 1e-3}\nvae: {channel_mult: [1, 3]}\ntrain: {max_steps: 7}"
    )
    config = load_config(VAETrainConfig, path)
    assert config.optim_vae == dataclasses.replace(OptimConfig(), lr=1e-3)
    assert config.vae == dataclasses.replace(VAEConfig(), channel_mult=(1, 3))
    assert config.train.max_steps == 7
    assert config.data == DataConfig()


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write(tmp_path, "optim_vae: {lr: 1e-3, eps: 1e-5}")
    line = parse_command_line(VAETrainConfig, ["--config", str(path), "--optim_vae.lr", "2e-3"])
    assert (line.config.optim_vae.lr, line.config.optim_vae.eps) == (2e-3, 1e-5)
    assert line.config.optim_vae.betas == OptimConfig().betas
    assert line.config_path == path


def test_command_line_value_forms():
    line = parse_command_line(
        VAETrainConfig,
        "--resume --vae.channel_mult 1 4 --data.flip true --train.compile "
        "--train.channels-last=False "
        "--train.max_steps null --optim_vae.betas 0.5 0.9 --out there".split(),
    )
    config = line.config
    assert config.vae.channel_mult == (1, 4)
    assert (config.data.flip, config.train.compile, config.train.channels_last) == (
        True,
        True,
        False,
    )
    assert config.train.max_steps is None
    assert config.optim_vae.betas == (0.5, 0.9)
    assert line.options == {"out": "there", "resume": True}


def test_negative_numbers_are_values():
    line = parse_command_line(LSGMTrainConfig, ["--prior.mixing_init", "-3.5"])
    assert line.config.prior.mixing_init == -3.5


@pytest.mark.parametrize(
    "config", [VAETrainConfig(), LSGMTrainConfig(data=DataConfig(name="mnist"))]
)
def test_saved_config_reads_back_equal(tmp_path, config):
    config = dataclasses.replace(config, name="again")
    save_config(config, tmp_path / "config.yaml")
    assert load_run_config(tmp_path) == config
    assert load_config(type(config), tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vae: {num_nff: 1}", "unknown key vae.num_nff; did you mean vae.num_nf?"),
        ("vaee: {num_nf: 1}", "unknown key vaee.num_nf; did you mean vae.num_nf?"),
        ("train: {lr: 1}", "unknown key train.lr; did you mean optim_vae.lr?"),
        ("vae: {num_nf: {a: 1}}", "unknown key vae.num_nf.a; did you mean vae.num_nf?"),
        ("optim_vae: {lr: x}", "optim_vae.lr: 'x' does not fit (wanted: a number)"),
        ("optim_vae: {lr: -1}", "optim_vae.lr: must be positive, not -1.0"),
        (
            "optim_vae: {betas: [0.1]}",
            "optim_vae.betas: [0.1] does not fit (wanted: 2 values, each a number)",
        ),
        ("train: {epochs: 2.5}", "train.epochs: 2.5 does not fit (wanted: a whole number)"),
        ("train: 3", "train: 3 does not fit (wanted: a section of keys)"),
        ("train: null", "train: None does not fit (wanted: a section of keys)"),
        ("data: {flip: maybe}", "data.flip: 'maybe' does not fit (wanted: true or false or null)"),
        ("data: {name: minst}", "data.name: 'minst' does not fit (wanted: digits or mnist or"),
        (
            "vae: {channel_mult: [1, x]}",
            "vae.channel_mult: [1, 'x'] does not fit (wanted: a list, each a whole number)",
        ),
        ("vae: {channel_mult: [1, 2, 3]}", "vae.channel_mult: needs 2 positive values"),
        ("[1, 2]", "must hold 'key: value' lines"),
        ("", "must hold 'key: value' lines"),
        ("name: ${oc.env:HOME}", "${...} is not expanded"),
        ("train: {seed: '${oc.env:LSGM_SEED}'}", "${...} is not expanded"),
        ("data: {root: 'a/${train.seed}/b'}", "${...} is not expanded"),
        ("name: ${", "cannot be read"),
        ("train: {seed: 99999999999999999999}", "train.seed: must be below 2^63 in size"),
        ("train: {seed: " + "9" * 5000 + "}", "integer"),
        ("train: {epochs: 1e400}", "train.epochs: inf does not fit"),
        ("optim_vae: {weight_decay: 1e308}", "weight_decay: must be below 3.4e+38 in size"),
        ("optim_vae: {lr: .inf}", "optim_vae.lr: must be finite, not inf"),
        ("vae: {log_sig_q_scale: .nan}", "log_sig_q_scale: must be positive, not nan"),
        ("vae: {num_preprocess_blocks: 1000000000}", "num_preprocess_blocks: must be at most 16"),
        ("train: {num_threads: 1000000000}", "num_threads: must be at most 4096"),
        ("a: " + "[" * 2000, "nesting depth"),
        ("a: " + "[" * 900 + "]" * 900, "nested too deeply"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line_with_file_and_key(tmp_path, text, expected):
    path = write(tmp_path, text)
    line = message(load_config, VAETrainConfig, path)
    assert line.startswith(f"{path}: ")
    assert expected in line


def test_bad_value_in_a_nested_section_names_the_whole_key(tmp_path):
    path = write(tmp_path, "prior: {network: {dropout: 2}}")
    assert "prior.network.dropout: must lie in [0, 1)" in message(
        load_config, LSGMTrainConfig, path
    )


def test_the_environment_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LSGM_SECRET", "hunter2")
    path = write(tmp_path, "name: ${oc.env:LSGM_SECRET}\ntrain: {epochs: x}")
    assert "hunter2" not in message(load_config, VAETrainConfig, path)


def test_a_network_beyond_the_memory_is_refused_before_it_is_built():
    spec = DataSpec("digits", 1, 16, 0, binary=True)
    for wide in ({"num_channels_enc": 10**9}, {"num_latent_per_group": 2**62}):
        config = dataclasses.replace(VAEConfig(), **wide)
        assert message(build_vae, config, spec).startswith("vae: the network is too large")
    prior = PriorConfig(network=PriorNetworkConfig(num_channels=10**6))
    vae = build_vae(VAEConfig(num_channels_enc=4, num_channels_dec=4), spec)
    assert "GiB of memory" in message(build_prior, prior, vae)


def test_a_rehearsal_draws_no_numbers():
    torch.manual_seed(3)
    first = nn.Linear(4, 4)
    torch.manual_seed(3)
    second = build_within_memory(lambda: nn.Linear(4, 4), "layer")
    assert torch.equal(first.weight, second.weight) and second.weight.device.type == "cpu"


def test_missing_file_and_folder(tmp_path):
    assert "no such configuration file" in message(
        load_config, VAETrainConfig, tmp_path / "no.yaml"
    )
    assert "a folder" in message(load_config, VAETrainConfig, tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--optim_vae.lrr 1", "unknown option --optim_vae.lrr; did you mean --optim_vae.lr?"),
        ("--lr 1", "unknown option --lr; did you mean --optim_vae.lr?"),
        ("--oot x", "unknown option --oot; did you mean --out?"),
        ("--optim_vae.lr abc", "--optim_vae.lr: 'abc' does not fit (wanted: a number)"),
        ("--optim_vae.lr", "--optim_vae.lr: needs a value (wanted: a number)"),
        ("--optim_vae.lr -3", "--optim_vae.lr: must be positive, not -3.0"),
        (
            "--optim_vae.lr 1e-3 --optim_vae.lr_min 1e-2",
            "--optim_vae.lr_min: 0.01 must not exceed lr 0.001",
        ),
        ("--data.name foo", "--data.name: 'foo' does not fit (wanted: digits or mnist or"),
        (
            "--train.max_steps 2.5",
            "--train.max_steps: '2.5' does not fit (wanted: a whole number or null)",
        ),
        ("--vae.channel_mult x", "--vae.channel_mult: 'x' does not fit"),
        ("--train 3", "unknown option --train"),
        ("--out", "--out needs one value (DIR), not none"),
        ("--resume 3", "--resume takes no value or auto, not 3"),
        ("--name ${oc.env:HOME}", "--name: ${...} is not expanded"),
        ("--train.seed 99999999999999999999", "--train.seed: must be below 2^63 in size"),
        ("--optim_vae.lr inf", "--optim_vae.lr: must be finite, not inf"),
        ("--vae.num_latent_scales 99", "--vae.num_latent_scales: must be at most 16, not 99"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_bad_command_line_is_one_line_with_the_option(argv, expected, capsys):
    assert message(parse_command_line, VAETrainConfig, argv.split()).startswith(expected)
    assert capsys.readouterr() == ("", "")


def test_help_shows_every_field_and_exits_with_zero(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(LSGMTrainConfig, ["--help"], extra=(VAE_RUN, LSGM_RUN, OUT, RESUME))
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for shown in (
        "--config",
        "--vae RUN",
        "--resume",
        "--data.name",
        "--prior.network.fir",
        "--optim_prior.lr",
    ):
        assert shown in text
    assert "images per optimizer step" in text.lower()
    assert "experiment" not in text


def options_in(capsys, argv: list[str]) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        parse_command_line(VAETrainConfig, argv, shown=("data.name", "optim_vae.lr"))
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[0] for line in lines if line.startswith("  --")]


def test_help_shows_the_options_that_matter_and_help_all_the_rest(capsys):
    keys = [f"--{key}" for key in schema_keys(VAETrainConfig)]
    plain = ["--config", "--out", "--resume"]
    assert options_in(capsys, ["--help"]) == [*plain, "--data.name", "--optim_vae.lr"]
    assert options_in(capsys, ["--help-all"]) == [*plain, *keys]


def test_help_shows_the_values_of_the_configuration(tmp_path, capsys):
    path = write(tmp_path, "optim_vae: {lr: 0.0625, betas: [0.25, 0.5]}\ntrain: {compile: true}")
    with pytest.raises(SystemExit):
        parse_command_line(VAETrainConfig, ["--help", "--config", str(path)])
    text = " ".join(capsys.readouterr().out.split())
    for key, metavar, shown in (
        ("optim_vae.lr", "FLOAT", "Learning rate after the warm-up. (default: 0.0625)"),
        ("optim_vae.betas", "FLOAT FLOAT", "moments, per step. (default: 0.25 0.5)"),
        ("train.compile", "{true,false}", "networks. (default: true)"),
        ("train.max_steps", "INT", "earlier. (default: None)"),
        ("optim_vae.optimizer", "{adamax,adam,adamw}", "it. (default: adamax)"),
    ):
        assert shown in text.partition(f"--{key} {metavar} ")[2].partition(" --")[0]


@pytest.mark.parametrize("schema", [VAETrainConfig, LSGMTrainConfig, NCSNTrainConfig])
def test_every_field_has_help(schema):
    assert [key for key, text in field_docs(schema).items() if not text] == []


def test_a_packaged_configuration_is_found_by_name_and_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = parse_command_line(VAETrainConfig, ["--config", "omniglot/vae_small"])
    assert line.config.data.name == "omniglot"
    assert load_config(VAETrainConfig, "omniglot/vae_small") == line.config
    (tmp_path / "omniglot").mkdir()
    (tmp_path / "omniglot" / "vae_small").write_text("name: mine")
    assert load_config(VAETrainConfig, "omniglot/vae_small").name == "mine"


def test_a_wrong_name_of_a_configuration_gets_the_right_one(tmp_path):
    wrong = message(load_config, VAETrainConfig, "omniglot/vae_smal")
    assert wrong.endswith("no such configuration file; did you mean omniglot/vae_small?")
    assert "lsgm configs" in message(load_config, VAETrainConfig, "nothing-like-it")


def test_the_summary_of_a_configuration_is_its_first_sentence(tmp_path):
    path = write(tmp_path, "# One of two\n# lines (App. B).\n# More.\nname: x")
    assert config_summary(path) == "One of two lines (App. B)"


def test_second_stage_takes_the_data_of_the_vae_run(tmp_path):
    save_config(
        VAETrainConfig(data=DataConfig(name="mnist", eval_binarisation_seed=3)),
        tmp_path / "config.yaml",
    )

    def parse(*argv: str) -> LSGMTrainConfig:
        return parse_command_line(
            LSGMTrainConfig,
            argv,
            extra=(VAE_RUN, LSGM_RUN, OUT, RESUME),
            prepare=take_data_from_run,
        ).config

    config = parse("--vae", str(tmp_path), "--data.augment", "affine")
    assert config.vae_run == str(tmp_path)
    assert config.data == DataConfig(name="mnist", eval_binarisation_seed=3, augment="affine")
    config = parse("--lsgm", str(tmp_path), "--add_context_blocks", "2")
    assert (config.vae_run, config.lsgm_run) == (None, str(tmp_path))
    assert config.data == DataConfig(name="mnist", eval_binarisation_seed=3)
    assert "not both" in message(parse, "--vae", str(tmp_path), "--lsgm", str(tmp_path))
    assert message(parse).startswith("--vae: give the folder")
    assert "no such configuration file" in message(parse, "--vae", str(tmp_path / "none"))


def test_resume_continues_with_the_configuration_of_the_run(tmp_path):
    save_config(VAETrainConfig(name="first"), tmp_path / "config.yaml")
    default = write(tmp_path, "name: second")
    argv = ["--out", str(tmp_path)]
    assert parse_command_line(VAETrainConfig, argv, default_config=default).config.name == "second"
    resumed = parse_command_line(VAETrainConfig, [*argv, "--resume"], default_config=default)
    assert resumed.config.name == "first"
    chosen = parse_command_line(VAETrainConfig, [*argv, "--resume", "--config", str(default)])
    assert chosen.config.name == "second"


def test_sections_check_their_values():
    with pytest.raises(ValueError, match="channel_mult"):
        VAEConfig(num_preprocess_blocks=3)
    with pytest.raises(ValueError, match="impl: apex"):
        OptimConfig(impl="apex", optimizer="adamax")
    with pytest.raises(ValueError, match="test_fraction"):
        DataConfig(test_fraction=1.0)


@pytest.mark.parametrize("name", packaged_configs())
def test_shipped_configs_are_valid(name):
    path = packaged_configs()[name]
    kinds = {"vae": VAETrainConfig, "lsgm": LSGMTrainConfig}
    load_config(kinds.get(path.stem.split("_")[0], NCSNTrainConfig), name)
    assert config_summary(path)
