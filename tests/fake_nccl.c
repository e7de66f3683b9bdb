/* fake_nccl.c - a second implementation of NCCL's interface and of the CUDA device, for machines without a
 * GPU: memory is the host's, operations are vit_cpu's, and collectives go through memory that the
 * processes share, carried out behind the host, in order, by a thread that stands for the communication
 * stream. Sums are in rank order, so that all numbers must equal the local transport's.
 *
 * FAKE_CUDA_DEVICES: how many devices there are (4). FAKE_NCCL_FAIL=RANK:N: NCCL reports an asynchronous
 * error on that rank after its N-th collective. */
#define _GNU_SOURCE
#define vit_cuda vit_cuda_declared /* vit.h declares it const */
#include "vit.h"
#undef vit_cuda

#include <fcntl.h>
#include <nccl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLOT = 1 << 20, QUEUE = 64, MOST_RANKS = 16 };

typedef struct {
    atomic_ulong arrived[MOST_RANKS]; /* meetings that each rank has come to */
    char slot[MOST_RANKS][SLOT];
} shared_memory;

typedef enum { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, REDUCE } kind;

typedef struct {
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
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    operation queue[QUEUE];
    unsigned long posted, done;
    int stop;
    atomic_int aborted;
};

static struct ncclComm *the_comm; /* of this process: events are positions in its queue */

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
    _Alignas(64) static char sum[SLOT]; /* one thread uses it */
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

static void *carry_out(void *argument) {
    struct ncclComm *c = argument;
    pthread_mutex_lock(&c->lock);
    for (;;) {
        while (c->done == c->posted && !c->stop) pthread_cond_wait(&c->changed, &c->lock);
        if (c->stop) break;
        operation o = c->queue[c->done % QUEUE];
        pthread_mutex_unlock(&c->lock);
        size_t step = SLOT / size_of(o.type);
        for (size_t at = 0; at < o.count; at += step)
            if (carry_out_piece(c, &o, at, o.count - at < step ? o.count - at : step)) break;
        pthread_mutex_lock(&c->lock);
        c->done++;
        pthread_cond_broadcast(&c->changed);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

static ncclResult_t post(struct ncclComm *c, operation o) {
    if (c != the_comm || atomic_load(&c->aborted)) return ncclInvalidUsage;
    pthread_mutex_lock(&c->lock);
    while (c->posted - c->done == QUEUE) pthread_cond_wait(&c->changed, &c->lock);
    c->queue[c->posted++ % QUEUE] = o;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
    return ncclInProgress; /* as NCCL answers sometimes */
}

ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t c, cudaStream_t s) {
    (void)s;
    return op == ncclSum ? post(c, (operation){ALL_REDUCE, in, out, n, 0, type}) : ncclInvalidArgument;
}
ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t c, cudaStream_t s) {
    (void)s;
    operation o = {REDUCE_SCATTER, in, out, n * (size_t)c->size, 0, type};
    return op == ncclSum ? post(c, o) : ncclInvalidArgument;
}
ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t type, ncclComm_t c,
                           cudaStream_t s) {
    (void)s;
    return post(c, (operation){ALL_GATHER, in, out, n, 0, type});
}
ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t type, int root, ncclComm_t c,
                           cudaStream_t s) {
    (void)s;
    return post(c, (operation){BROADCAST, in, out, n, root, type});
}
ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t c, cudaStream_t s) {
    (void)s;
    return op == ncclSum ? post(c, (operation){REDUCE, in, out, n, root, type}) : ncclInvalidArgument;
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
    the_comm = *comm = c;
    return pthread_create(&c->thread, NULL, carry_out, c) ? ncclSystemError : ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) {
    pthread_mutex_lock(&c->lock);
    *error = c->fails_after >= 0 && c->done > (unsigned long)c->fails_after ? ncclRemoteError : ncclSuccess;
    pthread_mutex_unlock(&c->lock);
    return ncclSuccess;
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
    pthread_mutex_lock(&c->lock);
    while (c->done < c->posted) pthread_cond_wait(&c->changed, &c->lock);
    pthread_mutex_unlock(&c->lock);
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

/* --------------------------------------------------------------------------------------------- the device */

cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaMalloc(void **memory, size_t bytes) {
    return (*memory = calloc(1, bytes)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *memory) { return free(memory), cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    (void)flags;
    *event = calloc(1, sizeof(unsigned long));
    return *event ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) {
    (void)s;
    if (the_comm) *(unsigned long *)event = the_comm->posted; /* by the thread that posts */
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    pthread_mutex_lock(&the_comm->lock);
    int ready = the_comm->done >= *(unsigned long *)event;
    pthread_mutex_unlock(&the_comm->lock);
    return ready ? cudaSuccess : cudaErrorNotReady;
}

/* Operations of the CPU have run when their call returns; only the communication stream runs behind. */
static void record(rt_stream *s, rt_event *event) {
    int communicates = s == &s->rank->stream[RT_COMMUNICATION];
    event->device = (void *)(communicates && the_comm ? the_comm->posted : 0);
}
static void wait_for(rt_stream *s, rt_event *event) {
    struct ncclComm *c = the_comm;
    if (!event->device || s == &s->rank->stream[RT_COMMUNICATION]) return;
    pthread_mutex_lock(&c->lock);
    while (c->done < (unsigned long)event->device && !atomic_load(&c->aborted))
        pthread_cond_wait(&c->changed, &c->lock);
    pthread_mutex_unlock(&c->lock);
}

static int fake_memory(int first, int ranks, double *unused, double *total, error_text *e) {
    int count = getenv("FAKE_CUDA_DEVICES") ? atoi(getenv("FAKE_CUDA_DEVICES")) : 4;
    if (first >= count)
        return error_set(
            e,
            "found %d CUDA devices, and a rank that is number %d of this host, expected a device "
            "for each (--backend local lets ranks share them)",
            count, first);
    *unused = *total = 1e10 * ranks;
    return 0;
}

static int fake_list(FILE *out, error_text *e) {
    (void)e;
    fprintf(out, "GPU                fake\n");
    return 0;
}

static int fake_open(rt_rank *rank, error_text *e) {
    if (vit_cpu.open(rank, e)) return -1;
    rank->record = record;
    rank->wait = wait_for;
    return 0;
}

static int fake_reserve(rt_rank *rank, const rt_ledger *ledger, error_text *e) {
    (void)e;
    rank->arena = rank; /* something to register */
    rank->arena_size = ledger->total_peak_bytes;
    return 0;
}

void vit_cuda_products(rt_rank *rank, int tf32, int first_algorithm) {
    (void)rank, (void)tf32, (void)first_algorithm;
}

static int fake_address(const rt_rank *rank, char address[32], error_text *e) {
    (void)e;
    snprintf(address, 32, "0000:%02x:00.0", (unsigned)rank->rank % 255 + 1);
    return 0;
}

vit_device vit_cuda;

__attribute__((constructor)) static void make_device(void) {
    vit_cuda = vit_cpu;
    vit_cuda.name = "cuda";
    vit_cuda.open = fake_open;
    vit_cuda.memory = fake_memory;
    vit_cuda.list = fake_list;
    vit_cuda.reserve = fake_reserve;
    vit_cuda.address = fake_address;
}
