/* spawn.h - starts the ranks of this machine as processes: this program again, each as one rank.
 *
 *     int status = spawn_ranks(argv, 4, &e);   // when all have ended; e.text "": all there is to say is said
 *
 * A rank finds its place in the environment as under torchrun (launch.h): RANK, LOCAL_RANK, WORLD_SIZE,
 * MASTER_ADDR, MASTER_PORT. The ranks end together: SIGINT and SIGTERM are passed on to all, each time
 * they come; when one fails, the others have SPAWN_GRACE_S seconds to notice it before they are killed;
 * and when this process dies they are told by SIGTERM.
 *
 * One error line in all: the right to write it is a byte in a pipe, TRAIN_TURN, which the first rank that
 * has something to say reads (launch_takes_turn). If nobody has, this process does. */
#ifndef SPAWN_H
#define SPAWN_H

#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "launch.h"

enum { SPAWN_GRACE_S = 10 };

/* A port of the loopback interface that nobody listens at, at present; 0: there is none. */
static inline int spawn__free_port(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    int failed = bind(fd, (struct sockaddr *)&a, length) || getsockname(fd, (struct sockaddr *)&a, &length);
    close(fd);
    return failed ? 0 : ntohs(a.sin_port);
}

static inline void spawn__set(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

/* In the new process, in which only what is safe in a signal handler may be called. */
static inline void spawn__become_rank(char **argv, pid_t parent, const sigset_t *signals) {
    setpgid(0, 0); /* or a terminal's Ctrl-C would come twice */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    sigprocmask(SIG_SETMASK, signals, NULL);
    if (getppid() == parent) execv("/proc/self/exe", argv);
    _exit(1);
}

/* What the end of a rank means for the whole: the exit status. `passed_on`: the signal that all were sent. */
static inline int spawn__status(int status, int passed_on) {
    if (WIFSIGNALED(status)) return passed_on && WTERMSIG(status) == passed_on ? 130 : 1;
    return WEXITSTATUS(status);
}

static inline int spawn_ranks(char **argv, int n, error_text *e) {
    pid_t pid[n]; /* 0: ended */
    sigset_t ours, before;
    int turn[2], started = 0, running = 0, worst = 0, passed_on = 0, port = spawn__free_port() - 1;
    time_t killed_at = 0; /* 0: nobody has failed */
    char byte = 1;
    *e->text = 0;
    if (port <= 0 || pipe(turn) || fcntl(turn[0], F_SETFL, O_NONBLOCK) || write(turn[1], &byte, 1) != 1) {
        error_set(e, "cannot start %d ranks: %s", n, strerror(errno));
        return 1;
    }
    sigemptyset(&ours);
    sigaddset(&ours, SIGINT), sigaddset(&ours, SIGTERM), sigaddset(&ours, SIGCHLD);
    sigprocmask(SIG_BLOCK, &ours, &before);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    spawn__set("MASTER_PORT", port);
    spawn__set("WORLD_SIZE", n);
    spawn__set("TRAIN_TURN", turn[0]);
    for (pid_t parent = getpid(); started < n; started++) {
        spawn__set("RANK", started);
        spawn__set("LOCAL_RANK", started);
        pid[started] = fork();
        if (!pid[started]) spawn__become_rank(argv, parent, &before);
        if (pid[started] < 0) break;
        running++;
    }
    if (started < n) {
        error_set(e, "cannot start rank %d of %d: %s", started, n, strerror(errno));
        killed_at = time(NULL);
        worst = 1;
    }
    while (running) {
        int status, signal = sigtimedwait(&ours, NULL, &(struct timespec){.tv_sec = 1});
        int kills = killed_at && time(NULL) >= killed_at;
        if (signal == SIGINT || signal == SIGTERM) passed_on = signal;
        for (int r = 0; r < started; r++) {
            if (!pid[r]) continue;
            if (signal == SIGINT || signal == SIGTERM) kill(pid[r], signal);
            if (kills) kill(pid[r], SIGKILL);
            if (waitpid(pid[r], &status, WNOHANG) != pid[r]) continue;
            pid[r] = 0;
            running--;
            int end = spawn__status(status, passed_on);
            if (end == 0 || end == 130) {
                if (worst == 0) worst = end;
                continue;
            }
            if (worst == 0 || worst == 130) worst = end;
            if (killed_at) continue; /* it may have been killed for another's failure */
            killed_at = time(NULL) + SPAWN_GRACE_S;
            if (WIFSIGNALED(status))
                error_set(e, "rank %d was killed by signal %d (%s)", r, WTERMSIG(status),
                          strsignal(WTERMSIG(status)));
            else
                error_set(e, "rank %d ended with status %d and did not say why", r, end);
        }
    }
    if (read(turn[0], &byte, 1) != 1) *e->text = 0; /* somebody has said it */
    close(turn[0]), close(turn[1]);
    sigprocmask(SIG_SETMASK, &before, NULL);
    return worst;
}

#endif
