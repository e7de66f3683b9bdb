/* rendezvous.h - how the processes of one run meet, agree, and tell each other of a failure.
 *
 *     rendezvous *z = rendezvous_open("10.0.0.1", 29501, rank, size, 60, &e); // all meet at rank 0's address
 *     if (rendezvous_agree(z, failed, &e, shared, sizeof shared)) ...            // does anyone fail?
 *     rendezvous_connect(z, fd, &e);                                             // a socket to every other
 *     rendezvous_close(z);
 *
 * One process is one rank. Rank 0 keeps a connection to every other, the control connection; all that is
 * said here goes over it. */
#ifndef RENDEZVOUS_H
#define RENDEZVOUS_H

#include "base.h"

enum { RENDEZVOUS_SHARED = 4096 };

typedef struct rendezvous {
    int rank, size;
    double timeout; /* seconds */
    int *control;   /* [size] of rank 0: to each other; of the others: to rank 0, in [0]; else -1 */
    int listener;   /* where those above this rank find it */
    struct rendezvous_hello *at; /* [size] where each rank listens */
} rendezvous;

/* Meets the other ranks: rank 0 listens at `port`, the others look for it at `host` (IPv4). NULL: e says why,
 * after `timeout` seconds at most: which ranks have not come, that nobody answers, that the port is taken, or
 * that two processes are the same rank or disagree on the size. Others than rank 0 leave e empty where rank 0
 * says it. */
rendezvous *rendezvous_open(const char *host, int port, int rank, int size, double timeout, error_text *e);
void rendezvous_close(rendezvous *z);

/* Before or between runs; every rank calls it. Gives all ranks rank 0's `shared` [size <= 4096]. -1: some
 * rank has failed; e is this rank's own failure, or else empty; also empty if rank 0 has the same to say. */
int rendezvous_agree(rendezvous *z, int failed, error_text *e, char *shared, size_t size);

/* A socket, not blocking, to every other rank: fd [size], own: -1. Every rank calls it, once. -1: e says who
 * cannot be reached. */
int rendezvous_connect(rendezvous *z, int *fd, error_text *e);

/* A failure is told over the control connections: by rank 0 to all, by the others to rank 0. speaks: this
 * process will print it. */
void rendezvous_tell(rendezvous *z, const char *failure, int speaks);

/* Looks, without waiting: a rank that has failed or gone, as far as this one is connected to it; -1: none.
 * One that waits in rendezvous_agree has not. */
int rendezvous_gone(rendezvous *z);

/* After a run that ended well here; every such rank calls it. -1: some rank has not ended well, and *speaks:
 * this process is the one to print `why`. */
int rendezvous_end(rendezvous *z, error_text *why, int *speaks);

/* What rank r, which has gone, had told: 1, its failure, and in *speaks whether this process should print it,
 * as rank 0 does what nobody has printed. 0: nothing, it was killed or cut off; *speaks likewise. Waits for a
 * second at most. */
int rendezvous_told(rendezvous *z, int r, error_text *failure, int *speaks);

/* All n bytes over a socket that does not block: 0, or -1: the other end is gone, or it is past `deadline`
 * (rt_seconds; errno ETIMEDOUT). */
int rendezvous_transfer(int fd, void *data, size_t n, int sends, double deadline);

#endif
