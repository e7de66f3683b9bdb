/* launch.h - which rank this process is, as torchrun, srun, mpirun or this program itself (spawn.h) tell
 * it in the environment.
 *
 *     launch l;
 *     if (launch_find(&l, &e)) ...        // l.launcher NULL: nobody has started this process as a rank
 *
 * torchrun, or a loop in a shell: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. srun:
 * SLURM_PROCID, but only where SLURM_STEP_ID is set too, as a batch script has the former itself; the
 * master is the first host of the list unless MASTER_ADDR names it. mpirun: OMPI_COMM_WORLD_RANK or
 * PMI_RANK. */
#ifndef LAUNCH_H
#define LAUNCH_H

#include "base.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct launch {
    const char *launcher; /* "torchrun", "srun", "mpirun", "train"; NULL: none */
    int rank, size;
    int local_rank, local_size; /* on this host */
    char host[256];             /* where rank 0 is */
    int port;                   /* MASTER_PORT; 0: not given */
    int turn;                   /* of "train": where the right to write the error lies */
} launch;

/* A whole number of the environment in [least, most]. */
static inline int launch__number(const char *name, int least, int most, int *value, error_text *e) {
    const char *text = getenv(name);
    char *end;
    errno = 0;
    long x = text ? strtol(text, &end, 10) : 0;
    if (!text) return error_set(e, "found no %s in the environment, expected it beside the rank's", name);
    if (errno || end == text || *end || x < least || x > most)
        return error_set(e, "%s: found '%.64s', expected a whole number in [%d, %d]", name, text, least,
                         most);
    *value = (int)x;
    return 0;
}

/* The first name of Slurm's list: n[03-07,9],m1 -> n03. */
static inline void launch__first_host(const char *list, char host[256]) {
    size_t plain = strcspn(list, "[,");
    size_t digits = list[plain] == '[' ? strcspn(list + plain + 1, "-,]") : 0;
    snprintf(host, 256, "%.*s%.*s", (int)plain, list, (int)digits, list + plain + (digits > 0));
}

static inline int launch_find(launch *l, error_text *e) {
    static const struct {
        const char *launcher, *needs, *rank, *size, *local_rank, *local_size;
    } known[] = {
        {"train", "TRAIN_TURN", "RANK", "WORLD_SIZE", "LOCAL_RANK", "WORLD_SIZE"},
        {"torchrun", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
        {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
         "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"},
        {"srun", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
         "SLURM_STEP_TASKS_PER_NODE"},
        {"mpirun", "PMI_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
    };
    const char *host = getenv("MASTER_ADDR"), *nodes = getenv("SLURM_STEP_NODELIST");
    *l = (launch){0};
    for (size_t i = 0; i < sizeof known / sizeof *known && !l->launcher; i++) {
        if (!getenv(known[i].needs)) continue;
        l->launcher = known[i].launcher;
        if (launch__number(known[i].size, 1, 4096, &l->size, e) ||
            launch__number(known[i].rank, 0, l->size - 1, &l->rank, e))
            return -1;
        if (getenv(known[i].local_rank) && launch__number(known[i].local_rank, 0, 4095, &l->local_rank, e))
            return -1;
        const char *here = getenv(known[i].local_size); /* Slurm: "2(x3),1", of this host as of the first */
        l->local_size = here ? atoi(here) : l->size;
        if (l->local_size < 1 || l->local_size > l->size) l->local_size = l->size;
    }
    if (!l->launcher) return 0;
    if (!strcmp(l->launcher, "train") && launch__number("TRAIN_TURN", 0, 1 << 20, &l->turn, e)) return -1;
    if (getenv("MASTER_PORT") && launch__number("MASTER_PORT", 1, 65534, &l->port, e)) return -1;
    if (host)
        snprintf(l->host, sizeof l->host, "%s", host);
    else if (nodes && !strcmp(l->launcher, "srun"))
        launch__first_host(nodes, l->host);
    else if (!strcmp(l->launcher, "torchrun"))
        return error_set(e, "found RANK but no MASTER_ADDR in the environment, expected the host of rank 0");
    else
        snprintf(l->host, sizeof l->host, "127.0.0.1");
    return 0;
}

/* May this process say why all have failed? Of ranks that the program has started one may, once. */
static inline int launch_takes_turn(const launch *l) {
    char byte;
    return !l->launcher || strcmp(l->launcher, "train") || read(l->turn, &byte, 1) == 1;
}

#endif
