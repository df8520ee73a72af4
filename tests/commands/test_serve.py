"""`alignjax serve` opens runs by name, LoRA runs of one base hold it once, and it listens where it should."""

import os
import re
import signal
import subprocess
import sys

import httpx2 as httpx
import jax
import pytest

from alignjax import cli
from alignjax.commands.serve import Options, serve
from alignjax.errors import InputError
from alignjax.runs.run import load, sample
from alignjax.serving import models
from alignjax.serving.device import Device
from alignjax.serving.engine import Ask, Job
from tests import smoke


def test_an_address_that_others_reach_needs_a_key(monkeypatch):
  monkeypatch.delenv("ALIGNJAX_SERVE_KEY", raising=False)
  with pytest.raises(InputError, match=r"--host=0\.0\.0\.0: .*--api-key"):
    serve(["runs/none"], Options(host="0.0.0.0"))


def test_runs_are_named_by_their_folders_or_by_hand(tmp_path):
  assert models.named(["runs/a/", "b=runs/a"]) == {"a": "runs/a/", "b": "runs/a"}
  odd = tmp_path / "x=y"
  odd.mkdir()
  assert models.named([str(odd)]) == {"x=y": str(odd)}
  with pytest.raises(InputError, match="--workdir NAME=other/a"):
    models.named(["runs/a", "other/a"])


@pytest.mark.parametrize(
  ("arguments", "line"),
  [
    (["--workdir", "runs/none"], "runs/none"),
    (["--workdir", "runs/none", "--port", "70000"], "--port=70000"),
    (["--workdir", "runs/none", "--slots", "0"], "--slots=0"),
    (["--workdir", "a=runs/x", "--workdir", "b=runs/y", "--step", "3"], "--step=3"),
  ],
)
def test_what_cannot_be_served_is_one_line(arguments, line):
  with pytest.raises(InputError, match=line):
    cli.main(["serve", *arguments])


@pytest.mark.slow
def test_a_reward_model_is_refused():
  with pytest.raises(InputError, match="reward model"):
    models.open_models({"reward": str(smoke.finished("reward")[0])}, 8)


def test_a_context_that_does_not_fit_is_refused():
  with pytest.raises(InputError, match="--context=1000000"):
    models.open_models({"sft": str(smoke.finished("sft")[0])}, 8, context=10**6)


@pytest.mark.slow
def test_lora_runs_of_one_base_share_it_and_answer_as_alone(tmp_path):
  workdir = str(smoke.finished("dpo_lora")[0])
  served = models.open_models({"one": workdir, "two": workdir}, 8, 128)
  engines = {name: model.engine for name, model in served.items()}
  one, two = engines.values()
  _, held = one.run.model.split(one.run.params)
  for name in held:
    mine, others = (jax.tree.leaves(engine.run.params[name]) for engine in (one, two))
    assert all(a is b for a, b in zip(mine, others, strict=True))
    mine, others = (jax.tree.leaves(engine._params[name]) for engine in (one, two))
    assert all(a is b for a, b in zip(mine, others, strict=True))
  run = load(workdir)
  prompt = tuple(run.tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True))
  device = Device(engines, 10)
  got = {name: [] for name in engines}
  device.start()
  for name in engines:
    device.submit(name, [Job(Ask(prompt, 8, seed=3), got[name].append)])
  while not all(pieces and pieces[-1].last for pieces in got.values()):
    pass
  device.close()
  (expected,) = sample(run, ["Hi"], seed=3, max_new_tokens=8)[0]
  assert {pieces[-1].text for pieces in got.values()} == {expected.text}


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted():
  command = [sys.executable, "-m", "alignjax.cli", "serve", "--workdir", f"tiny={smoke.finished('sft')[0]}"]
  process = subprocess.Popen(
    [*command, "--port", "0", "--slots", "8", "--context", "96"], stdout=subprocess.PIPE, text=True, env=os.environ
  )
  try:
    url = next(found[0] for line in process.stdout if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()
    assert answer["usage"]["completion_tokens"] <= 3
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
  finally:
    process.kill()
