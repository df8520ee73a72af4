"""What a run that goes on otherwise than it began says of its later numbers."""

import pytest

from alignjax.runs.config import resolve
from alignjax.runs.notes import continued
from tests import smoke

RAW = {"algorithm": {"name": "sft"}, "run": {"steps": 6}, "optimizer": {"learning_rate": 6e-4}}


def config(**overrides):
  return resolve(RAW).replace(smoke.dotted(overrides))


def lines(step, *, then, **overrides):
  old = config(**overrides).to_dict()
  return list(continued({"config": old}, config(**overrides, run__steps=then), {}, step))


def test_a_schedule_that_stretches_is_one_line_with_both_rates():
  assert lines(6, then=12) == [
    "run.steps 6 -> 12: the cosine schedule now ends at step 12; the learning rate was 4.02e-05 at step 6 and is "
    "0.0003 at step 7"
  ]
  (line,) = lines(3, then=12, optimizer__schedule="linear")
  assert line.endswith("was 0.0004 at step 3 and is 0.00045 at step 4, where it would have been 0.0003")


@pytest.mark.parametrize("same", [{"optimizer__schedule": "constant"}, {"optimizer__final_scale": 1.0}])
def test_a_rate_that_stays_is_not_spoken_of(same):
  assert lines(6, then=12, **same) == []
  assert lines(6, then=6) == []
  assert lines(6, then=4) == []  # complete: no step is taken


def test_what_changes_only_rounding_is_said_to():
  old = config().to_dict()
  (line,) = continued({"config": old}, config(optimizer__microbatches=2, mesh__tensor=2), {}, 3)
  assert line.startswith("goes on from step 3 with mesh.tensor 1 -> 2, optimizer.microbatches 1 -> 2: ")
  assert list(continued({}, config(), {}, 3)) == []  # a checkpoint of a version that kept no config
  assert list(continued({"config": old}, config(run__log_every=1, run__save_every=3), {}, 3)) == []


def test_a_loss_of_the_users_own_that_was_edited_is_said():
  files = {"losses": {"my_losses:f": "new"}}
  (line,) = continued({"config": {}, "losses": {"my_losses:f": "old"}}, config(), files, 3)
  assert line == "goes on from step 3 with another my_losses:f: its file has changed since"
  assert list(continued({"config": {}, **files}, config(), files, 3)) == []
