/* dist_nccl.h - the transport of one process a GPU: every collective is one call of NCCL. */
#ifndef DIST_NCCL_H
#define DIST_NCCL_H

#include "dist_process.h"

/* Meets the other ranks: rank 0 listens at `port`, the others look for it at `host`. NULL: e says why, after
 * `timeout` seconds at most (rendezvous_open). NCCL itself starts with the communicator. When a rank dies, or
 * NCCL fails, or `timeout` seconds pass without a collective's end, the world fails and the message names the
 * last collective. Sums are not in rank order: they differ from other transports' in the last bits. */
dist_process *dist_nccl_open(const char *host, int port, int rank, int size, double timeout, error_text *e);

#endif
