/* dist_tcp.h - the transport between processes, on one host or many: collectives over sockets.
 *
 *     dist_tcp *tcp = dist_tcp_open("10.0.0.1", 29501, rank, size, 600, &e);   // all meet at rank 0's address
 *     if (dist_tcp_agree(tcp, failed, &e, shared, sizeof shared)) ...          // does anyone fail? shared: rank 0's
 *     rt_world_init(&world, 1, RT_CHECK | RT_ELSEWHERE), world.ranks[0].rank = rank;
 *     dist_hub *hub = dist_tcp_start(tcp, &world, &vit_cpu, &e);               // then as with dist_hub_create
 *     rt_run(&world, body, argument);
 *     dist_tcp_close(tcp);
 *
 * One process is one rank. Every sum is taken in rank order, so all numbers are those of the local
 * transport. */
#ifndef DIST_TCP_H
#define DIST_TCP_H

#include "dist.h"

typedef struct dist_tcp dist_tcp;

/* Meets the other ranks: rank 0 listens at `port`, the others look for it at `host` (IPv4). NULL: e says why,
 * after `timeout` seconds at most: which ranks have not come, that nobody answers, that the port is taken, or
 * that two processes are the same rank or disagree on the size. */
dist_tcp *dist_tcp_open(const char *host, int port, int rank, int size, double timeout, error_text *e);

/* Before or between runs; every rank calls it. Gives all ranks rank 0's `shared` [size <= 4096]. -1: some
 * rank has failed; e is this rank's own failure, or else empty; also empty if rank 0 has the same to say. */
int dist_tcp_agree(dist_tcp *tcp, int failed, error_text *e, char *shared, size_t size);

/* The hub of a world of this one rank. NULL: e says why. */
dist_hub *dist_tcp_start(dist_tcp *tcp, rt_world *world, const vit_device *device, error_text *e);

/* Ends what dist_tcp_start began, after rt_run. Returns whether it is this process that should say why the
 * world failed: what all ranks suffer rank 0 says. */
int dist_tcp_stop(dist_tcp *tcp);

void dist_tcp_close(dist_tcp *tcp);

#endif
