"""Real clients, in an environment of their own without torch: the openai package, lm-eval and inspect_ai."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.losses.logps import next_token_logps
from alignjax.runs.run import sample
from alignjax.serving import votes
from alignjax.serving.app import Server
from alignjax.serving.served import Served
from benchmarks import environments
from tests import trl_environment
from tests.serving.conftest import CONTEXT, serving

pytestmark = pytest.mark.long  # an environment of 150 packages

TASK = """\
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {test: DATA}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
INSPECT = """\
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def sums():
  samples = [Sample(input=f"What is {i} + 1?", target=str(i + 1)) for i in range(4)]
  return Task(dataset=samples, solver=generate(max_tokens=8), scorer=match())
"""


@pytest.fixture(scope="module")
def python():
  return trl_environment.python("requirements-clients.txt")


def run_in(folder: Path, command: list[str], **variables: str) -> str:
  """The standard output of a command of the clients' environment."""
  own = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "INSPECT_LOG_DIR": str(folder / "logs")}
  env = os.environ | environments.SETTINGS | own | variables
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
  assert not done.returncode, (done.stdout + done.stderr)[-3000:]
  return done.stdout


def test_openai(python, url, run, tmp_path):
  told = json.loads(run_in(tmp_path, [python, str(Path(__file__).with_name("clients.py").resolve()), f"{url}/v1"]))
  expected = sample(run, ["Hi"], num=2, seed=3, max_new_tokens=8)[0]
  assert told["models"] == ["tiny"]
  assert told["texts"] == [completion.text for completion in expected]
  assert told["streamed"] == expected[0].text
  assert told["usage"] == len(expected[0].tokens)
  assert told["scored"] == [len(completion.tokens) for completion in expected]
  assert [text[0] for text in told["completed"]] == ["a", "b"]
  assert told["errors"] == {
    "field": ["BadRequestError", "frequency_penalty"],
    "model": ["NotFoundError", "model"],
  }


def test_lm_eval_reads_log_likelihoods_without_torch(python, url, run, tmp_path):
  documents = [
    {"question": f"What is {i} + {i + 1}?", "choices": [f" {2 * i + 1}", " a red ball"], "answer": 0} for i in range(4)
  ]
  (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(document)}\n" for document in documents))
  (tmp_path / "sums.yaml").write_text(TASK.replace("DATA", str(tmp_path / "sums.jsonl")))
  arguments = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=4,max_length={CONTEXT}"
  command = [python, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
  run_in(tmp_path, [*command, "--include_path", ".", "--tasks", "sums", "--output_path", "out", "--log_samples"])
  assert not list(Path(python).parents[1].glob("lib/python*/site-packages/torch"))
  (path,) = (tmp_path / "out").rglob("samples_sums_*.jsonl")
  for line in path.read_text().splitlines():
    row = json.loads(line)
    for choice, (((logp, is_greedy),),) in zip(row["doc"]["choices"], zip(row["resps"], strict=True), strict=True):
      expected, greedy = likelihood(run, row["doc"]["question"], choice)
      assert float(logp) == pytest.approx(expected, abs=1e-3)
      assert (str(is_greedy) == "True") == greedy


def likelihood(run, context, continuation):
  """The log-prob of a continuation in nats, and whether it is the greedy one, by a forward without a cache."""
  before = run.tokenizer.encode(context)
  ids = np.array([run.tokenizer.encode(context + continuation)] * 8)  # a row for each device
  with jax.set_mesh(run.mesh):
    ones = np.ones_like(ids)
    hidden, _ = run.model.forward(run.params, ids, ones, np.arange(ids.shape[1])[None] * ones)
    unembedding = run.model.unembedding(run.params)
    logps = next_token_logps(hidden, unembedding, ids)[0, len(before) :]
    best = np.argmax(np.asarray(hidden @ unembedding.T)[0, len(before) - 1 : -1], axis=-1)
  return float(logps.sum()), bool((best == ids[0, len(before) :]).all())


def test_inspect_ai(python, url, run, tmp_path):
  (tmp_path / "sums.py").write_text(INSPECT)
  inspect = str(Path(python).with_name("inspect"))
  command = [inspect, "eval", "sums.py", "--model", "openai-api/alignjax/tiny", "--seed", "3", "--log-format", "json"]
  variables = {"ALIGNJAX_BASE_URL": f"{url}/v1", "ALIGNJAX_API_KEY": "none"}
  run_in(tmp_path, [*command, "--display", "none", "--no-log-realtime"], **variables)
  (path,) = (tmp_path / "logs").glob("*.json")
  log = json.loads(path.read_text())
  assert log["status"] == "success"
  for row in log["samples"]:
    (expected,) = sample(run, [row["input"]], seed=3, max_new_tokens=8)[0]
    assert row["output"]["choices"][0]["message"]["content"] == expected.text


def test_the_page_in_a_browser(python, engine, run, tmp_path):
  chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
  if chromium is None:
    pytest.skip("no Chromium on this machine")
  models = {name: Served(name, "", engine) for name in ("tiny", "other")}
  server = Server(models, 40, kept=votes.Votes(str(tmp_path / "votes.jsonl")))
  with serving(server) as address:
    script = str(Path(__file__).with_name("page_client.py").resolve())
    told = json.loads(run_in(tmp_path, [python, script, address, chromium]))
  (expected,) = sample(run, ["Hi"], seed=3, max_new_tokens=8)[0]
  for seen in told.values():
    assert seen["answer"].split() == expected.text.split()
    assert "tiny" not in seen["blind"]
    assert "other" not in seen["blind"]
    assert sorted(head.split(": ")[1] for head in seen["shown"]) == ["other", "tiny"]
    assert seen["tags"] == "H3 P STRONG A BR UL LI LI PRE CODE"
    assert seen["links"] == ["https://example.com/"]
    assert not seen["hacked"]
    assert seen["fits"]
    assert not seen["errors"]
  assert told["light"]["ground"] == told["phone"]["ground"] != told["dark"]["ground"]
  for line in (tmp_path / "votes.jsonl").read_text().splitlines():
    vote = json.loads(line)
    assert vote["prompt"] == [{"role": "user", "content": "Hi"}]
    assert vote["completions"] == [expected.text] * 2
    assert (vote["verdict"], vote["strength"], vote["annotator"]) == ("second", 3, "Ann")
    assert sorted(vote["models"]) == ["other", "tiny"]
