/* dist_mpi.c - the transport over MPI (dist_mpi.h). MPI's own reductions add in any order, so it only moves
 * numbers here: an all-to-all gives every rank all values of the part of the payload that it adds up, in rank
 * order, and an all-gather spreads the sums. What is posted is carried out by the queue's thread, one call
 * after the other, piece by piece. */
#include "dist_mpi.h"

#include <limits.h>
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PIECE = 1 << 18 }; /* elements of one rank's part that are added up at a time */

typedef struct {
    dist_process head;
    dist_queue queue;
    int rank, size, failed, speaks;
    double timeout;
    const vit_device *device;
    _Alignas(64) char stage[]; /* [size][PIECE] of any type: what the ranks have sent of this rank's part */
} dist_mpi;

/* Waits for a request that MPI has accepted, or not (status). -1: the world has failed. MPI makes progress
 * only while it is asked, and the rank's own thread needs the core. */
static int finish(dist_mpi *m, int status, MPI_Request *request) {
    double begin = rt_seconds();
    char last[128];
    for (int done = 0; status == MPI_SUCCESS; rt_seconds() - begin > 1e-4 ? usleep(20) : 0) {
        status = MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (done) return 0;
        if (atomic_load(&m->queue.head.world->failed)) return -1;
        if (rt_seconds() - begin > m->timeout) break;
    }
    dist_queue_fail(&m->queue, "rank %d: %s %s after %g s (--timeout; MPI says %d)", m->rank,
                    status ? "MPI fails" : "no word from the others", dist_queue_last(&m->queue, last),
                    rt_seconds() - begin, status);
    return -1;
}

/* Do all ranks mean the same call? MPI would mix up what they send. */
static int all_agree(dist_mpi *m, const dist_fingerprint *own) {
    const int bytes = sizeof *own;
    dist_fingerprint *all = (dist_fingerprint *)m->stage;
    error_text e;
    MPI_Request request;
    int status = MPI_Iallgather(own, bytes, MPI_BYTE, all, bytes, MPI_BYTE, MPI_COMM_WORLD, &request);
    if (finish(m, status, &request)) return 0;
    for (int r = 1; r < m->size; r++) {
        if (!memcmp(&all[r], &all[0], sizeof *all)) continue;
        dist_disagreement(&e, 0, &all[0], r, &all[r]);
        if (dist_queue_fail(&m->queue, "%s", e.text)) m->speaks = m->rank == 0;
        return 0;
    }
    return 1;
}

/* A piece of a sum: of an all-reduce, n elements, each rank adding up its share of them; of a reduce, all for
 * the root; of a reduce-scatter, n of every rank's part. */
static int sum_piece(dist_mpi *m, const dist_call *c, size_t at, size_t n, MPI_Datatype type) {
    size_t size = rt_type_size(dist_type(c)), N = (size_t)m->size, me = (size_t)m->rank;
    int spreads = c->op == DIST_ALL_REDUCE || c->op == DIST_CONTROL;
    int count[N], offset[N], own[N], own_offset[N]; /* in elements: to each rank, from each rank */
    rt_block part[N], sum = rt_slice(c->out, at, 0);
    MPI_Request request;
    for (size_t r = 0; r < N; r++) {
        size_t lo = spreads ? n * r / N : 0, hi = spreads ? n * (r + 1) / N : n;
        count[r] = c->op == DIST_REDUCE && (int)r != c->peer ? 0 : (int)(hi - lo);
        offset[r] = (int)(lo + (c->op == DIST_REDUCE_SCATTER ? r * c->out.count : 0));
    }
    sum = rt_slice(sum, spreads ? (size_t)offset[me] : 0, (size_t)count[me]);
    for (size_t r = 0; r < N; r++) {
        own[r] = count[me], own_offset[r] = (int)(r * PIECE);
        part[r] = (rt_block){.data = m->stage + r * PIECE * size, .type = sum.type, .count = sum.count};
    }
    int status = MPI_Ialltoallv((char *)c->in.data + at * size, count, offset, type, m->stage, own,
                                own_offset, type, MPI_COMM_WORLD, &request);
    if (finish(m, status, &request)) return -1;
    if (sum.count) m->device->sum_buffers(&m->queue.self.stream[RT_COMMUNICATION], &sum, 1, part, N);
    if (!spreads) return 0;
    status = MPI_Iallgatherv(MPI_IN_PLACE, 0, type, (char *)c->out.data + at * size, count, offset, type,
                             MPI_COMM_WORLD, &request);
    return finish(m, status, &request);
}

static int carry_out_call(dist_mpi *m, const dist_entry *x) {
    const dist_call *c = &x->call;
    const size_t elements = dist_elements(c), size = rt_type_size(dist_type(c)), N = (size_t)m->size;
    const MPI_Datatype type = size == 2 ? MPI_UINT16_T : size == 4 ? MPI_UINT32_T : MPI_UINT64_T;
    const int n = (int)elements, share = (int)(elements / N), roots = m->rank == c->peer;
    size_t all = c->op == DIST_REDUCE_SCATTER ? elements / N : elements, step = PIECE;
    char *in = c->in.data, *out = c->out.data, *own = out + (size_t)m->rank * c->in.count * size;
    MPI_Request request;
    int status = elements > INT_MAX ? MPI_ERR_COUNT : MPI_SUCCESS;
    if (status) return finish(m, status, &request);
    if (c->op != DIST_SEND && c->op != DIST_RECV && !all_agree(m, &x->fingerprint)) return -1;
    switch (c->op) {
    case DIST_ALL_GATHER:
        if (own != in) memcpy(own, in, c->in.count * size);
        status = MPI_Iallgather(MPI_IN_PLACE, 0, type, out, share, type, MPI_COMM_WORLD, &request);
        break;
    case DIST_BROADCAST:
        if (roots && out && out != in) memcpy(out, in, elements * size);
        status = MPI_Ibcast(roots ? in : out, n, type, c->peer, MPI_COMM_WORLD, &request);
        break;
    case DIST_SEND: status = MPI_Isend(in, n, type, c->peer, 0, MPI_COMM_WORLD, &request); break;
    case DIST_RECV: status = MPI_Irecv(out, n, type, c->peer, 0, MPI_COMM_WORLD, &request); break;
    case DIST_BARRIER: return 0; /* all have come, or they would not have agreed */
    default:
        if (c->op == DIST_ALL_REDUCE || c->op == DIST_CONTROL) step *= N;
        for (size_t at = 0; at < all; at += step)
            if (sum_piece(m, c, at, all - at < step ? all - at : step, type)) return -1;
        return 0;
    }
    return finish(m, status, &request);
}

static void *carry_out(void *argument) {
    dist_mpi *m = argument;
    for (int end;;) {
        uint64_t posted = dist_queue_posted(&m->queue, &end);
        if (end && !atomic_load(&m->queue.head.world->failed))
            all_agree(m, &(dist_fingerprint){.op = DIST_OPS}); /* that this was all */
        if (end) return dist_queue_leave(&m->queue);
        double begin = rt_seconds();
        if (m->queue.completed == posted)
            dist_queue_sleep(&m->queue);
        else if (!carry_out_call(m, dist_queue_at(&m->queue, m->queue.completed)))
            dist_queue_complete(&m->queue, rt_seconds() - begin);
    }
}

static int mpi_agree(dist_process *p, int failed, error_text *e, char *shared, size_t size) {
    dist_mpi *m = (dist_mpi *)p;
    error_text first = {{0}};
    int any = failed != 0;
    if (failed) first = *e;
    MPI_Allreduce(MPI_IN_PLACE, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    MPI_Bcast(shared, (int)size, MPI_CHAR, 0, MPI_COMM_WORLD);
    MPI_Bcast(first.text, sizeof first.text, MPI_CHAR, 0, MPI_COMM_WORLD);
    if (!failed || (m->rank && !strcmp(first.text, e->text))) *e->text = 0;
    return any ? -1 : 0;
}

static dist_hub *mpi_start(dist_process *p, rt_world *world, const vit_device *device, error_text *e) {
    static const dist_transport transport = {"mpi", dist_queue_post, NULL, NULL};
    dist_mpi *m = (dist_mpi *)p;
    m->device = device;
    m->speaks = 1; /* of its own failures */
    return dist_queue_start(&m->queue, &transport, world, m->size, carry_out, m, e) ? NULL : &m->queue.head;
}

static int mpi_stop(dist_process *p) {
    dist_mpi *m = (dist_mpi *)p;
    dist_queue_stop(&m->queue);
    m->failed = atomic_load(&m->queue.head.world->failed);
    return m->failed && m->speaks;
}

/* Ranks that wait for one that has failed would wait in MPI_Finalize too. */
static void mpi_close(dist_process *p) {
    dist_mpi *m = (dist_mpi *)p;
    if (m->failed && !m->speaks) sleep(5); /* rank 0 says why, and then ends all */
    if (m->failed) MPI_Abort(MPI_COMM_WORLD, 1);
    MPI_Finalize();
    free(m);
}

dist_process *dist_mpi_open(int rank, int size, double timeout, error_text *e) {
    int level = 0, mpi_rank = 0, mpi_size = 0;
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &level) || level < MPI_THREAD_SERIALIZED) {
        error_set(e, "MPI starts with thread level %d, expected MPI_THREAD_SERIALIZED", level);
        return NULL;
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &mpi_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &mpi_size);
    dist_mpi *m = aligned_alloc(64, sizeof *m + (size_t)size * PIECE * 8);
    if (mpi_rank == rank && mpi_size == size && m) {
        *m = (dist_mpi){{mpi_agree, mpi_start, mpi_stop, mpi_close}, .rank = rank, .size = size};
        m->timeout = timeout;
        return &m->head;
    }
    error_set(e, "MPI says rank %d of %d, the launcher said rank %d of %d (is it the launcher's MPI?)",
              mpi_rank, mpi_size, rank, size);
    if (!m) error_set(e, "out of memory for %d ranks", size);
    free(m);
    MPI_Finalize();
    return NULL;
}
