"""Does the quickstart show what it must, whatever the seed?

  python -m benchmarks.quickstart --workdir runs/quickstart-seeds --seeds 0 1 2

One process per seed, in DIR/SEED; a seed whose summary.json is there is not run again. Writes results/quickstart.json:
the numbers of each summary, wall seconds and peak resident memory, beside what is asked of them; prints the table that
README.md and docs/results.md hold.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import result

ASKED = {
  "reward model within 0.05 of the best possible accuracy": lambda s: (
    s["reward"]["heldout_accuracy"] >= s["reward"]["bayes_accuracy"] - 0.05
  ),
  "expected calibration error at most 0.05": lambda s: s["reward"]["ece"] <= 0.05,
  "gold win rate of DPO against SFT at least 0.75": lambda s: s["dpo"]["gold_win_rate_vs_sft"] >= 0.75,
  "gold win rate of PPO against SFT at least 0.75": lambda s: s["ppo"]["gold_win_rate_vs_sft"] >= 0.75,
  "KL of PPO from SFT at most 15 nats": lambda s: s["ppo"]["kl"] <= 15,
  "all stages within 480 s": lambda s: sum(s["wall_s"].values()) <= 480,
}
POLICY = (
  *("gold_win_rate_vs_sft", "gold_win_rate_interval", "kl", "kl_interval", "kl_stderr", "gold_mean", "gold_mean_sft"),
  *("capability", "capability_sft", "sycophancy", "sycophancy_sft", "over_refusal", "over_refusal_sft"),
  *("harm", "harm_sft"),
)
KEPT = {
  "reward": ("heldout_accuracy", "heldout_interval", "bayes_accuracy", "ece", "pairs"),
  "dpo": POLICY,
  "ppo": (*POLICY, "gold_win_rate_vs_dpo", "gold_win_rate_vs_dpo_interval"),
}


def one(workdir: pathlib.Path, seed: int) -> dict[str, Any]:
  """The numbers of one seed's quickstart."""
  path = workdir / str(seed) / "summary.json"
  if not path.exists():
    command = [sys.executable, "-m", "alignjax.cli", "quickstart"]
    subprocess.run([*command, "--workdir", str(path.parent), "--seed", str(seed)], check=True)
  summary = json.loads(path.read_text())
  numbers = {part: {key: summary[part][key] for key in keys} for part, keys in KEPT.items()}
  shown = {name: holds(summary) for name, holds in ASKED.items()}
  wall_s = summary["wall_s"]
  return {"seed": seed, **numbers, "wall_s": wall_s | {"all": round(sum(wall_s.values()), 1)}, "asked": shown}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """The runs as columns of a Markdown table."""

  def share(part: Mapping[str, Any], name: str, interval: str) -> str:
    low, high = part[interval]
    return f"{part[name]:.1%} [{low:.1%}, {high:.1%}]"

  def capability(run: Mapping[str, Any]) -> str:
    dpo, ppo = run["dpo"], run["ppo"]
    return f"{dpo['capability_sft']:.1%} → {dpo['capability']:.1%}, {ppo['capability']:.1%}"

  rows = {
    "what": lambda run: f"seed {run['seed']}",
    "---": lambda run: "---",
    "reward model, held-out accuracy": lambda run: share(run["reward"], "heldout_accuracy", "heldout_interval"),
    "the best possible (Bayes) accuracy": lambda run: f"{run['reward']['bayes_accuracy']:.1%}",
    "reward model, expected calibration error": lambda run: f"{run['reward']['ece']:.3f}",
  }
  for name in ("dpo", "ppo"):
    rows[f"{name.upper()} preferred to SFT by the gold reward"] = lambda run, name=name: share(
      run[name], "gold_win_rate_vs_sft", "gold_win_rate_interval"
    )
    rows[f"KL of {name.upper()} from SFT, nats a completion"] = lambda run, name=name: f"{run[name]['kl']:.1f}"
  rows["capability probe, SFT → DPO, PPO"] = capability
  rows["wall time"] = lambda run: f"{run['wall_s']['all']:.0f} s"
  return "\n".join(f"| {' | '.join([label, *map(cell, runs)])} |" for label, cell in rows.items())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  arguments = parser.parse_args()
  runs = [one(arguments.workdir, seed) for seed in arguments.seeds]
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  numbers = {"runs": runs, "peak_resident_gib": round(peak, 2) or None}
  result.write("quickstart", numbers)
  print(table(runs))
  missed = [f"seed {run['seed']}: {name}" for run in runs for name, holds in run["asked"].items() if not holds]
  print("\n".join(missed) or "all that is asked holds")
  sys.exit(bool(missed))


if __name__ == "__main__":
  main()
