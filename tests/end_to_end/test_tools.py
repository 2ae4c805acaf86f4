"""The benchmark script on the tiny configurations."""

from tiny import call


def test_benchmark_measures_both_stages(tiny):
    outcome = call(
        "benchmark", "train", "--config", tiny.configs / "tiny-vae.yaml", "--repeats", 1,
        "--train.batch_size", 16,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    header, vae, lsgm = outcome.out.splitlines()
    assert header.split()[:3] == ["step", "params", "batch"]
    assert vae.startswith("VAE ") and lsgm.startswith("LSGM joint ")
    for row in (vae, lsgm):
        values = row.removeprefix("LSGM joint").removeprefix("VAE").split()
        millions, _, batch, seconds, _, per_second, memory, _, repeats = values
        assert float(seconds) >= 0 and float(per_second) > 0 and float(memory) >= 0
        assert float(millions) > 0 and int(repeats) == 1 and int(batch) > 0


def test_mistakes_at_the_benchmark(tiny):
    call("benchmark", "fly").error(2, "fly", "train")
    call("benchmark", "train", "--repeats", "0").error(2, "--repeats", "0")
    call("benchmark", "train", "--repeats", "many").error(2, "--repeats", "many")
    call("benchmark", "train", "--lsgm", "no.yaml", "--repeats", "x").error(2, "--repeats")
