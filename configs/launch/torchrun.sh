#!/usr/bin/env bash
# Several machines without a scheduler: run this on each, at about the same time. Arguments are those of `bfpo fit`.
#   NODES=2 DEVICES=8 MEET=host0:29500 configs/launch/torchrun.sh -c configs/base.yaml \
#     -c configs/experiment/bfpo.yaml -c configs/strategy/fsdp2.yaml
# MEET is a machine that all reach, with a free port. --runs must lie on a file system that all of them see.
# torchrun starts the processes anew up to RESTARTS times if one of them fails; they go on from the last checkpoint.
set -euo pipefail
exec torchrun --nnodes="$NODES" --nproc_per_node="$DEVICES" --max_restarts="${RESTARTS:-0}" \
  --rdzv_id="${ID:-bfpo}" --rdzv_backend=c10d --rdzv_endpoint="$MEET" \
  -m bfpo_pl.cli fit "$@" --trainer.devices="$DEVICES" --trainer.num_nodes="$NODES" --resume=auto
