/* dist_process.c - the queue of posted calls (dist_process.h). */
#include "dist_process.h"

#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void wake(dist_queue *q) {
    if (write(q->wake, &(uint64_t){1}, 8) < 0) return; /* it has been told 2^64 - 2 times and not looked */
}

int dist_queue_start(dist_queue *q, const dist_transport *transport, rt_world *world, int size,
                     void *(*carry_out)(void *), void *argument, error_text *e) {
    *q = (dist_queue){.head = {transport, world, size}, .self = world->ranks[0]};
    q->self.threads = 1;
    for (int s = 0; s < RT_STREAMS; s++) q->self.stream[s].rank = &q->self;
    q->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    world->executing++;
    if (q->wake >= 0 && !pthread_create(&q->thread, NULL, carry_out, argument)) return 0;
    if (q->wake >= 0) close(q->wake);
    world->executing--;
    return error_set(e, "cannot start a thread for communication");
}

void dist_queue_stop(dist_queue *q) {
    rt_world *w = q->head.world;
    pthread_mutex_lock(&w->lock);
    q->stop = 1;
    pthread_mutex_unlock(&w->lock);
    wake(q);
    pthread_join(q->thread, NULL);
    close(q->wake);
}

void dist_queue_post(dist_comm *comm, const dist_call *calls, size_t n) {
    dist_queue *q = comm->shared;
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

uint64_t dist_queue_posted(dist_queue *q, int *end) {
    rt_world *w = q->head.world;
    pthread_mutex_lock(&w->lock);
    uint64_t posted = q->posted;
    *end = atomic_load(&w->failed) || (q->stop && q->completed == posted);
    pthread_mutex_unlock(&w->lock);
    return posted;
}

void dist_queue_sleep(dist_queue *q) {
    struct pollfd wake = {q->wake, POLLIN, 0};
    uint64_t ignored;
    if (poll(&wake, 1, 100) > 0 && read(q->wake, &ignored, sizeof ignored) < 0) return; /* looked in vain */
}

void dist_queue_complete(dist_queue *q, double seconds) {
    rt_world *w = q->head.world;
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
    rt_world *w = q->head.world;
    pthread_mutex_lock(&w->lock);
    w->executing--; /* rt_drain waits for it */
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

int dist_queue_fail(dist_queue *q, const char *format, ...) {
    rt_rank *rank = &q->head.world->ranks[0];
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&rank->world->lock);
    int first = !atomic_load(&rank->world->failed);
    if (first) rt_fail_with_table(rank, "%s", text);
    pthread_mutex_unlock(&rank->world->lock);
    return first;
}

const char *dist_queue_last(dist_queue *q, char text[128]) {
    rt_world *w = q->head.world;
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
