#!/usr/bin/env bash
# A night on one machine, until Ctrl-C: a Prefect server, its set-up, and the workers.
#   deployments/laptop.sh [FOLDER]      default: ./night
# FOLDER gets nightly.yaml and inbox.yaml for the model of `make demo`, unless they are there; change them.
# What is not given here is `nightjar deploy`'s to say: options after FOLDER are passed on to it.
#   CRON="0 22 * * *" ZONE=Europe/Berlin deployments/laptop.sh night --webhook https://example.org/hook
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
night=$(mkdir -p "${1:-night}" && cd "${1:-night}" && pwd)
shift || true
if [ -d "$home/.venv/bin" ]; then PATH=$home/.venv/bin:$PATH; fi
zone=${ZONE:-$(readlink -f /etc/localtime | sed 's#.*/zoneinfo/##; s#^/.*#UTC#')}

export PREFECT_HOME=$night/.prefect PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
export PREFECT_SERVER_API_PORT=${PREFECT_SERVER_API_PORT:-4200}
export PREFECT_API_URL=http://127.0.0.1:$PREFECT_SERVER_API_PORT/api
export PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30

common="model: {source: $home/.demo/smollm2}
sampling: {max_tokens: 32}
timezone: $zone"
if [ ! -e "$night/nightly.yaml" ]; then
  cat > "$night/nightly.yaml" << EOF
name: nightly
$common
input: {uri: $home/configs/demo_prompts.parquet, messages_column: messages, id_column: id}
output: {uri: "$night/results/{date}"}
EOF
fi
if [ ! -e "$night/inbox.yaml" ]; then
  cat > "$night/inbox.yaml" << EOF
name: inbox
$common
input: {prompt_column: prompt}
output: {uri: $night/results}
EOF
fi

mkdir -p "$night/inbox"
trap 'trap - EXIT; kill $(jobs -p) 2> /dev/null; wait' EXIT
trap exit INT TERM
prefect server start > "$night/server.log" 2>&1 &
until python3 -c "import urllib.request as u; u.urlopen('$PREFECT_API_URL/health')" 2> /dev/null; do
  kill -0 $! || { tail -n 5 "$night/server.log"; exit 1; }
  sleep 1
done
nightjar deploy --job "$night/nightly.yaml" --cron "${CRON:-0 22 * * *}" --timezone "$zone" \
  --inbox "$night" --inbox-job "$night/inbox.yaml" "$@"
for pool in nightjar gpu-process; do
  # A shell's background processes ignore SIGINT, and a worker then never stops.
  env --default-signal=INT prefect worker start --pool $pool --type process > "$night/$pool.log" 2>&1 &
done
cat << EOF

Prefect:  ${PREFECT_API_URL%/api}      nightly at ${CRON:-0 22 * * *} ($zone)
inbox:    cp prompts.parquet $night/inbox/     the letter comes within two minutes to $night/accepted/
results:  $night/results
Ctrl-C stops everything; start it again and it goes on.
EOF
wait -n
