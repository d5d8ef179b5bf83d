#!/usr/bin/env bash
# Fuzzes a running server by its own OpenAPI document, with valid and invalid data: no answer of 5xx, answers of the declared
# types and shapes, invalid data refused, undeclared methods refused with 405.
#
#     scripts/schemathesis/run.sh .../bin/schemathesis http://127.0.0.1:8080 [further flags]
#
# Not checked: that valid data is accepted, because much of what a request must be cannot be said in a schema (roles that
# follow each other, fields that exclude each other, files that exist), and that Allow is exactly what the document has for a
# path, because /v1/fine_tuning/jobs/dry_run is also the id of a job to whoever asks with GET.
set -euo pipefail
schemathesis=$1
export base=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
PYTHONPATH=$here SCHEMATHESIS_HOOKS=hooks "$schemathesis" run "$base/openapi.json" --phases examples,coverage,fuzzing \
	--exclude-checks positive_data_acceptance,allow_header_conformance --max-examples "${EXAMPLES:-100}" --seed "${SEED:-1}" \
	--request-timeout 60 --continue-on-failure --no-color --warnings off "$@"
