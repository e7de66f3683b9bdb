/* dist_tcp.h - the transport between processes, on one host or many: collectives over sockets. */
#ifndef DIST_TCP_H
#define DIST_TCP_H

#include "dist_process.h"

/* Meets the other ranks: rank 0 listens at `port`, the others look for it at `host` (IPv4). NULL: e says why,
 * after `timeout` seconds at most (rendezvous_open). */
dist_process *dist_tcp_open(const char *host, int port, int rank, int size, double timeout, error_text *e);

#endif
