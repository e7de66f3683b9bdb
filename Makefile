# make         builds ./train and prints what was found on this machine
# make demo    installs what is missing, builds, and trains a small ViT on two local ranks
# make test    installs what the tests need, builds, and runs every test that needs no GPU
# make bench   times operations, decoding, and two ranks against one process; prints fractions and ratios
# make test-gpu  the tests that need an NVIDIA GPU; without one it says so
# make bench-gpu  times bf16 training steps on a GPU against the machine's PyTorch; DATA_DIR names CIFAR-10, if wanted
# make bench-pytorch  times training steps against PyTorch and timm, which it installs, in turn

CC       := gcc
CFLAGS   := -O3 -g -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math
WARNINGS := -Wall -Wextra -Werror
PREFIX   := /usr/local
CUDA_ARCHS := 90 # of the GPUs that vit_cuda.cu is compiled for: 80 A100, 90 H100 and H200, 100 B200
override CFLAGS += -std=gnu11 $(WARNINGS) -I.

HEADERS := $(wildcard *.h io/*.h data/*.h)
PARSERS := file json options safetensors data image imagefolder loader metrics
TESTS   := $(PARSERS) checkpoint pretrained compare runtime ops model dist schedule memory poison waits transport
SCRIPTS := example mismatch train tcp start launchers cuda_on_cpu nccl resume kill images errors cuda_errors compare strategies docs
FUZZERS := options safetensors idx cifar image

.DEFAULT_GOAL := train
.SECONDARY:
.PHONY: demo test test-built test-gpu test-sanitize sanitize-built fuzz bench bench-pytorch bench-gpu validate docs format
.PHONY: install clean cuda-archs

# What this machine has: OPENMP, BLAS_CFLAGS, BLAS_LIBS, JPEG_CFLAGS, JPEG_LIBS, MPI_CFLAGS, MPI_LIBS, NVCC,
# CUDA_CFLAGS, CUDA_LIBS, NCCL_CFLAGS, NCCL_LIBS.
# Goals that build nothing themselves do not ask.
NO_PROBE := demo test fuzz test-sanitize validate format clean
ifneq ($(filter-out $(NO_PROBE),$(or $(MAKECMDGOALS),train)),)
include build/config.mk
endif
build/config.mk: scripts/probe.sh | build/
	@scripts/probe.sh "$(CC)" "-std=gnu11" $@

%/:
	@mkdir -p $@

# --------------------------------------------------------------------------------------------- the program
# Three flavours of everything: plain; asan, with UBSan; tsan. The last two go without OpenMP, whose library
# is not instrumented, and fill freed memory of dist.h with NaN (DIST_DEBUG).

LIBS         := $(JPEG_LIBS) $(MPI_LIBS) -lcjson -lz -lm -lpthread -ldl
plain_CFLAGS  = $(OPENMP) $(BLAS_CFLAGS) $(JPEG_CFLAGS)
plain_LIBS    = $(BLAS_LIBS) $(LIBS)
asan_CFLAGS  := $(JPEG_CFLAGS) -O1 -DDIST_DEBUG -fsanitize=address,undefined -fno-sanitize-recover=all
tsan_CFLAGS  := $(JPEG_CFLAGS) -O1 -DDIST_DEBUG -fsanitize=thread
asan_LIBS    := $(LIBS)
tsan_LIBS    := $(LIBS)
flavour       = $(notdir $(patsubst %/,%,$(dir $@)))

build/%/vit_cpu.o: vit_cpu.c vit.h runtime.h base.h build/config.mk | build/%/
	$(CC) $(CFLAGS) $($*_CFLAGS) -c $< -o $@

# Of processes that are one rank each.
PROCESS := rendezvous dist_process dist_tcp $(if $(MPI_LIBS),dist_mpi)
build/plain/dist_nccl.o: dist_nccl.c $(HEADERS) build/config.mk | build/plain/
	$(CC) $(CFLAGS) $(plain_CFLAGS) $(NCCL_CFLAGS) -c $< -o $@
define process_rule
$(PROCESS:%=build/$(1)/%.o): build/$(1)/%.o: %.c $$(HEADERS) build/config.mk | build/$(1)/
	$$(CC) $$(CFLAGS) $$($(1)_CFLAGS) $$(MPI_CFLAGS) -c $$< -o $$@
endef
$(foreach f,plain asan tsan,$(eval $(call process_rule,$(f))))

build/plain/train: $(if $(NVCC),build/cuda/vit_cuda.o) $(if $(NCCL_LIBS),build/plain/dist_nccl.o)
build/plain/train: private plain_CFLAGS += $(CUDA_CFLAGS) $(NCCL_CFLAGS)
build/plain/train: private plain_LIBS := $(if $(NVCC),build/cuda/vit_cuda.o) $(plain_LIBS) $(CUDA_LIBS) $(NCCL_LIBS)
build/plain/train build/asan/train build/tsan/train: build/%/train: train.c $(foreach p,vit_cpu $(PROCESS),build/%/$(p).o) $(HEADERS)
	$(CC) $(CFLAGS) $($*_CFLAGS) $(MPI_CFLAGS) $(filter %.c build/$*/%.o,$^) -o $@ $($*_LIBS)

build/plain/libnvidia-ml.so.1: tests/fake_nvml.c | build/plain/
	$(CC) $(CFLAGS) -shared -fPIC $< -o $@

# vit_cuda.cu run by the CPU (tests/cuda_on_cpu.h says what changes in its source), for tests without a GPU.
ON_CPU := build/cuda_on_cpu
ON_CPU_FLAGS := -O3 -g -march=native -mprefer-vector-width=512 -std=c++20 -I. -isystem $(dir $(NVCC))../include
ON_CPU_OBJECTS := $(ON_CPU)/vit_cuda.o $(ON_CPU)/cuda_on_cpu.o build/plain/vit_cpu.o
$(ON_CPU)/vit_cuda.cpp: vit_cuda.cu | $(ON_CPU)/
	sed -e '/^.\* -* tensor cores \*.$$/,/^.\* -* attention, fused \*.$$/d' -e 's/extern __shared__/extern/' \
	    -e 's/kernel_<<<\(.*\)>>>(__VA_ARGS__)/cuda_launch(kernel_, \1, __VA_ARGS__)/' $< >$@
# asan_: under AddressSanitizer and UBSan, for kernels that read or write beyond a block of the device.
$(ON_CPU)/asan_%.o: ON_CPU_FLAGS += -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
$(ON_CPU)/vit_cuda.o $(ON_CPU)/asan_vit_cuda.o: $(ON_CPU)/vit_cuda.cpp tests/cuda_on_cpu.h vit.h runtime.h base.h build/config.mk
	$(CXX) $(ON_CPU_FLAGS) -w -fno-strict-aliasing -include tests/cuda_on_cpu.h -c $< -o $@
$(ON_CPU)/cuda_on_cpu.o $(ON_CPU)/asan_cuda_on_cpu.o: tests/cuda_on_cpu.cpp tests/cuda_on_cpu.h build/config.mk | $(ON_CPU)/
	$(CXX) $(ON_CPU_FLAGS) $(WARNINGS) -c $< -o $@
ON_CPU_ASAN := $(ON_CPU)/asan_test_ops $(ON_CPU)/asan_test_cuda
$(ON_CPU_ASAN): $(ON_CPU)/asan_%: tests/%.c $(ON_CPU)/asan_vit_cuda.o $(ON_CPU)/asan_cuda_on_cpu.o build/asan/vit_cpu.o $(HEADERS)
	$(CC) $(CFLAGS) $(asan_CFLAGS) $(CUDA_CFLAGS) $(filter %.c %.o,$^) -o $@ -lcmocka $(asan_LIBS) -lstdc++
$(ON_CPU)/train: train.c $(if $(NCCL_LIBS),tests/fake_nccl.c build/plain/dist_nccl.o) $(ON_CPU_OBJECTS) $(PROCESS:%=build/plain/%.o) $(HEADERS)
	$(CC) $(CFLAGS) $(plain_CFLAGS) $(CUDA_CFLAGS) $(MPI_CFLAGS) $(NCCL_CFLAGS) $(filter %.c %.o,$^) -o $@ \
	    $(plain_LIBS) -lstdc++

# Machine code for each of CUDA_ARCHS, and PTX of the last, which newer GPUs translate.
gencode = $(foreach a,$(1),-gencode arch=compute_$(a),code=sm_$(a)) \
    -gencode arch=compute_$(lastword $(1)),code=compute_$(lastword $(1))
NVCCFLAGS := -O3 -std=c++20 -I. -Xcompiler -Wall,-Wextra -Werror all-warnings
build/cuda/vit_cuda.o: vit_cuda.cu vit.h runtime.h base.h build/config.mk | build/cuda/
	$(NVCC) $(NVCCFLAGS) $(call gencode,$(CUDA_ARCHS)) -c $< -o $@
cuda-archs: build/config.mk | build/cuda/
	$(NVCC) $(NVCCFLAGS) $(call gencode,80 90 100) -c vit_cuda.cu -o build/cuda/all.o

train: build/plain/train
	@cp --remove-destination $< $@

demo:
	@scripts/install.sh build
	@$(MAKE) --no-print-directory train
	@rm -rf runs/demo
	./train --nproc-per-node 2 --output-dir runs/demo

# --------------------------------------------------------------------------------------------------- tests

test_flags = $(CFLAGS) $($(flavour)_CFLAGS) $(if $(filter %test_waits,$@),-DDIST_TEST_SKIP_WAIT)
test_flags += $(if $(filter %test_poison,$@),-DDIST_DEBUG)
define test_rule
build/$(1)/test_transport: tests/test_transport.c build/$(1)/vit_cpu.o $(PROCESS:%=build/$(1)/%.o) $$(HEADERS)
	$$(CC) $$(test_flags) $$(MPI_CFLAGS) $$(filter %.c %.o,$$^) -o $$@ -lcmocka $$($(1)_LIBS)
$(PARSERS:%=build/$(1)/test_%): build/$(1)/test_%: tests/test_%.c $$(HEADERS) tests/files.h build/config.mk | build/$(1)/
	$$(CC) $$(test_flags) $$< -o $$@ -lcmocka $$($(1)_LIBS)
build/$(1)/test_%: tests/test_%.c build/$(1)/vit_cpu.o $$(HEADERS) $$(wildcard tests/*.h)
	$$(CC) $$(test_flags) $$< build/$(1)/vit_cpu.o -o $$@ -lcmocka $$($(1)_LIBS)
endef
$(foreach f,plain asan tsan,$(eval $(call test_rule,$(f))))

build/cuda/fake_cuda.so: tests/fake_cuda.c build/config.mk | build/cuda/
	$(CC) $(CFLAGS) -I$(dir $(NVCC))../include -shared -fPIC $< -o $@

# test_ops: vit_cuda beside vit_cpu.
GPU_TESTS := build/cuda/test_ops build/cuda/test_cuda
$(GPU_TESTS): $(HEADERS) $(wildcard tests/*.h)
$(GPU_TESTS): build/cuda/%: tests/%.c build/plain/vit_cpu.o build/cuda/vit_cuda.o
	$(CC) $(CFLAGS) $(plain_CFLAGS) $(CUDA_CFLAGS) $< $(filter %.o,$^) -o $@ -lcmocka $(plain_LIBS) \
	    $(CUDA_LIBS)

$(ON_CPU)/test_ops $(ON_CPU)/test_cuda: $(ON_CPU)/%: tests/%.c $(ON_CPU_OBJECTS) $(HEADERS) $(wildcard tests/*.h)
	$(CC) $(CFLAGS) $(plain_CFLAGS) $(CUDA_CFLAGS) $(filter %.c %.o,$^) -o $@ -lcmocka $(plain_LIBS) -lstdc++

build/plain/test_image_stb: tests/test_image.c $(HEADERS) build/config.mk # the fallback for JPEGs
	$(CC) $(test_flags) -UHAVE_JPEG $< -o $@ -lcmocka $(plain_LIBS)

build/plain/bench_cpu build/plain/mismatch: build/plain/%: tests/%.c build/plain/vit_cpu.o $(HEADERS)
	$(CC) $(CFLAGS) $(plain_CFLAGS) $< build/plain/vit_cpu.o -o $@ $(plain_LIBS)

build/plain/bench_decode: tests/bench_decode.c $(HEADERS) build/config.mk | build/plain/
	$(CC) $(CFLAGS) $(plain_CFLAGS) $< -o $@ $(plain_LIBS)

PROGRAMS := $(TESTS:%=build/plain/test_%) $(TESTS:%=build/asan/test_%)
PROGRAMS += build/plain/test_image_stb build/tsan/test_runtime build/tsan/test_dist build/tsan/test_loader build/tsan/test_transport
PROGRAMS += $(if $(NVCC),$(ON_CPU)/test_ops $(ON_CPU)/test_cuda)

test:
	@scripts/install.sh test
	@$(MAKE) --no-print-directory -j$$(nproc) test-built
test-built: train build/asan/train build/tsan/train build/plain/mismatch $(PROGRAMS) \
    $(if $(NVCC),build/cuda/fake_cuda.so build/plain/libnvidia-ml.so.1 $(ON_CPU)/train)
	@tests/run.sh $(PROGRAMS) $(SCRIPTS:%=tests/test_%.sh)

test-gpu: train $(if $(NVCC),$(GPU_TESTS))
	@tests/run.sh $(if $(NVCC),$(GPU_TESTS)) tests/test_gpu.sh

# The long ones: every test under both.
LONG := $(TESTS:%=build/asan/test_%) $(TESTS:%=build/tsan/test_%)
test-sanitize:
	@scripts/install.sh test
	@$(MAKE) --no-print-directory sanitize-built
sanitize-built: $(LONG) $(if $(NVCC),$(ON_CPU_ASAN))
	@tests/run.sh $^

build/fuzz/%: tests/fuzz_%.c $(HEADERS) | build/fuzz/
	clang -g -O1 -std=gnu11 $(WARNINGS) -I. $(JPEG_CFLAGS) -fsanitize=fuzzer,address,undefined $< -o $@ \
	    $(JPEG_LIBS) -lcjson -lz -lm
FUZZ_SECONDS := 600
fuzz:
	@scripts/install.sh test
	@$(MAKE) --no-print-directory $(FUZZERS:%=build/fuzz/%)
	@tests/fuzz.sh $(FUZZ_SECONDS) $(FUZZERS)

bench: train build/plain/bench_cpu build/plain/bench_decode
	build/plain/bench_cpu
	@if [ -n "$$DATA_DIR" ]; then build/plain/bench_decode "$$DATA_DIR"; \
	else echo "decoding: skipped, as DATA_DIR names no folder of images"; fi
	tests/bench_ranks.sh
	tests/bench_ranks.sh 9 vit_tiny_patch16_224 8 9 ddp:2:1 zero3:2:1

bench-pytorch: train
	tests/bench_pytorch.sh

bench-gpu: train
	@tests/bench_gpu.sh $(if $(DATA_DIR),--cifar "$(DATA_DIR)")

validate:
	@echo "make $@ is not built yet" >&2; exit 1

# The chapters, with what their commands print now.
docs: train
	@mkdir -p build
	@for chapter in docs/[0-9]*.md; do \
	    scripts/docs.sh $$chapter >build/chapter && cp build/chapter $$chapter || exit 1; done

# ------------------------------------------------------------------------------------------------ the rest

format:
	clang-format -i *.c *.h *.cu io/*.h data/*.h tests/*.c tests/*.h tests/*.cpp

install: train
	install -D train $(DESTDIR)$(PREFIX)/bin/vit-train

clean:
	rm -rf build train
