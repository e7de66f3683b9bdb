/* cuda_on_cpu.cpp - the CUDA runtime and cuBLASLt for tests/cuda_on_cpu.h: blocks run one after the other,
 * streams are queues, which run when somebody waits for them and not before.
 *
 * CUDA_ON_CPU: "late" (default), nothing runs before it must; "compute" and "communication", only what is
 * on the stream of that name (communication is what has a priority) runs late, the other at once; "early",
 * all runs at once. Work that forgets to wait for another stream finds old data under one of them.
 * CUDA_ON_CPU_DEVICES: how many there are (1). CUDA_ON_CPU_GUARD: host code that touches the device's memory
 * is a segmentation fault, as long as no work is under way. CUDA_ON_CPU_FORGET: no stream waits for an event,
 * by which tests see whether they would tell. */
#include "cuda_on_cpu.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

void cuda_wrong(const char *what) {
    fprintf(stderr, "CUDA on the CPU: %s\n", what);
    abort();
}

/* ------------------------------------------------------------------------------------ threads of a block */

namespace {
const size_t WARP = 32, STACK = 256 << 10, MOST_THREADS = 1024, MOST_SHARED = 48 << 10;

struct barrier {
    unsigned live, arrived, generation;
    void open() { arrived = 0, generation++; }
    void leave() {
        if (--live && arrived == live) open();
    }
};

struct warp {
    barrier meeting;
    alignas(32) char slot[2][WARP * 32];
};

struct worker : cuda_thread { /* a thread of the block */
    warp *own;
    unsigned exchanges;
};

/* A fiber runs threads of the block, the next when one has ended; where one must wait, another goes on. */
struct fiber {
    ucontext_t start;
    void *here[5]; /* of __builtin_setjmp, which costs less than setjmp */
    bool begun;
    std::unique_ptr<char[]> stack;
    worker *runs;
    const barrier *waits; /* NULL: it has run out of threads */
    unsigned generation;
};

struct block {
    const std::function<void()> *body;
    std::vector<worker> threads;
    std::vector<warp> warps;
    barrier all;
    size_t next; /* thread that no fiber has begun */
    std::vector<std::unique_ptr<fiber>> fibers;
    fiber *current;
    void *scheduler[5];
};
block the_block; /* with the lock of the runtime */

[[gnu::noinline]] void enter_scheduler() { __builtin_longjmp(the_block.scheduler, 1); }

[[gnu::noinline]] void leave_fiber() {
    if (!__builtin_setjmp(the_block.current->here)) enter_scheduler();
}

void run_threads() {
    for (;;) {
        block &b = the_block;
        while (b.next < b.threads.size()) {
            worker *t = b.current->runs = &b.threads[b.next++];
            cuda_self = t;
            (*b.body)();
            t = b.current->runs;
            t->own->meeting.leave();
            b.all.leave();
        }
        b.current->waits = NULL;
        leave_fiber();
    }
}

void wait_at(barrier &at) {
    block &b = the_block;
    fiber *f = b.current;
    if (++at.arrived == at.live) return at.open();
    f->waits = &at, f->generation = at.generation;
    leave_fiber();
}

[[gnu::noinline]] void enter_fiber(fiber *f) {
    if (f->begun) __builtin_longjmp(f->here, 1);
    f->begun = true;
    setcontext(&f->start);
}

/* Until the fiber waits, or no thread is left. */
[[gnu::noinline]] void resume(fiber *f) {
    the_block.current = f;
    cuda_self = f->runs;
    if (!__builtin_setjmp(the_block.scheduler)) enter_fiber(f);
}

fiber *new_fiber() {
    auto f = std::make_unique<fiber>();
    f->stack = std::make_unique<char[]>(STACK);
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack.get();
    f->start.uc_stack.ss_size = STACK;
    f->start.uc_link = NULL;
    makecontext(&f->start, run_threads, 0);
    the_block.fibers.push_back(std::move(f));
    return the_block.fibers.back().get();
}

/* The threads of a block that has been set up. */
void run_block() {
    block &b = the_block;
    size_t used = 0; /* fibers that wait */
    while (b.next < b.threads.size()) {
        fiber *f = used < b.fibers.size() ? b.fibers[used].get() : new_fiber();
        resume(f);
        used += f->waits != NULL;
    }
    for (bool moved = true; moved;) {
        bool left = moved = false;
        for (size_t i = 0; i < used; i++) {
            fiber *f = b.fibers[i].get();
            if (!f->waits) continue;
            left = true;
            if (f->waits->generation == f->generation) continue;
            resume(f);
            moved = true;
        }
        if (left && !moved) cuda_wrong("the threads of a block wait for each other");
    }
}

void run_blocks(dim3 blocks, dim3 threads, const std::function<void()> &body) {
    const unsigned n = threads.x * threads.y * threads.z;
    block &b = the_block;
    b.body = &body;
    b.threads.resize(n);
    b.warps.resize(n / WARP);
    for (unsigned k = 0; k < blocks.x; k++) {
        for (unsigned w = 0; w < n / WARP; w++) b.warps[w].meeting = {WARP, 0, 0};
        for (unsigned i = 0; i < n; i++) {
            worker &t = b.threads[i];
            t.thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
            t.block = {k, 0, 0};
            t.threads = threads, t.blocks = blocks;
            t.own = &b.warps[i / WARP], t.exchanges = 0;
        }
        b.all = {n, 0, 0};
        b.next = 0;
        run_block();
    }
}
}  // namespace

cuda_thread *cuda_self;
float shared[MOST_SHARED / sizeof(float)];

void __syncthreads(void) { wait_at(the_block.all); }

const char *cuda_exchange(const void *mine, size_t bytes) {
    worker *t = the_block.current->runs;
    warp *w = t->own;
    char *slot = w->slot[t->exchanges++ % 2];
    const size_t lane = (size_t)(t - the_block.threads.data()) % WARP;
    if (w->meeting.live != WARP) cuda_wrong("an exchange with lanes that have left");
    memcpy(slot + lane * 32, mine, bytes);
    wait_at(w->meeting);
    return slot;
}

/* ---------------------------------------------------------------------------------------------- streams */

namespace {
struct capture;
struct state { /* of an event; who waits for it keeps it */
    unsigned long recorded = 0, done = 0;
    double time = 0;
    CUstream_st *stream = nullptr; /* where it was recorded last */
    std::shared_ptr<capture> in;   /* the last record was in a capture */
    std::set<size_t> after;        /* of its nodes */
};
}  // namespace
struct CUevent_st : std::shared_ptr<state> {};

namespace {
struct node;
typedef std::shared_ptr<const std::vector<node>> nodes;
struct task { /* one of: */
    std::function<void()> run{};
    std::shared_ptr<state> wait{}; /* until it has been recorded so often: */
    unsigned long times = 0;
    nodes graph{};
    bool outside = false; /* run without the lock: what may take long */
};

struct node {
    task what;
    bool communicates;
    std::set<size_t> after;
};

struct capture {
    CUstream_st *origin;
    std::vector<node> graph;
    bool over = false;
};
}  // namespace

struct CUstream_st {
    std::deque<task> queue;
    bool communicates = false, busy = false;
    std::shared_ptr<capture> in;
    std::set<size_t> after; /* nodes that its next follows */
};
struct CUgraph_st {
    nodes graph{};
};
struct CUgraphExec_st : CUgraph_st {};

namespace {
struct runtime {
    std::mutex lock;
    std::condition_variable changed;
    std::string policy = getenv("CUDA_ON_CPU") ? getenv("CUDA_ON_CPU") : "late";
    int devices = getenv("CUDA_ON_CPU_DEVICES") ? atoi(getenv("CUDA_ON_CPU_DEVICES")) : 1;
    char *memory = nullptr; /* of the device [TOTAL_MEMORY], as far as `end` in use */
    size_t end = 0;
    std::map<char *, size_t> pieces, pinned; /* that were allocated */
    size_t used = 0;
    bool guard = getenv("CUDA_ON_CPU_GUARD") != nullptr;
    int accesses = 0; /* work under way, to which the device's memory is open */
} the;
thread_local struct {
    int device, captures; /* captures: under way */
    cudaError_t last;
} mine;
const size_t TOTAL_MEMORY = (size_t)4 << 30, PAGE = 4096;

typedef std::unique_lock<std::mutex> lock_guard;

cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) mine.last = error;
    return error;
}

double now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The device's memory is for its work alone, with the guard. */
void open_memory() {
    if (the.accesses++ == 0 && the.guard && mprotect(the.memory, the.end, PROT_READ | PROT_WRITE))
        cuda_wrong("mprotect fails");
}
void close_memory() {
    if (--the.accesses == 0 && the.guard && mprotect(the.memory, the.end, PROT_NONE))
        cuda_wrong("mprotect fails");
}

bool is_late(bool communicates) {
    return the.policy == "late" || the.policy == (communicates ? "communication" : "compute");
}

void execute(lock_guard &lock, const task &t);

/* In an order in which each node comes after those that it follows, and what is late comes last. */
void run_graph(lock_guard &lock, const std::vector<node> &all) {
    std::vector<bool> done(all.size());
    for (size_t left = all.size(); left; left--) {
        size_t next = all.size();
        for (size_t i = 0; i < all.size(); i++) {
            const bool ready = !done[i] && std::all_of(all[i].after.begin(), all[i].after.end(),
                                                       [&](size_t k) { return (bool)done[k]; });
            if (ready &&
                (next == all.size() || (is_late(all[next].communicates) && !is_late(all[i].communicates))))
                next = i;
        }
        execute(lock, all[next].what);
        done[next] = true;
    }
}

void execute(lock_guard &lock, const task &t) {
    if (t.graph) return run_graph(lock, *t.graph);
    if (!t.outside) return t.run();
    lock.unlock();
    t.run();
    lock.lock();
}

/* Runs the stream until enough() or, if that never holds, until it is empty. */
void advance(lock_guard &lock, CUstream_st *s, const std::function<bool()> &enough) {
    open_memory();
    while (!enough()) {
        if (s->busy) { /* another thread runs it */
            the.changed.wait(lock);
            continue;
        }
        if (s->queue.empty()) break;
        task t = std::move(s->queue.front());
        s->queue.pop_front();
        s->busy = true;
        if (t.wait)
            advance(lock, t.wait->stream, [&] { return t.wait->done >= t.times; });
        else
            execute(lock, t);
        s->busy = false;
        the.changed.notify_all();
    }
    close_memory();
}

bool never() { return false; }

/* Is the stream part of a capture? */
bool captured(CUstream_st *s) {
    if (s->in && s->in->over) s->in = nullptr;
    return s->in != nullptr;
}

cudaError_t enqueue(lock_guard &lock, CUstream_st *s, task t) {
    if (captured(s)) {
        s->in->graph.push_back({std::move(t), s->communicates, s->after});
        s->after = {s->in->graph.size() - 1};
        return cudaSuccess;
    }
    s->queue.push_back(std::move(t));
    if (!is_late(s->communicates)) advance(lock, s, never);
    return cudaSuccess;
}

cudaError_t enqueue(CUstream_st *s, std::function<void()> run) {
    lock_guard lock(the.lock);
    if (!s) cuda_wrong("work on the default stream");
    return result(enqueue(lock, s, {std::move(run), nullptr}));
}

bool lies_in(const std::map<char *, size_t> &pieces, const void *p) {
    auto next = pieces.upper_bound((char *)p);
    return next != pieces.begin() && (char *)p < std::prev(next)->first + std::prev(next)->second;
}
}  // namespace

void cuda_enqueue_blocks(cudaStream_t s, dim3 blocks, dim3 threads, size_t bytes,
                         std::function<void()> body) {
    const size_t n = (size_t)threads.x * threads.y * threads.z;
    if (!blocks.x || n == 0 || n > MOST_THREADS || bytes > MOST_SHARED)
        return (void)result(cudaErrorInvalidConfiguration);
    if (n % WARP || blocks.y * blocks.z != 1) cuda_wrong("a launch of a shape that is not built");
    enqueue(s, [=] { run_blocks(blocks, threads, body); });
}

extern "C" {
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int priority) {
    *s = new CUstream_st;
    (*s)->communicates = priority < 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    lock_guard lock(the.lock);
    if (captured(s)) return result(cudaErrorStreamCaptureUnsupported);
    return advance(lock, s, never), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaStreamSynchronize(s), delete s, cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *argument) {
    lock_guard lock(the.lock);
    task t = {[=] { f(argument); }};
    t.outside = true;
    return enqueue(lock, s, std::move(t));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = new CUevent_st{std::make_shared<state>()};
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    lock_guard lock(the.lock);
    const std::shared_ptr<state> x = *e;
    captured(s);
    x->in = s->in;
    if (x->in) return x->after = s->after, cudaSuccess;
    x->stream = s;
    const unsigned long times = ++x->recorded;
    return enqueue(lock, s, {[x, times] { x->done = times, x->time = now(); }});
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    lock_guard lock(the.lock);
    const state &x = **e;
    if (x.in && x.in->over) return result(cudaErrorCapturedEvent);
    if (captured(s) && x.in != s->in) return result(cudaErrorStreamCaptureIsolation);
    if (x.in) {
        if (!s->in) s->in = x.in, s->after.clear();
        s->after.insert(x.after.begin(), x.after.end());
        return cudaSuccess;
    }
    if (getenv("CUDA_ON_CPU_FORGET")) return cudaSuccess;
    return x.recorded ? enqueue(lock, s, {nullptr, *e, x.recorded}) : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    lock_guard lock(the.lock);
    const std::shared_ptr<state> x = *e;
    if (x->in) return result(cudaErrorCapturedEvent);
    if (x->recorded) advance(lock, x->stream, [&, times = x->recorded] { return x->done >= times; });
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
    lock_guard lock(the.lock);
    if ((*e)->in) return result(cudaErrorCapturedEvent);
    return (*e)->done >= (*e)->recorded ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    return *ms = (float)(1e3 * ((*b)->time - (*a)->time)), cudaSuccess;
}

/* ----------------------------------------------------------------------------------------------- graphs */

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode) {
    lock_guard lock(the.lock);
    if (captured(s)) return result(cudaErrorIllegalState);
    s->in = std::make_shared<capture>();
    s->in->origin = s;
    s->after.clear();
    mine.captures++;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    lock_guard lock(the.lock);
    *status = captured(s) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    lock_guard lock(the.lock);
    if (!captured(s) || s->in->origin != s) return result(cudaErrorIllegalState);
    std::vector<node> &all = s->in->graph;
    std::vector<bool> joined(all.size()); /* the origin has waited for it */
    for (size_t i : s->after) joined[i] = true;
    for (size_t i = all.size(); i-- > 0;)
        for (size_t k : all[i].after)
            if (joined[i]) joined[k] = true;
    const bool whole = std::find(joined.begin(), joined.end(), false) == joined.end();
    *graph = whole ? new CUgraph_st{std::make_shared<const std::vector<node>>(std::move(all))} : NULL;
    s->in->over = true;
    mine.captures--;
    return result(whole ? cudaSuccess : cudaErrorStreamCaptureUnjoined);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    return *exec = new CUgraphExec_st{*graph}, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    lock_guard lock(the.lock);
    task t;
    t.graph = exec->graph;
    return enqueue(lock, s, std::move(t));
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

/* ----------------------------------------------------------------------------------------------- memory */

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    lock_guard lock(the.lock);
    if (mine.captures) return result(cudaErrorStreamCaptureUnsupported);
    if (bytes > TOTAL_MEMORY) return result(cudaErrorMemoryAllocation);
    if (!the.memory) {
        the.memory = (char *)mmap(NULL, TOTAL_MEMORY, the.guard ? PROT_NONE : PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (the.memory == MAP_FAILED) cuda_wrong("mmap fails");
    }
    char *at = the.memory; /* the first gap that is large enough */
    const size_t wanted = bytes;
    bytes = (bytes + 511) / 512 * 512 + 512; /* a gap behind it, which AddressSanitizer guards */
    for (auto &[begin, size] : the.pieces) {
        if (begin - at >= (ptrdiff_t)bytes) break;
        at = begin + size;
    }
    if (bytes > (size_t)(the.memory + TOTAL_MEMORY - at)) return result(cudaErrorMemoryAllocation);
    the.end = std::max(the.end, (size_t)(at - the.memory) + (bytes + PAGE - 1) / PAGE * PAGE);
    open_memory();
    ASAN_UNPOISON_MEMORY_REGION(at, wanted);
    ASAN_POISON_MEMORY_REGION(at + wanted, bytes - wanted);
    memset(at, 0xFF, std::min(wanted, (size_t)1 << 20)); /* NaN, as far as it costs little */
    close_memory();
    the.pieces[at] = bytes;
    the.used += bytes;
    return *memory = at, cudaSuccess;
}
cudaError_t cudaFree(void *memory) {
    lock_guard lock(the.lock);
    if (mine.captures) return result(cudaErrorStreamCaptureUnsupported);
    if (!memory) return cudaSuccess;
    const auto piece = the.pieces.find((char *)memory);
    if (piece == the.pieces.end()) return result(cudaErrorInvalidValue);
    ASAN_POISON_MEMORY_REGION(memory, piece->second);
    the.used -= piece->second;
    the.pieces.erase(piece);
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **memory, size_t bytes, cudaStream_t) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeAsync(void *memory, cudaStream_t s) {
    const cudaError_t error = cudaStreamSynchronize(s);
    return error == cudaSuccess ? cudaFree(memory) : error;
}
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned) {
    lock_guard lock(the.lock);
    if (mine.captures) return result(cudaErrorStreamCaptureUnsupported);
    if (!(*memory = malloc(bytes + 1))) return result(cudaErrorMemoryAllocation);
    the.pinned[(char *)*memory] = bytes;
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **memory, size_t bytes) { return cudaHostAlloc(memory, bytes, 0); }
cudaError_t cudaFreeHost(void *memory) {
    lock_guard lock(the.lock);
    if (!the.pinned.erase((char *)memory)) return result(cudaErrorInvalidValue);
    return free(memory), cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    lock_guard lock(the.lock);
    return *unused = TOTAL_MEMORY - the.used, *total = TOTAL_MEMORY, cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *memory, int byte, size_t bytes, cudaStream_t s) {
    return enqueue(s, [=] { memset(memory, byte, bytes); });
}
/* Other host memory than page-locked is read at once, and written before the call returns. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t s) {
    lock_guard lock(the.lock);
    const bool to_device = lies_in(the.pieces, to), from_device = lies_in(the.pieces, from);
    const bool to_page = !to_device && !lies_in(the.pinned, to);
    const bool from_page = !from_device && !lies_in(the.pinned, from);
    if ((kind == cudaMemcpyHostToDevice && (!to_device || from_device)) ||
        (kind == cudaMemcpyDeviceToHost && (to_device || !from_device)))
        return result(cudaErrorInvalidMemcpyDirection);
    if (captured(s) && (to_page || from_page)) return result(cudaErrorStreamCaptureUnsupported);
    if (from_page) {
        const std::string copy((const char *)from, bytes);
        return enqueue(lock, s, {[=] { memcpy(to, copy.data(), bytes); }});
    }
    const cudaError_t error = enqueue(lock, s, {[=] { memmove(to, from, bytes); }});
    if (to_page) advance(lock, s, never);
    return error;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind, cudaStream_t s) {
    return enqueue(s, [=] {
        for (size_t i = 0; i < height; i++)
            memcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    });
}

/* ---------------------------------------------------------------------------------------------- devices */

cudaError_t cudaGetDeviceCount(int *count) { return *count = the.devices, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = mine.device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= the.devices) return result(cudaErrorInvalidDevice);
    return mine.device = device, cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "CUDA on the CPU");
    p->major = 9, p->totalGlobalMem = TOTAL_MEMORY;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    return snprintf(id, (size_t)length, "0000:%02x:00.0", device + 1), cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *, const void *) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 1, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) {
    const cudaError_t error = mine.last;
    return mine.last = cudaSuccess, error;
}
const char *cudaGetErrorString(cudaError_t error) {
    static thread_local char text[64];
    if (error == cudaErrorMemoryAllocation) return "out of memory";
    return snprintf(text, sizeof text, "cudaError_t %d", (int)error), text;
}

}  // extern "C"

/* --------------------------------------------------------------------------------------------- cuBLASLt */

/* Matrices lie column by column: op(A) [m, k], op(B) [k, n], C and D [m, n]. */
namespace {
struct layout {
    cudaDataType type;
    size_t rows, columns, ld;
    int32_t batch;
    int64_t stride;
};
struct operation {
    cublasComputeType_t compute;
    cublasOperation_t transpose_a, transpose_b;
    cublasLtEpilogue_t epilogue;
    void *bias, *aux;
    int64_t aux_ld;
};

size_t size_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }
float get(cudaDataType type, const void *p, size_t i) {
    if (type == CUDA_R_16BF) return (float)((const __nv_bfloat16 *)p)[i];
    return type == CUDA_R_16F ? (float)((const __half *)p)[i] : ((const float *)p)[i];
}
void put(cudaDataType type, void *p, size_t i, float x) {
    if (type == CUDA_R_16BF)
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
    else if (type == CUDA_R_16F)
        ((__half *)p)[i] = __float2half_rn(x);
    else
        ((float *)p)[i] = x;
}

/* TF32 has 10 bits after the point: round to nearest, ties to even. */
float tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits += 0xFFF + (bits >> 13 & 1);
    bits &= ~(uint32_t)0x1FFF;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The elements of matrix b of the batch, op applied, row i of column j at [j * rows + i]. */
std::vector<float> elements(const layout &l, const void *at, size_t b, bool transposed, bool is_tf32) {
    const size_t rows = transposed ? l.columns : l.rows, columns = transposed ? l.rows : l.columns;
    const char *begin = (const char *)at + b * (size_t)l.stride * size_of(l.type);
    std::vector<float> all(rows * columns);
    for (size_t j = 0; j < columns; j++)
        for (size_t i = 0; i < rows; i++) {
            const float x = get(l.type, begin, transposed ? i * l.ld + j : j * l.ld + i);
            all[j * rows + i] = is_tf32 ? tf32(x) : x;
        }
    return all;
}

/* Algorithm 1 adds from the other end, as algorithms differ. */
void multiply(const operation &o, float alpha, const void *a, layout la, const void *b, layout lb, void *d,
              layout ld, int algorithm) {
    const size_t m = ld.rows, n = ld.columns;
    const size_t k = o.transpose_a == CUBLAS_OP_N ? la.columns : la.rows;
    const bool is_tf32 = o.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    for (size_t batch = 0; batch < (size_t)ld.batch; batch++) {
        const auto A = elements(la, a, batch, o.transpose_a == CUBLAS_OP_T, is_tf32);
        const auto B = elements(lb, b, batch, o.transpose_b == CUBLAS_OP_T, is_tf32);
        char *to = (char *)d + batch * (size_t)ld.stride * size_of(ld.type);
        std::vector<float> sum(m);
        for (size_t j = 0; j < n; j++) {
            std::fill(sum.begin(), sum.end(), 0.f);
            double bias = 0;
            for (size_t q = 0; q < k; q++) {
                const size_t p = algorithm ? k - 1 - q : q;
                const float x = B[j * k + p], *column = &A[p * m];
                for (size_t i = 0; i < m; i++) sum[i] += column[i] * x;
                bias += x;
            }
            for (size_t i = 0; i < m; i++) {
                float x = alpha * sum[i];
                if (o.epilogue == CUBLASLT_EPILOGUE_BIAS || o.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS)
                    x += get(ld.type, o.bias, i);
                if (o.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) {
                    put(ld.type, o.aux, j * (size_t)o.aux_ld + i, x);
                    x = 0.5f * x * (1 + tanhf(0.797884561f * (x + 0.044715f * x * x * x)));
                }
                put(ld.type, to, j * ld.ld + i, x);
            }
            if (o.epilogue == CUBLASLT_EPILOGUE_BGRADB) put(ld.type, o.bias, j, (float)bias);
        }
    }
}
}  // namespace

extern "C" {
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    return *handle = (cublasLtHandle_t) new char, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    return delete (char *)handle, CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
const char *cublasLtGetStatusString(cublasStatus_t status) {
    static thread_local char text[64];
    return snprintf(text, sizeof text, "cublasStatus_t %d", (int)status), text;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t ld) {
    if (ld < (int64_t)rows) return CUBLAS_STATUS_INVALID_VALUE;
    *l = (cublasLtMatrixLayout_t) new layout{type, rows, columns, (size_t)ld, 1, 0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    return delete (layout *)l, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                cublasLtMatrixLayoutAttribute_t name, const void *value,
                                                size_t size) {
    layout *x = (layout *)l;
    if (name == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT && size == sizeof x->batch)
        x->batch = *(const int32_t *)value;
    else if (name == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET && size == sizeof x->stride)
        x->stride = *(const int64_t *)value;
    else
        return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *o, cublasComputeType_t compute, cudaDataType) {
    *o = (cublasLtMatmulDesc_t) new operation{
        compute, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL, 0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t o) {
    return delete (operation *)o, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t name,
                                              const void *value, size_t size) {
    operation *o = (operation *)desc;
    const std::map<cublasLtMatmulDescAttributes_t, std::pair<void *, size_t>> fields = {
        {CUBLASLT_MATMUL_DESC_TRANSA, {&o->transpose_a, sizeof o->transpose_a}},
        {CUBLASLT_MATMUL_DESC_TRANSB, {&o->transpose_b, sizeof o->transpose_b}},
        {CUBLASLT_MATMUL_DESC_EPILOGUE, {&o->epilogue, sizeof o->epilogue}},
        {CUBLASLT_MATMUL_DESC_BIAS_POINTER, {&o->bias, sizeof o->bias}},
        {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, {&o->aux, sizeof o->aux}},
        {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, {&o->aux_ld, sizeof o->aux_ld}}};
    const auto field = fields.find(name);
    if (field == fields.end() || field->second.second != size) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(field->second.first, value, size);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    return *p = (cublasLtMatmulPreference_t) new char, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return delete (char *)p, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t, const void *,
                                                    size_t) {
    return CUBLAS_STATUS_SUCCESS;
}

/* Two algorithms for everything but the gradient of a bias in fp32 and an auxiliary matrix with odd rows. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t, int most,
                                              cublasLtMatmulHeuristicResult_t found[], int *count) {
    const operation *o = (const operation *)desc;
    *count = 0;
    if (o->epilogue == CUBLASLT_EPILOGUE_BGRADB && ((const layout *)d)->type == CUDA_R_32F)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (o->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS && o->aux_ld % 8) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (; *count < most && *count < 2; ++*count) {
        memset(&found[*count], 0, sizeof found[*count]);
        found[*count].algo.data[0] = (uint64_t)*count;
    }
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t la, const void *b, cublasLtMatrixLayout_t lb,
                              const void *beta, const void *c, cublasLtMatrixLayout_t, void *d,
                              cublasLtMatrixLayout_t ld, const cublasLtMatmulAlgo_t *algorithm, void *,
                              size_t, cudaStream_t s) {
    const operation o = *(const operation *)desc;
    const layout A = *(const layout *)la, B = *(const layout *)lb, D = *(const layout *)ld;
    const size_t m = o.transpose_a == CUBLAS_OP_N ? A.rows : A.columns;
    const size_t k = o.transpose_a == CUBLAS_OP_N ? A.columns : A.rows;
    const size_t n = o.transpose_b == CUBLAS_OP_N ? B.columns : B.rows;
    const float factor = *(const float *)alpha;
    if (m != D.rows || n != D.columns || k != (o.transpose_b == CUBLAS_OP_N ? B.rows : B.columns) ||
        A.type != B.type || A.batch != D.batch || B.batch != D.batch || c != d || *(const float *)beta != 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    const int number = (int)algorithm->data[0];
    return enqueue(s, [=] { multiply(o, factor, a, A, b, B, d, D, number); }) == cudaSuccess
               ? CUBLAS_STATUS_SUCCESS
               : CUBLAS_STATUS_EXECUTION_FAILED;
}
}  // extern "C"

void *cuda_on_cpu_cublaslt(const char *name) {
#define ENTRY(function)                                                                                      \
    { #function, (void *)function }
    static const std::map<std::string, void *> functions = {ENTRY(cublasLtCreate),
                                                            ENTRY(cublasLtDestroy),
                                                            ENTRY(cublasLtGetVersion),
                                                            ENTRY(cublasLtGetStatusString),
                                                            ENTRY(cublasLtMatrixLayoutCreate),
                                                            ENTRY(cublasLtMatrixLayoutDestroy),
                                                            ENTRY(cublasLtMatrixLayoutSetAttribute),
                                                            ENTRY(cublasLtMatmulDescCreate),
                                                            ENTRY(cublasLtMatmulDescDestroy),
                                                            ENTRY(cublasLtMatmulDescSetAttribute),
                                                            ENTRY(cublasLtMatmulPreferenceCreate),
                                                            ENTRY(cublasLtMatmulPreferenceDestroy),
                                                            ENTRY(cublasLtMatmulPreferenceSetAttribute),
                                                            ENTRY(cublasLtMatmulAlgoGetHeuristic),
                                                            ENTRY(cublasLtMatmul)};
    const auto found = functions.find(name);
    return found == functions.end() ? NULL : found->second;
}
