#!/usr/bin/env bash
# A run on a TPU VM, of one host or a pod slice: get it, install, run on all workers, go on after preemption, delete it.
#
#   launch/tpu_vm.sh --name dpo --zone us-east5-b --type v5litepod-16 --bucket gs://my-bucket -- \
#     train --config configs/dpo.py --workdir gs://my-bucket/runs/dpo
#
# What follows -- are the arguments of `alignjax`; the workdir has to be a bucket's, since the machines go. The code is the
# commit that --commit names, not the working tree. At the end the machine is deleted, whatever the run ended with, unless
# --keep is given or it was there before. Prints every gcloud command; with --dry-run it runs none.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: tpu_vm.sh --name NAME --zone ZONE --type TYPE --bucket gs://BUCKET [options] -- ARGUMENTS OF alignjax
  --project ID          default: gcloud's own
  --version IMAGE       of the runtime; default: the one for v5litepod, v5p, v6e
  --commit REV          what runs; default: HEAD
  --data gs://PATH      a file or folder, copied to data/ on every worker: files of records are read from a disk
  --spot                cheaper, and preempted at any time
  --queued              wait in the queue for it (a queued resource) instead of failing when there is none
  --extras LIST         of setup.py; default: tpu,gcs,hub
  --attempts N          how often the machine is got again after a preemption or a lost host; default: 20
  --keep                do not delete the machine at the end
  --delete              delete it even if it was there before: after a lost connection, the same command and --delete
  --dry-run             print the commands and run none
TEXT
  exit 2
}

name='' zone='' type='' bucket='' project='' version='' commit=HEAD extras=tpu,gcs,hub data='' attempts=20
spot=0 queued=0 keep=0 dry=0 force=0
while (($#)); do
  case $1 in
    --name | --zone | --type | --bucket | --project | --version | --commit | --extras | --attempts | --data)
      (($# > 1)) || usage
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot) spot=1 && shift ;;
    --queued) queued=1 && shift ;;
    --keep) keep=1 && shift ;;
    --delete) force=1 && shift ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) usage ;;
  esac
done
[[ $name && $zone && $type && $bucket == gs://* && $# -gt 0 && $attempts =~ ^[0-9]+$ ]] || usage
[[ " $* " == *" --workdir gs://"* || " $* " == *" --workdir=gs://"* ]] || {
  echo "tpu_vm.sh: --workdir has to lie in a bucket (gs://...): the machine's disks go with it" >&2
  exit 2
}
if [[ ! $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) echo "tpu_vm.sh: no runtime known for $type; give --version" >&2 && exit 2 ;;
  esac
fi
cd "$(dirname "$0")/.."
revision=$(git rev-parse --quiet --verify "$commit^{commit}") || {
  echo "tpu_vm.sh: --commit $commit: no such commit; commit first, or name another" >&2
  exit 2
}
cheap=()
((spot)) && cheap=(--spot)
where=(--zone "$zone" ${project:+--project "$project"})
archive=$bucket/alignjax-$revision.tar.gz
job=alignjax-$name

say() { printf '+' >&2 && printf ' %q' "$@" >&2 && printf '\n' >&2; }
call() {
  say "$@"
  ((dry)) || "$@"
}
ask() { # for an answer; it changes nothing
  say "$@"
  ((dry)) || "$@" 2>/dev/null || true
}
on() { # worker (or all), command
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

state() { ask gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)'; }

delete() {
  if ((queued)); then
    call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet || true
  else
    call gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet || true
  fi
}

get() { # creates the machine, or takes the one that is there
  local now
  now=$(state)
  case $now in
    READY)
      echo "tpu_vm.sh: $name is there already and is used" >&2
      ((created || force)) || mine=0
      return
      ;;
    PREEMPTED | TERMINATED | STOPPED) delete ;;
    '') ;;
    *)
      echo "tpu_vm.sh: $name is $now" >&2
      return 1
      ;;
  esac
  created=1
  if ! ((queued)); then
    call gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
      --accelerator-type "$type" --version "$version" "${cheap[@]}"
    return
  fi
  call gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "$type" --runtime-version "$version" "${cheap[@]}" || return 1
  ((dry)) && return
  until [[ $(state) == READY ]]; do
    case $(ask gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)') in
      FAILED | SUSPENDED)
        delete
        return 1
        ;;
    esac
    sleep "${TPU_VM_POLL:-30}"
  done
}

running="[ \"\$(systemctl show -P SubState $job)\" = running ]" # on a worker: the run still goes, so leave it alone

install() { # the code of the commit, in an environment of its own (the images' Python is too old), on every worker
  on all "set -e; $running && exit 0; rm -rf alignjax-code; mkdir -p alignjax-code/data
${data:+gcloud storage cp -r $data alignjax-code/data/}
gcloud storage cat $archive | tar -xz -C alignjax-code
python3 -m pip install -q --user uv; python3 -m uv venv -q --clear --python 3.12 alignjax-venv
python3 -m uv pip install -q -p alignjax-venv -e 'alignjax-code[$extras]'"
}

# The run is a unit of each worker's systemd: it outlives this connection, and stopping it is SIGTERM, at which all save.
start() {
  local quoted
  quoted=$(printf ' %q' ../alignjax-venv/bin/alignjax "$@")
  on all "$running && exit 0; sudo systemctl stop $job 2>/dev/null; sudo systemctl reset-failed $job 2>/dev/null
sudo systemd-run --unit=$job --uid=\$(id -u) --working-directory=\$HOME/alignjax-code --setenv=HOME=\$HOME \
--setenv=ALIGNJAX_HOSTS=auto --remain-after-exit --property=TimeoutStopSec=300 bash -c $(printf %q "exec$quoted")"
}

follow() { # the first worker's log, until its unit has ended; fails as the run did
  on 0 "journalctl -f -o cat -u $job & tail=\$!
while $running; do sleep 10; done
kill \$tail; exit \$(systemctl show -P ExecMainStatus $job)"
}

if ! ((dry)) && [[ $(ask gcloud storage ls "$archive") ]]; then
  echo "tpu_vm.sh: $archive is there already" >&2
else
  say git archive --format=tar.gz "$revision" '|' gcloud storage cp - "$archive"
  ((dry)) || git archive --format=tar.gz "$revision" | gcloud storage cp - "$archive"
fi
created=0 mine=1
# shellcheck disable=SC2329  # by the trap
finish() {
  if ((keep || !mine)); then
    echo "tpu_vm.sh: $name is kept, and costs until it is deleted: $0 ... --delete, or gcloud" >&2
  else
    delete
  fi
}
trap finish EXIT

for ((attempt = 1; attempt <= attempts; attempt++)); do
  status=0
  get && install && start "$@" && follow || status=$?
  case $status in
    0) echo "tpu_vm.sh: $name has finished" >&2 && exit 0 ;;
    2) echo "tpu_vm.sh: the input is at fault (see above)" >&2 && exit 2 ;;
  esac
  # Of a preempted machine, the connection fails; of a lost host, the others leave: the run goes on where it was saved.
  echo "tpu_vm.sh: attempt $attempt of $attempts ended with status $status; again" >&2
  if [[ $(state) == READY ]]; then on all "sudo systemctl stop $job" || true; fi
  ((dry)) || sleep "${TPU_VM_PAUSE:-30}"
done
echo "tpu_vm.sh: gave up after $attempts attempts" >&2
exit 1
