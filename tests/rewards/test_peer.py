"""The two sides of a test in a cell."""

import builtins
import sys

import pytest

from alignjax.rewards.cell.peer import _Streams


@pytest.mark.parametrize("replaced", [{"stdin": 3}, {"stdin": "text", "input": len}])
def test_no_stream_stays_replaced(replaced):
  before = sys.stdout, sys.stdin, builtins.input
  streams = _Streams({"capture": True} | replaced)
  if "input" in replaced:
    with streams:
      print("said")
      assert (sys.stdin.read(), builtins.input) == ("text", len)
    assert streams.printed() == "said\n"
  else:
    with pytest.raises(TypeError), streams:
      pytest.fail("it has begun")
  assert (sys.stdout, sys.stdin, builtins.input) == before
