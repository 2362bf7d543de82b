"""Which packages are installed, and the command that installs the others."""

from __future__ import annotations

import importlib.util

from engine.errors import BackendError

# The extra of `dgm4` that brings each module.
EXTRAS = {
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "trt",
    "tensorrt_rtx": "rtx",
    "jinja2": "evaluate",
    "sklearn": "evaluate",
    "torch": "export",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "scipy": "export",
    "skimage": "export",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "python_multipart": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "timm": "train",
    "transformers": "train",
    "ray": "ray",
    "pyarrow": "parquet",
    "cryptography": "sign",
}
# The package of a module that is called otherwise.
_NAMES = {"sklearn": "scikit-learn", "skimage": "scikit-image", "tensorrt_rtx": "tensorrt-rtx"}


def version_of(*packages: str) -> str | None:
    """Version of the first of these distributions that is installed; None if none is."""
    import importlib.metadata  # which costs as much as the rest of `import engine`

    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def install_command(*extras: str) -> str:
    """The command that adds these extras to an installed `dgm4`, be it a wheel or a clone."""
    return f'pip install "dgm4[{",".join(extras)}]"'


def require(user: str, *modules: str) -> None:
    """Raise BackendError, naming the command to install them, where `user` needs modules that are absent."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        extras = dict.fromkeys(EXTRAS[module] for module in missing)
        names = ", ".join(_NAMES.get(module, module) for module in missing)
        raise BackendError(f"{user} needs {names}: {install_command(*extras)}")


def lacking(user: str, error: ModuleNotFoundError) -> BackendError:
    """The error of `require` for a failed import; raises `error` itself where no extra has the module."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        raise error
    return BackendError(f"{user} needs {_NAMES.get(module, module)}: {install_command(EXTRAS[module])}")


def find_conflict() -> str | None:
    """What is wrong with the packages of ONNX Runtime, and the commands that mend it; None if nothing is.

    The two share one folder, so that the one installed last hides the other, and removing either breaks both.
    """
    packages = ("onnxruntime", "onnxruntime-gpu")
    if None in map(version_of, packages):
        return None
    return (
        f"{' and '.join(packages)} are both installed and overwrite each other: pip uninstall -y "
        f"{' '.join(packages)}, then {install_command('cpu')} or {install_command('gpu')}, not both"
    )
