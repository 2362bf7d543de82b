"""The parts of the proof, the most telling first."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.checks import OPERATORS, TOOLS
from benchmarks.gpu.edges import OWN
from benchmarks.gpu.runner import Part
from engine.registry import NAMES

NETWORK, PICTURES = "benchmarks.gpu.networks:measure", "benchmarks.gpu.networks:pictures"
CHECKS, HOTSPOTS = "benchmarks.gpu.checks", "benchmarks.gpu.hotspots:measure"
EDGES, SERVING = "benchmarks.gpu.edges", "benchmarks.gpu.serving:check"
ENGINES = "benchmarks.engines:part"
ASKED = "asap"  # the network that most figures of benchmarks/gpu/targets.py are about
OTHERS = tuple(name for name in NAMES if name != ASKED)
TUNED = ("attention", "conv_fusion")
LAUNCHES = ("tests/kernels/test_launch.py", "tests/kernels/test_launch_codes.py")
NO_GPU = ("tests/kernels/tools", "tests/kernels/onnx")  # compilers and graphs
ENGINE = (
    "tests/engine/backends/test_torch.py",
    "tests/engine/backends/test_graphs.py",
    "tests/engine/network",
)


def _network(name: str, variant: str) -> Part:
    return Part(f"network-{name}-{variant}", NETWORK, (name, variant), limit_s=150, needs_s=30)


def _compiled(name: str, mode: str, *shapes: str) -> Part:
    """Compilation takes minutes a shape."""
    label = f"network-{name}-compile-{mode}-{shapes[0]}"
    arguments = (name, f"compile-{mode}-bf16", ",".join(shapes))
    return Part(label, NETWORK, arguments, limit_s=530, needs_s=120 if mode == "default" else 300)


def _tests() -> list[Part]:
    """What runs kernels on the GPU, and what runs around them."""
    kernels = tuple(f"--ignore={path}" for path in (*LAUNCHES, *NO_GPU))
    return [
        Part("tests-launch", f"{CHECKS}:tests", LAUNCHES, limit_s=400, needs_s=60),
        Part("tests-kernels", f"{CHECKS}:tests", ("tests/kernels", *kernels), limit_s=300, needs_s=60),
        Part("tests-engine", f"{CHECKS}:tests", ("-m", "not base", *ENGINE), limit_s=300, needs_s=60),
    ]


def _edges() -> list[Part]:
    """Inputs that the benchmarks' are not."""
    return [
        Part("edges-inputs", f"{EDGES}:hard", limit_s=200, needs_s=30),
        Part("edges-masks", f"{EDGES}:masks", limit_s=100),
        Part("edges-second-device", f"{EDGES}:second_device", limit_s=200, needs_s=30),
        *(Part(f"large-{name}", f"{EDGES}:large", (name,), limit_s=200, needs_s=40) for name in OWN),
    ]


def _serving() -> list[Part]:
    """A Predictor by torch in every precision that a GPU has, and by TensorRT where it is installed."""
    ways = [("torch", precision) for precision in ("fp32", "fp16", "bf16", "fp8")] + [("tensorrt", "fp16")]
    return [
        Part(f"serving-{backend}-{precision}", SERVING, (precision, backend), limit_s=400, needs_s=90)
        for backend, precision in ways
    ]


def _sanitizers() -> list[Part]:
    """A part a tool and file, of which each takes minutes under it."""
    return [
        Part(f"{tool}-{Path(file).stem}", f"{CHECKS}:sanitize", (tool, file), limit_s=530, needs_s=120)
        for tool in TOOLS
        for file in LAUNCHES
    ]


def parts() -> list[Part]:
    """All of them, in order; every network at every precision beside its published form."""
    variants = ("ours-bf16", "published-fp32", "ours-fp8", "ours-fp16", "published-bf16")
    rest = [_network(name, variant) for variant in variants for name in OTHERS]
    return [
        Part("machine", f"{CHECKS}:machine", limit_s=90),
        Part("smoke", f"{CHECKS}:smoke", limit_s=200),
        *(Part(f"kernel-{name}", f"{CHECKS}:operator", (name,)) for name in OPERATORS),
        *_edges(),
        Part("plugins", "benchmarks.gpu.plugins:check", limit_s=300, needs_s=60),
        Part("rtx", "benchmarks.gpu.rtx:check", limit_s=200, needs_s=60),
        *(_network(ASKED, variant) for variant in variants[:3]),
        *(
            Part(f"{kind}-{ASKED}-{variant}", call, (ASKED, variant), needs_s=30)
            for kind, call in (("pictures", PICTURES), ("profile", HOTSPOTS))
            for variant in ("ours-bf16", "ours-fp8")
        ),
        *(_network(ASKED, variant) for variant in (*variants[3:], "ours-fp8-rows")),
        *_serving(),
        *rest,
        *_tests(),
        *(Part(f"tune-{name}", f"{CHECKS}:tune", (name,), limit_s=250, needs_s=90) for name in TUNED),
        *_sanitizers(),
        *(
            Part(f"engine-{name}-{precision}", ENGINES, (name, precision), limit_s=530, needs_s=30)
            for precision in ("fp16", "bf16")
            for name in (ASKED, *OTHERS)
        ),
        _compiled(ASKED, "default", "64x50"),
        *(_compiled(name, "max-autotune", "64x50") for name in (ASKED, *OTHERS)),
        _compiled(ASKED, "max-autotune", "1x50", "8x50", "256x50"),
    ]
