"""Each kind of records, from its file to an evaluated run."""

import json

import pytest

from alignjax.evaluation.held_out import evaluate
from alignjax.train import fit
from tests import smoke


def pairs():
  return [json.loads(line) for line in (smoke.DATA / "preference.jsonl").read_text().splitlines()]


def triples():
  return [pair | {"reference": f"{pair['chosen']} Indeed."} for pair in pairs()]


def rankings():
  for pair in pairs():
    yield {
      "prompt": pair["prompt"],
      "responses": [pair["rejected"], pair["chosen"], "I do not know."],
      "rankings": [2, 1, 2],
    }


def answers():
  for pair in pairs():
    steps = pair["chosen"].split(". ") + pair["rejected"].split(". ")[-1:]
    yield {"prompt": pair["prompt"], "completions": steps, "labels": [*[True] * (len(steps) - 1), False]}


def labelled():
  for k, pair in enumerate(pairs()):
    yield {"prompt": pair["prompt"], "completion": pair[("chosen", "rejected")[k % 2]], "label": k % 2 == 0}


RUNS = {
  "triple": (triples, "preference", "tpo", "rewards/accuracies"),
  "ranked": (rankings, "reward", "plackett_luce", "rewards/accuracies"),
  "stepwise": (answers, "process_reward", "", "accuracy"),
  "mismatched": (labelled, "unpaired", "kto", "rewards/margins"),
  "unpaired": (labelled, "unpaired", "apo_zero_unpaired", "rewards/margins"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_on_records_of_each_kind(kind, tmp_path):
  records, algorithm, loss, metric = RUNS[kind]
  path = tmp_path / "records.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records()))
  config = smoke.config("dpo", algorithm__name=algorithm, algorithm__loss=loss, data__train=str(path), run__steps=2)
  config = config.replace({"data.row_length": 256})
  run = fit(config, tmp_path / "run")
  assert run.step == 2
  evaluated = evaluate(tmp_path / "run")
  assert evaluated[metric] == pytest.approx(run.metrics[f"eval/{metric}"], abs=1e-5)
  assert evaluated["loss"] == pytest.approx(run.metrics["eval/loss"], abs=1e-4)
