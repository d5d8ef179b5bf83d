#!/usr/bin/env bash
# Starts a server on a free port over a throw-away data directory and runs a shell command beside it, which finds its
# address in $base. Ends with the command's code, and after a failure with the end of the server's log.
#
#     scripts/with_server.sh bin/hone 'curl $base/health'
set -euo pipefail
hone=$(realpath "$1")
command=$2

home=$(mktemp -d)
unset HONE_API_KEY # the server would ask its users for it
export HONE_HOME=$home HONE_HOST=127.0.0.1
HONE_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export HONE_PORT
export base=http://127.0.0.1:$HONE_PORT
# Job control off and a direct child: "$server" is the server's own process id.
"$hone" serve >"$home/server.log" 2>&1 &
server=$!

finish() {
	code=$?
	trap - EXIT INT TERM
	kill "$server" 2>/dev/null || true
	wait "$server" 2>/dev/null || true
	if [ "$code" -ne 0 ] && [ "$code" -lt 128 ]; then
		echo "== the end of the server's log" >&2
		tail -n 40 "$home/server.log" >&2
	fi
	rm -rf "$home"
	exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for ((i = 0; ; i++)); do
	if curl --silent --fail --max-time 2 "$base/health" >/dev/null; then break; fi
	kill -0 "$server" 2>/dev/null || { echo "the server ended before it answered" >&2; exit 1; }
	[ "$i" -lt 240 ] || { echo "the server did not answer on $base within 2 minutes" >&2; exit 1; }
	sleep 0.5
done

bash -euo pipefail -c "$command"
