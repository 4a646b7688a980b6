# Two commands matter: `make demo` and `make test`. Each installs what it needs first; afterwards neither touches
# any network but loopback. PYTHON=python3.12 chooses an interpreter, UV=/path/to/uv an installer.
VENV ?= .venv
BIN := $(VENV)/bin
# Spinning OpenMP threads starve two busy cores: 1 token/s instead of 18.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0
export ORT_DISABLE_TELEMETRY := 1
export PYTHON UV VENV
# A warning is an error. Of what LangChain calls beta it says so once a process, to whichever test is the first.
STRICT := -W error -W ignore::langchain_core._api.beta_decorator.LangChainBetaWarning
# Whoever sets it would have every test rewritten in every worker of every run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo service service-load test test-slow test-lowest test-newest soak check bench-cache bench-growth lock clean

install:
	@sh tools/install.sh

demo: install
	@$(BIN)/python -m langchain_aegis demo

# The example service on the embedded parts, http://127.0.0.1:8080; REDIS_URL and OLLAMA_BASE_URL name others.
service: install
	@$(BIN)/python examples/service/run.py $(ARGS)

# The same under 200 clients for a minute, while a worker and Redis are killed; exit code 1 if any question ended in
# anything but an answer or a typed 503. ARGS="--clients 50 --seconds 20 --json FILE" adds to the command line.
service-load: install
	@$(BIN)/python examples/service/load.py --start --kill-worker --restart-redis $(ARGS)

test: install
	@$(BIN)/python -m pytest $(STRICT) -n 2 --dist worksteal -m "not slow"

# What takes more than some seconds each: long runs, real models, examples as processes of their own.
test-slow: install
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The same with the lowest, or the newest, versions that pyproject.toml allows, in an environment of its own.
test-lowest test-newest: test-%:
	@RESOLUTION=$(subst newest,highest,$(subst lowest,lowest-direct,$*)) VENV=.venv-$* sh tools/install.sh
	@.venv-$*/bin/python -m pytest $(STRICT) -n 2 --dist worksteal -m "not slow"

# Half an hour of faults, one every five seconds; exit code 1 if anything was ever wrong.
# ARGS="--seconds 180 --seed 7 --report FILE" adds to the command line.
soak: install
	@$(BIN)/python tests/faults/soak.py $(ARGS)

check: install
	@$(BIN)/python tools/check.py

# Measure the cache, on a machine that does nothing else, and write benchmarks/README.md. PYTHON_BENCH may name an
# interpreter that also has langchain-redis, to which it is then compared; ARGS adds to the command line.
PYTHON_BENCH ?= $(BIN)/python

bench-cache: install
	@PYTHONPATH=. $(PYTHON_BENCH) benchmarks/cache.py --write $(ARGS)

bench-growth: install
	@PYTHONPATH=. $(PYTHON_BENCH) benchmarks/growth.py --write $(ARGS)

# Renew the pins. The file holds hashes and no addresses, so that any index serves it.
lock: install
	@sh tools/install.sh lock

clean:
	rm -rf .venv .venv-* .uv .cache dist
