/* rendezvous.c - how processes meet (rendezvous.h): plain sockets, one message each way. */
#define _GNU_SOURCE
#include "rendezvous.h"
#include "runtime.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAGIC = 0x56695431 };

/* Who a process says that it is, and where it listens. */
typedef struct rendezvous_hello {
    uint32_t magic;
    int32_t rank, size;
    uint16_t port, unused;
    uint32_t address;
} rendezvous_hello;

/* A failure, and what rank 0 shares. */
typedef struct {
    int failed, speaker; /* speaker: the rank that prints the failure; -1: nobody has yet */
    char text[512], shared[RENDEZVOUS_SHARED];
} rendezvous_note;

int rendezvous_transfer(int fd, void *data, size_t n, int sends, double deadline) {
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
static int gather_ranks(rendezvous *z, int port, double deadline, error_text *e) {
    uint16_t p = (uint16_t)port;
    int listener = listen_at(&p, e), missing = z->size - 1;
    if (listener < 0) return -1;
    *e->text = 0;
    while (missing && !*e->text) {
        rendezvous_hello hello;
        struct in_addr from;
        int fd = accept_one(listener, &from, deadline);
        if (fd < 0) break;
        if (rendezvous_transfer(fd, &hello, sizeof hello, 0, rt_seconds() + 5) || hello.magic != MAGIC) {
            close(fd); /* somebody else's */
            continue;
        }
        if (hello.size != z->size)
            error_set(e, "rank %d says that there are %d ranks, rank 0 that there are %d", hello.rank,
                      hello.size, z->size);
        else if (hello.rank <= 0 || hello.rank >= z->size || z->control[hello.rank] >= 0)
            error_set(e, "two processes say that they are rank %d of %d", hello.rank, z->size);
        if (*e->text) {
            rendezvous_note note = {.failed = 1};
            snprintf(note.text, sizeof note.text, "%.500s", e->text);
            rendezvous_transfer(fd, &note, sizeof note, 1, rt_seconds() + 5);
            close(fd);
            break;
        }
        z->control[hello.rank] = fd;
        z->at[hello.rank] = hello;
        z->at[hello.rank].address = from.s_addr;
        missing--;
    }
    close(listener);
    if (missing && !*e->text) {
        size_t used = (size_t)snprintf(e->text, sizeof e->text,
                                       "port %d: after %g s not all of %d ranks have come, missing:", port,
                                       z->timeout, z->size);
        for (int r = 1, named = 0; r < z->size && named < 16; r++)
            if (z->control[r] < 0 && ++named)
                used += (size_t)snprintf(e->text + used, sizeof e->text - used, " %d", r);
    }
    rendezvous_note note = {.failed = *e->text != 0};
    snprintf(note.text, sizeof note.text, "%.500s", e->text);
    for (int r = 1; r < z->size; r++)
        if (z->control[r] >= 0 &&
            (rendezvous_transfer(z->control[r], &note, sizeof note, 1, deadline + 5) ||
             (!note.failed &&
              rendezvous_transfer(z->control[r], z->at, (size_t)z->size * sizeof *z->at, 1, deadline + 5))))
            return error_set(e, "rank %d went away while ranks met", r);
    return note.failed ? -1 : 0;
}

/* The others: find rank 0, and are told where everyone is. */
static int find_rank_0(rendezvous *z, const char *host, int port, double deadline, error_text *e) {
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found = NULL;
    int status = getaddrinfo(host, NULL, &hints, &found);
    if (status) return error_set(e, "MASTER_ADDR %s: %s", host, gai_strerror(status));
    struct sockaddr_in a = *(struct sockaddr_in *)found->ai_addr;
    freeaddrinfo(found);
    a.sin_port = htons((uint16_t)port);
    rendezvous_note note;
    int fd = z->control[0] = connect_to(a, deadline);
    if (fd < 0)
        return error_set(e, "rank %d: nobody answers at %s:%d, after %g s (is rank 0 there?)", z->rank, host,
                         port, z->timeout);
    if (rendezvous_transfer(fd, &z->at[z->rank], sizeof *z->at, 1, deadline) ||
        rendezvous_transfer(fd, &note, sizeof note, 0, deadline + 5))
        return error_set(e, "rank %d: %s:%d answers, but is no rank 0 that waits: %s", z->rank, host, port,
                         errno == ETIMEDOUT ? "no word within the time" : "it closed the connection");
    if (note.failed) return *e->text = 0, -1;
    if (rendezvous_transfer(fd, z->at, (size_t)z->size * sizeof *z->at, 0, deadline + 5))
        return error_set(e, "rank 0 went away while ranks met");
    z->at[0].address = a.sin_addr.s_addr;
    return 0;
}

rendezvous *rendezvous_open(const char *host, int port, int rank, int size, double timeout, error_text *e) {
    rendezvous *z = calloc(1, sizeof *z);
    double deadline = rt_seconds() + timeout;
    uint16_t own = 0;
    if (z) *z = (rendezvous){.rank = rank, .size = size, .timeout = timeout, .listener = -1};
    if (!z || !(z->at = calloc((size_t)size, sizeof *z->at)) ||
        !(z->control = malloc((size_t)size * sizeof *z->control))) {
        error_set(e, "out of memory for %d ranks", size);
        rendezvous_close(z);
        return NULL;
    }
    for (int r = 0; r < size; r++) z->control[r] = -1;
    z->listener = listen_at(&own, e);
    z->at[rank] = (rendezvous_hello){.magic = MAGIC, .rank = rank, .size = size, .port = own};
    if (z->listener >= 0 &&
        !(rank ? find_rank_0(z, host, port, deadline, e) : gather_ranks(z, port, deadline, e)))
        return z;
    rendezvous_close(z);
    return NULL;
}

void rendezvous_close(rendezvous *z) {
    if (!z) return;
    for (int r = 0; z->control && r < z->size; r++)
        if (z->control[r] >= 0) close(z->control[r]);
    if (z->listener >= 0) close(z->listener);
    free(z->control);
    free(z->at);
    free(z);
}

int rendezvous_connect(rendezvous *z, int *fd, error_text *e) {
    double deadline = rt_seconds() + z->timeout + 5;
    for (int r = 0; r < z->size; r++) fd[r] = -1;
    for (int r = 0; r < z->rank; r++) { /* to those below; from those above */
        struct sockaddr_in a = {
            .sin_family = AF_INET, .sin_port = htons(z->at[r].port), .sin_addr.s_addr = z->at[r].address};
        fd[r] = connect_to(a, deadline);
        if (fd[r] < 0 || rendezvous_transfer(fd[r], &z->at[z->rank], sizeof *z->at, 1, deadline))
            return error_set(e, "rank %d: cannot reach rank %d at %s:%d", z->rank, r, inet_ntoa(a.sin_addr),
                             z->at[r].port);
    }
    for (int n = z->rank + 1; n < z->size;) {
        struct in_addr from;
        rendezvous_hello hello;
        int other = accept_one(z->listener, &from, deadline);
        if (other < 0) return error_set(e, "rank %d: the ranks above it do not all connect to it", z->rank);
        int fine = !rendezvous_transfer(other, &hello, sizeof hello, 0, deadline) && hello.magic == MAGIC &&
                   hello.rank > z->rank && hello.rank < z->size && fd[hello.rank] < 0;
        if (fine) fd[hello.rank] = other, n++;
        if (!fine) close(other);
    }
    return 0;
}

int rendezvous_agree(rendezvous *z, int failed, error_text *e, char *shared, size_t size) {
    double deadline = rt_seconds() + z->timeout;
    rendezvous_note own = {.failed = failed != 0}, other;
    int lost = 0, any = own.failed;
    snprintf(own.text, sizeof own.text, "%.500s", failed ? e->text : "");
    memcpy(own.shared, shared, size);
    for (int r = 1; r < z->size && z->rank == 0; r++) {
        if (rendezvous_transfer(z->control[r], &other, sizeof other, 0, deadline))
            lost = r;
        else
            any |= other.failed;
    }
    if (lost && !any) any = 1, error_set(e, "rank %d was lost while ranks agreed", lost);
    own.failed = any;
    for (int r = 1; r < z->size && z->rank == 0; r++)
        rendezvous_transfer(z->control[r], &own, sizeof own, 1, deadline);
    if (z->rank == 0) {
        if (any && !failed && !lost) *e->text = 0;
        return any ? -1 : 0;
    }
    if (rendezvous_transfer(z->control[0], &own, sizeof own, 1, deadline) ||
        rendezvous_transfer(z->control[0], &other, sizeof other, 0, deadline))
        return failed ? -1 : error_set(e, "rank %d: rank 0 was lost while ranks agreed", z->rank);
    memcpy(shared, other.shared, size);
    if (!failed || !strcmp(own.text, other.text)) *e->text = 0;
    return other.failed ? -1 : 0;
}

void rendezvous_tell(rendezvous *z, const char *failure, int speaks) {
    rendezvous_note note = {.failed = 1, .speaker = speaks ? z->rank : z->rank ? 0 : -1};
    snprintf(note.text, sizeof note.text, "%.500s", failure);
    for (int r = 0; r < z->size; r++)
        if (z->control[r] >= 0) rendezvous_transfer(z->control[r], &note, sizeof note, 1, rt_seconds() + 1);
}

int rendezvous_told(rendezvous *z, int r, error_text *failure, int *speaks) {
    rendezvous_note note;
    int told =
        z->control[r] >= 0 && !rendezvous_transfer(z->control[r], &note, sizeof note, 0, rt_seconds() + 1);
    *speaks = told ? z->rank == 0 && note.speaker == 0 : z->rank == 0 || r == 0;
    if (told) error_set(failure, "%.500s", note.text);
    return told;
}

int rendezvous_gone(rendezvous *z) {
    for (int r = 0; r < z->size; r++) {
        int failed = 0; /* the first field of a note */
        ssize_t k = z->control[r] < 0 ? -2 : recv(z->control[r], &failed, sizeof failed, MSG_PEEK);
        if (k == 0 || (k == -1 && errno != EAGAIN && errno != EINTR) || failed) return r;
    }
    return -1;
}

int rendezvous_end(rendezvous *z, error_text *why, int *speaks) {
    char nothing = 0;
    *why->text = 0;
    if (!rendezvous_agree(z, 0, why, &nothing, 0)) return 0;
    *speaks = *why->text != 0; /* it was lost, and could say nothing itself */
    if (!*speaks) error_set(why, "another rank has failed");
    return -1;
}
