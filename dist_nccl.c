/* dist_nccl.c - the transport over NCCL (dist_nccl.h): what is posted goes to the rank's communication
 * stream at once, one NCCL call a collective; the stream and its events (runtime.h) order it with the
 * computation. NCCL's unique id travels over the rendezvous. A thread watches NCCL and the other
 * processes: on a failure it aborts the communicator, so that kernels which wait for a lost rank end, and
 * with them whoever waits for these. */
#include "dist_nccl.h"

#include <nccl.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    dist_process head;
    int gpu, watches;
    ncclUniqueId id;
    void *registered;
    void *token; /* of barriers: one int64 of device memory, which the arena has no room for */
    cudaEvent_t posted;
    pthread_t watcher;
    /* under world->lock */
    ncclComm_t comm;     /* NULL: not open, or aborted */
    ncclResult_t wrong;  /* what a call has answered */
    double since;        /* when the last call was made; 0: none yet */
    int unsettled, stop; /* unsettled: NCCL has not accepted it yet */
} dist_nccl;

/* With the lock held. The first failure of the world aborts what runs; `speaks`: this process prints it. */
static void fail(dist_nccl *n, int speaks, const char *why) {
    rt_rank *rank = &n->head.hub.world->ranks[0];
    if (!atomic_load(&rank->world->failed)) {
        n->head.speaks = speaks;
        rt_fail_with_table(rank, "%s", why);
    }
    if (n->comm) ncclCommAbort(n->comm);
    n->comm = NULL;
}

/* Until NCCL, whose calls do not block here, has accepted one. -1: the world has failed; the watcher says
 * why. */
static int settle(dist_nccl *n, ncclResult_t result) {
    rt_world *w = n->head.hub.world;
    for (double begin = rt_seconds();; rt_seconds() - begin < 1e-3 ? sched_yield() : usleep(100)) {
        pthread_mutex_lock(&w->lock);
        if (result == ncclInProgress && n->comm) ncclCommGetAsyncError(n->comm, &result);
        int failed = atomic_load(&w->failed);
        n->unsettled = result != ncclSuccess;
        n->since = begin;
        if (result != ncclInProgress) n->wrong = result;
        pthread_mutex_unlock(&w->lock);
        if (failed || result == ncclSuccess) return failed ? -1 : 0;
    }
}

/* Looks ten times a second: has NCCL failed, has a process gone, does a collective take too long? */
static void *watch(void *argument) {
    dist_nccl *n = argument;
    rt_world *w = n->head.hub.world;
    cudaSetDevice(n->gpu); /* or the first question would begin with device 0 */
    for (int stop = 0; !stop; poll(NULL, 0, 100)) {
        error_text why = {{0}}, what = {{0}};
        int speaks = 1, gone = rendezvous_gone(n->head.meeting);
        int told = gone >= 0 && rendezvous_told(n->head.meeting, gone, &why, &speaks);
        pthread_mutex_lock(&w->lock);
        const rt_note *last = &w->ranks[0].last;
        ncclResult_t result = n->wrong;
        if (n->comm && result == ncclSuccess) ncclCommGetAsyncError(n->comm, &result);
        int late = n->comm && n->since > 0 && rt_seconds() - n->since > n->head.timeout;
        if (gone >= 0)
            error_set(&what, " lost rank %d", gone);
        else if (result != ncclSuccess && result != ncclInProgress)
            error_set(&what, ": NCCL: %s,", ncclGetErrorString(result));
        else if (late && (n->unsettled || cudaEventQuery(n->posted) == cudaErrorNotReady))
            error_set(&what, ": no word from the others for %g s (--timeout)", n->head.timeout);
        if (*what.text && !told)
            error_set(&why, "rank %d%.500s after %s %llu (%s)", n->head.rank, what.text,
                      last->op ? last->op : "no collective", (unsigned long long)last->sequence,
                      last->op ? last->unit : "-");
        if (*why.text || atomic_load(&w->failed)) fail(n, speaks, why.text);
        stop = n->stop || atomic_load(&w->failed);
        pthread_mutex_unlock(&w->lock);
    }
    return NULL;
}

static const ncclDataType_t types[] = {
    [RT_U8] = ncclUint8,  [RT_I32] = ncclInt32,     [RT_I64] = ncclInt64,  [RT_U64] = ncclUint64,
    [RT_FP16] = ncclHalf, [RT_BF16] = ncclBfloat16, [RT_FP32] = ncclFloat, [RT_FP64] = ncclDouble};

static ncclResult_t launch(const dist_nccl *n, const dist_call *c, cudaStream_t s) {
    const void *in = c->in.data;
    void *out = c->out.data;
    const size_t count = dist_elements(c), share = count / (size_t)n->head.hub.size;
    const ncclDataType_t type = types[dist_type(c)];
    switch (c->op) {
    case DIST_ALL_REDUCE:
    case DIST_CONTROL: return ncclAllReduce(in, out, count, type, ncclSum, n->comm, s);
    case DIST_REDUCE_SCATTER: return ncclReduceScatter(in, out, share, type, ncclSum, n->comm, s);
    case DIST_ALL_GATHER: return ncclAllGather(in, out, share, type, n->comm, s);
    case DIST_BROADCAST:
        return ncclBroadcast(in ? in : out, out ? out : (void *)in, count, type, c->peer, n->comm, s);
    case DIST_REDUCE: return ncclReduce(in, out, count, type, ncclSum, c->peer, n->comm, s);
    case DIST_SEND: return ncclSend(in, count, type, c->peer, n->comm, s);
    case DIST_RECV: return ncclRecv(out, count, type, c->peer, n->comm, s);
    default: return ncclAllReduce(n->token, n->token, 1, ncclInt64, ncclSum, n->comm, s);
    }
}

/* What has been launched now is what the watcher waits for; not what is being recorded, which does not
 * run. */
static void mark(dist_nccl *n, cudaStream_t s) {
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(s, &status);
    if (status == cudaStreamCaptureStatusNone) cudaEventRecord(n->posted, s);
}

static void replayed(dist_comm *comm) {
    dist_nccl *n = comm->shared;
    pthread_mutex_lock(&n->head.hub.world->lock);
    n->since = rt_seconds();
    pthread_mutex_unlock(&n->head.hub.world->lock);
    mark(n, (cudaStream_t)comm->rank->stream[RT_COMMUNICATION].device);
}

static void post(dist_comm *comm, const dist_call *calls, size_t count) {
    dist_nccl *n = comm->shared;
    rt_rank *rank = comm->rank;
    rt_stream *s = &rank->stream[calls[0].stream];
    ncclResult_t result = ncclSuccess;
    pthread_mutex_lock(&rank->world->lock);
    rank->last = (rt_note){comm->name, dist_op_name(calls[0].op), calls[0].unit, comm->sequence++,
                           dist_elements(&calls[0])};
    if (n->comm) {
        ncclGroupStart();
        for (size_t i = 0; i < count && result == ncclSuccess; i++)
            result = launch(n, &calls[i], (cudaStream_t)s->device);
        ncclResult_t end = ncclGroupEnd();
        if (result == ncclSuccess) result = end;
    }
    pthread_mutex_unlock(&rank->world->lock);
    if (settle(n, result)) return;
    for (size_t i = 0; i < count; i++)
        if (calls[i].done) rt_record(rank, calls[i].stream, calls[i].done);
    mark(n, (cudaStream_t)s->device);
}

/* The device is open, and the memory of the rank set aside. */
static int open_communicator(dist_comm *comm) {
    dist_nccl *n = comm->shared;
    rt_rank *rank = comm->rank;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    if (cudaGetDevice(&n->gpu) != cudaSuccess || cudaMalloc(&n->token, sizeof(int64_t)) != cudaSuccess ||
        cudaEventCreateWithFlags(&n->posted, cudaEventDisableTiming) != cudaSuccess)
        return rt_fail(rank, "rank %d: no device memory for a communicator", n->head.rank);
    ncclResult_t result = ncclCommInitRankConfig(&n->comm, n->head.hub.size, n->id, n->head.rank, &config);
    n->watches = !pthread_create(&n->watcher, NULL, watch, n);
    if (!n->watches) return rt_fail(rank, "rank %d: cannot start a thread", n->head.rank);
    if (settle(n, result)) return -1;
    if (!rank->arena) return 0;
    return settle(n, ncclCommRegister(n->comm, rank->arena, rank->arena_size, &n->registered));
}

static void close_communicator(dist_comm *comm) {
    dist_nccl *n = comm->shared;
    rt_world *w = comm->rank->world;
    ncclResult_t end = ncclSuccess;
    pthread_mutex_lock(&w->lock);
    if (n->comm && n->registered) ncclCommDeregister(n->comm, n->registered);
    if (n->comm) end = ncclCommFinalize(n->comm);
    pthread_mutex_unlock(&w->lock);
    settle(n, end);
    pthread_mutex_lock(&w->lock);
    n->stop = 1;
    if (atomic_load(&w->failed)) fail(n, n->head.speaks, "");
    pthread_mutex_unlock(&w->lock);
    if (n->watches) pthread_join(n->watcher, NULL);
    if (n->comm) ncclCommDestroy(n->comm);
    if (n->posted) cudaEventDestroy(n->posted);
    cudaFree(n->token);
}

static dist_hub *nccl_start(dist_process *p, rt_world *world, const vit_device *device, error_text *e) {
    dist_nccl *n = (dist_nccl *)p;
    (void)device;
    p->hub.world = world;
    int failed = p->rank == 0 && ncclGetUniqueId(&n->id) != ncclSuccess;
    if (failed) error_set(e, "NCCL: no unique id: %s", ncclGetLastError(NULL));
    return p->agree(p, failed, e, (char *)&n->id, sizeof n->id) ? NULL : &p->hub;
}

dist_process *dist_nccl_open(const char *host, int port, int rank, int size, double timeout, error_text *e) {
    static const dist_transport transport = {"nccl", post, open_communicator, close_communicator, replayed};
    dist_process *p = dist_process_meet(sizeof(dist_nccl), host, port, rank, size, timeout, e);
    if (p) p->hub.transport = &transport, p->start = nccl_start;
    return p;
}
