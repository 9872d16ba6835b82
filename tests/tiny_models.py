"""Tiny seeded models in the folder format of Hugging Face, made on the spot: tests download nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
_MERGES = [("Ġ", "t"), ("h", "e"), ("Ġ", "a"), ("i", "n"), ("Ġt", "he"), ("o", "n"), ("r", "e")]


def tiny_gpt2(
    path: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: bool = True,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Saves a random GPT-2 with `transformers` and returns `path`.

    `config` goes to GPT2Config: n_embd, n_head, n_layer, n_positions, n_inner, vocab_size, activation_function,
    layer_norm_epsilon, tie_word_embeddings, ...  Every parameter is random, also those that a fresh model has at 0 or
    1, so that a mix-up changes the logits.  `tokenizer` adds byte-level BPE files (vocab_size of at least 264).
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    end_id = len(_vocabulary()) - 1 if tokenizer else 0
    sizes = {"vocab_size": 301, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": end_id, "eos_token_id": end_id, **config}))
    randomize(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        save_tokenizer(path)
    return path


def randomize(model: Any, seed: int) -> None:
    """Normal values with deviation 0.1 around 1 for layernorm weights and around 0 for everything else."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.1, generator=generator)


def save_tokenizer(path: Path) -> None:
    """Byte-level BPE with a handful of merges, in the files that GPT-2 has; the end-of-text token has the last id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(_vocabulary())}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    bpe.save(str(path / "tokenizer.json"))
    (path / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in _MERGES)
    (path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1000000, "add_prefix_space": False, **special}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _vocabulary() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in _MERGES), END_OF_TEXT]
