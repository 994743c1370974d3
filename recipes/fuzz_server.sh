#!/usr/bin/env bash
# Sends requests that fit the API's schema, and others that do not, to a server of its own.
# Ends with an error where one was answered with 5xx or against the schema, or taken although it
# was wrong.
set -euo pipefail
usage="usage: recipes/fuzz_server.sh SECONDS [flags of passlm serve]"
seconds=${1:?$usage}
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)

passlm serve --port 0 --max-tokens 16 "${@:2}" >"$folder/address" 2>"$folder/log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true; rm -rf "$folder"' EXIT
until grep -q http "$folder/address"; do
    kill -0 "$server" 2>/dev/null || { cat "$folder/log" >&2; exit 1; }
    sleep 0.2
done
url=$(grep -o 'http://.*' "$folder/address")
cd "$folder"  # it keeps what it found in the folder it runs in
st --config-file "$here/../tests/schemathesis.toml" run "$url/openapi.json" \
    --max-time "$seconds" --continue-on-failure
! grep '"level": "error"' "$folder/log" >&2
