# make            builds ./train and prints what was found on this machine
# make demo       installs what is missing, builds, trains a small ViT on two local ranks
# make test       installs what the tests need, builds and runs every test that needs no GPU

CC       := gcc
CFLAGS   := -O3 -g -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math
WARNINGS := -Wall -Wextra -Werror
PREFIX   := /usr/local
override CFLAGS += -std=gnu11 $(WARNINGS) -I.

HEADERS := $(wildcard *.h io/*.h data/*.h)
TESTS   := options safetensors data metrics checkpoint runtime ops model dist waits
FUZZERS := options safetensors idx cifar

.PHONY: all demo test test-sanitize fuzz bench format install clean deps-build deps-test
.DEFAULT_GOAL := all
.SECONDARY:

# What this machine has; made again when the compiler changes.
build/config.mk: scripts/probe.sh | build/
	@scripts/probe.sh "$(CC)" "-std=gnu11" $@
ifeq ($(filter clean format deps-build deps-test,$(MAKECMDGOALS)),)
-include build/config.mk
endif
LIBS := $(BLAS_LIBS) -lcjson -lz -lm -lpthread

%/:
	@mkdir -p $@

all: train

train: train.c vit_cpu.c $(HEADERS) build/config.mk Makefile
	$(CC) $(CFLAGS) $(OPENMP) $(BLAS_CFLAGS) train.c vit_cpu.c -o $@ $(LIBS)

deps-build:
	@scripts/install.sh build
deps-test:
	@scripts/install.sh test

demo: deps-build
	@$(MAKE) --no-print-directory train
	@rm -rf runs/demo
	./train --nproc-per-node 2 --output-dir runs/demo

# ---------------------------------------------------------------------------------------------------------- tests
# Three builds of every test: plain; ASan + UBSan; and, for what runs ranks, TSan without OpenMP (libgomp is not
# instrumented and would be reported).

build/plain/test_%: tests/test_%.c vit_cpu.c $(HEADERS) $(wildcard tests/*.h) build/config.mk Makefile | build/plain/
	$(CC) $(CFLAGS) $(OPENMP) $(BLAS_CFLAGS) $(if $(filter waits,$*),-DDIST_TEST_SKIP_WAIT) $< vit_cpu.c -o $@ -lcmocka $(LIBS)

build/asan/test_%: tests/test_%.c vit_cpu.c $(HEADERS) $(wildcard tests/*.h) build/config.mk Makefile | build/asan/
	$(CC) $(CFLAGS) -O1 -fsanitize=address,undefined -fno-sanitize-recover=all $(if $(filter waits,$*),-DDIST_TEST_SKIP_WAIT) \
	    $< vit_cpu.c -o $@ -lcmocka -lcjson -lz -lm -lpthread

build/tsan/test_%: tests/test_%.c vit_cpu.c $(HEADERS) $(wildcard tests/*.h) build/config.mk Makefile | build/tsan/
	$(CC) $(CFLAGS) -O1 -fsanitize=thread $< vit_cpu.c -o $@ -lcmocka -lcjson -lz -lm -lpthread

build/plain/%: tests/%.c vit_cpu.c $(HEADERS) build/config.mk Makefile | build/plain/
	$(CC) $(CFLAGS) $(OPENMP) $(BLAS_CFLAGS) $< vit_cpu.c -o $@ $(LIBS)

build/asan/train build/tsan/train: build/%/train: train.c vit_cpu.c $(HEADERS) build/config.mk Makefile | build/asan/ build/tsan/
	$(CC) $(CFLAGS) -O1 -fsanitize=$(if $(filter asan,$*),address$(,)undefined -fno-sanitize-recover=all,thread) \
	    train.c vit_cpu.c -o $@ -lcjson -lz -lm -lpthread
, := ,

PLAIN := $(TESTS:%=build/plain/test_%)
ASAN  := $(TESTS:%=build/asan/test_%)
TSAN  := build/tsan/test_runtime build/tsan/test_dist
SHELL_TESTS := tests/test_example.sh tests/test_mismatch.sh tests/test_train.sh tests/test_errors.sh

test: deps-test
	@$(MAKE) --no-print-directory test-built
test-built: train $(PLAIN) $(ASAN) $(TSAN) build/plain/example build/plain/mismatch build/asan/train build/tsan/train
	@tests/run.sh $(PLAIN) $(ASAN) $(TSAN) $(SHELL_TESTS)
.PHONY: test-built

bench: build/plain/bench_cpu train
	build/plain/bench_cpu
	tests/bench_ranks.sh

build/fuzz/%: tests/fuzz_%.c $(HEADERS) | build/fuzz/
	clang $(CFLAGS) -O1 -fsanitize=fuzzer,address,undefined $< -o $@ -lcjson -lz -lm
FUZZ_SECONDS := 600
fuzz: deps-test $(FUZZERS:%=build/fuzz/%)
	@tests/fuzz.sh $(FUZZ_SECONDS) $(FUZZERS)

format:
	clang-format -i *.c *.h io/*.h data/*.h tests/*.c tests/*.h

install: train
	install -D train $(DESTDIR)$(PREFIX)/bin/vit-train

clean:
	rm -rf build train
