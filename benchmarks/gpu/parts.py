"""The parts of the proof, the most telling first."""

from __future__ import annotations

from benchmarks.gpu.checks import OPERATORS, ROOT
from benchmarks.gpu.runner import Part

NETWORK, PICTURES = "benchmarks.gpu.networks:measure", "benchmarks.gpu.networks:pictures"
CHECKS, HOTSPOTS = "benchmarks.gpu.checks", "benchmarks.gpu.hotspots:measure"
TUNED = ("attention", "conv_fusion")
NOT_KERNELS = ("test_aot", "test_onnx_ops")  # compilers and graphs that need no GPU
OTHERS = ("tests/engine/test_backend_torch.py", "tests/engine/network")
PRECISIONS = ("ours-bf16", "ours-fp8", "ours-fp16")


def _network(name: str, variant: str) -> Part:
    return Part(f"network-{name}-{variant}", NETWORK, (name, variant), limit_s=150, needs_s=30)


def _compiled(name: str, mode: str, *shapes: str) -> Part:
    """Compilation takes minutes a shape."""
    label = f"network-{name}-compile-{mode}-{shapes[0]}"
    arguments = (name, f"compile-{mode}-bf16", ",".join(shapes))
    return Part(label, NETWORK, arguments, limit_s=530, needs_s=120 if mode == "default" else 300)


def _tests() -> list[Part]:
    files = sorted((ROOT / "tests/kernels").glob("test_*.py"))
    paths = [f"tests/kernels/{file.name}" for file in files if file.stem not in NOT_KERNELS]
    long = {"tests/kernels/test_launch.py": 300.0}
    return [
        Part(
            f"tests-{path.split('/')[-1].removesuffix('.py')}",
            f"{CHECKS}:tests",
            (path,),
            long.get(path, 200),
        )
        for path in (*paths, *OTHERS)
    ]


def parts() -> list[Part]:
    """All of them, in order."""
    published = ("published-fp32", "published-bf16")
    rest = [_network(name, variant) for name in ("cals", "hammer") for variant in (*PRECISIONS, *published)]
    return [
        Part("machine", f"{CHECKS}:machine", limit_s=90),
        Part("smoke", f"{CHECKS}:smoke", limit_s=200),
        *(Part(f"kernel-{name}", f"{CHECKS}:operator", (name,)) for name in OPERATORS),
        *(_network("asap", variant) for variant in ("ours-bf16", "published-fp32", "ours-fp8")),
        *(
            Part(f"pictures-asap-{variant}", PICTURES, ("asap", variant), needs_s=30)
            for variant in PRECISIONS[:2]
        ),
        *(
            Part(f"profile-asap-{variant}", HOTSPOTS, ("asap", variant), needs_s=30)
            for variant in PRECISIONS[:2]
        ),
        *(_network("asap", variant) for variant in ("published-bf16", "ours-fp16")),
        *rest,
        *_tests(),
        *(Part(f"tune-{name}", f"{CHECKS}:tune", (name,), limit_s=200, needs_s=60) for name in TUNED),
        Part("memcheck", f"{CHECKS}:memcheck", limit_s=400, needs_s=90),
        _compiled("asap", "default", "64x50"),
        _compiled("asap", "max-autotune", "64x50"),
        _compiled("cals", "max-autotune", "64x50"),
        _compiled("hammer", "max-autotune", "64x50"),
        _compiled("asap", "max-autotune", "1x50", "8x50", "256x50"),
    ]
