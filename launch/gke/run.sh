#!/usr/bin/env bash
# A run as a JobSet on a TPU slice of a GKE cluster that has the JobSet controller; the same command continues it.
#
#   launch/gke/run.sh --name dpo --image REGISTRY/alignjax:COMMIT --accelerator tpu-v5-lite-podslice --topology 4x4 \
#     --hosts 4 --chips-per-host 4 -- train --config configs/dpo.py --workdir gs://my-bucket/runs/dpo
#
# Prints every kubectl command and the JobSet; with --dry-run it runs none.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: run.sh --name NAME --image IMAGE --accelerator LABEL --topology TxT --hosts N --chips-per-host N [options]
              -- ARGUMENTS OF alignjax
  --service-account KSA   that may write to the bucket; default: default
  --restarts N            how often all hosts start again; default: 50
  --namespace NS          default: kubectl's own
  --dry-run               print the commands and run none
TEXT
  exit 2
}

name='' image='' accelerator='' topology='' hosts='' chips_per_host='' service_account=default restarts=50 namespace=''
dry=0
while (($#)); do
  case $1 in
    --name | --image | --accelerator | --topology | --hosts | --chips-per-host | --service-account | --restarts | --namespace)
      (($# > 1)) || usage
      variable=${1#--}
      printf -v "${variable//-/_}" %s "$2"
      shift 2
      ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) usage ;;
  esac
done
[[ $name && $image && $accelerator && $topology && $hosts && $chips_per_host && $# -gt 0 ]] || usage
for number in "$hosts" "$chips_per_host" "$restarts"; do
  [[ $number =~ ^[0-9]+$ ]] || usage
done
[[ " $* " == *" --workdir gs://"* || " $* " == *" --workdir=gs://"* ]] || {
  echo "run.sh: --workdir has to lie in a bucket (gs://...): the pods' disks go with them" >&2
  exit 2
}

mode='' # a single host has nobody to look for
((hosts > 1)) && mode=auto
template=$(<"$(dirname "$0")/jobset.yaml")
arguments=$(printf '%q ' "$@")
arguments=${arguments//\$/\$\$} # Kubernetes expands $(NAME) itself
fill() { template=${template//"\${$1}"/"$2"}; }
fill NAME "$name"
fill IMAGE "$image"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill HOSTS_MODE "$mode"
fill HOSTS "$hosts"
fill CHIPS_PER_HOST "$chips_per_host"
fill SERVICE_ACCOUNT "$service_account"
fill RESTARTS "$restarts"
fill ARGUMENTS "$arguments"

call() {
  printf '+' >&2 && printf ' %q' "$@" >&2 && printf '\n' >&2
  ((dry)) || "$@"
}
within=(${namespace:+--namespace "$namespace"})
printf '%s\n' "$template"
call kubectl "${within[@]}" delete jobset "$name" --ignore-not-found --wait=true # one that has ended or was changed
call kubectl "${within[@]}" apply -f - <<<"$template"
call kubectl "${within[@]}" wait --for=create pod -l "jobset.sigs.k8s.io/jobset-name=$name" --timeout=10m
call kubectl "${within[@]}" wait --for=condition=Ready pod -l "jobset.sigs.k8s.io/jobset-name=$name" --timeout=24h
call kubectl "${within[@]}" logs -f -l "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
