# Everything that is done with this tree is a target here; CI and the Dockerfile call the same ones. `make help` lists them.
# The first line of a recipe that touches cgo is $(engine): the C flags live in scripts/env.sh alone, because they are
# part of Go's build cache key and other flags would compile the engine again. So would -trimpath or -race; hence no
# target builds the engine with them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

cache := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hone
export HONE_TEST_MODEL ?= $(cache)/models/SmolLM2-135M-Instruct.Q4_1.gguf
engine = HONE_NATIVE=$$(scripts/native.sh); export HONE_NATIVE; . scripts/env.sh
golangci = go tool -modfile=tools/go.mod golangci-lint
python = build/venv/bin/python

# serve's half: built and tested without cgo, which proves that it needs none. deps_test.go forbids the imports.
pure := $(addprefix ./,$(addsuffix /...,$(wildcard server client finetune adapters configs \
	internal/store internal/wire internal/child internal/models internal/gguf internal/lora internal/durable internal/doctor)))

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: build model ## the whole story on this machine: base accuracy, fine-tuning, tuned accuracy (about 4 minutes)
	@exec bin/hone demo

.PHONY: demo-check
demo-check: build model ## the demo, failing unless tuning gains 50 points
	@exec bin/hone demo --expect-points 50

.PHONY: test
test: check model ## all tests; the engine's run on the default model
	@echo "== serve's half, without cgo"
	@CGO_ENABLED=0 go test -timeout 10m $(pure)
	@echo "== the other packages, with the engine"
	@$(engine); go test -timeout 15m $$(go list ./... | grep -vxFf <(CGO_ENABLED=0 go list $(pure)))

.PHONY: run
run: build model ## start the server on the default data directory; the default model is pulled on first use
	@exec bin/hone serve

.PHONY: build
build: prerequisites ## build bin/hone
	@$(engine); go build -o bin/hone .

# HONE_LIB names another directory to load from. CUDA_ARCHITECTURES is as CMake's CMAKE_CUDA_ARCHITECTURES: 90, "80;89", all-major.
.PHONY: cuda
CUDA_ARCHITECTURES ?= native
cuda: ## build lib/hone/libggml-cuda.so beside bin, which lets jobs run on NVIDIA GPUs (CUDA 12 or 13, CMake; minutes)
	cmake -S scripts/cuda -B build/cuda -DGGML_DIR="$$(go list -m -f '{{.Dir}}' github.com/ollama/ollama)/ml/backend/ggml/ggml" \
		-DCUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" -Dout=$(CURDIR)/lib/hone
	cmake --build build/cuda --target ggml-cuda --parallel

.PHONY: native
native: ## build libtokenizers.a (Rust, about 3 minutes, once), which is kept outside the tree
	@scripts/native.sh >/dev/null

.PHONY: model
model: build ## fetch the default model into the cache, checked by its sha256
	@exec bin/hone pull --cache-only

.PHONY: prerequisites
prerequisites: ## name what is missing on this machine, what needs it and how to install it
	@scripts/prerequisites.sh

.PHONY: check
check: prerequisites ## gofmt and go vet
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted (run gofmt -w):"; echo "$$unformatted"; exit 1; fi
	@$(engine); go vet ./...

.PHONY: lint
lint: prerequisites ## golangci-lint, pinned in tools/go.mod (its first build takes about 2 minutes)
	@$(engine); $(golangci) run ./...

# VULNDB is the vulnerability database: nothing for vuln.go.dev, or file:///... for a copy (data/osv of golang/vulndb). CI goes
# on without one, and says so.
.PHONY: audit
audit: check ## go vet, govulncheck and gosec, pinned in tools/audit/go.mod; every finding has a reason
	@$(engine); go run ./scripts/audit $(if $(VULNDB),-db $(VULNDB)) $(if $(CI),-offline)

# LOAD has flags of scripts/load: LOAD="-clients 500 -sequences 64 -rate 2000 -duration 1m".
.PHONY: load
load: build model ## 500 clients at once beside 2,000 requests/s for /health and /v1/models (about 3 minutes)
	@CGO_ENABLED=0 go build -o build/load ./scripts/load; exec build/load -hone bin/hone -model $(HONE_TEST_MODEL) $(LOAD)

MINUTES ?= 20
.PHONY: soak
soak: build ## jobs, chats, uploads, batches and deletes at random for MINUTES (20), watching what the processes hold
	@CGO_ENABLED=0 go build -o build/load ./scripts/load; exec build/load -hone bin/hone -soak $(MINUTES)m -samples build/soak.csv $(LOAD)

# The trainer waits asleep, as serve starts it, and the runner does not.
.PHONY: bench
bench: model ## speed of training and serving on this machine
	@$(engine); OMP_WAIT_POLICY=passive go test -run XXX -bench Step -benchtime 20x ./internal/train
	@$(engine); go test -run XXX -bench MultipleChoice -benchtime 48x ./internal/runner

.PHONY: bench-train
bench-train: model build/venv/bench ## speed of training beside PEFT, with pass or fail per bar (installs PyTorch; about 40 minutes)
	@$(engine); go build -o build/peak ./scripts/bench/peak
	@exec $(python) scripts/bench/train.py --hone bin/hone --peak build/peak --model $(HONE_TEST_MODEL) --out build

.PHONY: bench-serve
bench-serve: model build/venv/bench ## speed of answers beside llama-server and transformers, with pass or fail per bar (builds llama.cpp, about 10 minutes; runs about 25)
	@llama=$$(scripts/bench/llama_server.sh $(python) build/llama); \
	exec $(python) scripts/bench/serve.py --hone bin/hone --llama $$llama --model $(HONE_TEST_MODEL) --out build

.PHONY: bench-quality
bench-quality: model build/venv/bench ## what hone and PEFT learn on two tasks with three seeds (installs PyTorch; about 2 hours)
	@$(python) scripts/bench/quality.py prepare --hone bin/hone --model $(HONE_TEST_MODEL) --data build/quality
	@exec $(python) scripts/bench/quality.py run --hone bin/hone --model $(HONE_TEST_MODEL) --data build/quality --out build/quality

build/venv/bench: $(python) scripts/bench/requirements.txt
	build/venv/bin/pip install --quiet --requirement scripts/bench/requirements.txt
	@touch $@

.PHONY: race
race: ## tests of serve's half under the race detector
	@CGO_ENABLED=1 go test -race -timeout 15m $(pure)

.PHONY: test-peft
test-peft: build model $(python) ## an exported adapter in PEFT gives the logits that the engine gives (installs PyTorch)
	@$(engine); HONE_PYTHON=$(CURDIR)/$(python) go test -tags peft -run PEFT -count 1 -v ./internal/train/...

# FAULTS has flags of the suite: FAULTS="-kills 200" for the published table, FAULTS="-run Kill -v", FAULTS="-seed 42".
.PHONY: test-faults
test-faults: build model ## inject faults into the real binary and write docs/faults.md
	@CGO_ENABLED=0 go test -tags faults -count 1 -timeout 90m ./internal/faults -hone $(CURDIR)/bin/hone -report $(CURDIR)/docs/faults.md $(FAULTS)

clients := $(cache)/clients-$(shell cat scripts/sdk/requirements.txt scripts/sdk/package.json | sha256sum | cut -c1-16)
.PHONY: test-clients
test-clients: build model $(clients)/ready ## curl, OpenAI's SDKs for Python, Node and Go, and go-openai against a running server
	@cd scripts/sdk/go && CGO_ENABLED=0 go build -o ../../../build/sdk/ ./...
	@scripts/with_server.sh bin/hone 'echo "== curl"; scripts/sdk/curl.sh $$base; \
		echo "== openai-python"; $(clients)/venv/bin/python scripts/sdk/openai_client.py $$base/v1; \
		echo "== openai-node"; cp scripts/sdk/openai_client.mjs $(clients)/; \
		PATH=$(clients)/venv/bin:$$PATH node $(clients)/openai_client.mjs $$base/v1 scripts/sdk/train.jsonl; \
		echo "== openai-go"; build/sdk/openai-go $$base/v1 scripts/sdk/train.jsonl; \
		echo "== go-openai"; build/sdk/go-openai $$base/v1 scripts/sdk/train.jsonl'

schemathesis := $(cache)/schemathesis-$(shell sha256sum < scripts/schemathesis/requirements.txt | cut -c1-16)
.PHONY: test-schemathesis
test-schemathesis: build model $(schemathesis)/ready ## schemathesis fuzzes a running server by its own /openapi.json (about a minute)
	@scripts/with_server.sh bin/hone 'scripts/schemathesis/run.sh $(schemathesis)/bin/schemathesis $$base'

frameworks := $(cache)/frameworks-$(shell cat scripts/frameworks/requirements.txt scripts/frameworks/package.json | sha256sum | cut -c1-16)
.PHONY: test-frameworks
test-frameworks: build model $(frameworks)/ready ## instructor, litellm, langchain-openai and the Vercel AI SDK against a running server
	@scripts/with_server.sh bin/hone '$(frameworks)/venv/bin/python scripts/frameworks/frameworks.py $$base/v1; \
		cp scripts/frameworks/ai_sdk.mjs $(frameworks)/; PATH=$(frameworks)/venv/bin:$$PATH node $(frameworks)/ai_sdk.mjs $$base/v1'

lmeval := $(cache)/lmeval-$(shell sha256sum < scripts/lmeval/requirements.txt | cut -c1-16)
.PHONY: test-lmeval
test-lmeval: build model $(lmeval)/ready ## lm-evaluation-harness against a running server: its accuracy is the predictor's
	@scripts/with_server.sh bin/hone '$(lmeval)/bin/python scripts/lmeval/run.py bin/hone $$base examples/mcq build/lmeval'

.PHONY: golden
golden: model $(python) ## compute the trainer's and the sampler's golden files again (installs PyTorch)
	$(python) scripts/golden/train_golden.py tiny internal/train/testdata
	$(python) scripts/golden/objective_golden.py internal/train/testdata
	$(python) scripts/golden/train_golden.py smollm2 $(HONE_TEST_MODEL) internal/train/testdata
	$(python) scripts/golden/sampling.py

$(python): scripts/golden/requirements.txt
	python3 -m venv build/venv
	build/venv/bin/pip install --quiet --requirement $<
	@touch $@

$(frameworks)/ready:
	python3 -m venv $(@D)/venv
	$(@D)/venv/bin/pip install --quiet --requirement scripts/frameworks/requirements.txt
	cp scripts/frameworks/package.json $(@D)
	cd $(@D) && PATH=$(@D)/venv/bin:$$PATH npm install --no-audit --no-fund --silent
	@touch $@

$(lmeval)/ready:
	python3 -m venv $(@D)
	$(@D)/bin/pip install --quiet --requirement scripts/lmeval/requirements.txt
	@touch $@

$(clients)/ready:
	python3 -m venv $(@D)/venv
	$(@D)/venv/bin/pip install --quiet --requirement scripts/sdk/requirements.txt
	cp scripts/sdk/package.json $(@D)
	cd $(@D) && PATH=$(@D)/venv/bin:$$PATH npm install --no-audit --no-fund --silent
	@touch $@

$(schemathesis)/ready:
	python3 -m venv $(@D)
	$(@D)/bin/pip install --quiet --requirement scripts/schemathesis/requirements.txt
	@touch $@

.PHONY: docker
docker: ## build the container image hone:local
	docker build --tag hone:local .

.PHONY: debian-packages
debian-packages: ## install what Debian or Ubuntu packages of the prerequisites (as root; Go and Rust are not among them)
	apt-get update
	apt-get install --yes --no-install-recommends build-essential ca-certificates cmake git python3-pip python3-venv

.PHONY: clean
clean: ## remove what was built in this tree (the cache outside of it stays)
	rm -rf bin build lib
