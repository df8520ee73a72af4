"""The Linen and the NNX module of docs/flax.md train and sample as our decoder does; a wrong one costs one line."""

import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from alignjax.commands.export import export
from alignjax.data.tokenizer import load_tokenizer
from alignjax.errors import InputError
from alignjax.losses.logps import next_token_logps
from alignjax.losses.support import Support
from alignjax.model import Model, ModelConfig, build, critic, lora
from alignjax.model import check as laws
from alignjax.model.flax import params_of, wrap
from alignjax.runs.build import with_sizes
from alignjax.runs.new_run import begin
from alignjax.runs.run import load, sample
from alignjax.runs.trust import trusting
from alignjax.sampling.generate import make_generate
from alignjax.sampling.queue import make_generate_queue
from alignjax.system import sharding
from alignjax.train import fit
from tests import smoke

pytestmark = pytest.mark.filterwarnings("ignore:no parameter of the module has an axis")
PAGE = (smoke.ROOT / "docs" / "flax.md").read_text()
FILES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
MODULES = ("my_linen", "my_nnx")
FEW = ("my_nnx", pytest.param("my_linen", marks=pytest.mark.long))  # for whole runs
STEPS = 30
PROMPTS = ["What is 12 + 5?", "Who has the red ball?", "Hi"]
_FOLDER = tempfile.TemporaryDirectory(prefix="alignjax-flax-")


@pytest.fixture(autouse=True, scope="module")
def importable():
  """The page's modules, as files that a config can name."""
  for name in MODULES:
    (Path(_FOLDER.name) / f"{name}.py").write_text(FILES[name])
  sys.path.insert(0, _FOLDER.name)
  importlib.invalidate_caches()
  yield
  sys.path.remove(_FOLDER.name)


def config(module, name="dpo", **overrides):
  settings = {"optimizer__learning_rate": 1e-3, "optimizer__schedule": "constant"} | overrides
  return smoke.config(name, model__module=f"{module}:build", **settings)


def longer(module):
  """A DPO run of an epoch and a half."""
  return config(module, run__steps=STEPS, run__save_every=STEPS // 2, run__eval_every=0)


@functools.cache
def finished(module, name="dpo"):
  workdir = Path(_FOLDER.name) / f"{module}-{name}"
  return workdir, fit(longer(module) if name == "dpo" else config(module, name), workdir)


@functools.cache
def begun(module):
  """The directory of a run of it at step 0, which trained nothing."""
  workdir = Path(_FOLDER.name) / f"{module}-begun"
  begin(config(module), params_of(pretrained(module)), workdir)
  return workdir


@functools.cache
def tiny(module) -> Model:
  return build.make(ModelConfig(vocab=96, layers=1, embed=32, heads=4, module=f"{module}:build"))


def forward(model, mesh, inputs):
  with jax.set_mesh(mesh):
    shardings = jax.tree.map(lambda x: x.sharding, model.abstract(mesh))
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    states, _ = jax.jit(model.forward)(params, *(sharding.to_mesh({"x": x}, mesh).rows["x"] for x in inputs))
    return jax.device_get(states)


@pytest.mark.parametrize("module", FEW)
@pytest.mark.slow
def test_dpo_begins_at_log_2_and_the_loss_falls(module):
  losses = smoke.losses(finished(module)[0])
  assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
  assert len(losses) == STEPS
  assert np.mean(losses[-8:]) < np.log(2) - 0.2


@pytest.mark.parametrize("module", FEW)
@pytest.mark.long
def test_interrupted_run_ends_as_the_uninterrupted(module, tmp_path):
  smoke.interrupt(longer(module), tmp_path / "run", STEPS - 3)
  assert (tmp_path / "run" / "checkpoints" / str(STEPS // 2)).is_dir()
  fit(longer(module), tmp_path / "run")
  assert smoke.arrays(tmp_path / "run", STEPS) == smoke.arrays(finished(module)[0], STEPS)


@pytest.mark.parametrize("module", FEW)
@pytest.mark.slow
def test_sampled_log_probs_are_those_of_a_rescoring(module):
  run = load(finished(module)[0], trust_code=[f"{module}:build"])
  drawn = [completion for (completion,) in sample(run, PROMPTS, max_new_tokens=8)]
  support = Support(excluded=run.tokenizer.pad_id)
  for prompt, completion in zip(PROMPTS, drawn, strict=True):
    ids = run.tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    tokens = np.array([[*ids, *completion.tokens]], np.int32)
    hidden, _ = run.model.forward(run.params, tokens, np.ones_like(tokens), np.arange(tokens.shape[1])[None])
    logps = next_token_logps(hidden, run.model.unembedding(run.params), tokens, support=support)[0]
    np.testing.assert_allclose(logps[-len(completion.tokens) :], completion.logps, atol=1e-4)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.slow
def test_a_queue_gives_the_completions_of_one_batch(module):
  model, rng = tiny(module), np.random.default_rng(0)
  lengths = np.array([5, 2, 0, 7, 3, 6], np.int32)
  prompts = np.where(np.arange(7) >= 7 - lengths[:, None], rng.integers(1, 96, (6, 7)), 0).astype(np.int32)
  params = model.init(jax.random.key(1))
  numbers = np.arange(6, dtype=np.int32)
  options = dict(key=jax.random.key(2), prompt_ids=numbers, sample_ids=0 * numbers, stop_id=3, pad_id=0)
  whole = make_generate(model, 6)(params, prompts, lengths, **options)
  queued, _ = make_generate_queue(model, 6, slots=2, refill=1)(params, prompts, lengths, **options)
  np.testing.assert_array_equal(queued.tokens, whole.tokens)
  np.testing.assert_allclose(queued.logps, whole.logps, atol=1e-5)
  assert whole.lengths[2] == 0 < whole.lengths[1]


@pytest.mark.parametrize("module", MODULES)
def test_states_are_those_of_one_device_on_any_mesh(module, mesh, one_device, preference_batch):
  inputs = [preference_batch[name] for name in ("tokens", "segment_ids", "positions")]
  alone = forward(tiny(module), one_device, inputs)
  np.testing.assert_allclose(forward(tiny(module), mesh, inputs), alone, atol=2e-5)


@pytest.mark.parametrize("module", MODULES)
def test_parameters_lie_where_their_axes_say(module):
  mesh = sharding.make_mesh(2, 2, 2)
  layouts = {x.sharding.spec for x in jax.tree.leaves(tiny(module).abstract(mesh))}
  assert {sharding.spec("vocab", "embed"), sharding.spec("embed", "mlp"), sharding.spec("mlp", "embed")} <= layouts


@pytest.mark.parametrize("module", MODULES)
def test_weight_draws_what_init_draws(module):
  model = tiny(module)
  params = jax.tree.leaves(model.init(jax.random.key(0)))
  weights = jax.tree.leaves(model.weights(), is_leaf=lambda node: hasattr(node, "axes"))
  for weight, array in zip(weights, params, strict=True):
    np.testing.assert_array_equal(weight.init(jax.random.key(0), weight.shape, weight.dtype), array)
  assert model.num_params() == sum(x.size for x in params)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", critic.KINDS)
def test_critic_has_a_trunk_of_the_module_or_a_head_on_it(module, kind):
  model = critic.attach(tiny(module), kind)
  params = critic.start(kind, model.init(jax.random.key(0)), tiny(module).init(jax.random.key(1)))
  assert set(params["value"]) == ({"score"} if kind == "shared" else {"module", "score"})
  batch = dict(zip(("tokens", "segment_ids", "positions"), np.ones((3, 2, 5), np.int32), strict=True))
  hidden, _ = model.forward(params, *batch.values())
  assert critic.values(model, params, batch, hidden).shape == (2, 5)


@pytest.mark.slow
def test_reward_model_has_a_head_on_the_module():
  _, run = finished("my_nnx", "reward")
  assert set(run.params) == {"module", "score"}
  assert run.metrics["eval/loss"] < np.log(2) - 1e-3


def test_module_decides_embed_and_dtype_and_the_arrays_theirs():
  module = Faulty(dtype=jnp.bfloat16)
  model = wrap(module, ModelConfig(embed=999), "words/embedding")
  assert (model.config.vocab, model.config.embed, model.config.dtype) == (16, 8, "bfloat16")
  assert {w.dtype for w in jax.tree.leaves(model.weights(), is_leaf=lambda node: hasattr(node, "axes"))} == {"float32"}


def test_axes_of_a_function_go_before_those_of_the_module():
  model = wrap(Faulty(), ModelConfig(), "words/embedding", axes=lambda path, shape: ("vocab", None)[: len(shape)])
  assert model.weights()["module"]["words"]["embedding"].axes == ("vocab", None)


def test_module_without_axes_says_that_it_is_replicated():
  with pytest.warns(UserWarning, match="no parameter of the module has an axis"):
    wrap(Faulty(), ModelConfig(), "words/embedding")


class Faulty(nn.Module):
  """A mean over what a token sees, and what can go wrong with that."""

  fault: str = ""
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens, segment_ids, positions):
    places = jnp.arange(tokens.shape[1])[None] if self.fault == "columns" else positions
    words = nn.Embed(16, 8, name="words", dtype=self.dtype)
    x = words(tokens) + nn.Embed(32, 8, name="places", dtype=self.dtype)(places)
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = jnp.ones_like(mask) if self.fault == "segments" else mask
    mask = mask if self.fault == "future" else mask & jnp.tri(tokens.shape[1], dtype=bool)
    if self.fault == "infinite":
      mask = mask & (segment_ids > 0)[:, None, :]
    share = jax.nn.softmax(jnp.where(mask, 0.0, -jnp.inf))
    x = x + jnp.einsum("btc,bcd->btd", share.astype(x.dtype), x)
    if self.fault == "state":
      self.variable("batch_stats", "mean", jnp.zeros, ())
    if self.fault == "error":
      raise ZeroDivisionError("by nought")
    return {"logits": words.attend(x), "tuple": (x, None)}.get(self.fault, x)


@pytest.mark.parametrize(
  ("fault", "said"),
  [
    ("logits", r"returns \[1, 8, 16\] .* \[V, D\] = \[16, 8\]; it must return the hidden states"),
    ("tuple", "returns a tuple"),
    ("state", "has variables of 'batch_stats'"),
    ("error", "ZeroDivisionError: by nought"),
  ],
)
def test_module_that_does_not_fit_is_refused(fault, said):
  with pytest.raises(InputError, match=said):
    wrap(Faulty(fault), ModelConfig(), "words/embedding")


@pytest.mark.parametrize(
  ("fault", "said"),
  [
    ("", ""),
    ("future", "changes with a later token"),
    ("segments", "changes with another segment"),
    ("columns", "change with the padding before it"),
    ("infinite", "padding are not finite"),
  ],
)
def test_module_that_breaks_a_law_is_found(fault, said):
  model = wrap(Faulty(fault), ModelConfig(), "words/embedding")
  check = lambda: laws.check(model, model.init(jax.random.key(0)))
  if said:
    with pytest.raises(InputError, match=said):
      check()
  else:
    check()


class Stateful(nnx.Module):
  def __init__(self, rngs):
    self.words = nnx.Embed(16, 8, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, tokens, segment_ids, positions):
    return self.words(tokens)


def wrong(module=Faulty(), vocab=0, unembedding="words/embedding", axes=None):  # noqa: B008
  return wrap(module, ModelConfig(vocab=vocab), unembedding, axes)


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ({"unembedding": "x"}, "no parameter 'x' to unembed with; it has places/embedding, words/embedding"),
    ({"vocab": 20}, "unembedding has 16 rows, but the vocabulary is 20; take that many"),
    ({"unembedding": lambda params: 3}, r"unembedding is \[\]; it must be one matrix"),
    ({"unembedding": lambda params: params["head"]}, "KeyError: 'head'"),
    ({"axes": lambda path, shape: ("model", None)}, "has an axis 'model'; they are batch, layers, embed"),
    ({"axes": lambda path, shape: ()}, r"has axes \(\); give one for each dimension"),
    ({"module": Stateful}, "has 'dropout/rngs/.*', a Rng.*; a model has parameters"),
    ({"module": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, "a Linear is no module to take; .* nnx.Rngs -> one of NNX"),
    ({"module": 3}, "a int is no module"),
  ],
)
def test_wrong_argument_is_named(arguments, said):
  with pytest.raises(InputError, match=said):
    wrong(**arguments)


def fails(config):
  raise ZeroDivisionError("by nought")


def other_vocabulary(config):
  return wrap(Faulty(), ModelConfig(), "words/embedding", lambda path, shape: ("vocab", None))


@pytest.mark.parametrize(
  ("module", "said"),
  [
    ("absent:build", "No module named 'absent'; give module:function, with the module's folder in PYTHONPATH"),
    ("my_linen:absent", "has no attribute 'absent'"),
    ("my_linen", "has no attribute ''"),
    (f"{__name__}:PROMPTS", "'list' object is not callable"),
    (f"{__name__}:fails", "ZeroDivisionError: by nought; it must take a ModelConfig"),
    ("builtins:repr", "returns a str; return a Model"),
    (f"{__name__}:other_vocabulary", "returns a model of another config"),
  ],
)
def test_function_that_makes_no_model_is_named(module, said):
  with pytest.raises(InputError, match=rf"model\.module={re.escape(module)}: .*{re.escape(said)}"):
    build.make(ModelConfig(vocab=96, module=module))


def test_run_of_a_broken_module_leaves_no_file(tmp_path):
  broken = smoke.config("dpo", model__module="absent:build")
  with pytest.raises(InputError, match="absent"):
    fit(broken, tmp_path / "run")
  assert not smoke.files(tmp_path)


def test_lora_is_refused():
  with pytest.raises(InputError, match=r"lora\.rank=4: a model of model\.module takes no factors; use 0"):
    lora.adapt(tiny("my_linen"), lora.LoraConfig(rank=4))


def pretrained(module):
  """What a user has: a module with parameters, as wide as the smoke runs'."""
  words = load_tokenizer(smoke.config("sft").data.tokenizer).vocab_size
  file = importlib.import_module(module)
  if module == "my_nnx":
    with nnx.use_eager_sharding(False):  # there is no mesh yet
      return file.LM(words, 64, 4, 2, rngs=nnx.Rngs(5))
  return file.LM(words, 64, 4, 2).init(jax.random.key(5), *np.ones((3, 1, 4), np.int32))


@pytest.mark.parametrize("module", FEW)
@pytest.mark.long
def test_run_begins_with_parameters_of_ones_own(module, tmp_path):
  params = params_of(pretrained(module))
  begin(config(module), params, tmp_path / "pretrained")
  started = load(tmp_path / "pretrained", trust_code=True)
  assert (started.step, started.config.algorithm.name) == (0, "sft")
  assert jax.tree.structure(started.params) == jax.tree.structure(params)
  for found, given in zip(jax.tree.leaves(started.params), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(found, given)
  once = config(module, run__steps=2, run__init=str(tmp_path / "pretrained"), optimizer__learning_rate=1e-9)
  trained = fit(once, tmp_path / "dpo").params
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), trained, params)


def test_parameters_of_another_model_are_named(tmp_path):
  params = params_of(pretrained("my_linen"))["module"]
  table = params["words"]["embedding"]
  for words, said in (
    ({"embedding": table[:, 1:]}, r"module/words/embedding: \[512, 64\] in the model, \[512, 63\] as given"),
    ({}, r"module/words/embedding: \[512, 64\] in the model, not there as given"),
    ({"embedding": table, "bias": np.ones(3)}, r"module/words/bias: not there in the model, \[3\] as given"),
  ):
    with pytest.raises(InputError, match=said):
      begin(config("my_linen"), {"module": params | {"words": words}}, tmp_path / "run")
    assert not smoke.files(tmp_path)


def test_run_that_starts_from_one_takes_its_module():
  init = smoke.config("dpo", run__init=str(begun("my_nnx")))
  with trusting(True):
    started = with_sizes(init, Path(_FOLDER.name) / "absent")
  assert started.model.module == "my_nnx:build"


def test_hugging_faces_layout_is_refused_both_ways(tmp_path):
  said = r"model\.module=my_nnx:build: Hugging Face has no layout for a module"
  with pytest.raises(InputError, match=said), trusting(True):
    export(begun("my_nnx"), tmp_path / "out")
  folder = smoke.ROOT / "tests" / "model" / "huggingface" / "families" / "llama"
  with pytest.raises(InputError, match=r"are not those of model\.module=my_linen:build; drop one"):
    with_sizes(config("my_linen", run__init=str(folder)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_the_page_runs_as_written(module, tmp_path):
  for name, text in FILES.items():
    (tmp_path / f"{name}.py").write_text(text.replace("my_linen", module))
  environment = os.environ | {"PYTHONPATH": f"{smoke.ROOT}:{tmp_path}", "HOME": str(tmp_path)}
  command = [sys.executable, "use.py"]
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "runs" / "mine" / "checkpoints").is_dir()


# What differs between the modules is below the algorithms: each of these trains one of them.
@pytest.mark.long
@pytest.mark.parametrize(
  ("name", "module"),
  [
    ("sft", "my_nnx"),
    pytest.param("ppo", "my_linen", marks=pytest.mark.long),
    pytest.param("rloo", "my_nnx", marks=pytest.mark.long),
    ("kto", "my_linen"),
    ("gkd", "my_nnx"),
    ("online_dpo", "my_linen"),
  ],
)
def test_other_algorithms_train_it(module, name, tmp_path):
  _, run = finished(module, name)
  assert run.step == smoke.STEPS
  assert np.isfinite(run.metrics["loss"])
