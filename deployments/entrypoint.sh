#!/bin/sh
# The first pod of a replica runs the flow; the others of an indexed Job join it as ranks.
#   NIGHTJAR_LEADER          name of the first pod, from the base job template
#   NIGHTJAR_NUM_HOSTS, NIGHTJAR_GPUS_PER_HOST   from the tier
set -eu
if [ "${JOB_COMPLETION_INDEX:-0}" = 0 ]; then
  exec "$@"
fi
exec torchrun --nnodes "$NIGHTJAR_NUM_HOSTS" --node-rank "$JOB_COMPLETION_INDEX" \
  --nproc-per-node "$NIGHTJAR_GPUS_PER_HOST" --master-addr "$NIGHTJAR_LEADER" --master-port 29500 \
  -m inference
