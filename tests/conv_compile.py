"""Compiles for sm_90, without a GPU, what the convolutions of real networks would launch at batch 256.

A script, for Triton must not have been imported as an interpreter. It runs the launcher on tensors without memory,
catches the kernels that it would have launched, compiles each distinct one, and prints a JSON list of them.
"""

import itertools
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from robust.conv import kernels
from robust.conv.algorithm import Epilogue
from robust.conv.geometry import Geometry
from robust.conv.kernels import depthwise, gemm, pooling

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}

POINT = Geometry((1, 1))
HALVED = Geometry((1, 1), stride=(2, 2))
WINDOW = Geometry((3, 3), padding=(1, 1))
STRIDED = Geometry((3, 3), stride=(2, 2), padding=(1, 1))
STEM = Geometry((7, 7), stride=(2, 2), padding=(3, 3))
GROUPS = Geometry((3, 3), padding=(1, 1), groups=32)
DEPTHWISE = Geometry((5, 5), stride=(2, 2), padding=(2, 2), groups=96)

# (geometry, batch, channels in and out, side of the image): of ResNet-50, and what else the table has to fit.
RESNET = [
    (POINT, 256, 256, 1024, 14), (WINDOW, 256, 256, 256, 14), (POINT, 256, 1024, 512, 14), (WINDOW, 256, 128, 128, 28),
    (WINDOW, 256, 64, 64, 56), (STRIDED, 256, 128, 128, 56), (STEM, 256, 3, 64, 224),
]  # fmt: skip
OTHERS = [(POINT, 1, 256, 128, 14), (HALVED, 256, 256, 512, 56), (WINDOW, 256, 75, 78, 28), (GROUPS, 256, 128, 128, 56)]
POOLS = [(STRIDED, 256, 64, 64, 112)]
THIN = [(DEPTHWISE, 256, 96, 96, 112)]
PLANS = [
    ("bf16", torch.bfloat16, RESNET + OTHERS + THIN),
    ("fp16", torch.float16, RESNET[1:2]),
    ("tf32", torch.float32, RESNET[:5] + OTHERS[:3]),
    ("ieee", torch.float32, RESNET[1:2] + OTHERS[:1] + OTHERS[2:3] + THIN),
]
PURPOSES = ("forward", "input_grad", "weight_grad", "max_pool")


class Recorder:
    """Stands in for a kernel, and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launches.append((self.kernel, arguments))


def run(purpose: str, geometry: Geometry, dtype: torch.dtype, n: int, c: int, k: int, side: int) -> None:
    """With everything that can be fused."""
    x = torch.empty(n, c, side, side, dtype=dtype, device="meta")
    weight = torch.empty(k, c // geometry.groups, *geometry.kernel, dtype=dtype, device="meta")
    y = torch.empty(n, k, *geometry.output_size((side, side)), dtype=dtype, device="meta")
    shift = torch.empty(k, device="meta")
    if purpose == "forward":
        kernels.forward(x, kernels.pack(weight, geometry), geometry, Epilogue(shift, y, relu=True))
    elif purpose == "input_grad":
        kernels.input_grad(y, kernels.pack_input_grad(weight, geometry), geometry, (side, side), mask=y)
    elif purpose == "weight_grad":
        kernels.weight_grad(x, y, geometry)
    else:
        pooled, taps = pooling.max_pool(x, geometry, geometry.output_size((side, side)))
        pooling.max_pool_grad(pooled, taps, geometry, (side, side))


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """What Triton would compile for these arguments, specialised by them as it is at a launch."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name], constants[parameter.name], aligned = "constexpr", value, False
        else:
            signature[parameter.name], aligned = "i32", special and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compiled(record: dict[str, Any], made: ASTSource, options: dict[str, int]) -> dict[str, Any]:
    binary = triton.compile(made, target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return record | used | {"wgmma": "wgmma.mma_async" in binary.asm["ptx"]}


def main() -> None:
    launches: list[tuple[Any, dict[str, Any]]] = []
    for module in (gemm, depthwise):
        module.convolve = Recorder(module.convolve, launches)
        module.weight_gradient = Recorder(module.weight_gradient, launches)
    pooling._max_pool = Recorder(pooling._max_pool, launches)
    pooling._max_pool_grad = Recorder(pooling._max_pool_grad, launches)
    jobs = {}
    for (precision, dtype, cases), purpose in itertools.product(PLANS, PURPOSES):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for case in cases if purpose != "max_pool" else POOLS:
            launches.clear()
            run(purpose, case[0], dtype, *case[1:])
            for kernel, arguments in launches:
                made = source(kernel, arguments)
                options = {name: arguments[name] for name in ("num_warps", "num_stages")}
                blocks = [arguments.get(f"BLOCK_{axis}", 1) for axis in "MNK"]
                record = {
                    "precision": precision, "purpose": purpose, "case": str(case), "dots": "PRECISION" in arguments,
                    "tile": [*blocks, *options.values()],
                }  # fmt: skip
                jobs.setdefault((made.hash(), str(options)), (record, made, options))
    with ThreadPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(lambda job: compiled(*job), jobs.values()))))


if __name__ == "__main__":
    main()
