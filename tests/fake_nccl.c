/* fake_nccl.c - a second implementation of NCCL's interface, for tests/cuda_on_cpu.h: a collective is work of
 * the stream that it is launched on, and goes through memory that the processes share. Sums are in rank
 * order, so that all numbers must equal the local transport's. A thread stands for the GPU, which needs
 * nobody to wait for it: it runs the stream.
 *
 * FAKE_NCCL_FAIL=RANK:N: NCCL reports an asynchronous error on that rank after its N-th collective. */
#define _GNU_SOURCE
#include "vit.h"

#include <fcntl.h>
#include <nccl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLOT = 1 << 20, MOST_RANKS = 16 };

typedef struct {
    atomic_ulong arrived[MOST_RANKS]; /* meetings that each rank has come to */
    char slot[MOST_RANKS][SLOT];
} shared_memory;

typedef enum { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, REDUCE } kind;

typedef struct {
    struct ncclComm *comm;
    kind kind;
    const char *in;
    char *out;
    size_t count; /* elements that each rank brings */
    int root;
    ncclDataType_t type;
} operation;

struct ncclComm {
    int rank, size, fails_after;
    shared_memory *shared;
    cudaStream_t stream; /* of the last launch */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int launched, stop; /* launched: since the thread last looked */
    atomic_int aborted;
    atomic_ulong done; /* collectives */
};

/* -------------------------------------------------------------------------------------------- collectives */

/* Until all ranks have come to the same meeting. -1: aborted. */
static int meet(struct ncclComm *c) {
    unsigned long mine = atomic_fetch_add(&c->shared->arrived[c->rank], 1) + 1;
    for (int r = 0; r < c->size; r++)
        while (atomic_load(&c->shared->arrived[r]) < mine) {
            if (atomic_load(&c->aborted)) return -1;
            poll(NULL, 0, 0);
            sched_yield();
        }
    return 0;
}

static size_t size_of(ncclDataType_t type) { return type == ncclInt64 ? 8 : type == ncclFloat32 ? 4 : 2; }

/* out += in */
static void add(char *out, const char *in, size_t n, ncclDataType_t type) {
    for (size_t i = 0; i < n; i++) {
        float x, y;
        rt_type narrow = type == ncclBfloat16 ? RT_BF16 : RT_FP16;
        if (type == ncclInt64) {
            ((int64_t *)out)[i] += ((const int64_t *)in)[i];
        } else if (type == ncclFloat32) {
            ((float *)out)[i] += ((const float *)in)[i];
        } else {
            rt_widen(&x, (uint16_t *)out + i, 1, narrow);
            rt_widen(&y, (const uint16_t *)in + i, 1, narrow);
            x += y;
            rt_narrow((uint16_t *)out + i, &x, 1, narrow);
        }
    }
}

/* Elements [at, at + n) of what every rank brings. */
static int carry_out_piece(struct ncclComm *c, const operation *o, size_t at, size_t n) {
    size_t size = size_of(o->type), share = o->count / (size_t)c->size;
    _Alignas(64) static char sum[SLOT]; /* a stream runs one collective at a time */
    int brings = o->kind != BROADCAST || c->rank == o->root;
    if (brings) memcpy(c->shared->slot[c->rank], o->in + at * size, n * size);
    if (meet(c)) return -1;
    if (o->kind == BROADCAST) {
        memcpy(o->out + at * size, c->shared->slot[o->root], n * size);
    } else if (o->kind == ALL_GATHER) {
        for (int r = 0; r < c->size; r++)
            memcpy(o->out + ((size_t)r * o->count + at) * size, c->shared->slot[r], n * size);
    } else {
        memcpy(sum, c->shared->slot[0], n * size);
        for (int r = 1; r < c->size; r++) add(sum, c->shared->slot[r], n, o->type);
        size_t lo = o->kind == REDUCE_SCATTER ? (size_t)c->rank * share : 0;
        size_t hi = o->kind == REDUCE_SCATTER ? lo + share : o->count;
        if (o->kind == REDUCE && c->rank != o->root) hi = lo;
        size_t first = at < lo ? lo : at, last = at + n > hi ? hi : at + n;
        if (first < last)
            memcpy(o->out + (first - lo) * size, sum + (first - at) * size, (last - first) * size);
    }
    return meet(c); /* the slots are free again */
}

/* What the stream runs. It is kept, as a graph may run it again. */
static void carry_out(void *argument) {
    const operation *o = argument;
    size_t step = SLOT / size_of(o->type);
    for (size_t at = 0; at < o->count && !atomic_load(&o->comm->aborted); at += step)
        if (carry_out_piece(o->comm, o, at, o->count - at < step ? o->count - at : step)) break;
    atomic_fetch_add(&o->comm->done, 1);
}

static void *run_stream(void *argument) {
    struct ncclComm *c = argument;
    pthread_mutex_lock(&c->lock);
    for (;;) {
        while (!c->launched && !c->stop) pthread_cond_wait(&c->changed, &c->lock);
        if (c->stop) break;
        c->launched = 0;
        pthread_mutex_unlock(&c->lock);
        cudaStreamSynchronize(c->stream); /* an error, harmless, while it is captured */
        pthread_mutex_lock(&c->lock);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

static ncclResult_t launch(struct ncclComm *c, operation o, cudaStream_t s) {
    operation *kept = malloc(sizeof *kept);
    if (!kept || atomic_load(&c->aborted)) return free(kept), ncclInvalidUsage;
    *kept = o;
    if (cudaLaunchHostFunc(s, carry_out, kept) != cudaSuccess) return ncclUnhandledCudaError;
    pthread_mutex_lock(&c->lock);
    c->stream = s;
    c->launched = 1;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    return ncclInProgress; /* as NCCL answers sometimes */
}

ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t c, cudaStream_t s) {
    return op == ncclSum ? launch(c, (operation){c, ALL_REDUCE, in, out, n, 0, type}, s)
                         : ncclInvalidArgument;
}
ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t c, cudaStream_t s) {
    operation o = {c, REDUCE_SCATTER, in, out, n * (size_t)c->size, 0, type};
    return op == ncclSum ? launch(c, o, s) : ncclInvalidArgument;
}
ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t type, ncclComm_t c,
                           cudaStream_t s) {
    return launch(c, (operation){c, ALL_GATHER, in, out, n, 0, type}, s);
}
ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t type, int root, ncclComm_t c,
                           cudaStream_t s) {
    return launch(c, (operation){c, BROADCAST, in, out, n, root, type}, s);
}
ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t c, cudaStream_t s) {
    return op == ncclSum ? launch(c, (operation){c, REDUCE, in, out, n, root, type}, s) : ncclInvalidArgument;
}
/* No strategy sends yet. */
ncclResult_t ncclSend(const void *in, size_t n, ncclDataType_t type, int peer, ncclComm_t c, cudaStream_t s) {
    (void)in, (void)n, (void)type, (void)peer, (void)c, (void)s;
    return ncclInvalidUsage;
}
ncclResult_t ncclRecv(void *out, size_t n, ncclDataType_t type, int peer, ncclComm_t c, cudaStream_t s) {
    (void)out, (void)n, (void)type, (void)peer, (void)c, (void)s;
    return ncclInvalidUsage;
}
ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }

/* ------------------------------------------------------------------------------------------ communicators */

/* The id is the name of the file that the processes share. */
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/dev/shm/fake_nccl.XXXXXX");
    int fd = mkstemp(id->internal);
    if (fd < 0 || ftruncate(fd, sizeof(shared_memory))) return ncclSystemError;
    close(fd);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
    struct ncclComm *c = calloc(1, sizeof *c);
    int fd = open(id.internal, O_RDWR), of = -1, after = 0;
    if (!c || fd < 0 || size > MOST_RANKS || config->blocking) return ncclSystemError;
    *c = (struct ncclComm){.rank = rank, .size = size, .fails_after = -1};
    c->shared = mmap(NULL, sizeof *c->shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (c->shared == MAP_FAILED) return ncclSystemError;
    const char *fail = getenv("FAKE_NCCL_FAIL");
    if (fail && sscanf(fail, "%d:%d", &of, &after) == 2 && of == rank) c->fails_after = after;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    if (meet(c)) return ncclSystemError;
    if (rank == 0) unlink(id.internal);
    *comm = c;
    return pthread_create(&c->thread, NULL, run_stream, c) ? ncclSystemError : ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) {
    int fails = c->fails_after >= 0 && atomic_load(&c->done) > (unsigned long)c->fails_after;
    return *error = fails ? ncclRemoteError : ncclSuccess, ncclSuccess;
}

static ncclResult_t end(ncclComm_t c) {
    pthread_mutex_lock(&c->lock);
    c->stop = 1;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->thread, NULL);
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t c) {
    atomic_store(&c->aborted, 1);
    return end(c);
}
ncclResult_t ncclCommFinalize(ncclComm_t c) {
    if (c->stream) cudaStreamSynchronize(c->stream);
    return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t c) { return end(c); }
ncclResult_t ncclCommRegister(const ncclComm_t c, void *memory, size_t size, void **handle) {
    (void)c;
    *handle = memory;
    return size ? ncclSuccess : ncclInvalidArgument;
}
ncclResult_t ncclCommDeregister(const ncclComm_t c, void *handle) {
    (void)c;
    return handle ? ncclSuccess : ncclInvalidArgument;
}
const char *ncclGetErrorString(ncclResult_t result) {
    return result == ncclRemoteError ? "a remote process has failed (fake)" : "an error (fake)";
}
const char *ncclGetLastError(ncclComm_t c) {
    (void)c;
    return "an error (fake)";
}
