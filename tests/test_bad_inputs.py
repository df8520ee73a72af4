"""Bad inputs by the hundred: each costs one line that names the place, a status that is not 0, and nothing written."""

import pytest

from tests.bad_inputs import config
from tests.bad_inputs.harness import answer

SEED = 0


def cases(seed, count):
  """What a seed draws."""
  return [
    *config.values(seed, count),
    *config.mappings(seed, count // 2),
    *config.shapes(),
    *config.overrides(),
    *config.files(),
  ]


@pytest.mark.parametrize("case", cases(SEED, 60), ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line(case, tmp_path, capsys):
  if found := answer(case, tmp_path, capsys):
    pytest.fail(f"{case.name}: {found}", pytrace=False)
