#!/bin/sh
# The first pod of a replica runs the flow; the others of an indexed Job stage the model and join it as ranks.
#   NIGHTJAR_LEADER          name of the first pod, from the base job template
#   NIGHTJAR_NUM_HOSTS, NIGHTJAR_GPUS_PER_HOST   from the tier
#   NIGHTJAR_FOLLOW          the run, from the flow that starts replicas
set -eu
if [ "${JOB_COMPLETION_INDEX:-0}" = 0 ]; then
  exec "$@"
fi
exec python -m tasks.follow
