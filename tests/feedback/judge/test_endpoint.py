"""A judge behind an endpoint, asked through the real client: repeats, limits, cache, and what its answers mean."""

import contextlib
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from alignjax.errors import InputError
from alignjax.feedback.judge import rubric
from alignjax.feedback.judge.endpoint import EndpointJudge
from alignjax.feedback.judge.judge import Settings
from alignjax.feedback.judge.pairwise import Item, judge_items
from alignjax.feedback.judge.rubric import Question
from tests.feedback.world import RUBRIC

pytest.importorskip("openai")
USER = [{"role": "user", "content": "Why?"}]
QUICK = {"x-should-retry": "true", "retry-after-ms": "1"}


@contextlib.contextmanager
def served(answer):
  """A server on the loopback; `answer(request, number)` gives (status, text, tokens). Yields (URL, requests)."""
  requests = []
  lock = threading.Lock()

  class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
      request = json.loads(self.rfile.read(int(self.headers["content-length"])))
      with lock:
        requests.append(request)
        number = len(requests)
      status, text, tokens = answer(request, number)
      content = None
      if tokens:
        content = [
          {"token": token, "logprob": 0.0, "bytes": None, "top_logprobs": [
            {"token": one, "logprob": logp, "bytes": None} for one, logp in likeliest
          ]} for token, likeliest in tokens
        ]  # fmt: skip
      message = {"role": "assistant", "content": text}
      choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}}
      reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
      body = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
      self.send_response(status)
      for name, value in {"content-type": "application/json", "content-length": str(len(body)), **QUICK}.items():
        self.send_header(name, value)
      self.end_headers()
      with contextlib.suppress(OSError):  # the client did not wait
        self.wfile.write(body)

    def log_message(self, *_):
      pass

  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
  finally:
    server.shutdown()
    server.server_close()


def longer(request, number):
  """Prefers the longer of two completions by 2 nats, and the first place by 1."""
  parts = request["messages"][-1]["content"].split("===")
  odds = 1.0 + 2.0 * math.copysign(1, len(parts[6]) - len(parts[10]))
  first, second = -math.log1p(math.exp(-odds)), -math.log1p(math.exp(odds))
  return 200, "A" if odds > 0 else "B", [[" A", [[" A", first], ["B", second], ["the", -30.0]]]]


def judge(url, tmp_path, **settings):
  return EndpointJudge(url, "m", Settings(**settings), str(tmp_path))


def test_log_probabilities_of_both_orders_and_a_cache_by_content(tmp_path):
  items = [Item(USER, ("a longer one", "short")), Item(USER, ("x", "yy"))]
  with served(longer) as (url, requests):
    found = [label for label, _ in judge_items([judge(url, tmp_path)], RUBRIC, items, seed=0)]
    assert [label.delta for label in found] == pytest.approx([2.0, -2.0])
    assert [label.opinions[0].position_bias for label in found] == pytest.approx([1.0, 1.0])
    assert len(requests) == 4
    again = [label for label, _ in judge_items([judge(url, tmp_path)], RUBRIC, items, seed=0)]
    assert again == found
    assert len(requests) == 4
    list(judge_items([judge(url, tmp_path, seed=1)], RUBRIC, items, seed=0))
    assert len(requests) == 8
  assert requests[0]["top_logprobs"] == 20


def test_an_overloaded_endpoint_is_asked_again(tmp_path):
  with served(lambda request, number: (503 if number < 3 else 200, "A", None)) as (url, requests):
    (answer,) = judge(url, tmp_path).ask([Question(RUBRIC, USER, ("a", "b"))])
    assert answer == ("A", None)
    assert len(requests) == 3


def test_a_refusal_says_what_to_do(tmp_path):
  refused = pytest.raises(InputError, match=r"status 401 .* set OPENAI_API_KEY")
  with served(lambda request, number: (401, "", None)) as (url, _), refused:
    judge(url, tmp_path, retries=0).ask([Question(RUBRIC, USER, ("a", "b"))])
  with pytest.raises(InputError, match="cannot be reached"):
    judge(url, tmp_path, retries=0).ask([Question(RUBRIC, USER, ("a", "b"))])


def test_a_call_that_takes_too_long_is_null_and_not_cached(tmp_path):
  waits = {1: 0.5}

  def slow(request, number):
    time.sleep(waits.get(number, 0))
    return 200, "B", None

  with served(slow) as (url, requests):
    ask = lambda: judge(url, tmp_path, retries=0, timeout=0.2).ask([Question(RUBRIC, USER, ("a", "b"))])
    assert ask() == [(None, None)]
    assert ask() == [("B", None)]
    assert len(requests) == 2


def test_calls_are_limited_in_number_and_in_rate(tmp_path):
  at_once = []
  now = [0]
  lock = threading.Lock()

  def counted(request, number):
    with lock:
      now[0] += 1
      at_once.append(now[0])
    time.sleep(0.02)
    with lock:
      now[0] -= 1
    return 200, "A", None

  asked = [Question(RUBRIC, USER, ("a", str(number))) for number in range(8)]
  with served(counted) as (url, _):
    judge(url, tmp_path, concurrency=2).ask(asked)
    assert max(at_once) == 2
    begun = time.monotonic()
    judge(url, tmp_path, seed=9, per_minute=1200).ask(asked)  # 50 ms apart
    assert time.monotonic() - begun > 0.35


def test_with_reasons_the_token_behind_the_mark_is_read(tmp_path):
  reasoned = rubric.parse(
    'name: r\nversion: 1\nform: pairwise\nreasoning: true\ntemplate: "{{ completions }}"\n', "r.yaml"
  )
  words = [["A", [["A", -0.1]]], [" first.\n", [["x", -0.1]]], ["Verdict", [["x", -0.1]]], [":", [["x", -0.1]]]]
  tokens = [*words, [" B", [[" B", -0.2], [" A", -1.7]]]]
  with served(lambda request, number: (200, "A first.\nVerdict: B", tokens)) as (url, _):
    (answer,) = judge(url, tmp_path).ask([Question(reasoned, USER, ("a", "b"))])
  assert answer.logps == {"A": -1.7, "B": -0.2}


def test_grades_of_which_one_begins_another_are_read_as_text(tmp_path):
  grade = rubric.load("reference-grade")
  with served(lambda request, number: (200, "Verdict: 10", [["Verdict:", [["x", 0]]], ["1", [["1", 0]]]])) as (url, _):
    (answer,) = judge(url, tmp_path).ask([Question(grade, USER, ("a",), "b")])
  assert answer == ("Verdict: 10", None)
