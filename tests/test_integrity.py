"""A damaged file of a run is one line or an earlier file: never other numbers or a traceback."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damages
from safetensors.torch import load_file, save_file

import lsgm
from lsgm.config.architecture import VAEConfig
from lsgm.config.command_line import load_run_config, save_config
from lsgm.config.training import DataConfig, VAETrainConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.latent import VAEModel, build_vae
from lsgm.models.release import load_data_config, save
from lsgm.system import memory
from lsgm.system.curves import read_metrics
from lsgm.system.files import log_line, open_log
from lsgm.system.integrity import file_sha256, seal
from lsgm.training.checkpoint import CheckpointError, Checkpoints

REPOSITORY = Path(__file__).parents[1]
WEIGHTS, DESCRIPTION = "model.safetensors", "run.json"
SPEC = DataSpec("digits", 1, 16, 0, binary=True, num_classes=10)
TINY = VAEConfig(
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_groups_per_scale=1,
    num_latent_per_group=2,
    cell="res_bnswish",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A released run, not trained."""
    torch.manual_seed(0)
    model = VAEModel(build_vae(TINY, SPEC), SPEC, TINY)
    save(model, tmp_path, DataConfig(), {"steps": 3})
    save_config(VAETrainConfig(vae=TINY), tmp_path / "config.yaml")
    return tmp_path


def line(function: Callable[..., Any], *arguments: Any) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns, or None after one line."""
    try:
        return function(*arguments)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None


def unsealed(run: Path, **changes: Any) -> dict[str, Any]:
    """The description as versions without hashes wrote it, changed."""
    description = json.loads((run / DESCRIPTION).read_text()) | changes
    del description["sha256"]
    return description


def test_every_flip_and_truncation_of_released_weights_is_found(run):
    path = run / WEIGHTS
    content = path.read_bytes()
    for damaged in damages(content):
        path.write_bytes(damaged)
        assert WEIGHTS in line(lsgm.load, run)
    path.write_bytes(content)
    lsgm.load(run)


def test_a_damaged_description_gives_no_other_model(run):
    path = run / DESCRIPTION
    content = path.read_text().encode()
    model, data = lsgm.load(run), load_data_config(run)
    weights = model.state_dict()
    opened = 0
    for damaged in damages(content):
        path.write_bytes(damaged)
        found = outcome(lsgm.load, run)
        if found is not None:  # white space, or the name of the seal
            opened += 1
            assert found.describe() == model.describe() and load_data_config(run) == data
            assert all(torch.equal(v, weights[k]) for k, v in found.state_dict().items())
    assert opened < 150  # about a third of the indented file is white space


def test_a_damaged_configuration_is_no_other_configuration(run):
    path = run / "config.yaml"
    content, config = path.read_bytes(), load_run_config(run)
    for damaged in damages(content):
        path.write_bytes(damaged)
        assert outcome(load_run_config, run) in (None, config)


def test_a_configuration_cut_between_two_lines_is_found(run):
    path = run / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        path.write_text("".join(lines[:count]))
        assert str(path) in line(load_run_config, run)
    path.write_text("".join(lines[1:]))  # as versions without hashes wrote it
    assert load_run_config(run) == VAETrainConfig(vae=TINY)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    rng = torch.Generator().manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(6, 5, generator=rng) for i in range(4)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"weights": weights, "counters": {"step": 1}})
    path = checkpoints.save(2, {"weights": weights, "counters": {"step": 2}})
    content = path.read_bytes()
    for damaged in damages(content):
        path.write_bytes(damaged)
        said: list[str] = []
        step, state = checkpoints.latest(said.append)
        assert state["step"] == state["counters"]["step"] == step == (1 if said else 2)
        assert all(torch.equal(state["weights"][k], v) for k, v in weights.items())


def test_a_compressed_checkpoint_is_none_of_ours(tmp_path):
    path = Checkpoints(tmp_path).save(1, {"weights": torch.zeros(1000)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(CheckpointError, match="compressed"):
        Checkpoints(tmp_path).load(1)


def test_weights_with_swapped_offsets_are_found(run):
    path = run / WEIGHTS
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    a, b = [k for k, v in header.items() if v.get("shape") == [4]][:2]
    header[a]["data_offsets"], header[b]["data_offsets"] = (
        header[b]["data_offsets"],
        header[a]["data_offsets"],
    )
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(content[:8] + text + content[8 + length :])
    load_file(path)  # as a file it is sound
    assert "sha256" in line(lsgm.load, run)


def test_runs_without_hashes_open_as_before(run):
    before = lsgm.load(run).state_dict()
    (run / DESCRIPTION).write_text(json.dumps(unsealed(run)))
    after = lsgm.load(run).state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_the_released_runs_carry_their_hashes():
    for run in (REPOSITORY / "released").iterdir():
        description = json.loads((run / DESCRIPTION).read_text())
        content = {k: v for k, v in description.items() if k != "sha256"}
        hashes = {WEIGHTS: file_sha256(run / WEIGHTS)}
        assert description == seal(content, DESCRIPTION, hashes)


def _header(path: Path, header: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


def _change(**tensors: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        state = load_file(path)
        name = next(name for name, value in state.items() if value.ndim == 4)
        for change, value in tensors.items():
            if change == "drop":
                del state[name]
            elif change == "add":
                state[value] = torch.zeros(1)
            elif change == "fill":
                state[name] = torch.full_like(state[name], value)
            elif change == "dtype":
                state[name] = state[name].to(value)
            else:
                state[name] = state[name].reshape(-1)
        save_file(state, path)

    return damage


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pickle(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


MALFORMED_WEIGHTS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights"),
    "a folder": _folder,
    "a pickle": _pickle,
    "a header of exabytes": lambda path: _header(path, b"{}", 1 << 62),
    "a header of no length": lambda path: _header(path, b"{}", 0),
    "a header that is a list": lambda path: _header(path, b"[1, 2]"),
    "a header of wrong types": lambda path: _header(path, b'{"a":{"dtype":3,"shape":"x"}}'),
    "a tensor missing": _change(drop=None),
    "a tensor too many": _change(add="extra"),
    "another shape": _change(shape=None),
    "another dtype": _change(dtype=torch.float64),
    "NaN": _change(fill=float("nan")),
    "infinity": _change(fill=float("inf")),
}


@pytest.mark.parametrize("damage", MALFORMED_WEIGHTS.values(), ids=MALFORMED_WEIGHTS.keys())
def test_malformed_weights_are_one_line_without_a_hash_too(run, damage):
    (run / DESCRIPTION).write_text(json.dumps(unsealed(run)))
    damage(run / WEIGHTS)
    assert WEIGHTS in line(lsgm.load, run)


def _vae(**changes: Any) -> dict[str, Any]:
    return {"vae": asdict(TINY) | changes}


def _spec(**changes: Any) -> dict[str, Any]:
    return {"spec": asdict(SPEC) | changes}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kind": ["vae"]}, "kind"),
        ({"kind": None}, "kind"),
        ({"vae": None}, "VAEConfig"),
        ({"vae": [1]}, "VAEConfig"),
        (_vae(use_se="no"), "use_se"),
        (_vae(num_channels_enc=4.0), "num_channels_enc"),
        (_vae(num_channels_enc=True), "num_channels_enc"),
        (_vae(num_channels_enc="${oc.env:HOME}"), "num_channels_enc"),
        (_vae(channel_mult=[1, "2"]), "channel_mult"),
        (_vae(channel_mult=[1, 2, 3]), "channel_mult"),
        (_vae(cell="res_new"), "cell"),
        (_vae(num_channels_enc=10**9), "memory"),
        (_vae(num_channels_enc=10**20), "num_channels_enc"),
        (_vae(num_latent_per_group=2**62), "vae"),
        (_vae(log_sig_q_scale=float("inf")), "log_sig_q_scale"),
        (_vae(surprise=1), "surprise"),
        (_spec(channels="1"), "channels"),
        (_spec(channels=0), "channels"),
        (_spec(image_size=-16), "image_size"),
        (_spec(image_size=10**9 * 16), "too large"),
        (_spec(binary=False), "decoder_dist"),
        ({"spec": 3}, "DataSpec"),
    ],
)
def test_a_malformed_description_is_one_line_without_a_seal_too(run, changes, part):
    (run / DESCRIPTION).write_text(json.dumps(unsealed(run, **changes)))
    message = line(lsgm.load, run)
    assert message.startswith(f"{run / DESCRIPTION}: ") and part in message


def test_a_billion_layers_are_not_built(run, monkeypatch):
    monkeypatch.setattr(memory, "MAX_TENSORS", 300)
    lsgm.load(run)
    description = unsealed(run, **_vae(num_preprocess_cells=10**9))
    (run / DESCRIPTION).write_text(json.dumps(description))
    assert "more than 300 weight tensors" in line(lsgm.load, run)


@pytest.mark.parametrize("data", [None, 3, {"name": "minst"}, {"test_fraction": 7}, {"root": 3}])
def test_malformed_data_sections_are_one_line(run, data):
    (run / DESCRIPTION).write_text(json.dumps(unsealed(run, data=data)))
    assert line(load_data_config, run).startswith(f"{run / DESCRIPTION}: ")


def test_a_deep_or_long_description_is_one_line(run):
    for text in ("[" * 100_000, '{"kind": ' + "9" * 10_000 + "}", '{"kind": "\\ud800"}', "null"):
        (run / DESCRIPTION).write_text(text)
        assert DESCRIPTION in line(lsgm.load, run)


def test_a_change_of_ones_own_is_allowed_without_the_seal(run):
    description = json.loads((run / DESCRIPTION).read_text())
    moved = description | {"data": description["data"] | {"root": "/elsewhere"}}
    (run / DESCRIPTION).write_text(json.dumps(moved))
    assert "remove 'sha256'" in line(load_data_config, run)
    del moved["sha256"]
    (run / DESCRIPTION).write_text(json.dumps(moved))
    assert load_data_config(run) == replace(DataConfig(), root="/elsewhere")


def test_a_damaged_log_has_fewer_lines_and_no_other_numbers(tmp_path):
    """200 flips and 200 truncations: the reader and a resumed run drop what is not as written."""
    path = tmp_path / "metrics.jsonl"
    written = [
        {"phase": "train", "step": k, "nelbo": 100 / (k + 1), "lr/vae": 1e-3} for k in range(9)
    ]
    whole = b"".join(log_line(record) for record in written)
    path.write_bytes(whole)
    assert read_metrics(path) == written
    for damaged in damages(whole):
        path.write_bytes(damaged)
        kept = read_metrics(path)
        assert len(kept) >= len(damaged) * len(written) // len(whole) - 2
        assert all(record in written for record in map(_without_extra, kept))
        said: list[str] = []
        with open_log(path, len(damaged), said.append):
            pass
        assert read_metrics(path) == kept
        assert all("damaged line" in line for line in said)


def _without_extra(record: dict[str, Any]) -> dict[str, Any]:
    """A flip in the name ``crc32`` leaves a record whose numbers are right."""
    return {
        key: value for key, value in record.items() if key in ("phase", "step", "nelbo", "lr/vae")
    }
