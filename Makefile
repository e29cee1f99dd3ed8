# `make run` and `make test` set everything up.  A fresh machine needs Python >= 3.10 (headers, pip, venv), g++ and make.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
# Of the package that is built here: the CUDA half takes minutes, so without a GPU only who asks for it waits for them.
MOERT_CUDA ?= $(if $(wildcard /dev/nvidia[0-9]*),AUTO,OFF)
# Tests run side by side on the same cores: threads that wait must not spin.
WORKERS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
CPP    := build/cpp
OLDER  := build/transformers-5.23
export PATH := $(abspath $(BIN)):$(PATH)

READY   := $(VENV)/.moert
TOOLS   := $(VENV)/.tools-$(firstword $(TORCH))
CHOICE  := $(VENV)/.cuda-$(MOERT_CUDA)
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc -type f)
ISAS     = $(shell $(BIN)/python -c "from moert import _C; kernels = sum(_C.build()['kernels'].values(), ['generic']); print(*[isa for isa in _C.isas() if isa in kernels])")

.PHONY: run test cuda cuda-sass cuda-toolchain test-gpu test-cpp test-isa test-slow test-transformers test-asan test-tsan test-aarch64 test-abi test-wheel fuzz lint size docs bench bench-peers bench-smoke bench-cpp bench-gpu systems systems-page clean

run: $(READY)
	$(BIN)/moert run

test: lint size test-cpp test-isa bench-smoke
	$(PYTEST) -m "not slow and not gpu"

test-cpp: $(READY)
	$(BIN)/cmake -S . -B $(CPP) -G Ninja -DMOERT_TORCH=OFF -DMOERT_TESTS=ON -DMOERT_CUDA=OFF >$(VENV)/cmake.log || (cat $(VENV)/cmake.log; false)
	$(BIN)/cmake --build $(CPP) && $(BIN)/ctest --test-dir $(CPP) --output-on-failure
	$(BIN)/python tools/symbols.py $(CPP)

# Every instruction set with kernels of its own that this CPU has, but the highest, which all other targets use.
# Registration, compilation and exchanges do not depend on it, test_every_isa… chooses for itself, avx512_vnni has
# kernels of packed weights alone, avx512_bf16 of products of floats.  ISA_TESTS=tests: the whole suite under each.
OF_KERNELS  := -m "not slow and not gpu and not ranks" -k "not opcheck and not test_compile and not test_every_isa"
OF_PRODUCTS := $(addprefix tests/,$(addprefix ops/test_,fused_experts.py fused_experts_main_grad.py grouped_gemm.py union_experts.py many_experts.py) test_numerics.py runtime/test_prepack.py)
OF_PACKED   := $(addprefix tests/ops/test_,fused_experts_quantized.py fused_experts_quantized_groups.py fused_experts_quantized_int8_weights.py)
PACKERS     := $(patsubst %,tests/quant/test_%.py,bit_nested int4 int8 mxfp4 ternary)
test-isa: test-cpp
	set -e; for isa in $(filter-out $(lastword $(ISAS)),$(ISAS)); do export MOERT_ISA=$$isa; echo "MOERT_ISA=$$isa"; \
	  $(BIN)/ctest --test-dir $(CPP) -Q; \
	  case $$isa in avx512_vnni) files="$(OF_PACKED)";; avx512_bf16) files="$(OF_PRODUCTS)";; \
	    *) files="tests/ops $(PACKERS) tests/test_numerics.py tests/test_determinism.py tests/runtime/test_prepack.py";; esac; \
	  $(PYTEST) -q -m "not slow and not gpu" $(or $(ISA_TESTS),$$files $(OF_KERNELS)); done

test-slow: $(READY)
	$(PYTEST) -m slow

# The older of the two supported minor versions of transformers; `make test` has the newest.
test-transformers: $(READY) $(OLDER)/transformers
	export PYTHONPATH=$(abspath $(OLDER)); $(BIN)/python -c "import transformers; print(transformers.__version__, transformers.__file__)"; \
	  $(PYTEST) -q -m "not gpu" tests/integrations/transformers

$(OLDER)/transformers: $(READY)
	$(BIN)/pip install -q --no-deps --upgrade --target $(OLDER) 'transformers==5.23.*'
	touch $@

# The CUDA half, compiled, and its kernels over tensor cores with their instructions imitated; nothing needs a GPU.
cuda: $(READY)
	$(BIN)/pip install -q --no-deps nvidia-cutlass==4.2.0.0
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DMOERT_CUDA=ON -DMOERT_TESTS=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" >$(VENV)/cmake.log || (cat $(VENV)/cmake.log; false)
	$(BIN)/cmake --build build/cuda
	$(BIN)/ctest --test-dir build/cuda -R emulated_mma --no-tests=error --output-on-failure

# Its machine code: registers that were spilled, loads of 16 bytes.
cuda-sass: cuda
	command -v cuobjdump >/dev/null || $(BIN)/pip install -q --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python tools/sass.py build/cuda/_cuda.so

# The compiler for it and what reads its machine code, from PyPI, where the machine has none.
cuda-toolchain: $(TOOLS)
	$(BIN)/pip install -q 'cuda-toolkit[nvcc,cccl]==13.0.*' nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm

# Needs a GPU and a torch built for CUDA: TORCH="torch --index-url https://download.pytorch.org/whl/cu130".
test-gpu: $(READY)
	tools/test_gpu.sh $(BIN)/python $(ARGS)

test-asan: $(READY)
	tools/test_asan.sh $(BIN)/python

test-tsan: $(READY)
	$(BIN)/cmake -S . -B build/tsan -G Ninja -DMOERT_TORCH=OFF -DMOERT_TESTS=ON -DMOERT_CUDA=OFF -DMOERT_STD_THREAD=ON -DMOERT_SANITIZE=thread
	$(BIN)/cmake --build build/tsan && $(BIN)/ctest --test-dir build/tsan --output-on-failure

# The portable kernels' C++ tests as an aarch64 machine runs them.  Needs apt install g++-aarch64-linux-gnu qemu-user.
test-aarch64: $(READY)
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DMOERT_TORCH=OFF -DMOERT_TESTS=ON -DMOERT_CUDA=OFF -DCMAKE_TOOLCHAIN_FILE=$(abspath cmake/aarch64.cmake)
	$(BIN)/cmake --build build/aarch64 && $(BIN)/ctest --test-dir build/aarch64 --output-on-failure

test-abi: $(READY)
	tools/test_abi.sh $(BIN)/python

test-wheel: $(READY)
	tools/test_wheel.sh $(BIN)/python "$(TORCH)"

# Hostile bytes for every decoder of packed weights and checkpoints, for so many seconds; a finding's bytes stay in build/fuzz.
SECONDS ?= 60
fuzz: $(READY)
	$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/pip install -q atheris
	mkdir -p build/fuzz && cd build/fuzz && $(abspath $(BIN)/python) $(abspath tests/fuzz/fuzz_packed.py) corpus -max_total_time=$(SECONDS) -timeout=20 -verbosity=0

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/python tools/bans.py && $(BIN)/python tools/mirror.py

size: $(READY)
	$(BIN)/python tools/size.py

docs: $(READY)
	$(PYTEST) -q tests/test_docs.py

# Operators beside torch, then whole layers beside every peer: a subset with every regime, about 10 minutes on two cores;
# ARGS=--quick: a few shapes in bfloat16, about 3; ARGS=--full: everything, hours, resumed where it was cut off.  The
# --help of both programs says what each size has.  Other ARGS are for the layers; those that choose among them (--model,
# --dtype, --T, --routing), or time another commit's (--base REV), ask for no operators.
bench: $(READY)
	$(if $(filter --model% --dtype% --T% --routing% --base%,$(ARGS)),,$(BIN)/python bench/run.py $(filter --quick --full --smoke --keep-memory,$(ARGS)))
	$(BIN)/python bench/layers.py $(ARGS)

bench-peers: $(READY)
	tools/bench_peers.sh $(BIN)/python

bench-smoke: $(READY)
	$(BIN)/python bench/run.py --smoke
	$(BIN)/python bench/layers.py --smoke
	$(BIN)/python bench/links.py --smoke
	$(BIN)/python bench/simulate.py --smoke
	$(BIN)/python bench/packing.py --smoke
	$(BIN)/python bench/router_parts.py --smoke
	$(BIN)/python bench/whole_models.py --smoke
	$(BIN)/torchrun --nproc-per-node 2 bench/exchange.py --smoke
	$(BIN)/python bench/gpu.py --smoke --device cpu

# Needs a GPU, as test-gpu does, and its build of the package.
bench-gpu: $(READY)
	tools/bench_gpu.sh $(BIN)/python $(ARGS)

# Needs Google Benchmark: apt install libbenchmark-dev.
bench-cpp: $(READY)
	$(BIN)/cmake -S . -B build/bench -G Ninja -DMOERT_TORCH=OFF -DMOERT_BENCH=ON -DMOERT_CUDA=OFF >$(VENV)/cmake.log || (cat $(VENV)/cmake.log; false)
	$(BIN)/cmake --build build/bench && build/bench/bench_cpp $(ARGS)

# Every system's experiment (under two minutes each on two cores), or ARGS="mor promoe", then docs/systems.md from their results.
systems: $(READY)
	$(BIN)/python examples/systems/experiment/every.py $(ARGS)

systems-page: $(READY)
	$(BIN)/python examples/systems/experiment/page.py

clean:
	rm -rf build dist $(VENV)

# A second call does nothing: each stamp is newer than all it was made from, and the build folder is kept.
$(READY): $(TOOLS) $(CHOICE) $(SOURCES)
	touch $@.new  # before the build, so that a file saved during it counts as newer
	$(if $(filter-out OFF,$(MOERT_CUDA)),$(BIN)/pip install -q --no-deps nvidia-cutlass==4.2.0.0)
	@echo "Compiling moert (some minutes the first time)"
	MOERT_CUDA=$(MOERT_CUDA) $(BIN)/pip install -q --no-build-isolation -e '.[test]'
	mv $@.new $@

$(TOOLS):
	$(PYTHON) tools/machine.py
	@echo "Making $(VENV) and downloading torch"
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.tools-*
	$(BIN)/pip install -q "$(firstword $(TORCH))" $(wordlist 2,9,$(TORCH)) scikit-build-core pybind11 cmake ninja
	touch "$@"

$(CHOICE): $(TOOLS)
	rm -f $(VENV)/.cuda-*
	touch $@
