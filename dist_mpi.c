/* dist_mpi.c - the transport over MPI (dist_mpi.h). MPI's own reductions add in any order, so it only moves
 * numbers here: an all-to-all gives every rank all values of its part of the payload (dist_queue_part), which
 * it adds up in rank order, and an all-gather spreads the sums. What is posted is carried out by the queue's
 * thread, one call after the other. */
#include "dist_mpi.h"

#include <limits.h>
#include <mpi.h>
#include <string.h>
#include <unistd.h>

enum { PIECE = 1 << 19 }; /* bytes of a rank's part that are added up at a time */

typedef struct {
    dist_queue queue;
    int failed;
    MPI_Request request;       /* of the call that is carried out */
    _Alignas(64) char stage[]; /* [size][PIECE] what the ranks have sent of this rank's part */
} dist_mpi;

/* Waits for the request, if MPI has accepted it (status). -1: the world has failed. MPI makes progress only
 * while it is asked, and the rank's own thread needs the core. */
static int finish(dist_mpi *m, int status) {
    double begin = rt_seconds();
    char last[128];
    for (int done = 0; status == MPI_SUCCESS; rt_seconds() - begin > 1e-4 ? usleep(20) : 0) {
        status = MPI_Test(&m->request, &done, MPI_STATUS_IGNORE);
        if (done) return 0;
        if (atomic_load(&m->queue.head.hub.world->failed)) return -1;
        if (rt_seconds() - begin > m->queue.head.timeout) break;
    }
    return dist_queue_fail(&m->queue, 1, "rank %d: %s %s after %g s (--timeout; MPI says %d)",
                           m->queue.head.rank, status ? "MPI fails" : "no word from the others",
                           dist_queue_last(&m->queue, last), rt_seconds() - begin, status);
}

/* Do all ranks mean the same call? MPI would mix up what they send. -1: no. */
static int agree_on(dist_mpi *m, const dist_fingerprint *own) {
    const int n = sizeof *own;
    dist_fingerprint *all = (dist_fingerprint *)m->stage;
    if (finish(m, MPI_Iallgather(own, n, MPI_BYTE, all, n, MPI_BYTE, MPI_COMM_WORLD, &m->request))) return -1;
    for (int r = 1; r < m->queue.head.hub.size; r++)
        if (memcmp(&all[r], all, sizeof *all)) return dist_queue_disagree(&m->queue, 0, all, r, &all[r]);
    return 0;
}

/* A sum, PIECE bytes of every rank's part at a time: each rank adds up its own. */
static int sum(dist_mpi *m, const dist_call *c, MPI_Datatype type) {
    const size_t size = rt_type_size(dist_type(c)), N = (size_t)m->queue.head.hub.size;
    const size_t elements = dist_elements(c), me = (size_t)m->queue.head.rank;
    const size_t most = size * (c->op == DIST_REDUCE ? elements : (elements + N - 1) / N); /* in a part */
    const int spreads = c->op == DIST_ALL_REDUCE || c->op == DIST_CONTROL;
    int count[N], offset[N], own[N], own_offset[N]; /* in elements: to each rank, from each rank */
    rt_block from[N];
    for (size_t at = 0; at < most; at += PIECE) {
        for (size_t r = 0; r < N; r++) {
            size_t bytes, begin = dist_queue_part(&m->queue, c, (int)r, &bytes);
            bytes = bytes < at ? 0 : bytes < at + PIECE ? bytes - at : PIECE;
            count[r] = (int)(bytes / size);
            offset[r] = bytes ? (int)((begin + at) / size) : 0;
        }
        rt_block to = rt_slice(c->out, spreads ? (size_t)offset[me] : at / size, (size_t)count[me]);
        for (size_t r = 0; r < N; r++) {
            own[r] = count[me], own_offset[r] = (int)(r * PIECE / size);
            from[r] = (rt_block){.data = m->stage + r * PIECE, .type = to.type, .count = to.count};
        }
        if (finish(m, MPI_Ialltoallv(c->in.data, count, offset, type, m->stage, own, own_offset, type,
                                     MPI_COMM_WORLD, &m->request)))
            return -1;
        if (to.count) m->queue.device->sum_buffers(&m->queue.self.stream[RT_COMMUNICATION], &to, 1, from, N);
        if (spreads && finish(m, MPI_Iallgatherv(MPI_IN_PLACE, 0, type, c->out.data, count, offset, type,
                                                 MPI_COMM_WORLD, &m->request)))
            return -1;
    }
    return 0;
}

static int carry_out_call(dist_mpi *m, const dist_entry *x) {
    const dist_call *c = &x->call;
    const size_t elements = dist_elements(c), size = rt_type_size(dist_type(c));
    const MPI_Datatype types[] = {
        [1] = MPI_UINT8_T, [2] = MPI_UINT16_T, [4] = MPI_UINT32_T, [8] = MPI_UINT64_T};
    const MPI_Datatype type = types[size];
    const int n = (int)elements, share = (int)c->in.count, rank = m->queue.head.rank;
    char *in = c->in.data, *out = c->out.data;
    if (elements > INT_MAX) return finish(m, MPI_ERR_COUNT);
    if (c->op != DIST_SEND && c->op != DIST_RECV && agree_on(m, &x->fingerprint)) return -1;
    switch (c->op) {
    case DIST_BARRIER: return 0; /* all have come, or they would not have agreed */
    case DIST_SEND: return finish(m, MPI_Isend(in, n, type, c->peer, 0, MPI_COMM_WORLD, &m->request));
    case DIST_RECV: return finish(m, MPI_Irecv(out, n, type, c->peer, 0, MPI_COMM_WORLD, &m->request));
    case DIST_BROADCAST:
        if (rank == c->peer && out && out != in) memcpy(out, in, elements * size);
        return finish(m, MPI_Ibcast(out ? out : in, n, type, c->peer, MPI_COMM_WORLD, &m->request));
    case DIST_ALL_GATHER:
        if (in == out + (size_t)rank * c->in.count * size) in = MPI_IN_PLACE;
        return finish(m, MPI_Iallgather(in, share, type, out, share, type, MPI_COMM_WORLD, &m->request));
    default: return sum(m, c, type);
    }
}

static void *carry_out(void *argument) {
    dist_mpi *m = argument;
    for (dist_entry *x; (x = dist_queue_next(&m->queue));) {
        double begin = rt_seconds();
        if (!carry_out_call(m, x)) dist_queue_complete(&m->queue, rt_seconds() - begin);
    }
    m->failed = atomic_load(&m->queue.head.hub.world->failed) ||
                agree_on(m, &(dist_fingerprint){.op = DIST_OPS}); /* that this was all */
    return dist_queue_leave(&m->queue);
}

static int mpi_agree(dist_process *p, int failed, error_text *e, char *shared, size_t size) {
    error_text first = failed ? *e : (error_text){{0}};
    int any = failed != 0;
    MPI_Allreduce(MPI_IN_PLACE, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    MPI_Bcast(shared, (int)size, MPI_CHAR, 0, MPI_COMM_WORLD);
    MPI_Bcast(first.text, sizeof first.text, MPI_CHAR, 0, MPI_COMM_WORLD);
    if (!failed || (p->rank && !strcmp(first.text, e->text))) *e->text = 0;
    return any ? -1 : 0;
}

/* Ranks that wait for one that has failed would wait in MPI_Finalize too. */
static void mpi_close(dist_process *p) {
    dist_mpi *m = (dist_mpi *)p;
    if (m->failed && !p->speaks) sleep(5); /* rank 0 says why, and then ends all */
    if (m->failed) MPI_Abort(MPI_COMM_WORLD, 1);
    MPI_Finalize();
    dist_process_close(p);
}

dist_process *dist_mpi_open(int rank, int size, double timeout, error_text *e) {
    int level = 0, mpi_rank = 0, mpi_size = 0;
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &level) || level < MPI_THREAD_SERIALIZED)
        return error_set(e, "MPI starts with thread level %d, expected MPI_THREAD_SERIALIZED", level), NULL;
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &mpi_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &mpi_size);
    dist_process *p = NULL;
    if (mpi_rank != rank || mpi_size != size)
        error_set(e, "MPI says rank %d of %d, the launcher said rank %d of %d (is it the launcher's MPI?)",
                  mpi_rank, mpi_size, rank, size);
    else
        p = dist_process_create(sizeof(dist_mpi) + (size_t)size * PIECE, rank, size, timeout, e);
    if (!p) return MPI_Finalize(), NULL;
    dist_queue_prepare((dist_queue *)p, "mpi", carry_out);
    p->agree = mpi_agree, p->close = mpi_close;
    return p;
}
