/* dist_mpi.h - the transport over any MPI, for clusters whose network it knows best. */
#ifndef DIST_MPI_H
#define DIST_MPI_H

#include "dist_process.h"

/* Joins the ranks that mpirun has started; once in a process. NULL: e says why: MPI cannot start, or its
 * size and rank are not `size` and `rank`, which the launcher announced. A rank without a word for `timeout`
 * seconds is lost. */
dist_process *dist_mpi_open(int rank, int size, double timeout, error_text *e);

#endif
