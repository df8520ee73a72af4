"""Generated code for the tests of the sandbox: what tests may ask of it, and how it would forge a pass."""

# Code, and a test that it passes.
USES = {
  "plain values": (
    "def f(x): return [x, (x, {'a': {1, 2}}), 10**50, 1e308 * 10]",
    "assert f(1) == [1, (1, {'a': {1, 2}}), 10**50, float('inf')]",
  ),
  "values of the library": (
    """
import fractions, decimal, datetime, collections
N = collections.namedtuple('N', 'a b')
def f():
  numbers = fractions.Fraction(1, 3), decimal.Decimal('1.5'), datetime.date(2020, 1, 2)
  return *numbers, N(1, 2), collections.Counter('aab'), collections.defaultdict(int)
""",
    """
third, half, day, pair, counts, zeros = f()
assert third * 3 == 1 and str(half) == '1.5' and day.day == 2
assert pair.b == 2 and pair == (1, 2) and counts.most_common(1) == [('a', 2)] and zeros['z'] == 0
""",
  ),
  "objects": (
    """
class P:
  def __init__(self, x): self.x = x
  def __eq__(self, o): return self.x == o.x
  def __add__(self, o): return P(self.x + o.x)
  def __mul__(self, k): return P(self.x * k)
  def __iter__(self): return iter([self.x])
  def __contains__(self, k): return k == self.x
  def __repr__(self): return f'P({self.x})'
  def __len__(self): return 1
""",
    """
assert P(1) + P(2) == P(3) == P(1) * 3 and P(1) != P(2)
assert list(P(4)) == [4] and 4 in P(4) and 5 not in P(4)
assert repr(P(1)) == 'P(1)' and len(P(1)) == 1
assert isinstance(P(1), P) and not isinstance(1, P) and P(1) is not None
""",
  ),
  "subclasses of plain values": (
    """
class M(int):
  def twice(self): return 2 * self
def f(): return M(3)
""",
    "assert f() == 3 and f().twice() == 6 and f() - 1 == 2",
  ),
  "enumerations": (
    """
import enum
class C(enum.Enum):
  R = 1
def f(): return C.R
""",
    "assert f() is C.R and f() == C['R'] and f().value == 1",
  ),
  "functions of the tests": (
    "def f(g, x): return sorted(x, key=g)",
    "assert f(lambda v: -v, [1, 2]) == [2, 1] and f(str, [10, 9]) == [10, 9]",
  ),
  "objects of the tests": (
    """
def f(node):
  found = []
  while node:
    found.append(node.value)
    node.seen = True
    node = node.after
  return found
""",
    """
class Node:
  def __init__(self, value, after=None):
    self.value = value
    self.after = after
    self.seen = False
node = Node(1, Node(2))
assert f(node) == [1, 2] and node.after.seen is True
""",
  ),
  "threads": (
    """
import threading
def f(x):
  found = []
  worker = threading.Thread(target=found.append, args=(x,))
  worker.start()
  worker.join()
  return found
""",
    """
import concurrent.futures
with concurrent.futures.ThreadPoolExecutor(2) as pool:
  assert list(pool.map(f, range(50))) == [[i] for i in range(50)]
""",
  ),
  "generators": (
    """
def f():
  i = 0
  while True:
    yield i
    i += 1
""",
    "assert [v for v, _ in zip(f(), range(3))] == [0, 1, 2]",
  ),
  "coroutines": (
    """
import asyncio
async def f(x):
  await asyncio.sleep(0)
  return x
def g(x): return asyncio.run(f(x))
""",
    "assert __import__('asyncio').run(f(2)) == 2 == g(2)",
  ),
  "modules": (
    """
import math
def f(x): return math.sqrt(x)
""",
    "assert math.isclose(f(4), 2)",
  ),
  "changes in place": (
    """
def f(x): x.sort()
def g(m): m['a'][0] = 5
""",
    """
x, m = [2, 1], {'a': [0]}
f(x)
g(m)
assert x == [1, 2] and m == {'a': [5]}
""",
  ),
  "exceptions": (
    """
class E(ValueError):
  def __init__(self, code):
    super().__init__(f'code {code}')
    self.code = code
def f(x): raise E(x)
""",
    """
for kind in (E, ValueError):
  try:
    f(7)
    assert 0
  except kind as error:
    assert str(error) == 'code 7' and error.code == 7
""",
  ),
  "what is printed": (
    "def f(): print('hello')",
    """
import io, contextlib
out = io.StringIO()
with contextlib.redirect_stdout(out): f()
assert out.getvalue() == 'hello\\n'
""",
  ),
  "what is read": (
    "def f(): return int(input()) + int(input())",
    """
import io, sys
from unittest.mock import patch
with patch('builtins.input', side_effect=['1', '2']): assert f() == 3
sys.stdin = io.StringIO('3\\n4\\n')
assert f() == 7
""",
  ),
}

# Code whose f(2) is not 4, and what it does so that a test passes nevertheless.
FORGED = {
  "an object that is equal to all, made among the tests": """
import sys
def equal(*a): return True
def f(x):
  frame = sys._getframe()
  while frame:
    for value in frame.f_locals.values():
      if type(value).__name__ == "Peer": peer = value
    frame = frame.f_back
  made = peer.ask("call", type, "A", (int,), {"__eq__": equal, "__sub__": lambda *a: 0, "__hash__": None})
  return peer.ask("call", made, 3)
""",
  "an object that is equal to all": """
class A:
  __eq__ = __bool__ = lambda *a: True
  __hash__ = None
def f(x): return A()
""",
  "a number that is equal to all": """
class A(int):
  __eq__ = lambda *a: True
def f(x): return A(3)
""",
  "an object without distance": """
class A:
  __sub__ = __rsub__ = __abs__ = __round__ = lambda *a: 0
def f(x): return A()
""",
  "frames": """
import sys
def f(x):
  frame = sys._getframe()
  while frame:
    frame.f_globals.update(AssertionError=Warning, error='', main=print, report=print)
    frame = frame.f_back
  return 3
""",
  "builtins": """
import builtins
builtins.AssertionError = Warning
builtins.abs = lambda x: 0
def f(x): return 3
""",
  "names of Python's own": """
abs = len = round = lambda *a: 0
isinstance = all = any = lambda *a: True
AssertionError = Warning
def f(x): return 3
""",
  "modules": """
import unittest, math, sys
unittest.TestCase.assertEqual = unittest.TestCase.run = lambda *a: None
math.isclose = lambda *a: True
def f(x): return 3
""",
  "SystemExit in a call": "def f(x): raise SystemExit(0)",
  "the end of a loop": "def f(x): raise StopIteration",
  "an address": """
class A:
  __array_interface__ = {"shape": (), "typestr": "<i8", "data": (id(4) + 24, True), "version": 3}
def f(x): return A()
""",
  "skipped": """
import unittest
def f(x): raise unittest.SkipTest('no')
""",
  "a handler at the end": """
import atexit, os
atexit.register(os._exit, 0)
def f(x): return 3
""",
}

KINDS_OF_TESTS = [
  "assert all(map(lambda case: f(case[0]) == case[1], [(2, 4)]))",
  "assert f(2) == 4",
  "assert abs(f(2) - 4) < 1e-6",
  """
import math
assert math.isclose(f(2), 4)
""",
  """
def test_f():
  assert f(2) == 4
""",
  """
import unittest
class A(unittest.TestCase):
  def test(self): self.assertAlmostEqual(f(2), 4)
""",
  """
import unittest
class B(unittest.TestCase):
  def test(self): self.assertEqual(f(2), 4)
unittest.main(exit=False)
""",
  """
import unittest
class C(unittest.TestCase):
  def test(self): assert f(2) == 4
unittest.main()
""",
]
