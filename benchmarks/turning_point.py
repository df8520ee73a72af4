"""Where the gold reward of runs is highest, and how far another condition moves that."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignjax.evaluation import interval


def turning_point(runs: list[dict[str, Any]]) -> dict[str, Any]:
  """Where a condition's gold reward is highest, how far it rose until there and how far it falls to the end.

  Args:
    runs: one of each seed, evaluated at the same steps.

  Returns:
    Where and how high the mean over seeds is highest, and how many seeds turned. For several seeds also means with
    Student's t intervals over them: of the rise from the first evaluation, and of the changes to the last. Their other
    end is the step at which the *other* seeds' mean is highest: the highest of a noisy curve's own points would be too
    high. Also of the rise to the step at which the first of the seeds turns. Only if every seed turned, of each seed's
    own turning point: the highest mean of three evaluations in a row, as single ones are noisy. A seed that has not
    turned is censored: its last step is no turning point, and no mean is taken over it.
  """
  of = lambda key: np.array([[point[key] for point in r["curve"]] for r in runs])
  gold, proxy, kl = map(of, ("gold", "proxy", "kl"))
  peak = int(np.argmax(gold.mean(axis=0)))
  found = {
    "seeds": [r["seed"] for r in runs],
    "step": runs[0]["curve"][peak]["step"],
    "kl": float(kl[:, peak].mean()),
    "gold": float(gold[:, peak].mean()),
    "gold_at_end": float(gold[:, -1].mean()),
    "kl_at_end": float(kl[:, -1].mean()),
    "length_at_end": float(of("length")[:, -1].mean()),
    "turns": turns(runs),
  }
  found["turned"] = sum(turn["turned"] for turn in found["turns"])
  if len(runs) == 1:
    return found
  at = [int(np.argmax(np.delete(gold, k, axis=0).mean(axis=0))) for k in range(len(runs))]
  of_each = np.arange(len(runs))
  first = [point["step"] for point in runs[0]["curve"]].index(min(turn["step"] for turn in found["turns"]))
  several = {
    "gold_at_end": gold[:, -1],
    "gold_rise": gold[of_each, at] - gold[:, 0],
    "gold_rise_to_first_turn": gold[:, first] - gold[:, 0],
    "gold_change_to_end": gold[:, -1] - gold[of_each, at],
    "proxy_change_to_end": proxy[:, -1] - proxy[of_each, at],
  }
  if found["turned"] == len(runs):
    several["turn_step"] = [turn["step"] for turn in found["turns"]]
    several["turn_kl"] = [turn["kl"] for turn in found["turns"]]
  return found | intervals(several)


def turns(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The three evaluations in a row whose gold rewards are highest: their middle and mean, and the last three's mean.

  A run whose last three are the highest has not turned: its step is the last, and its turning point later than that.
  """
  found = []
  for r in runs:
    means = of_three(r)
    at = int(np.argmax(means))
    turned = at < len(means) - 1
    point = {key: r["curve"][at + 1 if turned else -1][key] for key in ("step", "kl")}
    found.append({"seed": r["seed"], "turned": turned, **point, "gold": means[at], "gold_at_end": means[-1]})
  return found


def of_three(r: dict[str, Any]) -> np.ndarray:
  """The means of each three gold rewards in a row: place i is that of the evaluations i, i + 1 and i + 2, from 0."""
  return np.convolve([point["gold"] for point in r["curve"]], np.ones(3) / 3, mode="valid")


def against_plain(plain: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
  """How much later a condition turns than the same seed's plain run, how far it still rises from there, and how much
  more it is worth at the end.

  A run that has not turned is censored: its last step bounds the difference from one side. So `later` counts the seeds
  that surely turn later; `turn_step_at_least` is the mean of lower bounds; and means of the differences in steps and in
  nats, with intervals, are given only if every run turned.
  """
  pairs = [(p, r) for p in plain for r in runs if p["seed"] == r["seed"]]
  if len(pairs) < 2:
    return {}
  points = [(turns([p])[0], turns([r])[0]) for p, r in pairs]
  steps = [turn["step"] - plain_turn["step"] for plain_turn, turn in points]
  bounds = [bound(plain_turn, turn) for plain_turn, turn in points]
  end = [r["curve"][-1]["gold"] - p["curve"][-1]["gold"] for p, r in pairs]
  there = [int(np.argmax(of_three(p))) for p, _ in pairs]
  rise = [of_three(r)[-1] - of_three(r)[at] for (_, r), at in zip(pairs, there, strict=True)]
  named: dict[str, Any] = {"gold_from_plain_turn_to_end": rise, "gold_at_end": end}
  if set(bounds) == {"exact"}:
    named["turn_step"] = steps
    named["turn_kl"] = [turn["kl"] - plain_turn["kl"] for plain_turn, turn in points]
  each = {name: [round(float(value), 3) for value in values] for name, values in named.items()}
  each |= {"turn_step": steps, "turn_step_is": bounds}
  found = intervals(named) | {"turned": sum(turn["turned"] for _, turn in points), "of_each_seed": each}
  below = [kind in ("exact", "at least") for kind in bounds]
  found["later"] = sum(ok and step > 0 for ok, step in zip(below, steps, strict=True))
  found["seeds"] = len(pairs)
  if all(below):
    found["turn_step_at_least"] = float(np.mean(steps))
  return found


def bound(plain: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  """What other["step"] - plain["step"] says of how much later a run turns, of two of `turns`."""
  kinds = {(True, True): "exact", (True, False): "at least", (False, True): "at most", (False, False): "unknown"}
  return kinds[plain["turned"], other["turned"]]


def intervals(several: Mapping[str, Any]) -> dict[str, Any]:
  """The mean of each name's values, and its interval beside it."""
  means = {name: interval.mean(values) for name, values in several.items()}
  return {k: v for name, e in means.items() for k, v in ((name, e.value), (f"{name}_interval", e.interval))}
