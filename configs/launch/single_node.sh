#!/usr/bin/env bash
# One machine with several GPUs; `bfpo` starts a process for each. Arguments are those of `bfpo fit`:
#   DEVICES=8 configs/launch/single_node.sh -c configs/base.yaml -c configs/experiment/bfpo.yaml \
#     -c configs/strategy/fsdp2.yaml
# Run it again after a stop: it goes on with the newest run of the same config (--resume auto).
set -euo pipefail
exec bfpo fit "$@" --trainer.devices="${DEVICES:-auto}" --resume=auto
