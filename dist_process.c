/* dist_process.c - processes that meet over sockets, and the queue of posted calls (dist_process.h). */
#include "dist_process.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

dist_process *dist_process_create(size_t bytes, int rank, int size, double timeout, error_text *e) {
    dist_process *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) return error_set(e, "out of memory for %d ranks", size), NULL;
    memset(p, 0, bytes);
    *p = (dist_process){.hub.size = size, .rank = rank, .timeout = timeout, .speaks = 1};
    return p;
}

/* ------------------------------------------------------------------------------------------- over sockets */

static int agree(dist_process *p, int failed, error_text *e, char *shared, size_t size) {
    return rendezvous_agree(p->meeting, failed, e, shared, size);
}

dist_process *dist_process_meet(size_t bytes, const char *host, int port, int rank, int size, double timeout,
                                error_text *e) {
    dist_process *p = dist_process_create(bytes, rank, size, timeout, e);
    if (!p) return NULL;
    p->agree = agree, p->stop = dist_process_stop, p->close = dist_process_close;
    if ((p->meeting = rendezvous_open(host, port, rank, size, timeout, e))) return p;
    free(p);
    return NULL;
}

int dist_process_stop(dist_process *p) {
    rt_world *w = p->hub.world;
    error_text why;
    if (atomic_load(&w->failed))
        rendezvous_tell(p->meeting, w->error.text, p->speaks);
    else if (!rendezvous_end(p->meeting, &why, &p->speaks))
        return 0;
    else
        rt_fail(&w->ranks[0], "%s", why.text);
    return p->speaks;
}

void dist_process_close(dist_process *p) {
    rendezvous_close(p->meeting);
    free(p);
}

/* ---------------------------------------------------------------------------------------------- the queue */

static void wake(dist_queue *q) {
    if (write(q->wake, &(uint64_t){1}, 8) < 0) return; /* it has been told 2^64 - 2 times and not looked */
}

static void post(dist_comm *comm, const dist_call *calls, size_t n) {
    dist_queue *q = comm->shared; /* its hub */
    rt_rank *rank = comm->rank;
    rt_world *w = rank->world;
    pthread_mutex_lock(&w->lock);
    for (size_t i = 0; i < n; i++) {
        const dist_call *c = &calls[i];
        rt_stream *s = &rank->stream[c->stream];
        rt_event *done = c->done ? c->done : &comm->own_done;
        int pair = c->op == DIST_SEND || c->op == DIST_RECV, ready = 1;
        if (done->recorded && !done->done) ready = !rt_block_until(rank, &done->done);
        while (ready && q->posted - q->completed == DIST_QUEUE) {
            q->room = 0;
            ready = !rt_block_until(rank, &q->room);
        }
        if (!ready || atomic_load(&w->failed)) break;
        dist_entry *x = dist_queue_at(q, q->posted);
        *x = (dist_entry){.call = *c};
        x->call.done = done;
        x->fingerprint = (dist_fingerprint){
            .sequence = pair ? comm->pair_sequence[2 * c->peer + (c->op == DIST_RECV)]++ : comm->sequence++,
            .elements = dist_elements(c),
            .op = (uint32_t)c->op,
            .type = (uint32_t)dist_type(c),
            .root = c->peer};
        strncpy(x->fingerprint.unit, c->unit, sizeof x->fingerprint.unit - 1);
        x->ready = s->time > rank->stream[RT_HOST].time ? s->time : rank->stream[RT_HOST].time;
        memcpy(done->clock, s->clock, sizeof done->clock);
        done->recorded = 1;
        done->done = 0;
        s->tail = done;
        rank->last =
            (rt_note){comm->name, dist_op_name(c->op), c->unit, x->fingerprint.sequence, dist_elements(c)};
        q->posted++;
    }
    pthread_mutex_unlock(&w->lock);
    wake(q);
}

static dist_hub *start(dist_process *p, rt_world *world, const vit_device *device, error_text *e) {
    dist_queue *q = (dist_queue *)p;
    p->hub.world = world;
    q->device = device;
    q->self = world->ranks[0];
    q->self.threads = 1;
    for (int s = 0; s < RT_STREAMS; s++) q->self.stream[s].rank = &q->self;
    q->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    world->executing++;
    if (q->wake >= 0 && !pthread_create(&q->thread, NULL, q->carry_out, q)) return &p->hub;
    if (q->wake >= 0) close(q->wake);
    world->executing--;
    return error_set(e, "cannot start a thread for communication"), NULL;
}

int dist_queue_stop(dist_process *p) {
    dist_queue *q = (dist_queue *)p;
    rt_world *w = p->hub.world;
    pthread_mutex_lock(&w->lock);
    q->stop = 1;
    pthread_mutex_unlock(&w->lock);
    wake(q);
    pthread_join(q->thread, NULL);
    close(q->wake);
    return atomic_load(&w->failed) && p->speaks;
}

void dist_queue_prepare(dist_queue *q, const char *name, void *(*carry_out)(void *)) {
    q->transport = (dist_transport){name, post, NULL, NULL, NULL};
    q->carry_out = carry_out;
    q->head.hub.transport = &q->transport;
    q->head.start = start;
    q->head.stop = dist_queue_stop;
}

uint64_t dist_queue_posted(dist_queue *q, int *end) {
    rt_world *w = q->head.hub.world;
    pthread_mutex_lock(&w->lock);
    uint64_t posted = q->posted;
    *end = atomic_load(&w->failed) || (q->stop && q->completed == posted);
    pthread_mutex_unlock(&w->lock);
    return posted;
}

dist_entry *dist_queue_next(dist_queue *q) {
    struct pollfd wake = {q->wake, POLLIN, 0};
    uint64_t ignored;
    for (int end;;) {
        uint64_t posted = dist_queue_posted(q, &end);
        if (end) return NULL;
        if (q->completed < posted) return dist_queue_at(q, q->completed);
        if (poll(&wake, 1, 100) > 0 && read(q->wake, &ignored, sizeof ignored) < 0) continue; /* in vain */
    }
}

size_t dist_queue_part(const dist_queue *q, const dist_call *c, int r, size_t *bytes) {
    size_t n = dist_elements(c), N = (size_t)q->head.hub.size, p = (size_t)r;
    size_t size = rt_type_size(dist_type(c)), lo = 0, hi = 0;
    switch (c->op) {
    case DIST_BARRIER: break;
    case DIST_BROADCAST:
    case DIST_REDUCE:
    case DIST_RECV: hi = r == c->peer ? n : 0; break;
    case DIST_SEND: hi = r == q->head.rank ? n : 0; break;
    default: lo = n / N * p + (n % N * p) / N, hi = n / N * (p + 1) + (n % N * (p + 1)) / N;
    }
    *bytes = (hi - lo) * size;
    return lo * size;
}

void dist_queue_complete(dist_queue *q, double seconds) {
    rt_world *w = q->head.hub.world;
    dist_entry *x = dist_queue_at(q, q->completed);
    pthread_mutex_lock(&w->lock);
    q->last_end = (x->ready > q->last_end ? x->ready : q->last_end) + seconds;
    x->call.done->time = q->last_end;
    x->call.done->done = 1;
    q->completed++;
    q->room = 1;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

void *dist_queue_leave(dist_queue *q) {
    rt_world *w = q->head.hub.world;
    pthread_mutex_lock(&w->lock);
    w->executing--; /* rt_drain waits for it */
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

int dist_queue_fail(dist_queue *q, int speaks, const char *format, ...) {
    rt_rank *rank = &q->head.hub.world->ranks[0];
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&rank->world->lock);
    if (!atomic_load(&rank->world->failed)) {
        q->head.speaks = speaks;
        rt_fail_with_table(rank, "%s", text);
    }
    pthread_mutex_unlock(&rank->world->lock);
    return -1;
}

int dist_queue_disagree(dist_queue *q, int rank, const dist_fingerprint *a, int other,
                        const dist_fingerprint *b) {
    if (rank > other) return dist_queue_disagree(q, other, b, rank, a);
    const char *name[2] = {"nothing more", "nothing more"}; /* of a rank that has left */
    if (a->op < DIST_OPS) name[0] = dist_op_name((dist_op)a->op);
    if (b->op < DIST_OPS) name[1] = dist_op_name((dist_op)b->op);
    return dist_queue_fail(
        q, q->head.rank == 0,
        "ranks %d and %d disagree: %s %llu of %llu (%.32s) against %s %llu of %llu (%.32s)", rank, other,
        name[0], (unsigned long long)a->sequence, (unsigned long long)a->elements, a->unit, name[1],
        (unsigned long long)b->sequence, (unsigned long long)b->elements, b->unit);
}

const char *dist_queue_last(dist_queue *q, char text[128]) {
    rt_world *w = q->head.hub.world;
    pthread_mutex_lock(&w->lock);
    const rt_note *n = &w->ranks[0].last;
    const dist_fingerprint *f = &dist_queue_at(q, q->completed)->fingerprint;
    if (q->completed < q->posted)
        snprintf(text, 128, "in %s %llu (%s)", dist_op_name((dist_op)f->op), (unsigned long long)f->sequence,
                 f->unit);
    else if (n->op)
        snprintf(text, 128, "after %s %llu (%s)", n->op, (unsigned long long)n->sequence, n->unit);
    else
        snprintf(text, 128, "before the first collective");
    pthread_mutex_unlock(&w->lock);
    return text;
}
