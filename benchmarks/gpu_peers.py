"""Other engines that bench_gpu.py measures where they are installed; they read the same weights from a folder."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Shape
from gpu_systems import Prompts, Setup, hf_model


class Vllm:
    """vLLM with its own scheduler and CUDA graphs; prompts of one batch are handed over at once, prefixes not kept."""

    def __init__(self, setup: Setup):
        self.folder = save_hf(setup)
        build = setup.info.build
        from vllm import LLM

        self.engine: Any = LLM(
            model=str(self.folder),
            dtype=build.dtype,
            skip_tokenizer_init=True,
            max_model_len=build.max_seq_len,
            max_num_seqs=build.max_batch_size,
            max_num_batched_tokens=max(build.max_seq_len, build.max_batch_size * build.max_input_len),
            enable_prefix_caching=False,
            gpu_memory_utilization=0.8,
        )

    def prepare(self, shape: Shape) -> None: ...

    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.engine.generate(requests, settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def logits(self, ids: Sequence[int]) -> torch.Tensor | None:
        return None


class CTranslate2:
    """CTranslate2's Generator; its own converter makes its folder, its tokens are the ids as words.

    A sequence cannot go on behind an end token there, so token 0, which has to be one, is never chosen."""

    def __init__(self, setup: Setup):
        import ctranslate2

        folder = save_hf(setup)
        save_words(folder, setup.info.model.vocab_size)
        converted = setup.scratch / "ctranslate2"
        dtype = setup.info.build.dtype
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted), quantization=dtype)
        device = torch.device(setup.device)
        self.engine = ctranslate2.Generator(
            str(converted), device=device.type, device_index=device.index or 0, compute_type=dtype
        )

    def prepare(self, shape: Shape) -> None: ...

    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        results = self.engine.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=num_tokens,
            min_length=num_tokens,
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in results]

    def logits(self, ids: Sequence[int]) -> torch.Tensor | None:
        return None


def save_hf(setup: Setup) -> Path:
    """A folder in the format of `transformers` with the weights of the engine; the model does not stay in memory."""
    folder = setup.scratch / "hf"
    if not folder.is_dir():
        hf_model(setup.info, setup.device).save_pretrained(folder)
        # It says nothing here, and a checkpoint takes it for a part of a tokenizer.
        (folder / "generation_config.json").unlink(missing_ok=True)
        gc.collect()
        if torch.device(setup.device).type == "cuda":
            torch.cuda.empty_cache()
    return folder


def save_words(folder: Path, vocab_size: int) -> None:
    """A tokenizer whose words are the ids: CTranslate2 takes words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0"))
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "0")  # its model file needs the three
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
