"""Rewards that a process of their own has to hold, by what the completion says."""

import os
import re
import time


def short(prompts, completions, token_ids, columns):
  """Minus the number of tokens."""
  return [-float(len(ids)) for ids in token_ids]


short.facts = {"size": 3}


def score(prompts, completions, token_ids, columns):
  """The length of the column's entry, unless the completion asks for trouble."""
  (completion,) = completions
  if completion == "raise":
    raise ValueError("asked to")
  if completion == "leave":
    raise SystemExit(3)
  if completion == "interrupt":
    raise KeyboardInterrupt
  if completion == "local":
    return [lambda: 0]
  if completion == "sleep":
    time.sleep(60)
  if completion == "regex":  # holds Python's lock for longer than anybody waits
    re.search(r"(a+)+$", "a" * 60 + "b")
  if completion == "exit":
    os._exit(7)
  if completion == "memory":
    return [float(len(bytearray(1 << 34)))]
  if completion == "pid":
    return [float(os.getpid())]
  return [float(len(columns["answer"][0]))]
