"""A reward that runs generated code against unit tests. Off unless it is permitted."""

import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

from alignjax.errors import InputError
from alignjax.rewards.protocol import Entry, Reward, column, declaring
from alignjax.rewards.sandbox.sandbox import PARTS, Limits, Refused, run

SETTING = "ALIGNJAX_RUN_CODE"
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def code_tests(
  *,
  run_code: str = "",
  tests_column: str = "tests",
  code_credit: str = "all",
  code_wall_s: float = 10.0,
  code_cpu_s: int = 5,
  code_memory_mib: int = 512,
  code_isolation: str = "all",
) -> Reward:
  """Makes a reward: runs a completion's code and the record's tests in a sandbox; 1 if they pass, else 0.

  The code is the last fenced block (or all of the completion). The reward is 0 if the code is wrong, exits, hangs or
  needs too many resources. There is no reward if the sandbox fails, or a test of the record is not valid Python. The
  tests run in another process than the code, and call it. `sandbox.py` says what the sandbox defends against, and what
  not: read it before you permit a run. The share of the parts of isolation that this machine provides is logged as
  data/code_tests/isolation. Making it runs the sandbox once.

  Args:
    run_code: "1" or "strong" permits it if the machine isolates as `code_isolation` requires, "weak" on any machine,
      with the isolation that it provides; "" reads the environment variable ALIGNJAX_RUN_CODE.
    tests_column: Python as a string, or a list of strings, each a test; a record whose tests are empty has no reward.
    code_credit: "all": 1 if all tests pass; "share": the share that passes.
    code_wall_s: seconds.
    code_cpu_s: seconds.
    code_memory_mib: MiB, shared memory included.
    code_isolation: "all" parts of `sandbox.PARTS`, or those of "network,processes,files,user,calls,memory" that are
      required.

  Raises:
    InputError: it is not permitted, an option is unknown or too small, or the machine cannot isolate as required.
  """
  permitted = run_code or os.environ.get(SETTING, "")
  if permitted not in ("1", "strong", "weak"):
    raise InputError(
      "reward code_tests runs code that a model wrote, and is off: "
      f"read alignjax/rewards/sandbox/sandbox.py, then set {SETTING}=1"
    )
  if code_credit not in ("all", "share"):
    raise InputError(f"reward code_tests: code_credit is {code_credit!r}; use all or share")
  parts = _required_parts(code_isolation)
  for name, value, least in (
    ("code_wall_s", code_wall_s, 0.1),
    ("code_cpu_s", code_cpu_s, 1),
    ("code_memory_mib", code_memory_mib, 64),
  ):
    if not least <= value < math.inf:
      raise InputError(f"reward code_tests: {name} is {value}; give at least {least:g}")
  limits = Limits(wall_s=code_wall_s, cpu_s=code_cpu_s, memory_mib=code_memory_mib, isolation=parts)
  weak = permitted == "weak"
  try:
    reached = run("", [], limits, weak).isolation
  except Refused as error:
    raise InputError(
      f"reward code_tests: {error}; permit user namespaces, or set {SETTING}=weak in a virtual machine without network;"
      " code_isolation names the parts that are required"
    ) from error
  except RuntimeError as error:
    raise InputError(
      f"reward code_tests: {error}; try code_memory_mib above {code_memory_mib}, or another machine"
    ) from error

  print(f"reward code_tests: the kernel isolates {', '.join(reached) or 'nothing'}", flush=True)

  def score(completion: str, tests: str | list[str] | None) -> Entry:
    try:
      texts = _texts(tests)
      if not texts:
        return None
      outcome = run(extract(completion), texts, limits, weak)
      lost = [part for part in reached if part not in outcome.isolation]
      if lost:
        raise RuntimeError(f"the sandbox did not hold {', '.join(lost)} any more")
    except Exception as error:
      return error
    passed = outcome.passed
    if code_credit == "all":
      return float(all(passed))
    return sum(passed) / len(passed)

  def reward(prompts, completions, token_ids, columns):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
      return list(pool.map(score, completions, column(columns, tests_column)))

  return declaring(reward, needs=(tests_column,), facts={"isolation": len(reached) / len(PARTS)})


def _required_parts(code_isolation: str) -> tuple[str, ...]:
  """Returns the parts of `PARTS` that the option names."""
  if code_isolation == "all":
    return PARTS
  parts = tuple(filter(None, code_isolation.replace(" ", "").split(",")))
  unknown = [part for part in parts if part not in PARTS]
  if unknown:
    raise InputError(f"reward code_tests: code_isolation has {unknown[0]!r}; use all, or some of {','.join(PARTS)}")
  return parts


def _texts(tests: str | list[str] | None) -> list[str]:
  """Returns the tests of a record that are not empty."""
  texts = tests or []
  if isinstance(texts, str):
    texts = [texts]
  if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
    raise ValueError("the record's tests are neither a string nor a list of strings")
  return [text for text in texts if text.strip()]


def extract(completion: str) -> str:
  """Returns the last fenced block of Python in a completion; all of the completion if there is none."""
  blocks = _BLOCK.findall(completion)
  return blocks[-1] if blocks else completion
