"""The chat page's own script is all that a browser may run there, and a vote is on the disk when it is answered."""

import json

import httpx2 as httpx
import pytest

from alignjax.errors import InputError
from alignjax.serving import page, votes
from alignjax.serving.app import Server
from alignjax.serving.served import Served
from tests.serving.conftest import serving

VOTE = {
  "prompt": [{"role": "user", "content": "Hi"}],
  "completions": ["a", "b\n\N{SNOWMAN}"],
  "models": ["tiny", "tiny"],
  "verdict": "first",
  "strength": 2,
  "annotator": "Ann",
  "seconds": 1.5,
  "seed": 7,
}


def test_the_page_runs_no_script_but_its_own(url):
  response = httpx.get(url)
  assert response.headers["content-type"].startswith("text/html")
  policy = response.headers["content-security-policy"]
  assert "default-src 'none'" in policy
  assert policy.count("sha256-") == 2
  assert "unsafe" not in policy
  html = page.content()
  assert "innerHTML" not in html
  assert "http" not in html.replace("https?:", "")  # nothing is fetched from elsewhere
  assert html.count("<script") == html.count("<style") == 1


@pytest.fixture
def voting(engine, tmp_path):
  """A client of a server that keeps votes, and their file."""
  path = tmp_path / "votes.jsonl"
  path.write_text(json.dumps(VOTE) + '\n{"prompt": "cut')
  server = Server({"tiny": Served("tiny", "", engine)}, 4, kept=votes.Votes(str(path)))
  server.device.start = lambda: None
  with serving(server) as address, httpx.Client(base_url=address, timeout=60) as client:
    yield client, path


def test_a_vote_is_kept_whole_behind_a_line_that_a_crash_has_cut(voting):
  client, path = voting
  assert client.get("/votes").json() == {"kept": True}
  assert client.post("/votes", json=VOTE).status_code == 200
  assert client.post("/votes", json=VOTE | {"verdict": "tie", "strength": None}).status_code == 200
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    VOTE,
    VOTE,
    VOTE | {"verdict": "tie", "strength": None},
  ]


@pytest.mark.parametrize(
  "fields",
  [
    {"prompt": []},
    {"completions": ["a"]},
    {"completions": "ab"},
    {"models": ["tiny", "other"]},
    {"verdict": "third"},
    {"verdict": "tie"},
    {"strength": None},
    {"strength": 4},
    {"seconds": -1},
    {"annotator": ""},
    {"more": 1},
  ],
  ids=str,
)
def test_a_vote_that_says_nothing_is_refused(voting, fields):
  client, path = voting
  before = path.read_text()
  assert client.post("/votes", json=VOTE | fields).status_code == 400
  assert path.read_text() == before


def test_without_a_file_no_vote_is_kept(url):
  assert httpx.get(f"{url}/votes").json() == {"kept": False}
  assert httpx.post(f"{url}/votes", json=VOTE).status_code == 404


def test_a_file_of_votes_that_cannot_be_written_is_named(tmp_path):
  with pytest.raises(InputError, match="--votes="):
    votes.Votes(str(tmp_path / "none" / "votes.jsonl"))
