#!/usr/bin/env bash
# A head on this machine, with its dashboard on loopback and a token:  clusters/local.sh [ray start options]
# Ends with Ctrl-C. Ray's own ports listen on every interface: put a firewall in front of them.
set -euo pipefail

export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" RAY_USAGE_STATS_ENABLED=0
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
  ray get-auth-token --generate >/dev/null # into ~/.ray/auth_token, if there is none
fi
exec ray start --head --block --dashboard-host=127.0.0.1 --disable-usage-stats "$@"
