"""Draws the tables of docs/tpu.md, and sentences of docs/real_models.md, from benchmarks/results/preflight.json.

  python -m benchmarks.preflight_table

What stands between `<!-- NAME -->` and `<!-- end -->` is replaced. A number before the kernel, the gathers and the
narrower frozen trees is of benchmarks/results/preflight_before.json.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from alignjax.model.huggingface.catalogue import MODELS
from benchmarks.preflight_runs import LENGTH, LEVERS, OFFLINE, ONLINE_MODELS, RUNS, TOPOLOGIES, cell_name, matrix
from benchmarks.result import RESULTS

DOCS = tuple(pathlib.Path(__file__).parent.parent / "docs" / f"{page}.md" for page in ("tpu", "real_models"))
GIB = 2**30
WHAT = {
  "8b-dpo": "llama-3.1-8b, DPO of all weights, 32 rows of 4,096",
  "8b-dpo-cached": "the same, `run.reference_cache`",
  "8b-dpo-32k": "llama-3.1-8b, DPO of all weights, 4 rows of 32,768; fsdp 4 x sequence 4",
  "8b-dpo-128k": "llama-3.1-8b, DPO of all weights, one row of 131,072; sequence 16",
  "8b-grpo": "llama-3.1-8b, GRPO of all weights, 64 completions of 1,024 behind 1,024; fsdp 4 x tensor 4",
  "llama-ppo": "`configs/llama_ppo.py`, llama-3.1-8b, 64 prompts of 1,024, completions of 512",
  "1b-grpo": "llama-3.2-1b, GRPO of all weights, 64 completions of 256 behind 256",
  "70b-dpo-v5p": "llama-3.1-70b, DPO of all weights, 32 rows of 4,096; fsdp 16 x tensor 4",
  "70b-dpo-v6e": "the same",
  "70b-dpo-v6e-offload": "the same, `model.remat=offload`",
  "qwen3-dpo-lora": "`configs/qwen3_dpo_lora.py`, qwen3-0.6b, 16 rows of 2,048",
  "llama-reward": "`configs/llama_reward.py`, llama-3.2-1b, 64 rows of 2,048",
  "70b-dpo-4096-chips": "llama-3.1-70b, DPO of all weights, 1,024 rows of 4,096; fsdp 512 x tensor 8",
  "8b-dpo-4-slices": "llama-3.1-8b, DPO of all weights, 2,048 rows of 4,096; data 4 x fsdp 256",
}
Numbers = Mapping[str, Any]


def read(name: str) -> Numbers:
  """A file of benchmarks/results."""
  return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], lines: list[list[str]]) -> str:
  """As Markdown."""
  return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def runs(numbers: Numbers) -> str:
  """Every step of every run that was compiled."""
  head = ["run", "topology", "step", "GiB a device", "spare", "matmuls at the peak, s", "by cycles, s"]
  head += ["compiled in, CPU s", "host, GB"]
  lines = []
  for name in RUNS:
    found = numbers["runs"].get(name)
    if not found:
      continue
    first, last = [WHAT[name], _place(found)], f"{found.get('host_peak_bytes', 0) / 1e9:.1f}"
    for step in filter(lambda step: step["flops"], found["steps"]):
      took = f"{step.get('compile_cpu_seconds', 0):.0f}"
      lines.append([*first, step["step"], *_sizes(step), *_seconds(step), took, last])
      first, last = ["", ""], ""
  return table(head, lines)


def levers(numbers: Numbers) -> str:
  """The update of 8B DPO as it is, with one thing changed, and as it was before."""
  base, before = "8b-dpo", read("preflight_before")
  cells = {f"before: commit {before['commit']}": before["runs"][base], "**as it is**": numbers["runs"].get(base)}
  cells |= {"`run.reference_cache`": numbers["runs"].get("8b-dpo-cached")}
  names = {
    "lion": "`optimizer.name=lion`",
    "lora": "`lora.rank=16`, `lora.base=bfloat16`",
    "tensor=4": "`mesh.tensor=4`",
    "microbatches=2": "`optimizer.microbatches=2`",
    "rows of 8192": "16 rows of 8,192: pairs of 4,096 a side",
    "share_prompts": "`data.share_prompts`, 16 rows of 6,144: those pairs, half of a side its prompt",
    "optimizer.offload": "`optimizer.offload`",
    "both offloads": "`model.remat=offload`, `optimizer.offload`",
  }
  for lever in LEVERS:
    cells[names.get(lever, f"`model.{lever}`")] = numbers["runs"].get(f"{base}, {lever}")
  lines = []
  for name, found in ((name, found) for name, found in cells.items() if found):
    prepare, update = found["steps"]
    both = [f"{step['memory']['total'] / GIB:.2f}" for step in (prepare, update)]
    both[1] += f" + {host / GIB:.2f} on the host" if (host := update["memory"].get("host")) else ""
    work = [f"{step['flops'] / 1e12:.0f}" for step in (prepare, update)]
    by_cycles = f"{sum(_cycles(s) for s in found['steps']):.2f}" if all(map(_cycles, found["steps"])) else "-"
    sent = sum(each["bytes"] for step in found["steps"] for each in step.get("collectives", {}).values())
    lines.append([name, *both, " + ".join(work), by_cycles, f"{sent / GIB:.0f}" if sent else "-", _verdict(found)])
  head = ["8B DPO on v5e:4x4 with", "prepare, GiB", "update, GiB", "TFLOP", "by cycles, s", "sent, GiB", "fits"]
  missing = "; ".join(name for name, found in cells.items() if not found)
  return table(head, lines) + (f"\n\nNot compiled yet: {missing}." if missing else "")


def decode(numbers: Numbers) -> str:
  """A step of the decode loop against what it must read."""
  head = ["run", "topology", "weights, GiB", "cache, GiB", "least, ms", "by cycles, ms", "times the least"]
  lines = []
  for name in RUNS:
    found = numbers["runs"].get(name, {})
    if d := found.get("decode"):
      read = [f"{d[f'{what}_bytes'] / GIB:.2f}" for what in ("weights", "cache")]
      times = [f"{d[what] * 1e3:.2f}" for what in ("floor_seconds", "seconds")]
      lines.append([f"`{name}`", found["topology"], *read, *times, f"{d['ratio']:.1f}"])
  return table(head, lines)


def attention(numbers: Numbers) -> str:
  """The temporaries of attention alone."""
  if not (a := numbers.get("attention")):
    return "Not compiled yet."
  size = lambda name: f"{a[name]['temporaries'] / 2**20:,.0f} MiB"
  heads = f"{a['heads']} heads of {a['head_dim']} ({a['kv_heads']} of keys) over a row of {a['tokens']:,} tokens"
  sizes = f"{size('xla')} of temporaries in blocks by XLA, {size('splash')} with the kernel"
  return f"Attention alone, forwards and backwards, {heads}: {sizes}."


def cells(numbers: Numbers) -> str:
  """The largest step of every model on every topology, task by task."""
  names = sorted({name.split(".", 1)[1].rsplit(".", 1)[0] for name in matrix()}, key=list(MODELS).index)
  lines = []
  for task in (*OFFLINE, "grpo", "ppo"):
    for model in names if task in OFFLINE else ONLINE_MODELS:
      found = [numbers["runs"].get(cell_name(task, model, topology)) for topology in TOPOLOGIES]
      if any(found):
        lines.append([task, model, *map(_cell, found)])
  if not lines:
    return "Not compiled yet."
  return table(["task", "model", *(f"`{topology}`" for topology in TOPOLOGIES)], lines)


def _place(found):
  return found["topology"] + (f" x {found['slices']} slices" if found["slices"] > 1 else "")


def _sizes(step):
  m = step["memory"]
  spare = (m["capacity"] - m["total"]) / m["capacity"]
  verdict = f"{spare:.0%}" if spare >= 0 else f"**{-spare:.0%} too much**"
  return [f"{m['total'] / GIB:.2f} of {m['capacity'] / GIB:.2f}", verdict]


def _seconds(step):
  both = step.get("seconds", {}).get("compute", 0), _cycles(step)
  return [f"{seconds:.2f}" if seconds else "-" for seconds in both]


def _cycles(step):
  return step.get("seconds", {}).get("cycles", 0)


def _verdict(found):
  return "yes" if found["fits"] else "**no**"


def _cell(found):
  if not found:
    return "."
  size = max(step["memory"]["total"] for step in found["steps"]) / GIB
  return f"{size:.1f}" if found["fits"] else f"**{size:.1f}**"


def recipe(name: str, numbers: Numbers) -> str:
  """What each step of a recipe needs."""
  if not (found := numbers["runs"].get(name)):
    return "Not compiled yet."
  size = lambda step: f"{step['step']} {step['memory']['total'] / GIB:.1f}"
  steps = ", ".join(size(step) for step in found["steps"] if step["flops"])
  capacity = found["steps"][0]["memory"]["capacity"] / GIB
  return f"Estimated on {found['topology']}, GiB of {capacity:.2f} a chip: {steps}."


RECIPES = ("qwen3-dpo-lora", "llama-reward", "llama-ppo")
TABLES = {"runs": runs, "levers": levers, "decode": decode, "attention": attention, "matrix": cells}


def drawn(name: str) -> str:
  """What stands under a mark, from the files in benchmarks/results."""
  numbers = read("preflight")
  return recipe(name, numbers) if name in RECIPES else TABLES[name](numbers)


MARKED = re.compile(r"<!-- (\S+) -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)


def replaced(text: str) -> str:
  """A page with its tables drawn anew."""
  return MARKED.sub(lambda found: f"<!-- {found[1]} -->\n{drawn(found[1])}\n<!-- end -->", text)


if __name__ == "__main__":
  assert LENGTH == 4096  # as the words say
  for page in DOCS:
    page.write_text(replaced(page.read_text()))
