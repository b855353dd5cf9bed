"""Package, dependency ranges and extras. constraints.txt has the tested set, pyproject.toml the tool settings."""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.12,<3",
    "torchvision>=0.27,<1",
    "transformers>=5.23,<6",
    "diffusers>=0.42,<0.44",
    "accelerate>=1.15,<2",
    "peft>=0.21,<1",
    "datasets>=5.2,<6",
    "deepspeed>=0.19.8,<1",
    "open_clip_torch>=3.3,<4",
    "wandb>=0.31,<1",
    "huggingface_hub>=2.4,<3",
    "httpx2>=2.16,<3",  # what huggingface_hub speaks HTTP with; its errors are explained (llmga.release.hub)
    "tokenizers>=0.22,<1",
    "sentencepiece>=0.2,<1",  # released checkpoints bring tokenizer.model alone; transformers reads it with this
    "protobuf>=5",
    "safetensors>=0.8,<1",
    "numpy>=2,<3",
    "pillow>=12,<14",
    "pyarrow>=21",
    "pyyaml>=6,<7",
    "pydantic>=2.10,<3",
    "typer>=0.20,<1",
    "rich>=14",
    "jinja2>=3.1,<4",
]
FOUR_BITS = "bitsandbytes>=0.50,<1"  # 4-bit weights under adapters (model.quantize), on a CPU as well
EVAL = [
    "torch-fidelity>=0.4,<0.5",  # Inception as FID and IS are published with
    "lpips>=0.1.4,<0.2",
    "timm>=1,<2",  # DINO
]
TEST = [
    *EVAL,
    "torchmetrics>=1.9,<2",  # beside ours, in tests alone
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "pytest-timeout>=2.4,<3",
    "hypothesis>=6.150,<7",
    "scipy>=1.15,<2",
    "ruff>=0.15,<1",
    "mypy>=1.18",
    "import-linter>=2.5,<3",
    "types-PyYAML>=6",
    FOUR_BITS,
]
GPU = [
    FOUR_BITS,
    "liger-kernel>=0.8.1,<1",  # fused kernels (model.liger)
]

setup(
    name="llmga",
    version="0.1.0",
    description="A multimodal LLM that writes generation prompts, and the diffusion models that follow them.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["llmga", "llmga.*"]),
    package_data={"llmga": ["**/*.yaml", "**/*.j2", "**/*.jinja", "**/*.html", "toyworld/checkpoints/**/*"]},
    install_requires=CORE,
    extras_require={"eval": EVAL, "test": TEST, "gpu": GPU},
    entry_points={"console_scripts": ["llmga = llmga.__main__:main"]},
)
