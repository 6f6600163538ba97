# Thin: what a target does is in scripts/, in cargo or in the program. `make demo` and `make test` install what is missing.

# The online store of `make demo`: embedded or redis.
ONLINE ?= embedded
export ONLINE

.PHONY: setup demo demo-audit demo-rollout test lint fmt clean bench-pit bench-windows bench-flight bench-online bench-inference bench-rollout bench-audit

setup: ## what `demo` needs: compilers, a Python environment, libtorch
	@scripts/setup.sh

demo: ## definitions to served predictions on real flights, with the audit
	@scripts/demo.sh

demo-audit: ## what is served on real flights, logged and audited; labels; drift; planted faults
	@scripts/demo.sh audit

demo-rollout: ## a model through shadow and canary to champion, one that is stopped, and a rollback; on real flights
	@scripts/demo.sh rollout

test: ## formatting, clippy, Rust tests, Python tests against a real server
	@scripts/test.sh

lint: ## formatting and clippy only
	@scripts/lint.sh

fmt: ## format the Rust code
	@cargo fmt --all

bench-pit bench-windows bench-flight bench-online bench-inference bench-rollout: bench-%: ## ours and what users would pick instead, in turn on the same files
	@scripts/bench.sh $*

bench-audit: ## faults planted into a serving log: which the audit flags, and what it says they are
	@scripts/bench.sh audit

clean: ## remove what was built (the Python environment stays)
	@scripts/clean.sh
