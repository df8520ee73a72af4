"""The runs that `benchmarks/preflight.py` compiles: the arguments of `alignjax compile` by name."""

import math

from alignjax.model.huggingface.catalogue import MODELS

BF16 = ["--config.model.dtype=bfloat16", "--config.model.remat=full", "--config.data.holdout=0", "--config.data.eval="]
LENGTH = 4096


def run(config: str, topology: str, model: str, *more: str) -> list[str]:
  """A config with a published model, in bfloat16 with full remat; a later override of a key goes before an earlier."""
  return ["--config", f"configs/{config}.py", "--topology", topology, "--model", model, "--no-levers", *BF16, *more]


def rows(count: int, length: int = LENGTH) -> list[str]:
  """A batch of so many rows of so many tokens."""
  return [f"--config.data.rows={count}", f"--config.data.row_length={length}"]


def mesh(fsdp: int, tensor: int, sequence: int = 1) -> list[str]:
  """How many devices have a part of every matrix, how many a part of its heads, and how many a part of every row."""
  return [f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}", f"--config.mesh.sequence={sequence}"]


def completions(count: int, tokens: int) -> list[str]:
  """Of each prompt, in four microbatches."""
  sampled = [f"--config.algorithm.num_generations={count}", f"--config.algorithm.max_new_tokens={tokens}"]
  return [*sampled, "--config.optimizer.microbatches=4"]


ONE = "--config.data.max_examples=1"  # of a row
JUDGE = "--config.algorithm.reward_model=runs/reward"
# At 4,096 tokens a side: two rows of 4,096 for each shard of the rows.
DPO_8B = run("dpo", "v5e:4x4", "llama-3.1-8b", *rows(32), ONE)
DPO_70B = [*rows(32), ONE, *mesh(16, 4)]
RUNS = {
  "8b-dpo": DPO_8B,
  "8b-dpo-cached": [*DPO_8B, "--config.run.reference_cache=cache"],
  "8b-dpo-32k": run("dpo", "v5e:4x4", "llama-3.1-8b", *rows(4, 32768), ONE, *mesh(4, 1, sequence=4)),
  "8b-dpo-128k": run("dpo", "v5e:4x4", "llama-3.1-8b", *rows(1, 131072), ONE, *mesh(1, 1, sequence=16)),
  "8b-grpo": run("grpo", "v5e:4x4", "llama-3.1-8b", *rows(16, 1024), *mesh(4, 4), *completions(4, 1024)),
  "llama-ppo": run("llama_ppo", "v5e:4x4", "llama-3.1-8b", JUDGE),  # the recipes of docs/real_models.md
  "1b-grpo": run("grpo", "v5e:2x2", "llama-3.2-1b", *rows(16, 256), *completions(4, 256)),
  "70b-dpo-v5p": run("dpo", "v5p:4x4x4", "llama-3.1-70b", *DPO_70B),
  "70b-dpo-v6e": run("dpo", "v6e:8x8", "llama-3.1-70b", *DPO_70B),
  "70b-dpo-v6e-offload": [*run("dpo", "v6e:8x8", "llama-3.1-70b", *DPO_70B), "--config.model.remat=offload"],
  "qwen3-dpo-lora": run("qwen3_dpo_lora", "v5e:1x1", "qwen3-0.6b"),
  "llama-reward": run("llama_reward", "v5e:2x4", "llama-3.2-1b"),
  "70b-dpo-4096-chips": run("dpo", "v5p:16x16x16", "llama-3.1-70b", *rows(1024), ONE, *mesh(512, 8)),
  "8b-dpo-4-slices": [
    *run("dpo", "v6e:16x16", "llama-3.1-8b", *rows(2048), ONE, *mesh(256, 1)),
    *("--config.mesh.data=4", "--slices", "4"),
  ],
}
# What "8b-dpo" changes; "8b-dpo-cached" is one of these too.
LEVERS = {
  "remat=offload": ["--config.model.remat=offload"],
  "rows of 8192": rows(16, 8192),
  "share_prompts": [*rows(16, 6144), "--config.data.share_prompts=True"],
  "remat=dots": ["--config.model.remat=dots"],
  "remat=none": ["--config.model.remat=none"],
  "microbatches=2": ["--config.optimizer.microbatches=2"],
  "tensor=4": mesh(4, 4),
  "lora": ["--config.lora.rank=16", "--config.lora.base=bfloat16"],
  "lion": ["--config.optimizer.name=lion"],
  "attention=xla": ["--config.model.attention=xla"],
  "optimizer.offload": ["--config.optimizer.offload=True"],
  "both offloads": ["--config.model.remat=offload", "--config.optimizer.offload=True"],
}
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5p:2x2x4", "v5p:4x4x4", "v6e:4x4", "v6e:8x8")
OFFLINE = ("dpo", "reward", "sft")
ONLINE_MODELS = ("llama-3.2-1b", "llama-3.1-8b")


def matrix() -> dict[str, list[str]]:
  """Every model of the catalogue on every topology for SFT, reward models and DPO; two models for PPO and GRPO."""
  names = [name for name in MODELS if not name.startswith("gemma-2")]
  found = {}
  for task in OFFLINE:
    for model in names:
      for topology in TOPOLOGIES:
        fsdp, tensor = _split(model, topology)
        cell = run(task, topology, model, *rows(2 * fsdp), ONE, *mesh(fsdp, tensor))
        found[cell_name(task, model, topology)] = cell
  for model in ONLINE_MODELS:
    for topology in TOPOLOGIES:
      devices = _devices(topology)
      tensor = 4 if model == "llama-3.1-8b" else 1
      fsdp = devices // tensor
      grpo = run("grpo", topology, model, *rows(4 * fsdp, 1024), *mesh(fsdp, tensor), *completions(4, 1024))
      found[cell_name("grpo", model, topology)] = grpo
      ppo = run("llama_ppo", topology, model, *rows(4 * devices, 1024), JUDGE)
      found[cell_name("ppo", model, topology)] = ppo
  return found


def cell_name(task: str, model: str, topology: str) -> str:
  """A run of the matrix."""
  return f"{task}.{model}.{topology.replace(':', '-')}"


def _split(model: str, topology: str) -> tuple[int, int]:
  """(fsdp, tensor): heads are split where a layer is large."""
  tensor = 4 if MODELS[model].embed >= 5120 else 1
  return _devices(topology) // tensor, tensor


def _devices(topology: str) -> int:
  return math.prod(map(int, topology.partition(":")[2].split("x")))


ALL = RUNS | {f"8b-dpo, {name}": [*DPO_8B, *more] for name, more in LEVERS.items()} | matrix()
