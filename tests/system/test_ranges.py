"""Every number that a user can set has a range beside its definition, and a value outside is one line."""

import argparse
import dataclasses
import json
import math
from typing import Annotated

import numpy as np
import pytest

from alignjax.algorithms import ALGORITHMS, rollout
from alignjax.commands import arguments, sweep
from alignjax.commands.best_of import Request
from alignjax.errors import InputError
from alignjax.runs.config import SECTIONS, load_config, resolve
from alignjax.runs.workdir import read_config
from alignjax.sampling.generate import sample_text
from alignjax.system import ranges
from alignjax.system.ranges import Count, Finite, NonNegative, Positive, Range, Seed, Share
from alignjax.training.optim import OptimizerConfig
from tests import made, smoke

TO_BE_SET = {("run", "steps")}  # its default, 0, is refused
# Options that bring hyper-parameters of their own, one at a time.
BRING = {
  "preference": [{"divergence": "alpha"}],
  "grpo": [{"correction": "token_truncate"}],
  "ppo": [{"correction": "token_truncate"}],
  "online_preference": [{"divergence": "alpha"}, {"second": "reference"}],
}


def test_the_types_of_a_record_are_found_once():
  assert ranges.kinds_of(OptimizerConfig) is ranges.kinds_of(OptimizerConfig)
  with pytest.raises(TypeError):
    ranges.kinds_of(OptimizerConfig)["learning_rate"] = Count


def is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


def of_sections():
  for section, cls in SECTIONS.items():
    for field in dataclasses.fields(cls):
      if is_number(field.default):
        yield section, field.name, field.default, ranges.kinds_of(cls).get(field.name)


def of_algorithms():
  """(algorithm section, key, default, types) of every number of every algorithm, with each of its losses."""
  for name, module in ALGORITHMS.items():
    for loss in module.losses:
      for options in ({}, *BRING.get(name, [])):
        if loss and "divergence" in options and loss not in ("dpo",):
          continue
        declared = list(module.ranges(loss))
        found = made.defaults(module) | made.hparams(module, loss, **options)
        for key, default in found.items():
          if is_number(default):
            kinds = [kind for other, kind in declared if other == key]
            yield {"name": name, "loss": loss, **options}, key, default, kinds


def outside(kind):
  """Values that the type does not hold: what is no number, and what lies just beside the interval."""
  base, found = kind.__origin__, next(part for part in kind.__metadata__ if isinstance(part, Range))
  if base is int:
    yield from (value for value in (found.low - 1, found.high + 1, 2**40) if value not in found.also)
    return
  yield from (math.nan, math.inf, -math.inf, 1e39, -1e39)
  for end, is_open, away in ((found.low, found.open_low, -math.inf), (found.high, found.open_high, math.inf)):
    if abs(end) < ranges.LARGEST:
      yield end if is_open else float(np.nextafter(end, away))
      yield end + math.copysign(0.01, away)


def refuses(raw, section, key):
  with pytest.raises(InputError) as caught:
    resolve(raw)
  assert str(caught.value).startswith(f"{section}.{key}="), caught.value
  assert "must be" in str(caught.value)
  assert "\n" not in str(caught.value)


SECTION_NUMBERS = list(of_sections())
ALGORITHM_NUMBERS = list(of_algorithms())


@pytest.mark.parametrize(("section", "key", "default", "kind"), SECTION_NUMBERS, ids=lambda x: str(x)[:20])
def test_every_number_of_a_section_has_a_range(section, key, default, kind):
  assert kind, f"declare {section}.{key} with a type of alignjax.system.ranges"
  minimal = {"algorithm": {"name": "sft"}, "run": {"steps": 1}}
  if (section, key) not in TO_BE_SET:
    ranges.check(key, default, kind)
  for value in outside(kind):
    refuses(minimal | {section: minimal.get(section, {}) | {key: value}}, section, key)


def test_every_number_of_every_algorithm_has_a_range():
  assert len(ALGORITHM_NUMBERS) > 300
  for algorithm, key, default, kinds in ALGORITHM_NUMBERS:
    assert kinds, f"declare {key} of {algorithm} with a type of alignjax.system.ranges"
    for kind in kinds:
      ranges.check(key, default, kind)
      for value in outside(kind):
        refuses({"algorithm": algorithm | {key: value}, "run": {"steps": 1}}, "algorithm", key)


def test_every_range_is_of_something():
  for name, module in ALGORITHMS.items():
    keys = {key for algorithm, key, _, _ in ALGORITHM_NUMBERS if algorithm["name"] == name}
    assert keys >= getattr(module, "RANGES", {}).keys(), name


@pytest.mark.parametrize(
  ("config", "override", "said"),
  [
    ("dpo", "optimizer.clip_norm=-1", "optimizer.clip_norm=-1.0: must be at least 0 (0 does not clip)"),
    ("dpo", "optimizer.learning_rate=-3e-3", "optimizer.learning_rate=-0.003: must be at least 0"),
    ("dpo", "optimizer.weight_decay=-50", "optimizer.weight_decay=-50.0: must be at least 0"),
    ("dpo", "optimizer.final_scale=5", "optimizer.final_scale=5.0: must be at least 0 and at most 1"),
    ("dpo", "optimizer.b2=1", "optimizer.b2=1.0: must be -1 or at least 0 and less than 1"),
    ("dpo", "optimizer.eps=nan", "optimizer.eps=nan: must be finite, -1 or more than 0"),
    ("dpo", "run.seed=-1", "run.seed=-1: must be at least 0 and at most 4294967295"),
    ("dpo", "run.steps=9999999999", "run.steps=9999999999: must be at most 2147483647"),
    ("dpo", "mesh.fsdp=0", "mesh.fsdp=0: must be -1 or at least 1 (-1 takes the devices that remain)"),
    ("dpo", "algorithm.beta=0", "algorithm.beta=0.0: must be more than 0"),
    ("dpo", "algorithm.beta=1e-50", "algorithm.beta=1e-50: must be more than 0 in float32"),
    ("dpo", "algorithm.loss=dpo:nan+sft", "algorithm.loss='dpo:nan+sft': the weight of dpo=nan: must be finite"),
    ("dpo", "algorithm.loss=dpo:-1+sft", "the weight of dpo=-1.0: must be at least 0"),
    ("dpo", "algorithm.loss=dpo:0", "nothing to learn from"),
    ("ipo", "algorithm.beta=0", "algorithm.beta=0.0: must be more than 0"),
    ("grpo", "algorithm.temperature=0", "algorithm.temperature=0.0: must be more than 0 (0, the likeliest token"),
    ("gkd", "algorithm.beta=1.5", "algorithm.beta=1.5: must be at least 0 and at most 1"),
    ("ppo", "algorithm.kl_coef=-0.1", "algorithm.kl_coef=-0.1: must be at least 0"),
  ],
)
def test_a_number_out_of_range_is_refused_wherever_it_comes_from(config, override, said, tmp_path):
  path = f"{smoke.CONFIGS}/{config}.py:smoke"
  with pytest.raises(InputError) as caught:
    load_config(path, [override])
  assert said in str(caught.value)
  with pytest.raises(InputError):
    sweep.expand(path, [override])
  key, _, text = override.partition("=")
  section, name = key.split(".")
  good = load_config(path)
  kind = type(good.to_dict()[section][name])
  with pytest.raises(InputError):
    good.replace({key: kind(text)})
  stored = good.to_dict()
  stored[section][name] = kind(text)
  (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
  with pytest.raises(InputError) as caught:
    read_config(tmp_path)
  assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
  assert said in str(caught.value)


def test_what_is_meant_stays_legal():
  values = {
    "preference": {"loss": "simpo", "gamma": 0.0, "label_smoothing": 0.49},
    "unpaired": {"desirable_weight": 0.0},
    "distillation": {"loss": "jsd", "beta": 1.0},
    "nash_md": {"beta": 0.0},
    "grpo": {"rewards": "length:-0.5", "kl_coef": 0.0, "delta": 0.0},
  }
  for name, own in values.items():
    resolve(
      {"algorithm": {"name": name} | own, "run": {"steps": 1, "seed": 2**32 - 1}, "mesh": {"data": -1, "fsdp": 1}}
    )


def test_a_reward_of_a_weight_that_is_no_number_is_refused():
  grpo = smoke.config("grpo")
  with pytest.raises(InputError, match="the weight of reward_model=nan: must be finite"):
    rollout.weights(dataclasses.replace(grpo.options, rewards="reward_model:nan+length"))


@pytest.mark.parametrize(
  ("value", "kind", "said"),
  [
    pytest.param(10**5000, Count, "x=a number of more than 4983 digits: must be at most 2147483647", id="digits"),
    (True, Count, "x=True: must be a whole number, at least 1"),
    (1.5, Count, "x=1.5: must be a whole number, at least 1"),
    ("2", Share, "x='2': must be a number, at least 0 and at most 1"),
    (None, Finite, "x=None: must be a number, finite"),
    (1 - 1e-12, Annotated[float, Range(0, 1, open_high=True)], "must be at least 0 and less than 1"),
    (-1, Annotated[NonNegative, "0 is none"], "x=-1: must be at least 0 (0 is none)"),
  ],
)
def test_the_line_names_value_and_range(value, kind, said):
  with pytest.raises(InputError) as caught:
    ranges.check("x", value, kind)
  assert said in str(caught.value)
  assert len(str(caught.value)) < 120


def test_a_config_made_in_python_is_checked_too():
  config = smoke.config("dpo")
  with pytest.raises(InputError, match=r"algorithm\.beta=nan: must be finite, more than 0"):
    dataclasses.replace(config, hparams=config.hparams | {"beta": math.nan})


def test_numpy_numbers_are_numbers():
  ranges.check("x", np.float32(0.5), Positive)
  ranges.check("x", np.int64(3), Seed)


def test_a_section_made_in_python_is_checked_too():
  with pytest.raises(InputError, match=r"optimizer\.b1=1\.0: must be"):
    OptimizerConfig(b1=1.0)
  with pytest.raises(InputError, match=r"optimizer\.clip_norm=-1\.0"):
    dataclasses.replace(OptimizerConfig(), clip_norm=-1.0)


def parsers(parser):
  yield parser
  for action in parser._actions:
    if isinstance(action, argparse._SubParsersAction):
      for child in action.choices.values():
        yield from parsers(child)


def test_every_number_of_the_command_line_has_a_range():
  found = [action for parser in parsers(arguments.make_parser()) for action in parser._actions]
  flags = [action for action in found if isinstance(action, arguments.Number)]
  assert len(flags) > 30
  assert not [action.dest for action in found if action.type in (int, float)]
  for action in flags:
    if action.default is not None:
      ranges.check(action.dest, action.default, action.kind)
    for value in (*outside(action.kind), "much"):
      with pytest.raises(InputError, match="must be"):
        ranges.read(action.option_strings[0], action.kind, str(value))


def test_a_flag_out_of_range_is_one_line():
  with pytest.raises(InputError, match=r"^--seed=-1: must be at least 0"):
    arguments.parse(["quickstart", "--workdir", "w", "--seed", "-1"])
  with pytest.raises(InputError, match=r"^--temperature=nan: must be finite"):
    arguments.parse(["generate", "--workdir", "w", "--prompt", "a", "--temperature", "nan"])
  assert arguments.parse(["generate", "--workdir", "w", "--prompt", "a", "--temperature", "0"]).temperature == 0


def test_greedy_completions_of_one_prompt_are_refused():
  Request(n=1, temperature=0.0).check()
  with pytest.raises(InputError, match=r"temperature=0 with n=2: a prompt's completions would be the same"):
    Request(n=2, temperature=0.0).check()
  with pytest.raises(InputError, match=r"missing_eos_penalty=nan"):
    Request(missing_eos_penalty=math.nan).check()


@pytest.mark.parametrize("option", [{"temperature": math.nan}, {"top_p": 0.0}, {"top_k": -1}, {"batch_size": 2.5}])
def test_options_of_a_sampler_are_checked(option):
  with pytest.raises(InputError, match=rf"{next(iter(option))}=.*: must be"):
    sample_text(None, None, None, [[1]], key=None, **({"max_new_tokens": 4} | option))
