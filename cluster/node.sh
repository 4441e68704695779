#!/usr/bin/env bash
# What a node of a Ray cluster needs beside Ray, whoever has started it:
#   cluster/node.sh install SITE    checks the machine, installs what is pinned; shells get its PATH, SITE, and Ray's token mode
#   cluster/node.sh sweep FILE ...  is `pdiff sweep` in this folder, where jobs do not start
#   cluster/node.sh mlflow          starts MLflow on the head's loopback interface, for as long as Ray's head is there
#   cluster/node.sh notice          tells Ray of the cloud's notice that this spot machine is to go, once it comes
#   cluster/node.sh tidy            stops what Ray leaves of a worker whose head is gone, once it is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD
python=3.11  # of every node
uv=0.13.9
export PATH="$here/.venv/bin:$HOME/.local/bin:$PATH"

install() {
  command -v uv >/dev/null || curl -LsSf "https://astral.sh/uv/$uv/install.sh" | UV_NO_MODIFY_PATH=1 sh
  uv lock --quiet --python "$python"
  uv run --quiet --no-project --python "$python" cluster/check_node.py uv.lock
  uv sync --quiet --frozen --no-dev --group cluster --python "$python"
  # First, as much of what follows there ends early where nobody types.
  local line="export PATH=$here/.venv/bin:\$HOME/.local/bin:\$PATH RAY_AUTH_MODE=token PDIFF_SITE=$here/$1"
  touch ~/.bashrc
  if ! grep -qxF "$line" ~/.bashrc; then
    { echo "$line"; grep -v "PDIFF_SITE=$here/" ~/.bashrc || true; } >~/.bashrc.new  # without that of an earlier site
    mv ~/.bashrc.new ~/.bashrc
  fi
}

mlflow_server() {
  export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
  mkdir -p ~/mlflow
  setsid bash -c '
    mlflow server --host 127.0.0.1 --port 5000 --workers 1 --allowed-hosts "localhost:*,127.0.0.1:*" \
      --backend-store-uri "sqlite:///$HOME/mlflow/mlflow.db" --artifacts-destination "$HOME/mlflow/files" &
    while pgrep -u "$(id -u)" gcs_server >/dev/null; do sleep 2; done
    kill -- -$$
  ' >~/mlflow/log 2>&1 </dev/null &
}

# AWS tells two minutes before, Google half a minute; without a word to Ray, work would end where it is.
notice() {
  setsid bash -c '
    aws=${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}
    google=http://${GCE_METADATA_HOST:-169.254.169.254}/computeMetadata/v1/instance/preempted
    ask() { curl -sf --max-time 2 "$@"; }
    noticed() {
      local token
      token=$(ask -X PUT "$aws/latest/api/token" -H "X-aws-ec2-metadata-token-ttl-seconds: 60") &&
        ask -H "X-aws-ec2-metadata-token: $token" "$aws/latest/meta-data/spot/instance-action" && seconds=110 && return
      [ "$(ask -H "Metadata-Flavor: Google" "$google")" = TRUE ] && seconds=25
    }
    while raylet=$(pgrep -u "$(id -u)" -a raylet); do
      if noticed; then
        of() { grep -oP "(?<=--$1=)[0-9a-f.:]+" <<<"$raylet" | head -n 1; }
        ray drain-node --address "$(of gcs-address)" --node-id "$(of node_id)" \
          --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "notice of the cloud" \
          --deadline-remaining-seconds "$seconds" && break
      fi
      sleep "${PDIFF_NOTICE_EVERY_S:-5}"
    done
  ' >~/pdiff-notice.log 2>&1 </dev/null &
}

# `ray down` stops the head of machines that stay; workers' raylets end without it, their log monitors do not.
tidy() {
  setsid bash -c '
    while pgrep -u "$(id -u)" raylet >/dev/null; do sleep 2; done
    sleep 20  # for one that starts again
    pgrep -u "$(id -u)" raylet >/dev/null || ray stop
  ' >/dev/null 2>&1 </dev/null &
}

case ${1:-} in
  install) install "$2" ;;
  mlflow) mlflow_server ;;
  notice) notice ;;
  tidy) tidy ;;
  sweep) exec python -m pdiff_ray.sweep "${@:2}" ;;
  *) sed -n '2,7s/^# //p' cluster/node.sh >&2; exit 2 ;;
esac
