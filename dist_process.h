/* dist_process.h - a process that is one rank of several: what the program asks of every transport between
 * processes, what those over sockets share, and the queue in which those without a device's stream keep what
 * is posted.
 *
 *     dist_process *p = dist_tcp_open("10.0.0.1", 29501, rank, size, 600, &e);
 *     if (p->agree(p, failed, &e, shared, sizeof shared)) ...         // does anyone fail? shared: rank 0's
 *     rt_world_init(&world, 1, RT_CHECK | RT_ELSEWHERE), world.ranks[0].rank = rank;
 *     dist_hub *hub = p->start(p, &world, &vit_cpu, &e);              // then as with dist_hub_create
 *     rt_run(&world, body, argument);
 *     if (p->stop(p)) ...                                           // this process says why the world failed
 *     p->close(p);
 *
 * Over TCP and MPI every sum is taken in rank order, so all numbers are those of the local transport. */
#ifndef DIST_PROCESS_H
#define DIST_PROCESS_H

#include "dist.h"
#include "rendezvous.h"

/* Each transport has its own, which begins with this, and so with the hub. */
typedef struct dist_process dist_process;
struct dist_process {
    dist_hub hub; /* its world: from start on */
    int rank;
    int speaks;          /* this process says why the world failed; at first, as its own failures it does */
    double timeout;      /* seconds */
    rendezvous *meeting; /* where the processes have met; NULL over MPI */
    /* Before start; every rank calls it. Gives all ranks rank 0's `shared` [size <= 4096]. -1: some rank has
     * failed; e is this rank's own failure, or else empty; also empty if rank 0 has the same to say. */
    int (*agree)(dist_process *p, int failed, error_text *e, char *shared, size_t size);
    /* The hub of a world of this one rank; once. NULL: e says why. */
    dist_hub *(*start)(dist_process *p, rt_world *world, const vit_device *device, error_text *e);
    /* Ends what start began, after rt_run. Returns whether it is this process that should say why the world
     * failed: what all ranks suffer rank 0 says. */
    int (*stop)(dist_process *p);
    void (*close)(dist_process *p);
};

/* What every transport opens with, for it to add its functions to: the first of `bytes` bytes, aligned to 64,
 * the rest of them 0. NULL: out of memory, as e says. */
dist_process *dist_process_create(size_t bytes, int rank, int size, double timeout, error_text *e);
/* The same, which has met the others over sockets (rendezvous_open), and agrees, stops and closes so. */
dist_process *dist_process_meet(size_t bytes, const char *host, int port, int rank, int size, double timeout,
                                error_text *e);
/* Its stop, which says goodbye to the others, or why this rank has failed; and its close. */
int dist_process_stop(dist_process *p);
void dist_process_close(dist_process *p);

enum { DIST_QUEUE = 16 }; /* calls that can be posted and not complete */

/* By which ranks see whether they mean the same call. */
typedef struct dist_fingerprint {
    uint64_t sequence, elements;
    uint32_t op, type;
    int32_t root, unused;
    char unit[32];
} dist_fingerprint;

typedef struct dist_entry {
    dist_call call;
    dist_fingerprint fingerprint;
    double ready; /* virtual time */
} dist_entry;

/* A process whose thread carries out, in order, what the rank has posted. */
typedef struct dist_queue {
    dist_process head;
    dist_transport transport;
    void *(*carry_out)(void *q); /* what the thread does */
    rt_rank self;                /* what the thread computes as */
    const vit_device *device;
    pthread_t thread;
    int wake; /* an eventfd: something was posted, or the world has failed, or it is time to stop */
    double last_end;
    dist_entry entry[DIST_QUEUE];
    /* under world->lock */
    uint64_t posted, completed;
    int room, stop;
} dist_queue;

/* Gives a process that is a queue its transport of this name, its start, which runs carry_out(q) in a thread,
 * and its stop. */
void dist_queue_prepare(dist_queue *q, const char *name, void *(*carry_out)(void *));
/* The stop: waits for the thread to end, when all is carried out or the world has failed. */
int dist_queue_stop(dist_process *p);

/* For the thread. The oldest call that is not complete, as soon as there is one; NULL: none will follow, or
 * the world has failed. */
dist_entry *dist_queue_next(dist_queue *q);
/* Or at once: how many calls were posted; *end: none will follow, or the world has failed. Call i of them is
 * dist_queue_at(q, i), until it is completed. */
uint64_t dist_queue_posted(dist_queue *q, int *end);
static inline dist_entry *dist_queue_at(dist_queue *q, uint64_t i) { return &q->entry[i % DIST_QUEUE]; }
/* The part of a call's payload that rank r owns, which adds it up, or has it for the others: where it begins,
 * and its bytes. In a reduce or a broadcast the root owns everything, of a send and receive the sender. */
size_t dist_queue_part(const dist_queue *q, const dist_call *c, int r, size_t *bytes);
/* The oldest call is done; it took so long. */
void dist_queue_complete(dist_queue *q, double seconds);
/* The last thing that the thread does: it no longer touches memory of the rank. */
void *dist_queue_leave(dist_queue *q);

/* Fails the world with the table of what was posted last (printf style). speaks: if this is the first
 * failure, this process says so. Returns -1. */
__attribute__((format(printf, 3, 4))) int dist_queue_fail(dist_queue *q, int speaks, const char *format, ...);
/* Fails it, as two ranks do not mean the same call. Returns -1. */
int dist_queue_disagree(dist_queue *q, int rank, const dist_fingerprint *a, int other,
                        const dist_fingerprint *b);
/* Where this rank stands, for such a message: "in all_gather 17 (blocks.3)". */
const char *dist_queue_last(dist_queue *q, char text[128]);

#endif
