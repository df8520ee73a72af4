"""The routes answer as OpenAI's do, and what they sample is what `sample` gives for the seed."""

import json
import threading
import time

import httpx2 as httpx
import pytest

from alignjax.runs.run import sample
from alignjax.serving.app import Server
from alignjax.serving.engine import Engine
from alignjax.serving.served import Served
from tests.serving.conftest import CONTEXT, serving

HI = [{"role": "user", "content": "Hi"}]
NEW = 12


@pytest.fixture(scope="module")
def client(url):
  with httpx.Client(base_url=url, timeout=300) as client:
    yield client


def chat(client, **fields):
  body = {"model": "tiny", "messages": HI, "seed": 3, "max_tokens": NEW} | fields
  return client.post("/v1/chat/completions", json=body)


def complete(client, **fields):
  return client.post("/v1/completions", json={"model": "tiny", "prompt": "Who has", "max_tokens": 4} | fields)


def events(response):
  lines = [line for line in response.text.split("\n\n") if line]
  assert all(line.startswith("data: ") for line in lines)
  assert lines[-1] == "data: [DONE]"
  return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_chat_is_the_sample_of_its_seed(client, run):
  expected = sample(run, [HI], num=3, seed=3, max_new_tokens=NEW, temperature=0.9, top_p=0.8)[0]
  answer = chat(client, n=3, temperature=0.9, top_p=0.8).json()
  assert answer["object"] == "chat.completion"
  assert [choice["message"]["content"] for choice in answer["choices"]] == [c.text for c in expected]
  ends = ["stop" if c.finished else "length" for c in expected]
  assert [choice["finish_reason"] for choice in answer["choices"]] == ends
  tokens = sum(len(c.tokens) for c in expected)
  prompt = answer["usage"]["prompt_tokens"]
  assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def test_a_stream_has_the_same_text_and_ends_with_the_usage(client, run):
  whole = chat(client, n=2).json()
  chunks = events(chat(client, n=2, stream=True, stream_options={"include_usage": True}))
  texts = {0: "", 1: ""}
  for chunk in chunks[:-1]:
    assert chunk["object"] == "chat.completion.chunk"
    assert chunk["usage"] is None
    (choice,) = chunk["choices"]
    texts[choice["index"]] += choice["delta"].get("content", "")
  assert texts == {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
  assert chunks[-1]["choices"] == []
  assert chunks[-1]["usage"] == whole["usage"]
  assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_a_stop_string_ends_the_text_before_it(client):
  whole = chat(client, max_tokens=30).json()["choices"][0]["message"]["content"]
  stop = whole[5:8]
  expected = whole[: whole.index(stop)]
  answer = chat(client, max_tokens=30, stop=["\x00never", stop]).json()
  assert answer["choices"][0]["message"]["content"] == expected
  assert answer["choices"][0]["finish_reason"] == "stop"
  assert answer["usage"]["completion_tokens"] <= 30
  pieces = events(chat(client, max_tokens=30, stop=stop, stream=True))
  assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == expected


def test_log_probs_of_a_chat_name_the_likeliest_tokens(client):
  choice = chat(client, temperature=0, logprobs=True, top_logprobs=2).json()["choices"][0]
  for token in choice["logprobs"]["content"]:
    best, second = token["top_logprobs"]
    assert token["logprob"] == best["logprob"] > second["logprob"]
    assert token["token"] == best["token"]


def test_an_echo_scores_the_prompt_as_lm_eval_reads_it(client):
  ids = client.post("/tokenize", json={"prompt": "Who has the red ball?"}).json()["tokens"]
  answer = complete(client, prompt=[ids, ids[:-2]], echo=True, logprobs=1, max_tokens=1, temperature=0).json()
  whole, shorter = (choice["logprobs"] for choice in answer["choices"])
  assert whole["token_logprobs"][0] is None
  assert len(whole["tokens"]) == len(whole["top_logprobs"]) == len(ids) + 1
  assert whole["token_logprobs"][1 : len(ids) - 2] == pytest.approx(shorter["token_logprobs"][1:-1], abs=1e-4)
  for logp, likely in zip(whole["token_logprobs"][1:], whole["top_logprobs"][1:], strict=True):
    assert logp <= max(likely.values())
  # The next token is the greedy one.
  assert whole["token_logprobs"][-1] == max(whole["top_logprobs"][-1].values())
  scored = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
  assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(whole["token_logprobs"][1:-1], abs=1e-5)
  assert scored["text"] == client.post("/detokenize", json={"tokens": ids}).json()["prompt"]


def test_several_prompts_are_those_of_their_numbers(client):
  together = complete(client, prompt=["Who has", "Why"], n=2, seed=5).json()["choices"]
  assert [choice["index"] for choice in together] == [0, 1, 2, 3]
  assert together[:2] == complete(client, n=2, seed=5).json()["choices"]


def test_models_and_tokenizer_are_described(client, run):
  (model,) = client.get("/v1/models").json()["data"]
  assert model["id"] == "tiny"
  assert client.get("/v1/models/tiny").json() == model
  info = client.get("/tokenizer_info").json()
  assert client.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"] == [run.tokenizer.eos_id]
  tokens = client.post("/tokenize", json={"messages": HI, "return_token_strs": True}).json()
  assert tokens["tokens"] == run.tokenizer.render(HI, add_generation_prompt=True)
  assert len(tokens["token_strs"]) == tokens["count"]


# fields -> status, the parameter at fault
REFUSED = [
  ({"messages": None}, 400, "messages"),
  ({"messages": [{"role": "user", "content": " "}]}, 400, "messages"),
  ({"messages": [{"role": "wizard", "content": "Hi"}]}, 400, "messages"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].type"),
  ({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]}, 400, "messages[0].name"),
  ({"messages": [{"role": "user", "content": "x " * 200}]}, 400, "prompt"),
  ({"model": "other"}, 404, "model"),
  ({"model": None}, 400, "model"),
  ({"temperature": -1}, 400, "temperature"),
  ({"temperature": "hot"}, 400, "temperature"),
  ({"top_p": 0}, 400, "top_p"),
  ({"max_tokens": 0}, 400, "max_tokens"),
  ({"max_tokens": 10**6}, 400, "max_tokens"),
  ({"max_tokens": True}, 400, "max_tokens"),
  ({"n": 1000}, 400, "n"),
  ({"seed": -1}, 400, "seed"),
  ({"stop": [""]}, 400, "stop"),
  ({"stop": [1]}, 400, "stop"),
  ({"stream": "yes"}, 400, "stream"),
  ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
  ({"top_logprobs": 2}, 400, "top_logprobs"),
  ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
  ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
  ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
  ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),  # its template has no place for them
  ({"tool_choice": "required"}, 400, "tool_choice"),
  ({"guided_regex": "a+"}, 400, "guided_regex"),
]


@pytest.mark.parametrize(("fields", "status", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_served_is_named(client, fields, status, param):
  response = chat(client, **fields)
  error = response.json()["error"]
  assert response.status_code == status
  assert error["type"] == "invalid_request_error"
  assert (error["param"] or "") == param
  assert param.rpartition(".")[2].partition("[")[0] in error["message"]


@pytest.mark.parametrize(
  ("fields", "param"),
  [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [5, "x"]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"echo": True, "stream": True}, "echo"),
  ],
  ids=str,
)
def test_what_is_not_completed_is_named(client, fields, param):
  response = complete(client, **fields)
  assert response.status_code == 400
  assert response.json()["error"]["param"] == param


def test_fields_that_ask_for_nothing_are_taken(client):
  nothing = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "ann", "store": False}
  parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
  plain = chat(client).json()["choices"]
  assert chat(client, **nothing).json()["choices"] == plain
  assert chat(client, messages=parts, tool_choice="none", response_format={"type": "text"}).json()["choices"] == plain


@pytest.mark.parametrize(
  ("body", "headers", "status"),
  [
    (b"{", {}, 400),
    (b"[]", {}, 400),
    (b"", {}, 400),
    (b"\xff", {}, 400),
    (b'{"a": 1, "a": 2}', {}, 400),
    (b"[" * 100_000, {}, 400),
    (b"{}", {"content-type": "text/plain"}, 415),
    (b" " * (17 * 2**20), {}, 413),
  ],
  ids=["cut", "list", "empty", "bytes", "twice", "deep", "form", "large"],
)
def test_broken_bodies_are_refused(client, body, headers, status):
  headers = {"content-type": "application/json"} | headers
  response = client.post("/v1/chat/completions", content=body, headers=headers)
  assert response.status_code == status
  assert response.json()["error"]["message"]


def test_other_paths_and_methods_are_errors_of_the_same_form(client):
  assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
  assert client.get("/v1/completions").status_code == 405


def idle(engine, device):
  """Waits until nobody is served."""
  deadline = time.monotonic() + 60
  while (engine.busy or device.waiting) and time.monotonic() < deadline:
    time.sleep(0.01)
  return engine.busy == device.waiting == 0


def test_a_client_that_goes_away_frees_its_slot(client, engine, server, url):
  before = engine.counts.cancelled
  body = {"model": "tiny", "prompt": "Why", "max_tokens": CONTEXT - 10, "n": 40, "temperature": 1.5}
  with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
    next(response.iter_lines())
  assert idle(engine, server.device)
  between = engine.counts.cancelled
  assert between > before
  with pytest.raises(httpx.TimeoutException):
    httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.02))
  assert idle(engine, server.device)
  assert engine.counts.cancelled > between
  assert chat(client).status_code == 200


def test_a_full_queue_says_when_to_come_again(client, server):
  body = {"model": "tiny", "prompt": "Why", "max_tokens": 40, "n": 40}
  statuses = []

  def ask():
    response = httpx.post(f"{client.base_url}/v1/completions", json=body, timeout=300)
    statuses.append((response.status_code, int(response.headers.get("retry-after", 0))))

  threads = [threading.Thread(target=ask) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert {status for status, _ in statuses} == {200, 429}
  assert all(seconds >= 1 for status, seconds in statuses if status == 429)


def test_numbers_for_prometheus(client):
  chat(client)
  assert client.get("/health").json() == {"status": "ok"}
  lines = client.get("/metrics").text.splitlines()
  numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
  assert float(numbers['alignjax_tokens_total{model="tiny"}']) > 0
  assert float(numbers['alignjax_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
  assert numbers["alignjax_request_seconds_count"] == numbers['alignjax_request_seconds_bucket{le="+Inf"}']
  families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
  assert len(families) == len(set(families))


@pytest.fixture(scope="module")
def guarded(run, engine):
  """A server of the same engine with a key, that answers to the names of this machine; nothing is sampled there."""
  server = Server({"tiny": Served("tiny", "", engine)}, 4, "secret", ("127.0.0.1",))
  server.device.start = lambda: None
  with serving(server) as address, httpx.Client(base_url=address, timeout=60) as client:
    yield client


def test_a_key_is_asked_for(guarded):
  assert guarded.get("/health").status_code == 200
  for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Bearer \N{LATIN SMALL LETTER E WITH ACUTE}"}):
    encoded = {name: value.encode() for name, value in headers.items()}
    assert guarded.get("/v1/models", headers=encoded).status_code == 401
  assert guarded.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_another_name_for_this_machine_is_no_way_in(guarded):
  response = guarded.get("/v1/models", headers={"authorization": "Bearer secret", "host": "evil.example:80"})
  assert response.status_code == 421


def test_an_engine_that_fails_answers_and_goes_on(run, monkeypatch, engine):
  server = Server({"tiny": Served("tiny", "", engine)}, 4)
  whole = Engine.advance
  calls = []

  def broken(self):
    calls.append(1)
    if len(calls) == 2:
      raise FloatingPointError("no")
    return whole(self)

  monkeypatch.setattr(Engine, "advance", broken)
  with serving(server) as address, httpx.Client(base_url=address, timeout=300) as client:
    first = chat(client, max_tokens=30)
    assert first.status_code == 503
    assert "FloatingPointError" in first.json()["error"]["message"]
    assert chat(client).status_code == 200
    assert "alignjax_failures_total 1" in client.get("/metrics").text
