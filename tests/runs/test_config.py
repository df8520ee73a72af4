"""A config is complete, known and typed, or one line says which key is wrong and what it should have been."""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import pytest

from alignjax.algorithms import ALGORITHMS
from alignjax.errors import InputError
from alignjax.runs.config import SECTIONS, load_config, resolve
from tests import made, smoke
from tests.test_layering import MODULES, tree

FILES = sorted(path for path in smoke.CONFIGS.glob("*.py") if "get_config" in path.read_text())
FIELDS = [(section, field.name) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]
MINIMAL = {"algorithm": {"name": "sft"}, "run": {"steps": 1}}


def attributes():
  """(owner, field) of every attribute that the package reads: ("run", "steps") of config.run.steps."""
  for node in (node for name in MODULES for node in ast.walk(tree(name))):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      yield re.findall(r"\w+", ast.unparse(node.value))[-1:], node.attr


@functools.cache
def read():
  return {(owner, field) for owners, field in attributes() for owner in owners}


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=map(".".join, FIELDS))
def test_every_key_is_read(section, field):
  owners = {section, "config", "c"}  # whole; a part of it under the parameter's name; in formulas
  assert read() & {(owner, field) for owner in owners}, f"nothing reads {section}.{field}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.parametrize("variant", ["", ":smoke"])
def test_config_file_resolves(path, variant):
  config = load_config(f"{path}{variant}")
  assert resolve(config.to_dict()) == config
  if variant:
    assert config.run.steps == smoke.STEPS
    assert Path(config.data.train).is_file()
    assert Path(config.data.tokenizer).exists()


def test_there_are_config_files():
  assert {path.stem for path in FILES} >= set(smoke.NAMES)


def test_override_reaches_keys_that_the_file_leaves_at_their_default():
  config = load_config(
    f"{smoke.CONFIGS}/dpo.py:smoke",
    ["algorithm.beta=1", "data.pack=false", "run.loggers=wandb", "mesh.fsdp=-1", "optimizer.b2=0.5"],
  )
  assert config.hparams["beta"] == 1.0
  assert isinstance(config.hparams["beta"], float)
  assert (config.data.pack, config.run.loggers, config.mesh.fsdp, config.optimizer.b2) == (False, "wandb", -1, 0.5)


def test_another_optimizer_takes_its_own_decays():
  path = f"{smoke.CONFIGS}/ppo.py:smoke"  # sets b2=0.99 for adamw
  decays = lambda *overrides: [getattr(load_config(path, overrides).optimizer, key) for key in ("b1", "b2", "eps")]
  assert decays() == [0.9, 0.99, 1e-8]
  assert decays("optimizer.name=sgd") == [0.9, 0.999, 1e-8]
  assert decays("optimizer.name=lion") == [0.9, 0.99, 1e-8]
  assert decays("optimizer.name=lion", "optimizer.b2=0.95") == [0.9, 0.95, 1e-8]
  stored = load_config(path).to_dict()
  stored["optimizer"] |= {"name": "lion", "b2": 0.999}  # as a run of an earlier version has it
  assert resolve(stored).optimizer.b2 == 0.999


@pytest.mark.parametrize(
  ("override", "said"),
  [
    ("algorithm.bta=1", "no key algorithm.bta; the nearest is algorithm.beta"),
    ("optimiser.b1=0.5", "no key optimiser.b1; the nearest is optimizer.b1"),
    ("run=3", "no key run;"),
    ("run.steps=1.5", "--config.run.steps=1.5: expected a whole number, as in run.steps=6"),
    ("run.steps", "--config.run.steps: expected a whole number"),
    (
      "optimizer.learning_rate=fast",
      "--config.optimizer.learning_rate=fast: expected a number, as in optimizer.learning_rate",
    ),
    ("data.pack=maybe", "--config.data.pack=maybe"),
    ("run.steps=0", "run.steps=0: must be at least 1"),
    ("run.loggers=tensorbord", "run.loggers='tensorbord': 'tensorbord' is not known; use "),
    ("optimizer.microbatches=0", "optimizer.microbatches=0: must be at least 1"),
    ("data.overlong=keep", "data.overlong is 'keep'; it must be 'drop' or 'cut'"),
    ("algorithm.name=dpo", "algorithm.name='dpo': use one of sft, "),
    ("algorithm.loss=hinje", "algorithm.loss='hinje': use one of dpo, ipo, "),
    ("algorithm.loss=dpo+sft:0,5", "algorithm.loss='dpo+sft:0,5': '0,5' is no number; write sft:0.5"),
    ("algorithm.loss=dpo+hinge:much", "algorithm.loss=hinge:much: ModuleNotFoundError: No module named 'hinge'; give "),
    ("algorithm.loss=dpo+hinge:much", "or a number as the weight, as in hinge:0.5"),
    ("algorithm.gamma=1", "no key algorithm.gamma; the nearest is algorithm.name"),
    (
      "algorithm.label_smoothing=0.5",
      "label_smoothing=0.5: must be at least 0 and less than 0.5 (a share of flipped labels)",
    ),
    ("algorithm.divergence=kl", "algorithm.divergence='kl': use one of reverse_kl, forward_kl, js, alpha"),
  ],
)
def test_override_that_can_not_be_is_one_line(override, said):
  with pytest.raises(InputError) as caught:
    load_config(f"{smoke.CONFIGS}/dpo.py:smoke", [override])
  assert said in str(caught.value)
  assert "\n" not in str(caught.value)


def test_another_loss_brings_its_own_hyper_parameters():
  load = lambda *overrides: load_config(f"{smoke.CONFIGS}/dpo.py:smoke", overrides)
  hparams = lambda config: {k: v for k, v in config.hparams.items() if k != "learning_rate"}
  simpo = {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0}
  assert hparams(load("algorithm.loss=simpo")) == simpo
  assert hparams(load("algorithm.gamma=0.5", "algorithm.loss=simpo")) == simpo | {"gamma": 0.5}
  assert hparams(load().replace({"algorithm.loss": "simpo", "algorithm.beta": 2.5})) == simpo | {"beta": 2.5}
  assert hparams(load("algorithm.name=reward")) == {"center_coefficient": 0.01}
  alpha = load("algorithm.divergence=alpha", "algorithm.divergence_alpha=0.3")
  assert hparams(alpha) == hparams(load()) | {"divergence_alpha": 0.3}
  assert hparams(alpha.replace({"algorithm.divergence": "js"})) == hparams(load())
  assert alpha.options.divergence == "alpha"


def test_a_sum_of_losses_has_the_hyper_parameters_of_all():
  config = load_config(
    f"{smoke.CONFIGS}/dpo.py:smoke", ["algorithm.loss=dpo:0.8+bco_pair:0.2+sft", "algorithm.delta=1"]
  )
  assert config.hparams.keys() == {"beta", "label_smoothing", "delta", "learning_rate"}
  assert config.hparams["beta"] == 0.1  # the first loss's


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ({"modle": {}}, "unknown key modle; the nearest is model"),
    ({"run": {"stpes": 1}}, "unknown key run.stpes; the nearest is run.steps"),
    ({"algorithm": {"name": "preference", "bta": 1.0}}, "unknown key algorithm.bta; the nearest is algorithm.beta"),
    ({"run": {"steps": 1.5}}, "run.steps=1.5: expected int"),
    ({"run": {"steps": True}}, "run.steps=True: expected int"),
    ({"run": {"steps": 1, "init": None}}, "run.init=None: expected str"),
    ({"algorithm": {"name": "preference", "ld_alpha": "x"}}, "algorithm.ld_alpha='x': expected float"),
    ({"algorithm": {"name": "preference", "loss": 3}}, "algorithm.loss=3: expected str"),
    ({"algorithm": {}}, "algorithm.name='': use one of sft, "),
  ],
)
def test_mapping_that_can_not_be_is_one_line(values, said):
  with pytest.raises(InputError) as caught:
    resolve(MINIMAL | values)
  assert said in str(caught.value)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("x = 1", "no get_config; a config file defines get_config(variant)"),
    ("def get_config():\n  return 1 / 0", "ZeroDivisionError: division by zero"),
    ("def get_config(:", "SyntaxError"),
  ],
)
def test_error_in_the_file_names_it(tmp_path, text, said):
  path = tmp_path / "mine.py"
  path.write_text(text)
  with pytest.raises(InputError, match=r"mine\.py: ") as caught:
    load_config(str(path))
  assert said in str(caught.value)


def test_absent_file_is_named():
  with pytest.raises(InputError, match=r"no file configs/absent\.py; name a file such as configs/dpo\.py"):
    load_config("configs/absent.py:smoke")


def test_unknown_variant_is_an_error():
  with pytest.raises(InputError, match=r"no variant 'smok'; there is smoke"):
    load_config(f"{smoke.CONFIGS}/sft.py:smok")


def test_replace_checks_what_it_is_given():
  config = resolve(MINIMAL)
  assert config.replace({"run.steps": 7, "optimizer.learning_rate": 2}).hparams["learning_rate"] == 2.0
  with pytest.raises(InputError, match=r"unknown key run\.stps; the nearest is run\.steps"):
    config.replace({"run.stps": 7})
  with pytest.raises(InputError, match=r"config: steps: has no section; write section\.key, as in run\.steps"):
    config.replace({"steps": 7})


def test_keywords_are_still_taken_for_keys():
  config = resolve(MINIMAL)
  with pytest.warns(DeprecationWarning, match=r"config\.replace\(run__steps=\.\.\.\) is deprecated"):
    assert config.replace(run__steps=7) == config.replace({"run.steps": 7})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_config_leaves_the_defaults_as_they_are(name):
  module = ALGORITHMS[name]
  before = dict(made.hparams(module))
  made.hparams(module)["learning_rate"] = 1.0
  assert made.hparams(module) == before


def test_exo_pair_without_label_smoothing_is_refused():
  exo = smoke.config("dpo", algorithm__loss="exo_pair")
  assert exo.hparams["label_smoothing"] > 0
  with pytest.raises(InputError, match=r"must be more than 0 and less than 0\.5 \(its logarithm is taken"):
    exo.replace({"algorithm.label_smoothing": 0.0})
