/* dist_tcp.c - the transport between processes (dist_tcp.h): every rank has a socket to every other.
 *
 * A collective cuts the payload into parts, one of each rank, which owns it. (1) Everyone sends each owner
 * its values of the owner's part; the owner adds them in rank order, chunk by chunk as they come. (2) Each
 * owner sends the part, as it is finished, to all. An all-reduce is both, a reduce-scatter (1), an
 * all-gather (2); in a reduce or a broadcast the root owns everything. Both directions of every link are
 * busy from the start, and a rank sends 2 (N - 1) / N of the payload, the least there is. (In a ring that
 * adds in rank order, sums would have to begin at rank 0 and travel on to their owner: up to 1.5 times that.)
 *
 * What is posted goes into a queue (dist_process.h), which a thread carries out: for every peer it knows
 * which call it sends and which it receives, so that calls overlap; they are completed in order. A message
 * begins with a fingerprint by which ranks see whether they agree. */
#define _GNU_SOURCE
#include "dist_tcp.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHUNK = 256 << 10, STAGE = 4 * CHUNK, GOODBYE = DIST_OPS };

/* A call that is carried out. Parts are counted in bytes. */
typedef struct {
    int sums, spreads; /* (1), (2) */
    size_t own;        /* bytes of this rank's part */
    const char *from;  /* this rank's values of it */
    char *to;          /* where the sum of it goes, or NULL */
    size_t summed;     /* bytes of it that are finished */
    uint64_t stage;    /* where in the peers' stages it begins */
    uint64_t after;    /* so many calls must be complete first: the last of them has memory in common */
} tcp_work;

typedef struct {
    uint64_t sending, receiving; /* numbers of calls */
    size_t sent, received;       /* bytes of these, fingerprint included */
    dist_fingerprint other;      /* of the call that is received */
    char *stage;                 /* [STAGE] a ring of its values of this rank's parts */
} tcp_peer;

typedef struct {
    dist_queue queue;
    int rank, size;    /* as in queue.head */
    int *fd;           /* [size] sockets to the peers */
    tcp_peer *peer;    /* [size]; its own is unused */
    uint64_t prepared; /* calls that `work` has */
    uint64_t stage_end, stage_begin, summing;
    tcp_work work[DIST_QUEUE];
} dist_tcp;

/* ----------------------------------------------------------------------------------------------- failures */

/* A peer is gone. If it failed itself, or somebody else before it, its control connection says so. */
static void lose(dist_tcp *t, int r, const char *how) {
    error_text failure;
    char last[128];
    int speaks;
    if (!rendezvous_told(t->queue.head.meeting, r, &failure, &speaks))
        error_set(&failure, "rank %d lost rank %d (%s) %s", t->rank, r, how,
                  dist_queue_last(&t->queue, last));
    dist_queue_fail(&t->queue, speaks, "%s", failure.text);
}

static void silence(dist_tcp *t) {
    char names[128] = "", last[128];
    for (int begun = 0; begun < 2 && !*names; begun++) /* those who have not even begun the call, if any */
        for (int r = 0; r < t->size && strlen(names) < 100; r++)
            if (r != t->rank && t->peer[r].receiving <= t->queue.completed &&
                (begun || t->peer[r].received < sizeof t->peer[r].other))
                sprintf(names + strlen(names), " %d", r);
    dist_queue_fail(&t->queue, 1, "rank %d: no word from rank%s for %g s %s (--timeout)", t->rank, names,
                    t->queue.head.timeout, dist_queue_last(&t->queue, last));
}

/* ------------------------------------------------------------------------------------------- moving bytes */

static int overlap(rt_block a, rt_block b) {
    const char *x = a.data, *y = b.data;
    return x && y && x < y + b.count * rt_type_size(b.type) && y < x + a.count * rt_type_size(a.type);
}

/* What a call means to this rank. */
static void prepare(dist_tcp *t, uint64_t i) {
    const dist_call *c = &dist_queue_at(&t->queue, i)->call;
    tcp_work *w = &t->work[i % DIST_QUEUE];
    *w = (tcp_work){.stage = t->stage_end};
    w->sums = c->op == DIST_ALL_REDUCE || c->op == DIST_CONTROL || c->op == DIST_REDUCE_SCATTER ||
              c->op == DIST_REDUCE;
    w->spreads = c->op != DIST_REDUCE_SCATTER && c->op != DIST_REDUCE && c->op != DIST_BARRIER;
    size_t at = dist_queue_part(&t->queue, c, t->rank, &w->own);
    w->from = (char *)c->in.data + (c->op == DIST_ALL_GATHER || !w->own ? 0 : at);
    w->to = c->out.data ? (char *)c->out.data + (c->op == DIST_REDUCE_SCATTER || !w->own ? 0 : at) : NULL;
    if (w->sums) t->stage_end += (w->own + 63) / 64 * 64;
    for (uint64_t j = t->queue.completed; j < i; j++) { /* of one stream: as if in turn */
        const dist_call *before = &dist_queue_at(&t->queue, j)->call;
        if (overlap(c->in, before->out) || overlap(c->out, before->in) || overlap(c->out, before->out))
            w->after = j + 1;
    }
}

/* Does this rank send to rank r in a call, or else receive from it? */
static int exchanges(const dist_tcp *t, const dist_entry *x, int r, int sends) {
    int pair = x->call.op == DIST_SEND || x->call.op == DIST_RECV;
    return r != t->rank && (!pair || (r == x->call.peer && (x->call.op == DIST_SEND) == sends));
}

/* Sends what there is for rank r. Returns 1: something was sent; *more: and there is more. */
static int push(dist_tcp *t, int r, uint64_t posted, int *more) {
    tcp_peer *p = &t->peer[r];
    for (*more = 0; p->sending < posted; p->sending++, p->sent = 0) {
        dist_entry *x = dist_queue_at(&t->queue, p->sending);
        const tcp_work *w = &t->work[p->sending % DIST_QUEUE];
        size_t theirs, at = dist_queue_part(&t->queue, &x->call, r, &theirs);
        size_t head = sizeof x->fingerprint, done = p->sent;
        if (!exchanges(t, x, r, 1)) continue;
        if (t->queue.completed < w->after) return 0;
        if (!w->sums) theirs = 0;
        size_t own = w->spreads ? w->own : 0, finished = own && w->sums ? w->summed : own;
        if (done == head + theirs + own) continue;
        const char *piece[] = {(char *)&x->fingerprint, theirs ? (char *)x->call.in.data + at : NULL,
                               w->sums ? w->to : w->from};
        const size_t bytes[] = {head, theirs, finished};
        size_t i = 0;
        while (i < 3 && done >= bytes[i]) done -= bytes[i++];
        if (i == 3) return 0; /* the sum is not there yet */
        size_t n = bytes[i] - done < CHUNK ? bytes[i] - done : CHUNK;
        ssize_t k =
            send(t->fd[r], piece[i] + done, n, MSG_NOSIGNAL | (i == 0 && theirs + finished ? MSG_MORE : 0));
        *more = 1;
        if (k < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
        if (k < 0) return lose(t, r, strerror(errno)), 0;
        p->sent += (size_t)k;
        return 1;
    }
    return 0;
}

/* Do this rank and rank r mean the same call, of which the fingerprint has come? */
static int agrees(dist_tcp *t, int r, const dist_entry *x) {
    dist_fingerprint own = x->fingerprint;
    if (x->call.op == DIST_RECV) own.op = DIST_SEND, own.root = t->rank;
    if (!memcmp(&own, &t->peer[r].other, sizeof own)) return 1;
    dist_queue_disagree(&t->queue, t->rank, &x->fingerprint, r, &t->peer[r].other);
    return 0;
}

/* Takes what rank r has sent. Returns 1: something came; *more: more is expected now. */
static int pull(dist_tcp *t, int r, uint64_t posted, int *more) {
    tcp_peer *p = &t->peer[r];
    *more = 0;
    while (p->receiving < posted && !exchanges(t, dist_queue_at(&t->queue, p->receiving), r, 0))
        p->receiving++;
    char *to = (char *)&p->other + p->received;
    size_t head = sizeof p->other, n = p->received < head ? head - p->received : 0;
    if (!n && p->receiving == posted) return 0;
    dist_entry *x = dist_queue_at(&t->queue, p->receiving);
    const tcp_work *w = &t->work[p->receiving % DIST_QUEUE];
    if (p->received == head && p->other.op == GOODBYE) {
        if (p->receiving < posted) dist_queue_disagree(&t->queue, t->rank, &x->fingerprint, r, &p->other);
        return 0;
    }
    if (p->received == head && !agrees(t, r, x)) return 0;
    if (!n && t->queue.completed < w->after) return 0;
    if (!n) {
        size_t theirs, at = dist_queue_part(&t->queue, &x->call, r, &theirs);
        size_t done = p->received - head, own = w->sums ? w->own : 0;
        if (!w->spreads) theirs = 0;
        if (done < own) { /* into the ring, as far as it is free and in one piece */
            uint64_t position = w->stage + done, end = t->stage_begin + STAGE;
            n = own - done;
            if (n > end - position) n = (size_t)(end - position);
            if (n > STAGE - position % STAGE) n = STAGE - position % STAGE;
            to = p->stage + position % STAGE;
            if (!n) return 0;
        } else {
            n = own + theirs - done;
            to = (char *)x->call.out.data + (x->call.op == DIST_RECV ? 0 : at) + (done - own);
        }
        if (done == own + theirs) return p->receiving++, p->received = 0, 1;
    }
    *more = 1;
    ssize_t k = recv(t->fd[r], to, n, 0);
    if (k < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (k <= 0) return lose(t, r, k ? strerror(errno) : "connection closed"), *more = 0;
    p->received += (size_t)k;
    return 1;
}

/* Adds, in rank order, what has come from all ranks. Returns 1: something was added. */
static int sum(dist_tcp *t, uint64_t posted) {
    for (; t->summing < posted; t->summing++) {
        tcp_work *x = &t->work[t->summing % DIST_QUEUE];
        rt_type type = dist_type(&dist_queue_at(&t->queue, t->summing)->call);
        size_t size = rt_type_size(type), n = x->own - x->summed, N = (size_t)t->size;
        if (t->queue.completed < x->after) return 0;
        if (!x->sums) {
            if (x->own && x->to && x->to != x->from) memcpy(x->to, x->from, x->own);
            x->summed = x->own;
            continue;
        }
        if (!n) {
            t->stage_begin = x->stage + (x->own + 63) / 64 * 64;
            continue;
        }
        for (int r = 0; r < t->size; r++) {
            tcp_peer *p = &t->peer[r];
            size_t head = sizeof p->other, come = p->receiving > t->summing ? x->own : 0;
            if (r == t->rank) continue;
            if (p->receiving == t->summing && p->received > head) come = p->received - head;
            if (come > x->own) come = x->own;
            if (n > come - x->summed) n = come - x->summed;
        }
        size_t position = (x->stage + x->summed) % STAGE;
        if (n > CHUNK) n = CHUNK;
        if (n > STAGE - position) n = STAGE - position;
        n -= n % size;
        if (!n || (n < CHUNK / 8 && x->summed + n < x->own && position + n < STAGE)) return 0;
        rt_block from[N], to = {.data = x->to + x->summed, .type = type, .count = n / size};
        for (size_t r = 0; r < N; r++)
            from[r] = (rt_block){.data = (int)r == t->rank ? (char *)x->from + x->summed
                                                           : t->peer[r].stage + position,
                                 .type = type,
                                 .count = n / size};
        t->queue.device->sum_buffers(&t->queue.self.stream[RT_COMMUNICATION], &to, 1, from, N);
        x->summed += n;
        t->stage_begin = x->stage + x->summed;
        return 1;
    }
    return 0;
}

/* Completes, in order, the calls of which nothing is left to do; the oldest began at *begin. 1: some were. */
static int complete(dist_tcp *t, uint64_t posted, double *begin) {
    uint64_t before = t->queue.completed;
    while (t->queue.completed < posted && t->summing > t->queue.completed) {
        for (int r = 0; r < t->size; r++)
            if (r != t->rank &&
                (t->peer[r].sending <= t->queue.completed || t->peer[r].receiving <= t->queue.completed))
                return t->queue.completed > before;
        double now = rt_seconds();
        dist_queue_complete(&t->queue, now - *begin);
        *begin = now;
    }
    return t->queue.completed > before;
}

static void *carry_out(void *argument) {
    dist_tcp *t = argument;
    struct pollfd fds[t->size];
    double heard = rt_seconds(), begin = heard; /* of the last byte, of the oldest call */
    for (;;) {
        int moved = 0, more, end;
        uint64_t posted = dist_queue_posted(&t->queue, &end), ignored;
        if (end) return dist_queue_leave(&t->queue);
        if (t->queue.completed == posted) begin = heard = rt_seconds();
        for (; t->prepared < posted; t->prepared++) prepare(t, t->prepared);
        for (int r = 0; r < t->size; r++) {
            fds[r] = (struct pollfd){t->queue.wake, POLLIN, 0};
            if (r == t->rank) continue;
            fds[r].events = 0;
            moved |= push(t, r, posted, &more);
            if (more) fds[r].events |= POLLOUT;
            moved |= pull(t, r, posted, &more);
            if (more) fds[r].events |= POLLIN;
            fds[r].fd = fds[r].events ? t->fd[r] : -1;
        }
        moved |= sum(t, posted);
        moved |= complete(t, posted, &begin);
        if (moved) heard = rt_seconds();
        if (moved) continue;
        if (rt_seconds() - heard > t->queue.head.timeout) silence(t);
        poll(fds, (nfds_t)t->size, 100);
        if (fds[t->rank].revents && read(t->queue.wake, &ignored, sizeof ignored) < 0) continue;
    }
}

/* ---------------------------------------------------------------------------------------------- interface */

/* Says goodbye on every socket; or closes them once a failure is told, so that the peers look why (lose). */
static int tcp_stop(dist_process *p) {
    dist_tcp *t = (dist_tcp *)p;
    dist_fingerprint goodbye = {.op = GOODBYE};
    dist_queue_stop(p);
    int failed = atomic_load(&p->hub.world->failed);
    for (int r = 0; r < t->size && !failed; r++)
        if (r != t->rank) rendezvous_transfer(t->fd[r], &goodbye, sizeof goodbye, 1, rt_seconds() + 5);
    int speaks = dist_process_stop(p);
    for (int r = 0; r < t->size && failed; r++)
        if (r != t->rank) shutdown(t->fd[r], SHUT_RDWR);
    return speaks;
}

static void tcp_close(dist_process *p) {
    dist_tcp *t = (dist_tcp *)p;
    for (int r = 0; r < t->size; r++) {
        if (t->fd && t->fd[r] >= 0) close(t->fd[r]);
        if (t->peer) free(t->peer[r].stage);
    }
    free(t->peer);
    free(t->fd);
    dist_process_close(p);
}

dist_process *dist_tcp_open(const char *host, int port, int rank, int size, double timeout, error_text *e) {
    dist_process *p = dist_process_meet(sizeof(dist_tcp), host, port, rank, size, timeout, e);
    dist_tcp *t = (dist_tcp *)p;
    if (!p) return NULL;
    dist_queue_prepare(&t->queue, "tcp", carry_out);
    p->stop = tcp_stop, p->close = tcp_close;
    t->rank = rank, t->size = size;
    t->fd = malloc((size_t)size * sizeof *t->fd);
    t->peer = calloc((size_t)size, sizeof *t->peer);
    int failed = !t->fd || !t->peer;
    for (int r = 0; r < size && t->fd; r++) t->fd[r] = -1;
    for (int r = 0; r < size && !failed; r++)
        failed = r != rank && !(t->peer[r].stage = aligned_alloc(64, STAGE));
    if (failed) error_set(e, "out of memory for %d ranks", size);
    if (!failed && !rendezvous_connect(p->meeting, t->fd, e)) return p;
    tcp_close(p);
    return NULL;
}
