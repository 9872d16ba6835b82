"""The vocabulary of operations the network is written in, at the level of one fused kernel or a few TensorRT layers.

`X` is an executor's own handle: a torch tensor, or a TensorRT ITensor.  Activations are in the engine's dtype with the
hidden size last; what stands before it (packed tokens [N, E] or padded [B, S, E]) is the executor's business, as are
the step's inputs (token ids, positions, lengths), the cache and the weights, which are named as in
`gpt.checkpoint.layout`.  A linear weight reaches an executor as [out, in] (see `gpt.engine.weights`).  An executor may
keep the residual stream wider.

Every operation raises what the executor's library raises; shapes were settled when the engine was built.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

X = TypeVar("X")


class Ops(Protocol[X]):
    """What an executor has to know."""

    def embedding(self, table: str) -> X:
        """table[ids]: [..., E] from `table` [V, E] and the step's token ids; with prompt tuning an id of V + k is row k
        of the prompt table's part for the sequence's task.  Of a divided table (`Mapping.embedding`): zeros for tokens
        of other ranks, or this rank's columns."""
        ...

    def position_embedding(self, table: str) -> X:
        """table[positions]: [..., E] from `table` [P, E] and the step's positions."""
        ...

    def add(self, a: X, b: X) -> X:
        """a + b, elementwise, [..., E]; used for residuals, so either may be overwritten by an executor."""
        ...

    def layer_norm(self, x: X, name: str, epsilon: float, feeds: str | None = None) -> X:
        """(x - mean) / sqrt(var + epsilon) * weight + bias over the last axis, moments in float32 (Ba et al. 2016).

        feeds: the linear layer that is given the result; all others that are take it in the same form.  An executor
        may hand over what a quantised layer multiplies, int8 rows and their scales, from one kernel.
        """
        ...

    def rms_norm(self, x: X, name: str, epsilon: float, feeds: str | None = None) -> X:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, the mean in float32 (Zhang and Sennrich 2019).
        `feeds` as in `layer_norm`."""
        ...

    def linear(
        self, x: X, name: str, *, activation: str | None = None, bias: bool = True, feeds: str | None = None
    ) -> X:
        """activation(x @ weight.T + bias): [..., in] -> [..., out].  `bias` adds `name.bias` where the model has it.
        `activation` is an `Activation.function` name.  feeds: the one linear layer that is given the result, as in
        `layer_norm`."""
        ...

    def multiply(self, a: X, b: X) -> X:
        """a * b, elementwise: the gate of a gated MLP."""
        ...

    def rotary(self, qkv: X, rotary_dim: int, base: float, scaling: float) -> X:
        """Rotate-half position embedding (Su et al. 2021, GPT-NeoX order) on the first `rotary_dim` values of each
        query and key head of qkv [..., (H+2G)*D/R]; V is left as it is.  Positions are divided by `scaling`."""
        ...

    def attention(self, qkv: X, layer: int, scale: float) -> X:
        """Writes this step's K and V of `layer` into the cache at the step's positions, then
        softmax(scale * Q K^T, causal) V over the cache: [..., (H+2G)*D/R] -> [..., H*D/R].  Softmax in float32."""
        ...

    def all_reduce(self, x: X) -> X:
        """Sum over the ranks."""
        ...

    def all_gather(self, x: X) -> X:
        """The ranks' parts side by side along the last axis, the same on every rank: [..., n] -> [..., R*n]."""
        ...

    def add_bias(self, x: X, name: str) -> X:
        """x + `name.bias`: row-parallel biases, added once, after the all-reduce."""
        ...

    def gather_last(self, x: X) -> X:
        """Keeps the tokens whose logits are wanted, as a rule the last one of each sequence: [..., E] -> [B, E]."""
        ...

    def logits(self, x: X, name: str) -> X:
        """x @ head.T in the engine's dtype, as float32: [B, E] -> this rank's part [B, V padded to lcm(8, R) / R]."""
        ...

    def name(self, x: X, name: str) -> X:
        """Marks x as the named intermediate result (`layers.3.attention`), so that two executors can be compared."""
        ...
