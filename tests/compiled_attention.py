"""What the attention kernels take of shared memory, compiled for cards that need not be there.

    python -m tests.compiled_attention

Prints one JSON line for each kernel, architecture, dtype and head dim. A process of its own: in the tests' process
Triton interprets kernels.
"""

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inference.kernels import fused_attention
from inference.kernels.decode_attention import decode_kernel
from inference.kernels.tile_attention import tile_kernel

GROUP, GROUP_PAD, BLOCK = 4, 16, 64
BYTES = {"bf16": 2, "fp32": 4, "fp8e4nv": 1}
CASES = [
    ("tile", 89, "bf16", 256),
    ("tile", 89, "fp32", 128),
    ("tile", 89, "bf16", 128),
    ("tile", 90, "fp32", 128),
    ("decode", 89, "fp32", 256),
]
_UNALIGNED = ("num_items_ptr", "num_tiles_ptr", "quarters_ptr")


def shared_bytes(kernel: Any, arch: int, dtype: str, head_dim: int, options: dict[str, int]) -> int:
    """Compile for an architecture; return the bytes that a program takes."""
    options = dict(options)
    num_warps = options.pop("num_warps")
    constants: dict[str, Any] = {
        "K": 8,
        "G": GROUP,
        "G_PAD": GROUP_PAD,
        "M": fused_attention.tile_rows(GROUP),
        "H": head_dim,
        "H_PAD": head_dim,
        "S": BLOCK,
        "WINDOW": 0,
        "HAS_PTX": True,
        **options,
    }
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    pointers = dict.fromkeys(("q_ptr", "out_ptr"), "bf16" if dtype == "fp8e4nv" else dtype)
    pointers |= {"k_ptr": dtype, "v_ptr": dtype, "part_out_ptr": "fp32", "part_lse_ptr": "fp32"}
    types = {name: f"*{kind}" for name, kind in pointers.items()}
    types |= {"scale_log2": "fp32", "table_stride": "i32"}
    aligned = [name for name in names if name.endswith("_ptr") and name not in _UNALIGNED]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "*i32") for n in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    return int(compiled.metadata.shared)


def main() -> None:
    """Compile every case."""
    for name, arch, dtype, head_dim in CASES:
        size = BYTES[dtype]
        if name == "tile":
            rows = fused_attention.tile_rows(GROUP)
            options = fused_attention.tile_options(size, head_dim, rows, arch)
            found = shared_bytes(tile_kernel, arch, dtype, head_dim, options)
        else:
            options = fused_attention.decode_options(size, head_dim, GROUP_PAD, arch)
            found = shared_bytes(decode_kernel, arch, dtype, head_dim, options)
        print(json.dumps([name, arch, dtype, head_dim, options["TILE"], options["STAGES"], found]))


if __name__ == "__main__":
    main()
