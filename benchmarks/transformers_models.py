"""Tiny random models of every family that is loaded and exported, and what transformers computes with them.

  python benchmarks/transformers_models.py make DIR [--seed 0] [--shards]
  python benchmarks/transformers_models.py score DIR [--gradients]

Runs in an environment of requirements-trl.txt, without alignjax; tests/model/huggingface/test_families.py compares.
`make` writes DIR/FAMILY with config.json and model.safetensors as transformers saves them; every parameter, norms and
biases too, is random. `score` loads each folder of DIR as transformers loads any and writes DIR/FAMILY/numbers.npz:
tokens and mask [B, T] (rows whole, padded on the left, on the right), logits [B, T, V], or scores [B] of a reward
model, and if asked the gradients (`gradient/NAME`) of the mean cross-entropy of the first row; and
DIR/FAMILY/report.json: the names that were missing or unexpected.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers

SIZES = {
  "vocab_size": 48,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10_000.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
  "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
  "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
LENGTH, WINDOW = 24, 7
FAMILIES = {  # (config class, what it is told)
  "llama": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
  "llama_biases": (
    transformers.LlamaConfig,
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8},
  ),
  "llama_reward": (transformers.LlamaConfig, {"num_labels": 1}),
  "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW, "tie_word_embeddings": False}),
  "qwen2": (
    transformers.Qwen2Config,
    {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "tie_word_embeddings": True},
  ),
  "qwen3": (transformers.Qwen3Config, {"head_dim": 8, "tie_word_embeddings": False}),
  "gemma2": (
    transformers.Gemma2Config,
    {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 12, "num_hidden_layers": 3}
    | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
  ),
  "gemma3": (
    transformers.Gemma3TextConfig,
    {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 12, "num_hidden_layers": 7}
    | {"rope_parameters": GEMMA3_ROPE},
  ),
}


def make(folder: pathlib.Path, seed: int, shards: bool) -> None:
  """Writes a random model of every family."""
  generator = torch.Generator().manual_seed(seed)
  for name, (config_class, settings) in FAMILIES.items():
    config = config_class(**(SIZES | settings))
    model = kind(name).from_config(config)
    with torch.no_grad():
      for path, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in path and not name.startswith("gemma") else 0.0
        parameter.copy_(centre + 0.3 * noise)
    model.save_pretrained(folder / name, max_shard_size="20KB" if shards else "5GB")


def kind(name: str):
  """How transformers opens a folder of that name."""
  return (
    transformers.AutoModelForSequenceClassification if name.endswith("reward") else transformers.AutoModelForCausalLM
  )


def score(folder: pathlib.Path, gradients: bool) -> None:
  """Writes numbers.npz into every folder of a model."""
  for config in sorted(folder.glob("*/config.json")):
    opened = kind(config.parent.name).from_pretrained(
      config.parent, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, report = opened
    model.eval()
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, model.config.vocab_size, (3, LENGTH))
    mask = np.ones_like(tokens)
    mask[1, :5], mask[2, -5:] = 0, 0
    tokens[mask == 0] = model.config.pad_token_id
    numbers = {"tokens": tokens, "mask": mask}
    out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits
    numbers["logits"] = out.detach().numpy()
    if gradients and out.ndim == 3:
      torch.nn.functional.cross_entropy(out[0, :-1], torch.tensor(tokens[0, 1:])).backward()
      numbers |= {f"gradient/{path}": p.grad.numpy() for path, p in model.named_parameters()}
    np.savez_compressed(config.parent / "numbers.npz", **numbers)
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    (config.parent / "report.json").write_text(json.dumps(wrong))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("make", "score"))
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--shards", action="store_true", help="several files and an index")
  parser.add_argument("--gradients", action="store_true", help="those of the parameters too")
  arguments = parser.parse_args()
  if arguments.what == "make":
    make(arguments.folder, arguments.seed, arguments.shards)
  else:
    score(arguments.folder, arguments.gradients)
