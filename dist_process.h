/* dist_process.h - a process that is one rank of several: what the program asks of every transport between
 * processes, and the queue in which those without a device's stream keep what is posted.
 *
 *     dist_process *p = dist_tcp_open("10.0.0.1", 29501, rank, size, 600, &e);
 *     if (p->agree(p, failed, &e, shared, sizeof shared)) ...         // does anyone fail? shared: rank 0's
 *     rt_world_init(&world, 1, RT_CHECK | RT_ELSEWHERE), world.ranks[0].rank = rank;
 *     dist_hub *hub = p->start(p, &world, &vit_cpu, &e);              // then as with dist_hub_create
 *     rt_run(&world, body, argument);
 *     if (p->stop(p)) ...                                             // this process says why the world failed
 *     p->close(p);
 *
 * Every sum is taken in rank order, so all numbers are those of the local transport. */
#ifndef DIST_PROCESS_H
#define DIST_PROCESS_H

#include "dist.h"

/* Each transport has its own, which begins with this. */
typedef struct dist_process dist_process;
struct dist_process {
    /* Before or between runs; every rank calls it. Gives all ranks rank 0's `shared` [size <= 4096]. -1: some
     * rank has failed; e is this rank's own failure, or else empty; also empty if rank 0 has the same to
     * say. */
    int (*agree)(dist_process *p, int failed, error_text *e, char *shared, size_t size);
    /* The hub of a world of this one rank. NULL: e says why. */
    dist_hub *(*start)(dist_process *p, rt_world *world, const vit_device *device, error_text *e);
    /* Ends what start began, after rt_run. Returns whether it is this process that should say why the world
     * failed: what all ranks suffer rank 0 says. */
    int (*stop)(dist_process *p);
    void (*close)(dist_process *p);
};

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

/* What a rank has posted, carried out in order by a thread of its own. It is the hub. */
typedef struct dist_queue {
    dist_hub head;
    rt_rank self; /* what the thread computes as */
    pthread_t thread;
    int wake; /* an eventfd: something was posted, or the world has failed, or it is time to stop */
    double last_end;
    dist_entry entry[DIST_QUEUE];
    /* under world->lock */
    uint64_t posted, completed;
    int room, stop;
} dist_queue;

/* Starts `carry_out(argument)` in a thread. -1: e says why. */
int dist_queue_start(dist_queue *q, const dist_transport *transport, rt_world *world, int size,
                     void *(*carry_out)(void *), void *argument, error_text *e);
/* Waits for the thread to end: when all is carried out, or the world has failed. */
void dist_queue_stop(dist_queue *q);

/* A transport's `post` (comm->shared is the queue). */
void dist_queue_post(dist_comm *comm, const dist_call *calls, size_t n);

/* For the thread. How many calls were posted; *end: none will follow, or the world has failed. Call i of them
 * is dist_queue_at(q, i), until it is completed. */
uint64_t dist_queue_posted(dist_queue *q, int *end);
static inline dist_entry *dist_queue_at(dist_queue *q, uint64_t i) { return &q->entry[i % DIST_QUEUE]; }
/* Until something is posted, or for a moment. */
void dist_queue_sleep(dist_queue *q);
/* The oldest call is done; it took so long. */
void dist_queue_complete(dist_queue *q, double seconds);
/* The last thing that the thread does: it no longer touches memory of the rank. */
void *dist_queue_leave(dist_queue *q);

/* Fails the world with the table of what was posted last (printf style). 1: it is the first failure. */
__attribute__((format(printf, 2, 3))) int dist_queue_fail(dist_queue *q, const char *format, ...);
/* Where this rank stands, for such a message: "in all_gather 17 (blocks.3)". */
const char *dist_queue_last(dist_queue *q, char text[128]);

#endif
