# Everything starts here: `make` alone lists the commands. Nothing has to be installed first but Python 3.11+ and git.

# Each stage has a config of its own unless CONFIG names one.
JOB := $(firstword $(filter record stage2 cache diffrir release,$(MAKECMDGOALS)) stage1)
CONFIG ?= configs/$(JOB:cache=stage2)/toy.yaml
ARGS   ?=

# Where a run's processes start; llmga/nodes/launch.py makes the line, prints it and becomes it (docs/cluster.md).
NPROC       ?= 1
NODES       ?= 1
LAUNCHER    ?=
MASTER_ADDR ?=
MASTER_PORT ?=
NODE_RANK   ?=
HOSTFILE    ?=
LAUNCH_ARGS ?=

BIN := .venv/bin
PY  := $(BIN)/python
export PYTHON  # setup_env.sh makes .venv with it, if given
unexport PYTHONDONTWRITEBYTECODE  # where containers set it, each of a suite's hundred processes would compile all again

LAUNCH = -m llmga.nodes.launch --nodes=$(NODES) --nproc=$(NPROC) --launcher=$(LAUNCHER) --node-rank=$(NODE_RANK) \
  --master-addr=$(MASTER_ADDR) --master-port=$(MASTER_PORT) --hostfile=$(HOSTFILE) --launch-args="$(LAUNCH_ARGS)" --python=$(PY)
STAGE1 = scripts/train_stage1.py $(CONFIG) $(ARGS)
STAGE2 = scripts/train_stage2.py $(CONFIG) $(ARGS)
DIFFRIR = scripts/train_diffrir.py $(CONFIG) $(ARGS)
CACHE  = scripts/cache_stage2.py $(CONFIG) $(ARGS)
# A config that trains from a cache has it made, or mended, first.
NEEDS_CACHE := $(if $(shell grep -slE '^cache:' $(CONFIG)),cache)

# The toy data is built when a config reads it.
TOY_DATA := data/toy/train.jsonl
NEEDS_DATA := $(if $(shell grep -sl data/toy $(CONFIG)),$(TOY_DATA))
# Its prompts are recorded when a config of stage 2 reads them and they are not there.
TOY_PROMPTS := data/toy/recorded.jsonl
NEEDS_PROMPTS := $(if $(shell grep -sl $(TOY_PROMPTS) $(CONFIG)),$(TOY_PROMPTS))

.PHONY: help
help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s%s\n", $$1, $$2}' Makefile
	@echo
	@echo '  CONFIG=my.yaml NPROC=8 NODES=2 ARGS="optim.lr=1e-5 run.seed=1" change what is run'
	@echo '  LAUNCHER=torchrun|deepspeed|slurm|python MASTER_ADDR=node0 change how; see docs/cluster.md'

.PHONY: install
install:  ## make .venv with the pinned packages (every command does it when needed)
	@scripts/setup_env.sh

.PHONY: $(TOY_DATA)
$(TOY_DATA): | install  # data of the same settings and wording is left as it is
	$(PY) data_tools/build_world.py --out $(@D)

.PHONY: stage1
stage1: install $(NEEDS_DATA)  ## teach the MLLM to write generation prompts; toy scale by default
	@$(PY) $(LAUNCH) $(STAGE1)

.PHONY: stage2
stage2: install $(NEEDS_DATA) $(NEEDS_PROMPTS) $(NEEDS_CACHE)  ## teach Stable Diffusion to follow long prompts; toy scale by default
	@$(PY) $(LAUNCH) $(STAGE2)

.PHONY: cache
cache: install $(NEEDS_DATA) $(NEEDS_PROMPTS)  ## make or mend the latents that CONFIG trains stage 2 from
	@$(PY) $(LAUNCH) $(CACHE)

.PHONY: diffrir
diffrir: install $(NEEDS_DATA)  ## train the restorer, phase after phase; toy scale by default
	@$(PY) $(LAUNCH) $(DIFFRIR)

.PHONY: launch-line
launch-line:  ## print the line that `make stage1` starts, for a scheduler of your own
	@$(or $(wildcard $(PY)),python3) $(LAUNCH) --dry-run $(STAGE1)

.PHONY: preflight
preflight: install  ## check the machines, packages, folders and network that a run would use
	@$(PY) $(LAUNCH) -m llmga preflight $(CONFIG) $(ARGS)

.PHONY: plan
plan: install $(NEEDS_DATA)  ## tell what CONFIG will do, need and cost, without running it; NPROC=8 ARGS="--card A100-80GB"
	$(PY) -m llmga plan $(CONFIG) --devices $$(( $(NODES) * $(NPROC) )) $(ARGS)

.PHONY: preview
preview: install $(NEEDS_DATA)  ## write a page of the examples that CONFIG trains on
	$(PY) -m llmga preview $(CONFIG) $(ARGS)

# One recording, from one process or many: they share no port and never wait for each other.
# The toy recording asks what `make stage1` made, where that is there, else the shipped tuned model.
STAGE1_MODEL := $(addprefix model=,$(wildcard runs/stage1_toy/final))
.PHONY: record
record: install $(NEEDS_DATA)  ## have the MLLM write the prompt of every row of a manifest, for stage 2
	@$(PY) $(LAUNCH) scripts/record_prompts.py $(CONFIG) $(if $(filter configs/record/toy.yaml,$(CONFIG)),$(STAGE1_MODEL)) $(ARGS)

$(TOY_PROMPTS): | install $(TOY_DATA)
	@$(PY) $(LAUNCH) scripts/record_prompts.py configs/record/toy.yaml $(STAGE1_MODEL)

.PHONY: eval
eval: install $(TOY_DATA)  ## measure what stage 1 learned, the base model beside the tuned one
	$(PY) eval/language.py $(ARGS)

.PHONY: release
release: install  ## release a model to the Hugging Face Hub; ARGS="repo=OWNER/NAME --dry-run" lists what would be pushed
	@$(PY) -m llmga release $(CONFIG) $(ARGS)

.PHONY: toy-base
toy-base: install  ## train the shipped toy base MLLM again
	$(PY) scripts/make_toy_base.py $(ARGS)

.PHONY: toy-tuned
toy-tuned: install  ## train the shipped tuned toy MLLM again
	$(PY) scripts/make_toy_tuned.py $(ARGS)

.PHONY: toy-restorer
toy-restorer: install  ## train the shipped toy restorer again
	$(PY) scripts/make_toy_restorer.py $(ARGS)

.PHONY: toy-sd
toy-sd: install  ## train the toy Stable Diffusion `base` again
	$(PY) scripts/make_toy_sd.py $(ARGS)

# Tests of one file stay in one worker, which makes what they share once. The order is the folders': the slow rings come
# first, and the unit tests fill what is left of both workers at the end.
.PHONY: test
test: install  ## run the whole test suite
	$(PY) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: unit
unit: install  ## run the unit tests, in less than a minute
	$(PY) -m pytest tests/unit -n 2 --dist worksteal $(ARGS)

.PHONY: check
check: install  ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(PY) -m mypy
	$(BIN)/lint-imports

.PHONY: constraints
constraints: install  ## write the installed versions to constraints.txt
	@{ head -n 2 constraints.txt; $(PY) -m pip freeze --exclude-editable; } > constraints.txt.part
	mv constraints.txt.part constraints.txt

.PHONY: clean
clean:  ## remove the toy data and the tools' caches; .venv and runs stay
	rm -rf data/toy .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build llmga.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
