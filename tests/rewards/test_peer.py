"""The two sides of a test in a cell, whose modules are a program of their own."""

import builtins
import importlib
import sys

import pytest

from alignjax.rewards.sandbox import sandbox


@pytest.mark.parametrize("replaced", [{"stdin": 3}, {"stdin": "text", "input": len}])
def test_no_stream_stays_replaced(replaced, monkeypatch):
  monkeypatch.syspath_prepend(sandbox._PROGRAM)
  before = sys.stdout, sys.stdin, builtins.input
  streams = importlib.import_module("peer")._Streams({"capture": True} | replaced)
  if "input" in replaced:
    with streams:
      print("said")
      assert (sys.stdin.read(), builtins.input) == ("text", len)
    assert streams.printed() == "said\n"
  else:
    with pytest.raises(TypeError), streams:
      pytest.fail("it has begun")
  assert (sys.stdout, sys.stdin, builtins.input) == before
