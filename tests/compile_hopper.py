"""Compiles the kernel of `gpt.kernels.w8a8_hopper` for compute capability 9.0: a line of JSON on each of two forms."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from gpt.kernels.w8a8_hopper import BLOCK, w8a8_hopper_kernel

_BLOCK = [BLOCK.value, BLOCK.value]
_DESCRIPTOR = f"tensordesc<i8{_BLOCK},{gl.NVMMASharedLayout.get_default_for(_BLOCK, gl.int8)}>"
# What is no pointer to float32.
_TYPES = {
    "x_ptr": _DESCRIPTOR,
    "weight_ptr": _DESCRIPTOR,
    "bias_ptr": "*fp16",
    "places_ptr": "*i32",
    "blocks_ptr": "*fp16",
}
_SIZES = ("M", "N", "part_stride", "tokens_per_block")
_CONSTANTS = {
    "K": 1600,
    "INTEGER": True,
    "ACTIVATION": "none",
    "HAS_BIAS": True,
    "QUANTIZES": False,
    "SMOOTHED": False,
    "ADD_TO_OUT": False,
    "GROUPS": 0,
    "HEAD_SIZE": 0,
    "QUERIES_ALONE": False,
    "QUANTIZES_CACHE": False,
    "BY_TOKENS": False,
    "DEPENDENT": True,
}
_FORMS: dict[str, dict[str, object]] = {
    "fp32": {"ADD_TO_OUT": True},
    "fp16": {"GROUPS": 25, "HEAD_SIZE": 64, "QUERIES_ALONE": True},
}


def main() -> None:
    names = w8a8_hopper_kernel.arg_names
    for out, form in _FORMS.items():
        constants = _CONSTANTS | form
        types = dict.fromkeys(names, "*fp32") | dict.fromkeys(_SIZES, "i32") | _TYPES | {"out_ptr": f"*{out}"}
        source = GluonASTSource(
            w8a8_hopper_kernel,
            {name: "constexpr" if name in constants else types[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
        )
        options = {"num_warps": 4, "launch_pdl": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            assembler = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
            log = subprocess.run(assembler, check=True, capture_output=True, text=True).stderr
        found = {
            "shared": compiled.metadata.shared,
            "vectors": len(re.findall(r"(?:atom|st)\.global\S*\.v4\.", ptx)),
            "waits": ptx.count("griddepcontrol.wait"),
            "spills": int(re.findall(r"(\d+) bytes spill stores", log)[0]),
            "serialized": "C7510" in log,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
