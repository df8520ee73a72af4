"""A loss of the user's own: found beside the config, trained with its hyper-parameters, never imported for a record."""

import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from alignjax import cli
from alignjax.algorithms import ALGORITHMS
from alignjax.commands import adapter, rounds, sweep
from alignjax.commands.best_of import Request
from alignjax.commands.iterate import Plan
from alignjax.errors import InputError
from alignjax.evaluation.held_out import evaluate
from alignjax.losses import objective
from alignjax.losses.pair import make_pair
from alignjax.losses.preference import LOSSES
from alignjax.model import decoder
from alignjax.runs.config import load_config
from alignjax.runs.run import load
from alignjax.runs.scorer import settings
from alignjax.runs.trust import TRUST
from alignjax.train import fit
from alignjax.types import Mean
from tests import made, smoke

DOCS = (smoke.ROOT / "docs" / "objectives.md").read_text()
FOCAL = re.search(r"## An objective of your own.*?```python\n(.*?)```", DOCS, re.DOTALL)[1]
MODULE = f"""
{FOCAL}
import jax.numpy as jnp
from alignjax.losses.policy import PolicyLoss, TokenLosses
from alignjax.losses.pair import PairObjective
from alignjax.losses.unpaired import UnpairedObjective
from alignjax.system.ranges import Count

def same_as_dpo(pair, *, beta=0.1):
  return -jax.nn.log_sigmoid(beta * pair.margin)

def margins_of_one(pair):
  return jax.nn.relu(1 - pair.chosen + pair.rejected)

alone = PairObjective(margins_of_one, reference=False)

def towards(labelled, *, scale=1.0):
  return jnp.square(scale * labelled.ratio - labelled.desirable)

def reinforce(tokens, *, strength=1.0):
  return -strength * tokens.advantages * tokens.logps

def whole(tokens):
  return TokenLosses(-tokens.advantages * tokens.ratio, jnp.zeros_like(tokens.ratio))

sequence = PolicyLoss(whole, "sequence", "sequence_mean")

def mean(pair):
  return jnp.mean(pair.margin)

def unknown_field(pair):
  return pair.likelihood

def two(pair, batch):
  return pair.margin

def without_default(pair, *, beta):
  return pair.margin

def any_keywords(pair, **keywords):
  return pair.margin

def taken(pair, *, divergence=1.0):
  return pair.margin

number = 3

def ends():
  raise SystemExit(3)

def whole_number(pair, *, count: Count = 2):
  return pair.margin

def two_arrays(pair):
  return pair.margin, pair.margin

def asks(pair, *, focus=2.0):
  return pair.margin if focus > 1 else -pair.margin

def discounted(tokens, *, gamma=2.0):
  return -gamma * tokens.advantages * tokens.logps

misnamed = PolicyLoss(whole, "tokens", "sequence_mean")
running = UnpairedObjective(towards, running_mean=True)
"""
POSTPONED = """
from __future__ import annotations
from alignjax.system.ranges import Positive

def late(pair, *, focus: Positive = 1.0):
  return focus * pair.margin
"""


@pytest.fixture
def losses(tmp_path, monkeypatch):
  """The folder of the module my_losses and of a config; the module is in no path."""
  (tmp_path / "my_losses.py").write_text(MODULE)
  (tmp_path / "my_later_losses.py").write_text(POSTPONED)
  (tmp_path / "mine.py").write_text(
    f"import runpy, sys\nsys.path.append({str(smoke.CONFIGS)!r})\n"
    f"def get_config(variant=''):\n  return runpy.run_path({str(smoke.CONFIGS / 'dpo.py')!r})['get_config'](variant)\n"
  )
  monkeypatch.setattr(objective, "_imported", {})
  monkeypatch.setattr(objective, "_failed", {})
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.delenv(TRUST, raising=False)
  forget()
  yield tmp_path
  forget()


def config_of(folder, *overrides):
  return load_config(f"{folder / 'mine.py'}:smoke", [f"data.cache={folder}", "run.compile_cache=", *overrides])


def forget():
  """As another process, which has imported nothing."""
  objective._imported.clear()
  for name in ("my_losses", "my_later_losses", "hinge"):
    sys.modules.pop(name, None)


def test_the_example_of_the_docs_trains_and_its_hyper_parameters_are_set(losses, capsys):
  arguments = smoke.arguments("dpo", losses / "run", "algorithm.loss=my_losses:focal_dpo", "algorithm.focus=1")
  arguments[2] = f"{losses / 'mine.py'}:smoke"
  assert cli.main(arguments) == 0
  recorded = json.loads((losses / "run" / "config.json").read_text())["config"]["algorithm"]
  assert (recorded["loss"], recorded["focus"], recorded["beta"]) == ("my_losses:focal_dpo", 1.0, 0.1)
  assert np.isfinite(smoke.losses(losses / "run")).all()
  assert smoke.losses(losses / "run")[0] == pytest.approx(np.log(2) / 2, rel=1e-5)
  assert cli.main(arguments) == 0  # it is complete


def test_a_run_is_read_without_its_loss_and_trained_or_evaluated_with_permission_alone(losses, monkeypatch):
  run = fit(config_of(losses, "algorithm.loss=my_losses:same_as_dpo", "run.steps=2"), losses / "run")
  forget()
  assert load(losses / "run").config.hparams == run.config.hparams
  with pytest.raises(InputError, match=r"my_losses:same_as_dpo: is Python that only the record of a run names"):
    evaluate(losses / "run")
  assert "my_losses" not in sys.modules
  monkeypatch.syspath_prepend(str(losses))
  numbers = evaluate(losses / "run", trust_code=["my_losses:same_as_dpo"])
  assert numbers["loss"] == pytest.approx(run.metrics["eval/loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss"), [("preference", "same_as_dpo"), ("unpaired", "running")])
def test_factors_are_merged_without_the_loss(losses, monkeypatch, name, loss):
  overrides = [f"algorithm.name={name}", f"algorithm.loss=my_losses:{loss}", "lora.rank=2", "run.steps=2"]
  run = fit(config_of(losses, *overrides), losses / "run")
  forget()
  adapter.merge(losses / "run", losses / "merged")
  assert "my_losses" not in sys.modules
  monkeypatch.syspath_prepend(str(losses))
  numbers = evaluate(losses / "merged", trust_code=[f"my_losses:{loss}"])
  assert numbers["loss"] == pytest.approx(run.metrics["eval/loss"], abs=1e-5)


def test_a_sum_is_the_sum_of_known_and_own_terms_and_hyper_parameters_are_shared(losses):
  config = config_of(losses, "algorithm.loss=my_losses:same_as_dpo:0.5+dpo:0.5+sft:0.25", "algorithm.beta=0.3")
  assert config.hparams.keys() == {"beta", "label_smoothing", "learning_rate"}
  terms = made.objectives(ALGORITHMS["preference"], config.algorithm.loss)
  assert [(term.name, term.weight) for term in terms] == [("my_losses:same_as_dpo", 0.5), ("dpo", 0.5), ("sft", 0.25)]
  pair = make_pair(jnp.array([-3.0]), jnp.array([-4.0]), jnp.array([-3.5]), jnp.array([-3.0]))
  np.testing.assert_allclose(terms[0].objective.loss(pair, beta=0.3), LOSSES["dpo"].loss(pair, beta=0.3), rtol=1e-6)


def test_a_module_may_have_the_name_of_a_known_objective(losses):
  (losses / "hinge.py").write_text("def mine(pair, *, scale=2.0):\n  return -scale * pair.margin\n")
  config = config_of(losses, "algorithm.loss=hinge:mine:0.5+hinge:0.25")
  terms = made.objectives(ALGORITHMS["preference"], config.algorithm.loss)
  assert [(term.name, term.weight) for term in terms] == [("hinge:mine", 0.5), ("hinge", 0.25)]
  assert terms[1].objective is LOSSES["hinge"]
  assert config.hparams["scale"] == 2.0
  assert config_of(losses, "algorithm.loss=hinge:mine").algorithm.loss == "hinge:mine"


def test_a_record_says_that_no_reference_is_read(losses, model):
  config = config_of(losses, "algorithm.loss=my_losses:alone")
  algorithm = made.make(ALGORITHMS["preference"], model, config.algorithm.loss)
  assert algorithm.constant == ()
  assert "beta" not in config.hparams


@pytest.mark.parametrize(("name", "loss"), [("grpo", "reinforce"), ("ppo", "reinforce"), ("grpo", "sequence")])
def test_a_policy_loss_is_of_tokens_unless_its_record_says_otherwise(losses, model, name, loss):
  config_of(losses)
  sys.path.append(str(losses))
  recipe, spec = ALGORITHMS[name], f"my_losses:{loss}"
  objective.load([spec])
  options = {"rewards": "length", "max_new_tokens": 4}
  assert ("strength" in made.hparams(recipe, spec, **options)) == (loss == "reinforce")
  (term,) = made.objectives(recipe, spec)
  assert (term.objective.ratio, term.objective.aggregation) == (
    ("sequence", "sequence_mean") if loss == "sequence" else ("token", "token_mean")
  )
  if name == "ppo":
    model = recipe.adapt(model, recipe.options(critic="shared"))
  assert callable(made.make(recipe, model, spec, **options).loss)


@pytest.mark.slow
def test_grpo_trains_with_it(losses):
  config_of(losses)
  sys.path.append(str(losses))
  config = smoke.config("grpo", run__steps=2, algorithm__loss="my_losses:reinforce", algorithm__strength=0.5)
  assert np.isfinite(fit(config, losses / "run").metrics["loss/policy"])


def test_labelled_completions_take_a_loss_without_beta(losses):
  sys.path.append(str(losses))
  objective.load(["my_losses:towards"])
  model = decoder.make(smoke.config("sft").model.__class__(vocab=96, layers=1, embed=16, heads=2, head_dim=8, mlp=16))
  algorithm = made.make(ALGORITHMS["unpaired"], model, "my_losses:towards")
  metrics = algorithm.finish({"share/chosen": 0.5, "logps/chosen": Mean(1.0, 0.5), "logps/rejected": Mean(0.0, 0.0)})
  assert metrics["logps/chosen"] == 2.0
  assert algorithm.reads == ("reference",)


@pytest.mark.parametrize(
  ("loss", "said"),
  [
    ("my_losses:absent", "AttributeError: module 'my_losses' has no attribute 'absent'; give module:function"),
    ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'; give module:function"),
    ("my_losses:number", "is of type int; give a function"),
    ("my_losses:two", "takes (pair, batch); it must take the pair alone"),
    ("my_losses:without_default", "its hyper-parameter beta has no number as a default"),
    ("my_losses:any_keywords", "write def any_keywords(pair, *, focus=2.0)"),
    ("my_losses:taken", "its hyper-parameter divergence is a setting of the algorithm; rename it"),
    ("my_losses:focal_dpo:much", "my_losses:focal_dpo:much has more than one colon"),
    ("my_losses:focal_dpo:more:0.5", "has more than one colon; write module:function:0.5"),
    ("my_losses:whole_number", "its hyper-parameter count is declared as a whole number"),
    ("my_losses:sequence", "is a PolicyLoss; give a function or a PairObjective"),
    ("focal_dpo", "use one of dpo, ipo,"),
  ],
)
def test_what_is_no_loss_is_one_line(losses, loss, said):
  with pytest.raises(InputError) as caught:
    config_of(losses, f"algorithm.loss={loss}")
  assert said in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("loss", "said"),
  [
    ("my_losses:mean", "returns float32[] for arrays of shape [2, 2, 3]; return a float loss for each, without a mean"),
    ("my_losses:two_arrays", "returns a tuple; return one array of losses"),
    ("my_losses:asks", "TracerBoolConversionError when it is traced"),
    ("my_losses:unknown_field", "AttributeError when it is traced: 'Pair' object has no attribute 'likelihood'"),
  ],
)
def test_a_loss_of_the_wrong_shape_is_refused_before_anything_is_trained(losses, model, loss, said):
  config = config_of(losses, f"algorithm.loss={loss}")
  with pytest.raises(InputError, match=re.escape(said)):
    made.make(ALGORITHMS["preference"], model, config.algorithm.loss)


def test_values_outside_of_a_declared_range_are_refused(losses):
  with pytest.raises(InputError, match=r"algorithm\.focus=-1\.0: must be at least 0"):
    config_of(losses, "algorithm.loss=my_losses:focal_dpo", "algorithm.focus=-1")


@pytest.mark.parametrize(("value", "said"), [("nan", "must be finite"), ("1e300", "must be at most")])
def test_values_that_no_float32_holds_are_refused_without_a_range_too(losses, value, said):
  with pytest.raises(InputError, match=rf"algorithm\.beta=.*{said}"):
    config_of(losses, "algorithm.loss=my_losses:same_as_dpo", f"algorithm.beta={value}")


def test_a_range_holds_where_annotations_are_postponed(losses):
  with pytest.raises(InputError, match=r"algorithm\.focus=-1\.0: must be more than 0"):
    config_of(losses, "algorithm.loss=my_later_losses:late", "algorithm.focus=-1")


def test_a_keyword_that_is_a_setting_of_the_algorithm_is_refused(losses):
  sys.path.append(str(losses))
  objective.load(["my_losses:discounted", "my_losses:misnamed"])
  with pytest.raises(InputError, match="its hyper-parameter gamma is a setting of the algorithm; rename it"):
    made.hparams(ALGORITHMS["ppo"], "my_losses:discounted")
  assert made.hparams(ALGORITHMS["grpo"], "my_losses:discounted")["gamma"] == 2.0
  with pytest.raises(InputError, match="has the ratio 'tokens'; use one of token, sequence"):
    made.hparams(ALGORITHMS["grpo"], "my_losses:misnamed")


def test_another_module_of_the_same_name_is_refused(losses):
  config_of(losses, "algorithm.loss=my_losses:same_as_dpo")
  (losses / "other").mkdir()
  for name in ("my_losses.py", "mine.py"):
    (losses / "other" / name).write_text((losses / name).read_text())
  with pytest.raises(InputError, match="was imported as my_losses before"):
    config_of(losses / "other", "algorithm.loss=my_losses:same_as_dpo")


def test_equal_terms_are_one_program(losses):
  sys.path.append(str(losses))
  objective.load(["my_losses:reinforce"])
  assert made.objectives(ALGORITHMS["grpo"], "my_losses:reinforce") == made.objectives(
    ALGORITHMS["grpo"], "my_losses:reinforce"
  )


def claim_rounds(folder, config):
  rounds.claim(epath.Path(folder), Plan(config, settings("regex"), Request(n=2)))


def claim_sweep(folder, config):
  sweep._claim(epath.Path(folder), [sweep.Member({}, config)])


@pytest.mark.parametrize(("claim", "file"), [(claim_rounds, "plan.json"), (claim_sweep, "members.json")])
def test_a_stored_plan_or_sweep_imports_nothing(losses, claim, file):
  config = config_of(losses)
  claim(losses / "work", config)
  path = losses / "work" / file
  record = json.loads(path.read_text())
  del record["sha256"]  # as whoever changes it does
  stored = record["config"] if "config" in record else record["members"][0]["config"]
  stored["algorithm"] = {"name": "preference", "loss": "my_later_losses:late"}
  path.write_text(json.dumps(record))
  sys.path.append(str(losses))
  with pytest.raises(InputError, match=r"another sweep|other rounds"):
    claim(losses / "work", config)
  assert "my_later_losses" not in sys.modules


@pytest.mark.slow
def test_a_sweep_of_several_programs_finds_the_loss_beside_the_config(losses):
  axes = ["algorithm.loss=my_losses:same_as_dpo,dpo"]
  overrides = ["run.steps=2", f"data.cache={losses}", "run.compile_cache="]
  members = sweep.expand(f"{losses / 'mine.py'}:smoke", axes, overrides)
  result = sweep.sweep(members, losses / "sweep")
  numbers = [member["metrics"]["eval/loss"] for member in result["members"]]
  assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
