"""The very code that a TensorRT engine would hold of each plugin, launched as TensorRT would launch it.

Run where there is a GPU, `pytest -m gpu tests/test_gpu_plugins.py`; as a program it prints a table and, with OUT set,
writes it as CSV there.  No TensorRT is needed: name, PTX, launch parameters and sizes are what its build gets, and go
to the CUDA driver with input tensors, sizes, output tensors, and null for the scratch memory that is not there.
"""

from __future__ import annotations

import csv
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_driver import Driver
from plugin_cases import BOUNDS, Case, cases, largest_error

pytestmark = pytest.mark.gpu


def capability() -> int:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


def errors(case: Case) -> Iterator[tuple[int, float]]:
    """Of every tactic its largest error; raises AssertionError where integers are further away than one step."""
    from gpt.kernels.aot import ptx_parameters

    driver, expected = Driver(), case.expected()
    for tactic, (name, ptx, parameters, sizes) in case.kernels().items():
        function, launch = driver.load(ptx, name), parameters.values()
        inputs = [tensor.cuda() for tensor in case.inputs]
        outputs = case.empty_outputs(inputs)
        numbers = [size.value for size in sizes]
        num_scratch = len(ptx_parameters(ptx, name)) - len(inputs) - len(numbers) - len(outputs)
        grid, block = ([launch[f"{kind}_{axis}"] for axis in "xyz"] for kind in ("grid", "block"))
        arguments = (*inputs, *numbers, *outputs, *[None] * num_scratch)
        driver.launch(function, grid, block, launch["shared_mem"], arguments)
        yield tactic, largest_error([output.cpu() for output in outputs], expected)


@pytest.mark.parametrize("case", cases(capability()), ids=lambda case: case.name)
def test_what_is_embedded_computes_the_reference(case: Case) -> None:
    for tactic, error in errors(case):
        assert error < BOUNDS[case.dtype], tactic


def main() -> None:
    rows: list[dict[str, Any]] = []
    from gpt.kernels.launch import TRITON_VERSION

    device = torch.cuda.get_device_name()
    versions = {"device": device, "torch": torch.__version__, "triton": TRITON_VERSION}
    versions["command"] = "PYTHONPATH=. python tests/test_gpu_plugins.py"
    date = {"date": time.strftime("%Y-%m-%d")}
    for case in cases(capability()):
        begin = time.perf_counter()
        try:
            for tactic, error in errors(case):
                bound = BOUNDS[case.dtype]
                rows.append({**date, "case": case.name, "tactic": tactic, "error": error, "bound": bound})
                rows[-1] |= {"passed": error < bound, **versions}
        except Exception:
            traceback.print_exc()
            failed = {"tactic": "", "error": "failed", "bound": "", "passed": False}
            rows.append({**date, "case": case.name, **failed, **versions})
        print(f"{case.name}: {time.perf_counter() - begin:.1f} s", flush=True)
    if os.environ.get("OUT"):
        with open(Path(os.environ["OUT"]) / "plugins.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), restval="")
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        size = row["error"] if isinstance(row["error"], str) else f"{row['error']:.1e}"
        print(f"{row['case']:45} {row['tactic']!s:2} {size:8} {'passed' if row['passed'] else 'FAILED'}")
    print(f"{sum(row['passed'] for row in rows)} of {len(rows)} passed on {device}")


if __name__ == "__main__":
    main()
