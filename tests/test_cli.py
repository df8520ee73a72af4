"""The commands do what the README says; bad input costs one line, exit status 2, and nothing that was there before."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignjax import cli
from alignjax.commands.arguments import make_parser
from alignjax.errors import InputError, exit_status
from alignjax.runs import scorer
from tests import smoke

# After a failed read Orbax leaves coroutines behind that nobody awaits.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

COMMANDS = (
  "quickstart",
  "train",
  "compile",
  "evaluate",
  "generate",
  "best-of",
  "iterate",
  "retrain",
  "sweep",
  "export",
  "adapter",
  "adapter merge",
  "report",
  "data",
  *map("data {}".format, ("testbed", "tokenizer", "check")),
)


@pytest.fixture(autouse=True)
def data_cache(monkeypatch, tmp_path_factory):
  """Commands that have no flag for it keep their indices in a folder of the tests."""
  monkeypatch.setenv("ALIGNJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def pairs():
  """800 good pairs as lines of JSON."""
  return (smoke.DATA / "preference.jsonl").read_text().splitlines() * 4


def succeed(capsys, *argv):
  """What a command prints."""
  assert exit_status(cli.main, list(map(str, argv))) == 0, capsys.readouterr().err
  return capsys.readouterr().out


def refused(capsys, *argv):
  """The one line that a command gives for an error in its input."""
  capsys.readouterr()  # of a run that the arguments made
  assert exit_status(cli.main, list(map(str, argv))) == 2
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1, error
  assert error[0].startswith("alignjax: ")
  return error[0]


def write(path, lines):
  path.write_text("".join(f"{line}\n" for line in lines))
  return path


def train(tmp_path, *overrides, name="dpo"):
  return smoke.arguments(name, tmp_path / "run", *overrides)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_exits_0_and_says_what_the_command_does(command, capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main([*command.split(), "--help"])
  assert caught.value.code == 0
  text = capsys.readouterr().out
  assert text.startswith(f"usage: alignjax {command}".rstrip())
  assert len(text.splitlines()) > 5


def test_every_option_has_a_word_of_help():
  todo, silent = [make_parser()], []
  while todo:
    parser = todo.pop()
    for action in parser._actions:
      if isinstance(action, argparse._SubParsersAction):
        todo += action.choices.values()
      elif not action.help:
        silent.append(f"{parser.prog} {action.dest}")
  assert not silent


def test_unknown_command_and_missing_option_exit_2(capsys):
  for argv in (["tarin"], [], ["evaluate"], ["train", "--workdir", "x"], ["data"]):
    with pytest.raises(SystemExit) as caught:
      cli.main(argv)
    assert caught.value.code == 2
    assert "usage: alignjax" in capsys.readouterr().err


@pytest.mark.slow
def test_from_an_empty_folder_to_a_report(tmp_path, capsys):
  data, tokenizer = tmp_path / "data", tmp_path / "tokenizer.model"
  sizes = ("--sft", 240, "--preference", 200, "--evaluation", 40, "--prompts", 12)
  written = succeed(capsys, "data", "testbed", "--out", data, *sizes).split()
  assert all(os.path.isfile(path) for path in written)
  succeed(capsys, "data", "tokenizer", "--input", data / "sft.jsonl", "--vocab", 400, "--out", tokenizer)
  checked = succeed(capsys, "data", "check", "--input", data / "preference.jsonl", "--tokenizer", tokenizer)
  assert "preference examples of" in checked

  own = [f"data.tokenizer={tokenizer}", f"data.eval={data}/eval_preference.jsonl", "data.row_length=192"]
  sft, dpo = tmp_path / "sft", tmp_path / "dpo"
  succeed(capsys, *smoke.arguments("sft", sft, *own, f"data.train={data}/sft.jsonl"))
  said = succeed(capsys, *smoke.arguments("dpo", dpo, *own, f"data.train={data}/preference.jsonl", f"run.init={sft}"))
  assert "finished step 6:" in said

  numbers = json.loads(succeed(capsys, "evaluate", "--workdir", dpo, "--out", tmp_path / "numbers.json"))
  assert numbers == json.loads((tmp_path / "numbers.json").read_text())
  assert {"loss", "rewards/accuracies", "step", "examples"} <= set(numbers)

  sample = ("generate", "--workdir", dpo, "--max-new-tokens", 8)
  greedy = (*sample, "--temperature", 0, "--prompt", "What is 12 + 5?")
  assert succeed(capsys, *greedy) == succeed(capsys, *greedy)
  drawn = succeed(capsys, *sample, "--prompts", data / "eval_prompts.jsonl", "--num", 2).splitlines()
  records = [json.loads(line) for line in drawn]
  assert len(records) == 24
  assert list(records[0]) == ["id", "prompt", "family", "completion", "finished", "logp"]
  assert records[0]["prompt"] == records[1]["prompt"] != records[2]["prompt"]

  page = succeed(capsys, "report", "--workdir", dpo).strip()
  assert "</html>" in Path(page).read_text()


def test_malformed_line_is_named(tmp_path, capsys, pairs):
  data = write(tmp_path / "pairs.jsonl", [*pairs[:730], '{"prompt": "half', *pairs[731:]])
  line = refused(capsys, *train(tmp_path, f"data.train={data}"))
  assert f"{data}:731: not valid JSON" in line
  assert not (tmp_path / "run").exists()


def test_missing_field_is_named(tmp_path, capsys, pairs):
  data = write(tmp_path / "pairs.jsonl", [*pairs[:9], '{"prompt": "Hi", "chosen": "Hello"}'])
  line = refused(capsys, *train(tmp_path, f"data.train={data}"))
  assert f"{data}:10: field 'rejected' is missing" in line


def test_nothing_but_empty_completions_is_an_error(tmp_path, capsys):
  data = write(tmp_path / "pairs.jsonl", ['{"prompt": "Hi", "chosen": "", "rejected": "No"}'] * 3)
  line = refused(capsys, *train(tmp_path, f"data.train={data}", "data.holdout=0"))
  assert f"{data} [train]: no example is left: dropped 3 records: empty completion (first: {data}:1)" in line
  assert not (tmp_path / "run").exists()


def test_few_records_are_told_by_the_check_and_by_training_alike(tmp_path, capsys):
  sums = ("2 + 2", "9 - 3", "12 + 5")  # whose hashes are not in the share
  few = [json.dumps({"prompt": f"What is {sum_}?", "chosen": "It is that.", "rejected": "No."}) for sum_ in sums]
  data = write(tmp_path / "few.jsonl", few)
  check = ("data", "check", "--input", data, "--tokenizer", smoke.DATA / "tokenizer.model", "--row-length", 512)
  text = succeed(capsys, *check)
  assert "3 preference examples of 3 records" in text
  assert "no record is held out (data.holdout=0.1), so training refuses it: set data.holdout=0, or data.eval" in text
  line = refused(capsys, *train(tmp_path, f"data.train={data}", "data.eval=", "data.holdout=0.1"))
  assert "few.jsonl [eval]: no example is left: none of its 3 records is in the share that is held out" in line
  assert "set data.holdout=0 to train without evaluation, or data.eval to a file" in line


def test_equal_sides_and_long_prompts_are_counted(tmp_path, capsys, pairs):
  equal = '{"prompt": "Hi", "chosen": "Yes", "rejected": "Yes"}'
  long = json.dumps({"prompt": "word " * 400, "chosen": "Yes", "rejected": "No"})
  data = write(tmp_path / "pairs.jsonl", [*pairs[:4], equal, long, equal])
  check = ("data", "check", "--input", data, "--tokenizer", smoke.DATA / "tokenizer.model", "--row-length", 512)
  text = succeed(capsys, *check)
  assert re.search(rf"dropped 2 records: chosen equal to rejected \(first: {data}:5\)", text), text
  assert re.search(rf"dropped 1 record: over-long prompt \(first: {data}:6\)", text), text


@pytest.mark.parametrize(
  ("override", "said"),
  [
    ("algorithm.bta=1", "no key algorithm.bta; the nearest is algorithm.beta"),
    ("run.steps=1.5", "--config.run.steps=1.5: expected a whole number"),
    ("optimiser.b1=0.5", "no key optimiser.b1; the nearest is optimizer.b1"),
    ("mesh.tensor=3", "mesh: data=1 x fsdp=-1 x tensor=3 does not cover 8 devices"),
    ("mesh.fsdp=2", "mesh: data=1 x fsdp=2 x tensor=1 does not cover 8 devices"),
    ("data.rows=12", "data.rows=12 is not divisible by data x fsdp = 8 devices"),
    ("data.train=absent.jsonl", "absent.jsonl: no such file"),
    ("data.tokenizer=absent.model", "absent.model: the tokenizer cannot be read"),
    (f"data.tokenizer={smoke.DATA}/sft.jsonl", "sft.jsonl: no SentencePiece model"),
    ("model.vocab=10", "model.vocab=10, but"),
    ("optimizer.name=adam", "optimizer.name='adam': use one of adamw"),
    ("optimizer.warmup_steps=6", "optimizer.warmup_steps=6 must be"),
    ("run.keep_best=eval/loss", "run.keep_best='eval/loss': write METRIC:min or METRIC:max"),
    ("run.init=absent", "absent/checkpoints: has no checkpoint"),
  ],
)
def test_bad_value_is_one_line_and_leaves_no_file(override, said, tmp_path, capsys):
  assert said in refused(capsys, *train(tmp_path, override))
  assert not smoke.files(tmp_path)


def test_unknown_logger_is_one_line(tmp_path, capsys):
  assert "run.loggers='wandbb': 'wandbb' is not known" in refused(capsys, *train(tmp_path, "run.loggers=wandbb"))


def test_absent_config_is_named(tmp_path, capsys):
  line = refused(capsys, "train", "--config", "configs/absent.py", "--workdir", tmp_path / "run")
  assert "no file configs/absent.py" in line
  assert not (tmp_path / "run").exists()


def test_workdir_of_another_run_stays_as_it_was(tmp_path, capsys):
  workdir = smoke.copy(smoke.finished("sft")[0], tmp_path / "run")
  before = smoke.files(workdir)
  assert f"{workdir} holds another run: run.seed=0 there, 1 here" in refused(
    capsys, *train(tmp_path, "run.seed=1", name="sft")
  )
  assert f"{workdir} holds another run" in refused(capsys, *train(tmp_path))
  assert smoke.files(workdir) == before


def test_workdir_that_is_a_file_is_an_error(tmp_path, capsys):
  (tmp_path / "run").write_text("mine")
  assert f"{tmp_path / 'run'}: is a file" in refused(capsys, *train(tmp_path))
  assert (tmp_path / "run").read_text() == "mine"


def test_tokenizer_of_another_run_is_refused(tmp_path, capsys):
  start, run = smoke.finished("sft")
  other = tmp_path / "other.model"
  vocab = run.tokenizer.vocab_size
  succeed(capsys, "data", "tokenizer", "--input", smoke.DATA / "preference.jsonl", "--vocab", vocab, "--out", other)
  line = refused(capsys, *train(tmp_path, f"run.init={start}", f"data.tokenizer={other}"))
  assert f"data.tokenizer={other} is not the tokenizer that the checkpoint was trained with" in line
  assert not smoke.files(tmp_path / "run")


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "--prompt", "Hi")])
def test_folder_that_is_no_run_is_an_error(command, tmp_path, capsys):
  line = refused(capsys, *command, "--workdir", tmp_path)
  assert f"{tmp_path}: not a run directory" in line


def test_step_that_was_not_saved_is_an_error(capsys):
  workdir = smoke.finished("sft")[0]
  assert "has no checkpoint 99; it has [" in refused(capsys, "evaluate", "--workdir", workdir, "--step", 99)


@pytest.mark.slow
def test_reward_model_does_not_write(capsys):
  line = refused(capsys, "generate", "--workdir", smoke.finished("reward")[0], "--prompt", "Hi")
  assert "a reward model scores and does not write" in line


def test_prompts_without_a_prompt_are_named(tmp_path, capsys):
  prompts = write(tmp_path / "prompts.jsonl", ['{"prompt": "Hi"}', '{"question": "Hi"}'])
  line = refused(capsys, "generate", "--workdir", smoke.finished("sft")[0], "--prompts", prompts)
  assert f"{prompts}:2: none of the known fields among ['question']" in line


@pytest.mark.slow
def test_module_is_the_command(tmp_path):
  command = [sys.executable, "-m", "alignjax.cli", "report", "--workdir", str(tmp_path)]
  done = subprocess.run(command, cwd=smoke.ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert re.fullmatch("alignjax: .*\n", done.stderr)


@pytest.mark.slow
def test_python_of_the_readme_runs_as_written(tmp_path):
  blocks = re.findall(r"^```python\n(.*?)^```", (smoke.ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
  assert blocks
  environment = os.environ | {"PYTHONPATH": str(smoke.ROOT), "HOME": str(tmp_path)}
  for block in blocks:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
  assert (tmp_path / "runs" / "dpo" / "checkpoints").is_dir()


@pytest.mark.parametrize("text", ["[1]", "1", "null", '"a"', "{", "[" * 100_000])
def test_reward_settings_are_an_object(text, capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(
      ["best-of", "--workdir", "w", "--prompts", "p", "--out", "o.jsonl", "--reward", "r", "--reward-settings", text]
    )
  assert ended.value.code == 2
  assert "--reward-settings: " in capsys.readouterr().err
  with pytest.raises(InputError, match=r"reward_settings=\[1\]: give a mapping"):
    scorer.settings("regex", reward_settings=[1])
