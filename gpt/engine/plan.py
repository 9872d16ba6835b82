"""What an engine would take, for any architecture and number of ranks, without building anything."""

from __future__ import annotations

import math
import shlex
from bisect import bisect_right
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from pathlib import Path

from gpt.checkpoint.layout import tensors
from gpt.config import BuildConfig, ModelConfig
from gpt.console import human_bytes
from gpt.engine.estimate import Estimate, available_memory_bytes, estimate
from gpt.engine.kv_cache import batch_bucket, cache_slots
from gpt.engine.trt_check import compute_capabilities, loadable_cards
from gpt.mapping import Mapping

# Compute capability, and the MiB that nvidia-smi shows as a card's total.
CARDS = {
    "L4": ("SM89", 23034),
    "RTX 4090": ("SM89", 24564),
    "A100 40GB": ("SM80", 40960),
    "L40S": ("SM89", 46068),
    "A100 80GB": ("SM80", 81920),
    "H100 80GB": ("SM90", 81559),
    "H200": ("SM90", 143771),
    "B200": ("SM100", 183359),
}
# What the CUDA context, the libraries' workspaces and NCCL's buffers take of a card, roughly.
_OVERHEAD_BYTES = 1536 << 20


@dataclass(frozen=True)
class Plan:
    """needed: one rank at the limits of the engine.  library: what builds it, as `trt_library.library_info` says."""

    model: ModelConfig
    build: BuildConfig
    needed: Estimate
    library: Dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, model: ModelConfig, build: BuildConfig, library: Dict[str, str] | None = None) -> Plan:
        return cls(model, build, estimate(model, build, Mapping.of_build(build)), library or {})

    @property
    def num_parameters(self) -> int:
        """Of the whole model, padding left out."""
        return sum(math.prod(tensor.shape) for tensor in tensors(self.model))

    @property
    def gpu_bytes(self) -> int:
        """What a rank takes of its GPU at the limits, with everything that is not the engine's own."""
        return self._bytes(self.build.max_batch_size, on_gpu=True) + _OVERHEAD_BYTES

    def _bytes(self, batch_size: int, *, on_gpu: bool) -> int:
        """The engine's own, for so many sequences of full length."""
        build, needed = self.build, self.needed
        activations = needed.activations * batch_size // build.max_batch_size
        rows, slots = batch_size * build.max_beam_width, build.max_seq_len
        if on_gpu and build.backend == "torch":
            rows, slots = batch_bucket(rows), cache_slots(slots)
        return needed.weights + activations + build.kv_cache_bytes(self.model, rows, slots)

    def largest_batch(self, memory_bytes: int, *, on_gpu: bool = False) -> int:
        """Sequences of full length that one rank has room for beside its weights, at most --max_batch_size; 0: not even
        one."""
        sizes = range(1, self.build.max_batch_size + 1)
        return bisect_right(sizes, memory_bytes, key=lambda size: self._bytes(size, on_gpu=on_gpu))

    def describe(self, engine_dir: Path, gpus_per_node: int) -> str:
        """The plan as text of several lines; each of them speaks of one rank unless it says otherwise."""
        return "\n".join(self._lines(engine_dir, gpus_per_node))

    def _lines(self, engine_dir: Path, gpus_per_node: int) -> Iterator[str]:
        model, build, needed = self.model, self.build, self.needed
        ranks = f"{build.world_size} ranks" if build.world_size > 1 else "1 rank"
        size = f"{model.n_layer} x {model.n_embd}, vocabulary {model.vocab_size}"
        yield f"{self.num_parameters / 1e9:.3g} billion parameters ({size}), {build.dtype}, {build.backend}, {ranks}"
        yield "each rank:"
        limits = f"{build.max_batch_size} sequences of {build.max_input_len} + {build.max_output_len} tokens"
        if build.max_beam_width > 1:
            limits += f" with {build.max_beam_width} beams each"
        made_at_load = (
            " (random weights are made when it is loaded)"
            if build.seed is not None and build.backend == "torch"
            else ""
        )
        for what, value, note in (
            ("weights", needed.weights, ""),
            ("KV cache", needed.kv_cache, f" for {limits}"),
            ("activations", needed.activations, " for their prompts"),
            ("engine file", needed.engine_file, made_at_load),
            ("building", needed.build_peak, ""),
        ):
            yield f"  {what:12} {human_bytes(value):>10}{note}"
        rounded = "rounded sizes and " if build.backend == "torch" else ""
        overhead = f" with {rounded}about {human_bytes(_OVERHEAD_BYTES)} for CUDA, its libraries and NCCL"
        yield f"  {'on a GPU':12} {human_bytes(self.gpu_bytes):>10}{overhead}"
        yield "sequences of full length that fit at once:"
        for card, (capability, mib) in CARDS.items():
            if self._runs_on(capability):
                yield f"  {card:12} {self._fit(self.largest_batch((mib << 20) - _OVERHEAD_BYTES, on_gpu=True))}"
        available = available_memory_bytes()
        if available is not None and build.backend == "torch":
            here = self._fit(self.largest_batch(available // build.world_size))
            yield f"  {'this machine':12} {here} (CPU, all ranks)"
        yield "start it with:" if build.world_size == 1 else "start it with (srun for Open MPI: --mpi=pmix):"
        yield from (f"  {line}" for line in start_commands(build.world_size, engine_dir, gpus_per_node))

    def _runs_on(self, capability: str) -> bool:
        """TensorRT's plans load on the cards they are built for alone."""
        if self.build.backend == "torch":
            return True
        if built_on := self.library.get("compute_capability"):
            return capability == "SM" + built_on.replace(".", "")
        return capability in loadable_cards(compute_capabilities(self.build.targets))

    def _fit(self, batch: int) -> str:
        if batch == self.build.max_batch_size:
            return f"all {batch}"
        return str(batch) if batch else "none"


def start_commands(world_size: int, engine_dir: Path, gpus_per_node: int) -> list[str]:
    """Command lines that run an engine, on one machine where its ranks fit there and under Slurm."""
    script = f"python3 run.py --engine_dir {shlex.quote(str(engine_dir))} --max_output_len 8"
    if world_size == 1:
        return [script]
    num_nodes = -(-world_size // gpus_per_node)
    per_node = -(-world_size // num_nodes)
    slurm = f"srun --nodes {num_nodes} --ntasks {world_size} --ntasks-per-node {per_node} --gpus-per-node {per_node}"
    commands = [f"{slurm} --mpi=pmi2 --kill-on-bad-exit=1 {script}"]
    if num_nodes == 1:
        commands.insert(0, f"mpirun -np {world_size} {script}")
    return commands
