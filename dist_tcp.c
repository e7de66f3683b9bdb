/* dist_tcp.c - the transport between processes (dist_tcp.h): every rank has a socket to every other.
 *
 * A collective cuts the payload into parts, one of each rank, which owns it. (1) Everyone sends each owner
 * its values of the owner's part; the owner adds them in rank order, chunk by chunk as they come. (2) Each
 * owner sends the part, as it is finished, to all. An all-reduce is both, a reduce-scatter (1), an
 * all-gather (2); in a reduce or a broadcast the root owns everything. Both directions of every link are
 * busy from the start, and a rank sends 2 (N - 1) / N of the payload, the least there is. (A ring that
 * adds in rank order would send up to twice that: partial sums would have to begin at rank 0, wherever
 * their owner is.)
 *
 * What is posted goes into a queue. A thread of the process carries it out: for every peer it knows which
 * entry it sends and which it receives, so that entries overlap; they are completed in order. A message
 * begins with a header by which ranks see whether they agree. */
#define _GNU_SOURCE
#include "dist_tcp.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

enum { QUEUE = 16, CHUNK = 256 << 10, STAGE = 4 * CHUNK, GOODBYE = DIST_OPS, MAGIC = 0x56695431 };

/* What every message begins with: the fingerprint of the collective. */
typedef struct {
    uint64_t sequence, elements;
    uint32_t op, type;
    int32_t root, unused;
    char unit[32];
} tcp_header;

/* One call. Parts are counted in bytes. */
typedef struct {
    dist_call call;
    tcp_header header;
    int sums, spreads, copied; /* (1), (2) */
    size_t own;                /* bytes of this rank's part */
    const char *from;          /* this rank's values of it */
    char *to;                  /* where the sum of it goes, or NULL */
    size_t summed;             /* bytes of it that are finished */
    uint64_t stage;            /* where in the peers' stages it begins */
    double ready;              /* virtual time */
} tcp_entry;

typedef struct {
    int fd, control;             /* control: of rank 0, to all; of the others, to rank 0; or -1 */
    int left;                    /* it has said goodbye */
    uint64_t sending, receiving; /* numbers of entries */
    size_t sent, received;       /* bytes of these, header included */
    tcp_header header;           /* of the entry that is received */
    char *stage;                 /* [STAGE] a ring of its values of this rank's parts */
} tcp_peer;

struct dist_tcp {
    dist_hub head;
    int rank, size, wake, running, speaks;
    double timeout, last_end, moved;
    const vit_device *device;
    rt_rank self; /* what the thread computes as */
    pthread_t thread;
    tcp_peer *peer; /* [size]; its own is unused */
    uint64_t sequence, stage_end, stage_begin, summing;
    tcp_entry entry[QUEUE];
    /* under world->lock */
    uint64_t posted, completed;
    int room, stop;
};

/* What goes over control connections: a failure, and what rank 0 shares. */
typedef struct {
    int failed, speaker;
    char text[512], shared[4096];
} tcp_note;

/* ---------------------------------------------------------------------------------------------- rendezvous */

typedef struct {
    uint32_t magic;
    int32_t rank, size;
    uint16_t port, unused;
    uint32_t address;
} tcp_hello;

/* All n bytes, or -1: the other end is gone, or the time is over (errno ETIMEDOUT). */
static int transfer(int fd, void *data, size_t n, int sends, double deadline) {
    for (size_t at = 0; at < n;) {
        struct pollfd p = {fd, sends ? POLLOUT : POLLIN, 0};
        double left = deadline - rt_seconds();
        errno = ETIMEDOUT;
        if (left <= 0) return -1;
        if (poll(&p, 1, 1 + (int)(1000 * (left < 1 ? left : 1))) <= 0) continue;
        ssize_t k = sends ? send(fd, (char *)data + at, n - at, MSG_NOSIGNAL)
                          : recv(fd, (char *)data + at, n - at, 0);
        if (k == 0 || (k < 0 && errno != EAGAIN && errno != EINTR)) return -1;
        if (k > 0) at += (size_t)k;
    }
    return 0;
}

static int prepare_socket(int fd) {
    int on = 1;
    if (fd >= 0) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

static int listen_at(uint16_t *port, error_text *e) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(*port)};
    socklen_t length = sizeof a;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 1024) ||
        getsockname(fd, (struct sockaddr *)&a, &length)) {
        error_set(e, "port %d, at which ranks meet: %s (--rendezvous-port)", *port, strerror(errno));
        close(fd);
        return -1;
    }
    *port = ntohs(a.sin_port);
    return fd;
}

/* The next connection; -1: none within the time. */
static int accept_one(int listener, struct in_addr *from, double deadline) {
    while (rt_seconds() < deadline) {
        struct pollfd p = {listener, POLLIN, 0};
        struct sockaddr_in a;
        socklen_t length = sizeof a;
        if (poll(&p, 1, 100) <= 0) continue;
        int fd = accept4(listener, (struct sockaddr *)&a, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) continue;
        *from = a.sin_addr;
        return prepare_socket(fd);
    }
    return -1;
}

/* Tries until somebody answers; -1: nobody within the time. */
static int connect_to(struct sockaddr_in a, double deadline) {
    do {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), error = 0;
        struct pollfd p = {fd, POLLOUT, 0};
        socklen_t length = sizeof error;
        if (!connect(fd, (struct sockaddr *)&a, sizeof a)) return prepare_socket(fd);
        if (errno == EINPROGRESS && poll(&p, 1, 1000) > 0 &&
            !getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) && !error)
            return prepare_socket(fd);
        close(fd);
        poll(NULL, 0, 50);
    } while (rt_seconds() < deadline);
    return -1;
}

/* Rank 0: waits for all others, and tells them where everyone is. */
static int gather_ranks(dist_tcp *t, int port, tcp_hello *at, double deadline, error_text *e) {
    uint16_t p = (uint16_t)port;
    int listener = listen_at(&p, e), missing = t->size - 1;
    *e->text = 0;
    if (listener < 0) return listen_at(&p, e);
    while (missing && !*e->text) {
        tcp_hello hello;
        struct in_addr from;
        int fd = accept_one(listener, &from, deadline);
        if (fd < 0) break;
        if (transfer(fd, &hello, sizeof hello, 0, rt_seconds() + 5) || hello.magic != MAGIC) {
            close(fd); /* somebody else's */
            continue;
        }
        if (hello.size != t->size)
            error_set(e, "rank %d says that there are %d ranks, rank 0 that there are %d", hello.rank,
                      hello.size, t->size);
        else if (hello.rank <= 0 || hello.rank >= t->size || t->peer[hello.rank].control >= 0)
            error_set(e, "two processes say that they are rank %d of %d", hello.rank, t->size);
        if (*e->text) {
            tcp_note note = {.failed = 1};
            snprintf(note.text, sizeof note.text, "%.500s", e->text);
            transfer(fd, &note, sizeof note, 1, rt_seconds() + 5);
            close(fd);
            break;
        }
        t->peer[hello.rank].control = fd;
        at[hello.rank] = hello;
        at[hello.rank].address = from.s_addr;
        missing--;
    }
    close(listener);
    if (missing && !*e->text) {
        size_t used = (size_t)snprintf(e->text, sizeof e->text,
                                       "port %d: after %g s not all of %d ranks have come, missing:", port,
                                       t->timeout, t->size);
        for (int r = 1, named = 0; r < t->size && named < 16; r++)
            if (t->peer[r].control < 0 && ++named)
                used += (size_t)snprintf(e->text + used, sizeof e->text - used, " %d", r);
    }
    tcp_note note = {.failed = *e->text != 0};
    snprintf(note.text, sizeof note.text, "%.500s", e->text);
    for (int r = 1; r < t->size; r++)
        if (t->peer[r].control >= 0 &&
            (transfer(t->peer[r].control, &note, sizeof note, 1, deadline + 5) ||
             (!note.failed &&
              transfer(t->peer[r].control, at, (size_t)t->size * sizeof *at, 1, deadline + 5))))
            return error_set(e, "rank %d went away while ranks met", r);
    return note.failed ? -1 : 0;
}

/* The others: find rank 0, and are told where everyone is. */
static int find_rank_0(dist_tcp *t, const char *host, int port, tcp_hello *at, double deadline,
                       error_text *e) {
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found = NULL;
    int status = getaddrinfo(host, NULL, &hints, &found);
    if (status) return error_set(e, "MASTER_ADDR %s: %s", host, gai_strerror(status));
    struct sockaddr_in a = *(struct sockaddr_in *)found->ai_addr;
    freeaddrinfo(found);
    a.sin_port = htons((uint16_t)port);
    tcp_note note;
    int fd = t->peer[0].control = connect_to(a, deadline);
    if (fd < 0)
        return error_set(e, "rank %d: nobody answers at %s:%d, after %g s (is rank 0 there?)", t->rank, host,
                         port, t->timeout);
    if (transfer(fd, &at[t->rank], sizeof *at, 1, deadline) ||
        transfer(fd, &note, sizeof note, 0, deadline + 5))
        return error_set(e, "rank %d: %s:%d answers, but is no rank 0 that waits: %s", t->rank, host, port,
                         errno == ETIMEDOUT ? "no word within the time" : "it closed the connection");
    if (note.failed) return error_set(e, "%.500s", note.text);
    if (transfer(fd, at, (size_t)t->size * sizeof *at, 0, deadline + 5))
        return error_set(e, "rank 0 went away while ranks met");
    at[0].address = a.sin_addr.s_addr;
    return 0;
}

dist_tcp *dist_tcp_open(const char *host, int port, int rank, int size, double timeout, error_text *e) {
    dist_tcp *t = calloc(1, sizeof *t);
    tcp_hello *at = calloc((size_t)size, sizeof *at); /* where each rank listens */
    double deadline = rt_seconds() + timeout;
    uint16_t own = 0;
    int listener = -1, failed = !t || !at || !(t->peer = calloc((size_t)size, sizeof *t->peer));
    if (failed) {
        error_set(e, "out of memory for %d ranks", size);
        free(t);
        free(at);
        return NULL;
    }
    t->rank = rank, t->size = size, t->timeout = timeout, t->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    for (int r = 0; r < size; r++) t->peer[r].fd = t->peer[r].control = -1;
    failed = (listener = listen_at(&own, e)) < 0;
    at[rank] = (tcp_hello){.magic = MAGIC, .rank = rank, .size = size, .port = own};
    if (!failed)
        failed = rank ? find_rank_0(t, host, port, at, deadline, e) : gather_ranks(t, port, at, deadline, e);
    for (int r = 0; r < rank && !failed; r++) { /* to those below; from those above */
        struct sockaddr_in a = {
            .sin_family = AF_INET, .sin_port = htons(at[r].port), .sin_addr.s_addr = at[r].address};
        int fd = t->peer[r].fd = connect_to(a, deadline + 5);
        if (fd < 0 || transfer(fd, &at[rank], sizeof *at, 1, deadline + 5))
            failed = error_set(e, "rank %d: cannot reach rank %d at %s:%d", rank, r, inet_ntoa(a.sin_addr),
                               at[r].port);
    }
    for (int n = rank + 1; n < size && !failed;) {
        struct in_addr from;
        tcp_hello hello;
        int fd = accept_one(listener, &from, deadline + 5);
        int fine = fd >= 0 && !transfer(fd, &hello, sizeof hello, 0, deadline + 5) && hello.magic == MAGIC &&
                   hello.rank > rank && hello.rank < size && t->peer[hello.rank].fd < 0;
        if (fine) t->peer[hello.rank].fd = fd, n++;
        if (!fine && fd >= 0) close(fd);
        if (fd < 0) failed = error_set(e, "rank %d: the ranks above it do not all connect to it", rank);
    }
    if (listener >= 0) close(listener);
    free(at);
    for (int r = 0; r < size && !failed; r++)
        if (r != rank && !(t->peer[r].stage = aligned_alloc(64, STAGE)))
            failed = error_set(e, "out of memory");
    if (!failed) return t;
    dist_tcp_close(t);
    return NULL;
}

void dist_tcp_close(dist_tcp *t) {
    for (int r = 0; t && r < t->size; r++) {
        if (t->peer[r].fd >= 0) close(t->peer[r].fd);
        if (t->peer[r].control >= 0) close(t->peer[r].control);
        free(t->peer[r].stage);
    }
    if (t) close(t->wake), free(t->peer);
    free(t);
}

int dist_tcp_agree(dist_tcp *t, int failed, error_text *e, char *shared, size_t size) {
    double deadline = rt_seconds() + t->timeout;
    tcp_note own = {.failed = failed != 0}, other;
    int lost = 0, any = own.failed;
    snprintf(own.text, sizeof own.text, "%.500s", failed ? e->text : "");
    memcpy(own.shared, shared, size);
    for (int r = 1; r < t->size && t->rank == 0; r++) {
        if (transfer(t->peer[r].control, &other, sizeof other, 0, deadline))
            lost = r;
        else
            any |= other.failed;
    }
    if (lost && !any) any = 1, error_set(e, "rank %d was lost before training began", lost);
    own.failed = any;
    for (int r = 1; r < t->size && t->rank == 0; r++)
        transfer(t->peer[r].control, &own, sizeof own, 1, deadline);
    if (t->rank == 0) {
        if (any && !failed && !lost) *e->text = 0;
        return any ? -1 : 0;
    }
    if (transfer(t->peer[0].control, &own, sizeof own, 1, deadline) ||
        transfer(t->peer[0].control, &other, sizeof other, 0, deadline))
        return failed ? -1 : error_set(e, "rank %d: rank 0 was lost before training began", t->rank);
    memcpy(shared, other.shared, size);
    if (!failed || !strcmp(own.text, other.text)) *e->text = 0;
    return other.failed ? -1 : 0;
}

/* ------------------------------------------------------------------------------------------------- failures */

static const char *last_collective(const dist_tcp *t, char text[128]) {
    const rt_note *n = &t->head.world->ranks[0].last;
    const tcp_header *h = &t->entry[t->completed % QUEUE].header;
    if (t->completed < t->posted)
        snprintf(text, 128, "in %s %llu (%s)", dist_op_name((dist_op)h->op), (unsigned long long)h->sequence,
                 h->unit);
    else if (n->op)
        snprintf(text, 128, "after %s %llu (%s)", n->op, (unsigned long long)n->sequence, n->unit);
    else
        snprintf(text, 128, "before the first collective");
    return text;
}

/* A peer is gone. If it failed itself, or somebody else before it, its control connection says so. */
static void lose(dist_tcp *t, int r, const char *how) {
    rt_rank *rank = &t->head.world->ranks[0];
    int control = t->peer[r].control;
    tcp_note note;
    char last[128];
    int told = control >= 0 && !transfer(control, &note, sizeof note, 0, rt_seconds() + 1);
    pthread_mutex_lock(&rank->world->lock);
    if (!atomic_load(&rank->world->failed)) {
        t->speaks = told ? t->rank == 0 && note.speaker == 0 : t->rank == 0 || r == 0;
        if (told)
            rt_fail_with_table(rank, "%.500s", note.text);
        else
            rt_fail_with_table(rank, "rank %d lost rank %d (%s) %s", t->rank, r, how,
                               last_collective(t, last));
    }
    pthread_mutex_unlock(&rank->world->lock);
}

static void disagree(dist_tcp *t, int r, const tcp_header *own, const tcp_header *other) {
    rt_rank *rank = &t->head.world->ranks[0];
    const tcp_header *h[2] = {t->rank < r ? own : other, t->rank < r ? other : own};
    const char *name[2];
    for (int i = 0; i < 2; i++)
        name[i] = h[i]->op < DIST_OPS ? dist_op_name((dist_op)h[i]->op) : "nothing more";
    pthread_mutex_lock(&rank->world->lock);
    if (!atomic_load(&rank->world->failed)) {
        t->speaks = t->rank == 0;
        rt_fail_with_table(
            rank, "ranks %d and %d disagree: %s %llu of %llu (%.32s) against %s %llu of %llu (%.32s)",
            t->rank < r ? t->rank : r, t->rank < r ? r : t->rank, name[0], (unsigned long long)h[0]->sequence,
            (unsigned long long)h[0]->elements, h[0]->unit, name[1], (unsigned long long)h[1]->sequence,
            (unsigned long long)h[1]->elements, h[1]->unit);
    }
    pthread_mutex_unlock(&rank->world->lock);
}

static void silence(dist_tcp *t) {
    rt_rank *rank = &t->head.world->ranks[0];
    char names[128] = "", last[128];
    for (int r = 0; r < t->size && strlen(names) < 100; r++)
        if (r != t->rank && t->peer[r].receiving <= t->completed) sprintf(names + strlen(names), " %d", r);
    pthread_mutex_lock(&rank->world->lock);
    if (!atomic_load(&rank->world->failed)) {
        t->speaks = 1;
        rt_fail_with_table(rank, "rank %d: no word from rank%s for %g s %s (--timeout)", t->rank, names,
                           t->timeout, last_collective(t, last));
    }
    pthread_mutex_unlock(&rank->world->lock);
}

/* -------------------------------------------------------------------------------------------- moving bytes */

/* Where rank r's part of an entry begins in the payload, and its bytes. */
static size_t part(const dist_tcp *t, const tcp_entry *x, int r, size_t *bytes) {
    const dist_call *c = &x->call;
    size_t n = dist_elements(c), N = (size_t)t->size, p = (size_t)r, size = rt_type_size(dist_type(c));
    size_t lo = 0, hi = 0;
    switch (c->op) {
    case DIST_BARRIER: break;
    case DIST_BROADCAST:
    case DIST_REDUCE: hi = r == c->peer ? n : 0; break;
    case DIST_SEND: hi = r == t->rank ? n : 0; break;
    case DIST_RECV: hi = r == c->peer ? n : 0; break;
    default: lo = n / N * p + (n % N * p) / N, hi = n / N * (p + 1) + (n % N * (p + 1)) / N;
    }
    *bytes = (hi - lo) * size;
    return lo * size;
}

static int sends_to(const dist_tcp *t, const tcp_entry *x, int r) {
    return r != t->rank && x->call.op != DIST_RECV && (x->call.op != DIST_SEND || r == x->call.peer);
}

static int receives_from(const dist_tcp *t, const tcp_entry *x, int r) {
    return r != t->rank && x->call.op != DIST_SEND && (x->call.op != DIST_RECV || r == x->call.peer);
}

/* Sends what there is for rank r. Returns 1: something was sent; *more: and there is more. */
static int push(dist_tcp *t, int r, uint64_t posted, int *more) {
    tcp_peer *p = &t->peer[r];
    for (*more = 0; p->sending < posted; p->sending++, p->sent = 0) {
        tcp_entry *x = &t->entry[p->sending % QUEUE];
        size_t theirs, at = part(t, x, r, &theirs), head = sizeof x->header, done = p->sent;
        if (!sends_to(t, x, r)) continue;
        if (!x->sums) theirs = 0;
        size_t finished = x->spreads ? x->sums ? x->summed : x->own : 0, own = x->spreads ? x->own : 0;
        if (done == head + theirs + own) continue;
        struct iovec v[3] = {{(char *)&x->header, head},
                             {theirs ? (char *)x->call.in.data + at : NULL, theirs},
                             {x->sums ? x->to : (char *)x->from, finished}};
        size_t wanted = 0;
        for (int i = 0; i < 3; i++) {
            size_t skip = done < v[i].iov_len ? done : v[i].iov_len, most = i ? CHUNK : head;
            done -= skip;
            v[i].iov_base = (char *)v[i].iov_base + skip;
            v[i].iov_len -= skip;
            int whole = v[i].iov_len <= most;
            if (!whole) v[i].iov_len = most;
            wanted += v[i].iov_len;
            while (!whole && ++i < 3) v[i].iov_len = 0;
        }
        if (!wanted) return 0; /* the sum is not there yet */
        struct msghdr m = {.msg_iov = v, .msg_iovlen = 3};
        ssize_t k = sendmsg(p->fd, &m, MSG_NOSIGNAL);
        *more = 1;
        if (k < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
        if (k < 0) return lose(t, r, strerror(errno)), 0;
        p->sent += (size_t)k;
        return 1;
    }
    return 0;
}

/* Do this rank and rank r mean the same entry, of which the header has come? */
static int agrees(dist_tcp *t, int r, const tcp_entry *x) {
    tcp_header own = x->header;
    if (x->call.op == DIST_RECV) own.op = DIST_SEND, own.root = t->rank;
    if (!memcmp(&own, &t->peer[r].header, sizeof own)) return 1;
    disagree(t, r, &x->header, &t->peer[r].header);
    return 0;
}

/* Takes what rank r has sent. Returns 1: something came; *more: more is expected now. */
static int pull(dist_tcp *t, int r, uint64_t posted, int *more) {
    tcp_peer *p = &t->peer[r];
    *more = 0;
    while (p->receiving < posted && !receives_from(t, &t->entry[p->receiving % QUEUE], r)) p->receiving++;
    char *to = (char *)&p->header + p->received;
    size_t head = sizeof p->header, n = p->received < head ? head - p->received : 0;
    if (!n && p->receiving == posted) return 0;
    tcp_entry *x = &t->entry[p->receiving % QUEUE];
    if (p->left) {
        if (p->receiving < posted) disagree(t, r, &x->header, &p->header);
        return 0;
    }
    if (p->received == head && !agrees(t, r, x)) return 0;
    if (!n) {
        size_t theirs, at = part(t, x, r, &theirs), done = p->received - head, own = x->sums ? x->own : 0;
        if (!x->spreads) theirs = 0;
        if (done < own) { /* into the ring, as far as it is free and in one piece */
            uint64_t position = x->stage + done, end = t->stage_begin + STAGE;
            n = own - done;
            if (n > end - position) n = (size_t)(end - position);
            if (n > STAGE - position % STAGE) n = STAGE - position % STAGE;
            to = p->stage + position % STAGE;
            if (!n) return 0;
        } else {
            n = own + theirs - done;
            to = (char *)x->call.out.data + (x->call.op == DIST_RECV ? 0 : at) + (done - own);
            if (n > CHUNK) n = CHUNK;
        }
        if (done == own + theirs) {
            p->receiving++, p->received = 0;
            return 1;
        }
    }
    *more = 1;
    ssize_t k = recv(p->fd, to, n, 0);
    if (k < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (k <= 0) return lose(t, r, k ? strerror(errno) : "connection closed"), *more = 0;
    p->received += (size_t)k;
    if (p->received == head && (size_t)k <= head && p->header.op == GOODBYE) p->left = 1;
    return 1;
}

/* Adds, in rank order, what has come from all ranks. Returns 1: something was added. */
static int sum(dist_tcp *t, uint64_t posted) {
    for (; t->summing < posted; t->summing++) {
        tcp_entry *x = &t->entry[t->summing % QUEUE];
        rt_type type = dist_type(&x->call);
        size_t size = rt_type_size(type), n = x->own - x->summed, N = (size_t)t->size;
        if (!x->sums) {
            if (x->to && x->to != x->from) memcpy(x->to, x->from, x->own);
            x->summed = x->own;
            continue;
        }
        if (!n) {
            t->stage_begin = x->stage + (x->own + 63) / 64 * 64;
            continue;
        }
        for (int r = 0; r < t->size; r++) {
            tcp_peer *p = &t->peer[r];
            size_t head = sizeof p->header, come = p->receiving > t->summing ? x->own : 0;
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
        t->device->sum_buffers(&t->self.stream[RT_COMMUNICATION], &to, 1, from, N);
        x->summed += n;
        t->stage_begin = x->stage + x->summed;
        return 1;
    }
    return 0;
}

/* Completes, in order, the entries of which nothing is left to do. */
static void complete(dist_tcp *t, uint64_t posted) {
    rt_world *w = t->head.world;
    for (; t->completed < posted && t->summing > t->completed;) {
        tcp_entry *x = &t->entry[t->completed % QUEUE];
        for (int r = 0; r < t->size; r++)
            if (r != t->rank && (t->peer[r].sending <= t->completed || t->peer[r].receiving <= t->completed))
                return;
        double now = rt_seconds();
        pthread_mutex_lock(&w->lock);
        t->last_end = (x->ready > t->last_end ? x->ready : t->last_end) + now - t->moved;
        t->moved = now;
        x->call.done->time = t->last_end;
        x->call.done->done = 1;
        t->completed++;
        t->room = 1;
        pthread_cond_broadcast(&w->changed);
        pthread_mutex_unlock(&w->lock);
    }
}

static void *progress(void *argument) {
    dist_tcp *t = argument;
    rt_world *w = t->head.world;
    struct pollfd fds[t->size];
    double heard = rt_seconds();
    for (;;) {
        int moved = 0, more;
        pthread_mutex_lock(&w->lock);
        uint64_t posted = t->posted;
        int stop = t->stop && t->completed == posted;
        pthread_mutex_unlock(&w->lock);
        if (atomic_load(&w->failed) || stop) break;
        if (t->completed == posted) t->moved = heard = rt_seconds();
        for (int r = 0; r < t->size; r++) {
            fds[r] = (struct pollfd){r == t->rank ? t->wake : -1, POLLIN, 0};
            if (r == t->rank) continue;
            moved |= push(t, r, posted, &more);
            if (more) fds[r] = (struct pollfd){t->peer[r].fd, POLLOUT, 0};
            moved |= pull(t, r, posted, &more);
            if (more)
                fds[r].events = (short)(fds[r].fd < 0 ? POLLIN : fds[r].events | POLLIN),
                fds[r].fd = t->peer[r].fd;
        }
        moved |= sum(t, posted);
        complete(t, posted);
        if (moved) heard = rt_seconds();
        if (moved) continue;
        if (rt_seconds() - heard > t->timeout) silence(t);
        poll(fds, (nfds_t)t->size, 100);
        uint64_t ignored;
        if (fds[t->rank].revents && read(t->wake, &ignored, sizeof ignored) < 0) continue;
    }
    pthread_mutex_lock(&w->lock);
    w->executing--; /* rt_drain waits for it: memory is no longer touched */
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* ------------------------------------------------------------------------------------------------ interface */

static void wake(dist_tcp *t) {
    if (write(t->wake, &(uint64_t){1}, 8) < 0) return; /* it has been told 2^64 - 2 times and not looked */
}

static void tcp_post(dist_comm *comm, const dist_call *calls, size_t n) {
    dist_tcp *t = comm->shared;
    rt_rank *rank = comm->rank;
    rt_world *w = rank->world;
    pthread_mutex_lock(&w->lock);
    for (size_t i = 0; i < n; i++) {
        const dist_call *c = &calls[i];
        rt_stream *s = &rank->stream[c->stream];
        rt_event *done = c->done ? c->done : &comm->own_done;
        int pair = c->op == DIST_SEND || c->op == DIST_RECV, ready = 1;
        if (done->recorded && !done->done) ready = !rt_block_until(rank, &done->done);
        while (ready && t->posted - t->completed == QUEUE) {
            t->room = 0;
            ready = !rt_block_until(rank, &t->room);
        }
        if (!ready || atomic_load(&w->failed)) break;
        tcp_entry *x = &t->entry[t->posted % QUEUE];
        *x = (tcp_entry){.call = *c};
        x->call.done = done;
        x->header = (tcp_header){.sequence = pair ? comm->pair_sequence[2 * c->peer + (c->op == DIST_RECV)]++
                                                  : comm->sequence++,
                                 .elements = dist_elements(c),
                                 .op = (uint32_t)c->op,
                                 .type = (uint32_t)dist_type(c),
                                 .root = c->peer};
        strncpy(x->header.unit, c->unit, sizeof x->header.unit - 1);
        x->sums = c->op == DIST_ALL_REDUCE || c->op == DIST_CONTROL || c->op == DIST_REDUCE_SCATTER ||
                  c->op == DIST_REDUCE;
        x->spreads = c->op != DIST_REDUCE_SCATTER && c->op != DIST_REDUCE && c->op != DIST_BARRIER;
        size_t at = part(t, x, t->rank, &x->own);
        x->from = (char *)c->in.data + (c->op == DIST_ALL_GATHER || !x->own ? 0 : at);
        x->to = c->out.data ? (char *)c->out.data + (c->op == DIST_REDUCE_SCATTER || !x->own ? 0 : at) : NULL;
        x->stage = t->stage_end;
        if (x->sums) t->stage_end += (x->own + 63) / 64 * 64;
        x->ready = s->time > rank->stream[RT_HOST].time ? s->time : rank->stream[RT_HOST].time;
        memcpy(done->clock, s->clock, sizeof done->clock);
        done->recorded = 1;
        done->done = 0;
        s->tail = done;
        rank->last =
            (rt_note){comm->name, dist_op_name(c->op), c->unit, x->header.sequence, dist_elements(c)};
        t->posted++;
    }
    pthread_mutex_unlock(&w->lock);
    wake(t);
}

static const dist_transport transport = {"tcp", tcp_post};

dist_hub *dist_tcp_start(dist_tcp *t, rt_world *world, const vit_device *device, error_text *e) {
    t->head = (dist_hub){&transport, world, t->size};
    t->device = device;
    t->self = world->ranks[0];
    t->self.threads = 1;
    for (int s = 0; s < RT_STREAMS; s++) t->self.stream[s].rank = &t->self;
    t->stop = 0;
    t->speaks = 1; /* of its own failures */
    world->executing++;
    t->running = !pthread_create(&t->thread, NULL, progress, t);
    if (!t->running) error_set(e, "cannot start a thread for communication");
    return t->running ? &t->head : NULL;
}

/* Goodbye, or why this rank has failed. */
int dist_tcp_stop(dist_tcp *t) {
    rt_world *w = t->head.world;
    pthread_mutex_lock(&w->lock);
    t->stop = 1;
    pthread_mutex_unlock(&w->lock);
    wake(t);
    pthread_join(t->thread, NULL);
    if (!atomic_load(&w->failed)) {
        tcp_header goodbye = {.op = GOODBYE};
        for (int r = 0; r < t->size; r++)
            if (r != t->rank) transfer(t->peer[r].fd, &goodbye, sizeof goodbye, 1, rt_seconds() + 5);
        return 0;
    }
    int relays = t->rank == 0 && !t->speaks;
    tcp_note note = {.failed = 1, .speaker = relays ? -1 : t->speaks ? t->rank : 0};
    snprintf(note.text, sizeof note.text, "%.500s", w->error.text);
    for (int r = 0; r < t->size; r++)
        if (t->peer[r].control >= 0) transfer(t->peer[r].control, &note, sizeof note, 1, rt_seconds() + 1);
    for (int r = 0; r < t->size; r++)
        if (r != t->rank) shutdown(t->peer[r].fd, SHUT_RDWR);
    return t->speaks;
}
