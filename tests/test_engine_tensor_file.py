"""The rank's weight file: what the safetensors package reads, mapped and not copied, damage noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt.engine import device_load
from gpt.engine.device_load import read_into_device
from gpt.engine.tensor_file import map_tensor_file, write_tensor_file
from gpt.errors import EngineError

SHAPES = {"a": (3, 5), "b": (7,), "c": (64, 2)}


def write(path: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for name, shape in SHAPES.items()
    }
    write_tensor_file(
        path, {name: (dtype, shape) for name, shape in SHAPES.items()}, tensors.items(), {"build_id": "x"}, "test"
    )
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8", "float8_e4m3fn"])
def test_safetensors_reads_it_and_so_do_we(dtype: str, tmp_path: Path) -> None:
    tensors = write(tmp_path / "w", dtype)
    mapped, metadata = map_tensor_file(tmp_path / "w")
    theirs = load_file(tmp_path / "w")
    assert metadata == {"build_id": "x"}
    assert mapped.keys() == SHAPES.keys()
    for name, tensor in tensors.items():
        for read in (mapped[name], theirs[name]):
            assert read.dtype == tensor.dtype
            assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
        assert mapped[name].data_ptr() % 64 == 0


def test_weights_are_not_copied(tmp_path: Path) -> None:
    """Mapping a 200 MB file must not make a process 200 MB larger."""
    path = tmp_path / "w"
    shape = (50_000_000,)
    write_tensor_file(path, {"big": ("float32", shape)}, [("big", torch.ones(shape))], {}, "test")
    script = (
        "import sys, resource; from pathlib import Path; from gpt.engine.tensor_file import map_tensor_file;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); tensors, _ = map_tensor_file(Path(sys.argv[1]));"
        "print(peak() - before, tensors['big'][-1].item())"
    )
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    output = subprocess.check_output([sys.executable, "-c", script, str(path)], env=environment, text=True)
    growth_kib, value = output.split()
    assert float(value) == 1.0
    assert int(growth_kib) < 20_000


@pytest.mark.parametrize("num_bytes", [0, 5, 40, 300])
def test_cut_short(num_bytes: int, tmp_path: Path) -> None:
    write(tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[:num_bytes])
    with pytest.raises(EngineError, match="damaged"):
        map_tensor_file(tmp_path / "w")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        7,
    ],
)
def test_nonsense_in_the_header(entry: object, tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(EngineError, match="damaged"):
        map_tensor_file(tmp_path / "w")


def test_wrong_shape_is_refused_while_writing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="wrong shape"):
        write_tensor_file(tmp_path / "w", {"a": ("float32", (2,))}, [("a", torch.ones(3))], {}, "test")


@pytest.mark.parametrize("piece_bytes", [64, 1000, 1 << 20])
def test_a_file_is_read_into_a_device_piece_by_piece(
    piece_bytes: int, tmp_path: Path, kernel_device: torch.device
) -> None:
    tensors = write(tmp_path / "w")
    data = read_into_device(tmp_path / "w", kernel_device, piece_bytes)
    assert bytes(data.cpu().numpy()) == (tmp_path / "w").read_bytes()
    viewed, _ = map_tensor_file(tmp_path / "w", data)
    for name, tensor in tensors.items():
        assert viewed[name].device.type == kernel_device.type
        assert torch.equal(viewed[name].cpu(), tensor)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "w")
    make = torch.empty

    def cut(*args: object, **options: object) -> torch.Tensor:
        os.truncate(tmp_path / "w", 700)
        return make(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(device_load.torch, "empty", cut)
    with pytest.raises(EngineError, match="ends early"):
        read_into_device(tmp_path / "w", torch.device("cpu"))
