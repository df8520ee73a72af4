"""TRL's configs in this package's terms: which loss, options and hyper-parameters compute the same.

A key or value that has no equal here is an error, not a guess.
"""

from typing import Any, NamedTuple

from alignjax.algorithms import preference, unpaired

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
  names = preference.hparams(loss, **options)
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
  return Objective(name, {}, {key: values[key] for key in unpaired.hparams(name)}), swapped
