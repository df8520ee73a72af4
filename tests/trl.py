"""TRL's configs in this package's terms: which loss, options and hyper-parameters compute the same.

A key or value that has no equal here is an error, not a guess.
"""

import inspect
from typing import Any, NamedTuple

from alignjax.algorithms import preference, unpaired
from alignjax.losses.policy import LOSSES, PolicyLoss
from tests import made

NAMES = {"sigmoid": "dpo", "aot_pair": "aot_unpaired"}  # where TRL calls a loss otherwise
DIVERGENCES = {
  "reverse_kl": "reverse_kl",
  "forward_kl": "forward_kl",
  "js_divergence": "js",
  "alpha_divergence": "alpha",
}


class Objective(NamedTuple):
  """Arguments of `preference.make`, and values of all its hyper-parameters."""

  loss: str
  options: dict[str, Any]
  hparams: dict[str, float]


def objective(loss: str, options: dict[str, Any], values: dict[str, float]) -> Objective:
  """With those of `values` that the loss has; it must be all of its hyper-parameters."""
  names = made.hparams(preference.RECIPE, loss, **options)
  return Objective(loss, options, {name: values[name] for name in names})


def dpo(config: dict[str, Any]) -> Objective:
  """Of a DPOConfig of 1.x."""
  c = dict(config)
  types = c.pop("loss_type")
  types = [types] if isinstance(types, str) else types
  weights = c.pop("loss_weights")
  smoothing = c.pop("label_smoothing")
  ignores = [name for name in types if name in ("sigmoid", "sigmoid_norm")]  # label smoothing, since 1.0
  uses = [name for name in types if name in ("robust", "exo_pair", "aot", "aot_unpaired")]
  assert not (smoothing and ignores and uses), f"{types}: there is one label_smoothing for all"
  ld_alpha = c.pop("ld_alpha")
  options = {
    "divergence": DIVERGENCES[c.pop("f_divergence_type")],
    "ld_alpha": 1.0 if ld_alpha is None else float(ld_alpha),
    "weighting": "wpo" if c.pop("use_weighting") else "none",
  }
  values = {
    "beta": c.pop("beta"),
    "label_smoothing": 0.0 if ignores else smoothing,
    "tau": c.pop("discopop_tau"),
    "divergence_alpha": c.pop("f_alpha_divergence_coef"),
    "delta": 0.0,
    "length_power": 1.0,
  }
  assert not c, f"no equal here of {c}"
  loss = "+".join(f"{NAMES.get(name, name)}:{weight}" for name, weight in zip(types, weights, strict=True))
  return objective(loss, options, values)


def dpo_legacy(config: dict[str, Any]) -> Objective:
  """Of a DPOConfig of 0.23, whose ipo takes log-probabilities as they are given and whose bco_pair a delta of 0.05."""
  c = dict(config)
  name, smoothing = c.pop("loss_type"), c.pop("label_smoothing")
  coefficient = (c.pop("f_divergence_params") or {}).get("alpha_divergence_coef", 1.0)
  options = {
    "divergence": DIVERGENCES[c.pop("f_divergence_type")],
    "reference": "none" if c.pop("reference_free") else "frozen",
  }
  values = {
    "beta": c.pop("beta"),
    "label_smoothing": smoothing or (1e-3 if name == "exo_pair" else 0.0),
    "tau": c.pop("discopop_tau"),
    "divergence_alpha": 1 - coefficient,
    "delta": 0.05,
    "length_power": 1.0,
  }
  assert not c, f"no equal here of {c}"
  return objective(NAMES.get(name, name), options, values)


def cpo(config: dict[str, Any], nll_weight: float | None = None) -> Objective:
  """Of a CPOConfig; `nll_weight` in place of its cpo_alpha."""
  c = dict(config)
  name, alpha = c.pop("loss_type"), c.pop("alpha", 0.0)
  weight = c.pop("cpo_alpha", 1.0) if nll_weight is None else nll_weight
  values = {
    "beta": c.pop("beta"),
    "label_smoothing": c.pop("label_smoothing", 0.0),
    "gamma": c.pop("simpo_gamma", 0.5),
    "nll_weight": weight,
    "alpha": alpha,
    "divergence_alpha": 1 - alpha,
    "length_power": 1.0,
  }
  assert not c, f"no equal here of {c}"
  if name == "simpo":
    assert not (alpha and weight), "alphapo has no likelihood term"
    return objective("alphapo" if alpha else "cpo_simpo" if weight else "simpo", {}, values)
  if name == "sigmoid" and not alpha:
    return objective("cpo", {}, values)
  options = {"reference": "none", "divergence": "alpha" if alpha else "reverse_kl"}
  loss = NAMES.get(name, name) + (f"+sft:{weight}" if weight else "")
  return objective(loss, options, values)


def tpo(name: str, config: dict[str, Any]) -> Objective:
  """Of a TPOConfig whose loss type, and label smoothing after "_ls", the case's name alone tells."""
  kind, _, smoothing = name.partition("_ls")
  c = dict(config)
  values = {"beta": c.pop("beta"), "simpo_gamma": c.pop("tpo_l_gamma"), "label_smoothing": float(smoothing or 0)}
  weight = c.pop("tpo_alpha")
  assert not c, f"no equal here of {c}"
  found = cpo(values | {"loss_type": {"tpo-l": "simpo"}.get(kind, kind)}, nll_weight=weight)
  loss, options = {"cpo": "tpo"}.get(found.loss, found.loss), found.options | {"likelihood": "third"}
  return objective(loss, options, found.hparams)


def kto(config: dict[str, Any]) -> tuple[Objective, bool]:
  """Of a KTOConfig, and whether the case gives the mismatched log-probabilities of policy and reference exchanged."""
  c = dict(config)
  name, swapped = c.pop("loss_type"), c.pop("swap_kl_policy_and_ref", False)
  values = {key: c.pop(key) for key in ("beta", "desirable_weight", "undesirable_weight")}
  assert not c, f"no equal here of {c}"
  return Objective(name, {}, {key: values[key] for key in made.hparams(unpaired.RECIPE, name)}), swapped


class PolicyObjective(NamedTuple):
  """A loss of `losses.policy` and what surrounds it.

  Attributes:
    loss: with the ratio and the aggregation that the config asks for.
    hparams: values of all the loss's keywords.
    kl_coef, corrected_kl: of a k3 term, and whether it is times the ratio.
    entropy_coef: of the bonus.
    entropy_share: of tokens that count, or None.
    threshold: of `token_weight.on_policy`, or None.
    per_step: microbatches of an optimizer step; the loss is its share of a step's.
    tokens: of the step that a mean over tokens divides by, or None for the microbatch's times per_step.
  """

  loss: PolicyLoss
  hparams: dict[str, float]
  kl_coef: float
  corrected_kl: bool
  entropy_coef: float
  entropy_share: float | None
  threshold: float | None
  per_step: int
  tokens: float | None


def grpo(config: dict[str, Any], constants: dict[str, float], geometric: bool = False) -> PolicyObjective:
  """Of a GRPOConfig, less what says which inputs to take; `geometric` if a GMPOTrainer's.

  Args:
    config: of a case.
    constants: hyper-parameters that all cases share.
    geometric: GMPO has no loss type of its own.
  """
  c = dict(config)
  name = c.pop("loss_type")
  if geometric:
    c.pop("importance_sampling_level")  # it has none
    loss = LOSSES["gmpo"]
  else:
    loss = LOSSES[name]._replace(ratio=c.pop("importance_sampling_level"))
  delta, share = c.pop("delta"), c.pop("top_entropy_quantile")
  values = {
    "epsilon": c.pop("epsilon_low"),
    "epsilon_high": c.pop("epsilon_high"),
    "delta": float("inf") if delta is None else delta,
    "softness": constants["sapo_temperature_pos"],
    "softness_negative": constants["sapo_temperature_neg"],
    "k": constants["vespo_k_pos"],
    "lam": constants["vespo_lambda_pos"],
    "k_negative": constants["vespo_k_neg"],
    "lam_negative": constants["vespo_lambda_neg"],
  }
  training, window = c.pop("mode") == "train", c.pop("gradient_accumulation_steps")
  per_step = window if training else 1
  items, per_generation = c.pop("num_items_in_batch"), c.pop("steps_per_generation")
  of_generation = name in ("dapo", "cispo", "vespo")
  found = PolicyObjective(
    loss=loss,
    hparams={key: values[key] for key in keywords(loss.loss)},
    kl_coef=c.pop("beta"),
    corrected_kl=c.pop("use_bias_correction_kl") and not geometric,
    entropy_coef=c.pop("entropy_coef"),
    entropy_share=None if share == 1 else share,
    threshold=c.pop("off_policy_mask_threshold"),
    per_step=per_step,
    tokens=items * (window / per_generation if training else 1) if of_generation else None,
  )
  assert not c, f"no equal here of {c}"
  return found


def keywords(loss) -> list[str]:
  """The hyper-parameters of a loss."""
  return [p.name for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
