#!/usr/bin/env bash
# Uses a running server as the README shows it with curl: chat, streaming, a constrained answer, an upload, a job with
# the `hone` object, the tuned model. Ends with code 1 at the first answer that is not as expected.
#
#     scripts/sdk/curl.sh http://127.0.0.1:8080
set -euo pipefail
base=$1
here=$(cd "$(dirname "$0")" && pwd)
model=SmolLM2-135M-Instruct
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# get EXPRESSION: the value of a Python expression over the JSON document d on standard input.
get() { python3 -c 'import json, sys; d = json.load(sys.stdin); print(eval(sys.argv[1]))' "$1"; }
# is WHAT WANT GOT
is() {
	[ "$2" = "$3" ] || { printf 'FAIL %s: got %s, expected %s\n' "$1" "$3" "$2" >&2; exit 1; }
	printf 'ok   %s\n' "$1"
}
# post PATH JSON
post() { curl --silent --show-error --max-time 120 "$base$1" -H 'Content-Type: application/json' -d "$2"; }

answer=$(post /v1/chat/completions '{"model": "'$model'", "max_tokens": 8, "temperature": 0,
	"messages": [{"role": "user", "content": "Say hello."}]}')
is "chat: an assistant's message" assistant "$(get 'd["choices"][0]["message"]["role"]' <<<"$answer")"
is "chat: usage adds up" True "$(get 'd["usage"]["total_tokens"] == d["usage"]["prompt_tokens"] + d["usage"]["completion_tokens"]' <<<"$answer")"

curl --silent --show-error --no-buffer --max-time 120 "$base/v1/chat/completions" -H 'Content-Type: application/json' -d '{
	"model": "'$model'", "stream": true, "stream_options": {"include_usage": true}, "max_tokens": 8, "temperature": 0,
	"messages": [{"role": "user", "content": "Say hello."}]}' >"$work/stream"
is "stream: ends with [DONE]" "data: [DONE]" "$(grep . "$work/stream" | tail -n 1)"
sed -n 's/^data: {/{/p' "$work/stream" >"$work/chunks"
is "stream: same text as without" "$(get 'd["choices"][0]["message"]["content"]' <<<"$answer")" \
	"$(python3 -c 'import json, sys; print("".join(c["delta"].get("content") or "" for l in sys.stdin for c in json.loads(l)["choices"]))' <"$work/chunks")"
is "stream: usage in the last chunk" True "$(tail -n 1 "$work/chunks" | get 'd["usage"]["completion_tokens"] > 0')"

choice=$(post /v1/chat/completions '{"model": "'$model'", "guided_choice": ["A", "B", "C", "D"], "logprobs": true, "top_logprobs": 4,
	"messages": [{"role": "user", "content": "Which is a fruit?\nA. hammer\nB. apple\nC. copper\nD. violin\nAnswer with the letter."}]}')
is "guided_choice: one of the four" True "$(get 'd["choices"][0]["message"]["content"] in list("ABCD")' <<<"$choice")"
is "guided_choice: probabilities sum to 1" 1.000 \
	"$(get '"%.3f" % sum(2.718281828459045 ** t["logprob"] for t in d["choices"][0]["logprobs"]["content"][0]["top_logprobs"])' <<<"$choice")"

is "error: unknown model" 404 "$(curl --silent --output "$work/error" --write-out '%{http_code}' "$base/v1/chat/completions" \
	-H 'Content-Type: application/json' -d '{"model": "no-such-model", "messages": [{"role": "user", "content": "x"}]}')"
is "error: the envelope" "['code', 'message', 'param', 'type']" "$(get 'sorted(d["error"])' <"$work/error")"
is "error: malformed JSON" 400 "$(curl --silent --output /dev/null --write-out '%{http_code}' "$base/v1/chat/completions" \
	-H 'Content-Type: application/json' -d '{"model": ')"

file=$(curl --silent --show-error --max-time 60 "$base/v1/files" -F purpose=fine-tune -F file=@"$here/train.jsonl")
is "upload: the file's size" "$(wc -c <"$here/train.jsonl" | tr -d ' ')" "$(get 'd["bytes"]' <<<"$file")"
file=$(get 'd["id"]' <<<"$file")
curl --silent --show-error --max-time 60 "$base/v1/files/$file/content" >"$work/content"
cmp "$here/train.jsonl" "$work/content"
echo "ok   upload: the content comes back"

job=$(post /v1/fine_tuning/jobs '{"model": "'$model'", "training_file": "'"$file"'", "suffix": "curl",
	"hone": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "per_device_train_batch_size": 2,
	"gradient_accumulation_steps": 2, "learning_rate": 2e-4, "max_steps": 2, "max_length": 256}}')
is "job: no error" None "$(get 'd.get("error")' <<<"$job")"
job=$(get 'd["id"]' <<<"$job")
status=
for ((i = 0; i < 360; i++)); do
	status=$(curl --silent --show-error --max-time 30 "$base/v1/fine_tuning/jobs/$job" | get 'd["status"]')
	case $status in succeeded | failed | cancelled) break ;; esac
	sleep 0.5
done
[ "$status" = succeeded ] || curl --silent "$base/v1/fine_tuning/jobs/$job/events" >&2
is "job: its end" succeeded "$status"
tuned=$(curl --silent --show-error "$base/v1/fine_tuning/jobs/$job" | get 'd["fine_tuned_model"]')
results=$(curl --silent --show-error "$base/v1/fine_tuning/jobs/$job" | get 'd["result_files"][0]')
is "job: the result file's header" step, "$(curl --silent --show-error "$base/v1/files/$results/content" | head -n 1 | cut -c 1-5)"
is "tuned model: answers" True "$(post /v1/chat/completions '{"model": "'"$tuned"'", "guided_choice": ["A", "B", "C", "D"],
	"messages": [{"role": "user", "content": "Which is a fruit?\nA. hammer\nB. apple\nC. copper\nD. violin\nAnswer with the letter."}]}' |
	get 'd["choices"][0]["message"]["content"] in list("ABCD")')"
is "tuned model: is deleted" True "$(curl --silent --show-error -X DELETE "$base/v1/models/$tuned" | get 'd["deleted"]')"
is "file: is deleted" True "$(curl --silent --show-error -X DELETE "$base/v1/files/$file" | get 'd["deleted"]')"
