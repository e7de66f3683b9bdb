/* test_transport.c - collectives between processes (dist_tcp.c): each of them against sums made here, in rank
 * order, and what becomes of processes that disagree, leave, or say nothing.
 *
 * Every case forks its ranks; a rank's exit status says what it found. Under `mpirun ... test_transport mpi`
 * (test_launchers.sh) the process is one rank, and the collectives are those of dist_mpi.c. */
#include <arpa/inet.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#ifdef HAVE_MPI
#include "dist_mpi.h"
#endif
#include "dist_tcp.h"

#ifdef __SANITIZE_THREAD__ /* ten times slower */
enum { LEAST_RANKS = 3, LIMIT_RANKS = 3 };
#else
enum { LEAST_RANKS = 2, LIMIT_RANKS = 5 };
#endif

enum { FINE = 0, WRONG = 3, FAILED = 4 }; /* exit statuses; FAILED: of the world, as expected */

typedef struct {
    int size, port; /* port 0: over MPI */
    double timeout;
    void (*body)(dist_comm *comm);
    dist_hub *hub;
    int wrong;
} scene;

static int free_port(void) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &length), 0);
    close(fd);
    return ntohs(a.sin_port);
}

static int body_of_scene(rt_rank *rank, void *argument) {
    scene *s = argument;
    dist_comm comm;
    error_text e;
    if (vit_cpu.open(rank, &e)) return rt_fail(rank, "%s", e.text);
    if (!dist_comm_open(&comm, s->hub, rank, &vit_cpu)) s->body(&comm);
    dist_comm_close(&comm);
    vit_cpu.close(rank);
    return 0;
}

static dist_process *meet(const scene *s, int rank, error_text *e) {
#ifdef HAVE_MPI
    if (!s->port) return dist_mpi_open(rank, s->size, s->timeout, e);
#endif
    return dist_tcp_open("127.0.0.1", s->port, rank, s->size, s->timeout, e);
}

/* What a rank does. Its failure goes to `out`, a line. */
static int run_rank(scene *s, int rank, FILE *out) {
    error_text e = {{0}};
    rt_world world;
    char shared[64] = "";
    dist_process *p = meet(s, rank, &e);
    if (!p) return fprintf(out, "%s\n", e.text), FAILED;
    if (rank == 0) strcpy(shared, "from rank 0");
    if (p->agree(p, 0, &e, shared, sizeof shared) || strcmp(shared, "from rank 0")) return WRONG;
    if (rt_world_init(&world, 1, RT_CHECK | RT_ELSEWHERE)) return WRONG;
    world.ranks[0].rank = rank;
    if (!(s->hub = p->start(p, &world, &vit_cpu, &e))) return WRONG;
    int failed = rt_run(&world, body_of_scene, s), speaks = p->stop(p);
    if (failed && speaks) fprintf(out, "%s\n", world.error.text);
    p->close(p);
    rt_world_free(&world);
    return failed ? FAILED : FINE;
}

/* Plays the scene: the exit status of every rank, -1 for one that a signal ended, and all they have said. */
static void play(scene s, int status[], char said[4096]) {
    int pipes[2];
    pid_t pid[8];
    s.port = free_port();
    assert_int_equal(pipe(pipes), 0);
    for (int r = 0; r < s.size; r++) {
        pid[r] = fork();
        assert_true(pid[r] >= 0);
        if (pid[r]) continue;
        FILE *out = fdopen(pipes[1], "w");
        int result = run_rank(&s, r, out);
        fclose(out);
        _exit(result);
    }
    close(pipes[1]);
    size_t used = 0;
    for (ssize_t k; (k = read(pipes[0], said + used, 4095 - used)) > 0;) used += (size_t)k;
    said[used] = 0;
    close(pipes[0]);
    for (int r = 0; r < s.size; r++) {
        int how;
        waitpid(pid[r], &how, 0);
        status[r] = WIFEXITED(how) ? WEXITSTATUS(how) : -1;
    }
}

/* -------------------------------------------------------------------------------------------- the numbers */

/* Rank r's i-th number: any float; small whole numbers for 16 bits, whose sums are exact. */
static float number(rt_type type, int r, size_t i) {
    double u = random_uniform(random_key(1, RANDOM_SYNTHETIC, (uint64_t)r, 0), i);
    return type == RT_FP32 ? (float)(2 * u - 1) * 1e3f : (float)(int)(u * 16);
}

static void store(rt_block b, size_t i, float x, int64_t whole) {
    uint16_t h;
    if (b.type == RT_FP32) ((float *)b.data)[i] = x;
    if (b.type == RT_I64) ((int64_t *)b.data)[i] = whole;
    if (b.type == RT_BF16) rt_narrow(&h, &x, 1, RT_BF16), ((uint16_t *)b.data)[i] = h;
}

static int holds(rt_block b, size_t i, float x, int64_t whole) {
    float y = 0;
    if (b.type == RT_I64) return ((int64_t *)b.data)[i] == whole;
    if (b.type == RT_FP32) y = ((float *)b.data)[i];
    if (b.type == RT_BF16) rt_widen(&y, (uint16_t *)b.data + i, 1, RT_BF16);
    return memcmp(&x, &y, sizeof x) == 0;
}

static int64_t whole_of(int r, size_t i) { return ((int64_t)r + 1) * ((int64_t)1 << 40) - (int64_t)i; }

/* The sum over ranks, in rank order. */
static float sum_of(rt_type type, int N, size_t i) {
    float sum = number(type, 0, i);
    for (int r = 1; r < N; r++) sum += number(type, r, i);
    return sum;
}
static int64_t whole_sum(int N, size_t i) {
    int64_t sum = 0;
    for (int r = 0; r < N; r++) sum += whole_of(r, i);
    return sum;
}

static void expect(dist_comm *c, int fine, const char *op, size_t n, rt_type type) {
    if (!fine)
        rt_fail(c->rank, "wrong numbers: %s of %zu, type %d, rank %d of %d", op, n, type, c->index, c->size);
}

/* Every collective of k elements a rank and a type. All are posted before the first is waited for, in a group
 * where that is allowed, and one all-reduce has its result where its input was. */
static void every_collective(dist_comm *c, size_t k, rt_type type) {
    const int N = c->size, me = c->index, next = (me + 1) % N, last = (me + N - 1) % N;
    const size_t n = k * (size_t)N;
    enum { IN, PLACE, SUM, PART, ALL, CAST, ROOT, GOT, BLOCKS };
    rt_block b[BLOCKS];
    rt_event done[BLOCKS + 1] = {0}, ready = {0};
    for (int i = 0; i < BLOCKS; i++) {
        b[i] = rt_alloc(c->rank, RT_COMMUNICATION_BUFFERS, type, i == PART ? k : n, 1);
        for (size_t j = 0; b[i].data && i <= PLACE && j < n; j++)
            store(b[i], j, number(type, me, j), whole_of(me, j));
    }
    if (rt_failed(c->rank)) return;
    dist_op sum = type == RT_I64 ? DIST_CONTROL : DIST_ALL_REDUCE;
    rt_block own = rt_slice(b[IN], 0, k), nothing = {0};
    rt_record(c->rank, RT_COMPUTE, &ready);
    const dist_call calls[] = {
        {sum, b[IN], b[SUM], 0, "u", RT_COMMUNICATION, &ready, &done[0]},
        {sum, b[PLACE], b[PLACE], 0, "u", RT_COMMUNICATION, &ready, &done[1]},
        {DIST_REDUCE_SCATTER, b[IN], b[PART], 0, "u", RT_COMMUNICATION, &ready, &done[2]},
        {DIST_ALL_GATHER, own, b[ALL], 0, "u", RT_COMMUNICATION, &ready, &done[3]},
        {DIST_BROADCAST, me == 1 ? b[IN] : nothing, me == 1 ? nothing : b[CAST], 1, "u", RT_COMMUNICATION,
         &ready, &done[4]},
        {DIST_REDUCE, b[IN], me == N - 1 ? b[ROOT] : nothing, N - 1, "u", RT_COMMUNICATION, &ready, &done[5]},
        {DIST_BARRIER, nothing, nothing, 0, "u", RT_COMMUNICATION, NULL, &done[6]},
        {DIST_SEND, b[IN], nothing, next, "u", RT_COMMUNICATION, &ready, &done[7]},
        {DIST_RECV, nothing, b[GOT], last, "u", RT_COMMUNICATION, &ready, &done[8]},
    };
    dist_group_begin(c);
    for (int i = 0; i < 6; i++) dist_post(c, &calls[i]);
    dist_group_end(c);
    dist_post(c, &calls[6]);
    int receives_first = !strcmp(c->transport->name, "mpi") && me % 2; /* as it does one after the other */
    for (int i = 0; i < 2; i++) dist_post(c, &calls[i == receives_first ? 7 : 8]);
    for (int i = 0; i < 9; i++) rt_wait(c->rank, RT_HOST, &done[i]);
    int fine[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (size_t i = 0; i < n && !rt_failed(c->rank); i++) {
        float x = sum_of(type, N, i);
        int64_t w = whole_sum(N, i);
        size_t from = i / (k ? k : 1);
        fine[0] &= holds(b[SUM], i, x, w);
        fine[1] &= holds(b[PLACE], i, x, w);
        if (from == (size_t)me) fine[2] &= holds(b[PART], i % k, x, w);
        fine[3] &= holds(b[ALL], i, number(type, (int)from, i % k), whole_of((int)from, i % k));
        if (me != 1) fine[4] &= holds(b[CAST], i, number(type, 1, i), whole_of(1, i));
        if (me == N - 1) fine[5] &= holds(b[ROOT], i, x, w);
        fine[8] &= holds(b[GOT], i, number(type, last, i), whole_of(last, i));
    }
    for (int i = 0; i < 9; i++) expect(c, fine[i], dist_op_name(calls[i].op), k, type);
    for (int i = 0; i < BLOCKS; i++) rt_free(c->rank, RT_COMMUNICATION_BUFFERS, &b[i]);
}

/* All-reduces of one number, far more than the queue holds, posted without a wait: a stream keeps its
 * order. */
static void in_turn(dist_comm *c) {
    enum { TIMES = 40 };
    rt_block x = rt_alloc(c->rank, RT_COMMUNICATION_BUFFERS, RT_I64, 1, 1);
    rt_event done[TIMES] = {0};
    uint64_t expected = 1;
    if (!x.data) return;
    store(x, 0, 0, c->index == 0);
    for (int i = 0; i < TIMES; i++)
        dist_post(c, &(dist_call){DIST_CONTROL, x, x, 0, "u", RT_COMMUNICATION, NULL, &done[i]});
    rt_wait(c->rank, RT_HOST, &done[TIMES - 1]);
    for (int i = 1; i < TIMES; i++) expected *= (uint64_t)c->size; /* 1, then N times the sum before */
    expect(c, rt_failed(c->rank) || holds(x, 0, 0, (int64_t)expected), "a chain of control", TIMES, RT_I64);
    rt_free(c->rank, RT_COMMUNICATION_BUFFERS, &x);
}

static void all_sizes(dist_comm *c) {
    const size_t sizes[] = {1, 2, 5, 37, 1000, 65537, 400001}; /* the last: beyond every buffer */
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        every_collective(c, sizes[i], RT_FP32);
        every_collective(c, sizes[i], RT_BF16);
        every_collective(c, sizes[i], RT_I64);
    }
    in_turn(c);
}

static void numbers_are_right(void **state) {
    (void)state;
    for (int n = LEAST_RANKS; n <= LIMIT_RANKS; n++) {
        int status[8];
        char said[4096];
        play((scene){.size = n, .timeout = 60, .body = all_sizes}, status, said);
        if (*said) fail_msg("%s", said);
        for (int r = 0; r < n; r++) assert_int_equal(status[r], FINE);
    }
}

/* ----------------------------------------------------------------------------------------------- failures */

static void barrier(dist_comm *c, const char *unit) {
    rt_event done = {0};
    dist_post(c, &(dist_call){.op = DIST_BARRIER, .unit = unit, .stream = RT_COMMUNICATION, .done = &done});
    rt_wait(c->rank, RT_HOST, &done);
    rt_drain(c->rank); /* after a failure the event may still be signalled */
}

/* Rank 1 means another unit. */
static void another_unit(dist_comm *c) {
    barrier(c, "head");
    barrier(c, c->index == 1 ? "blocks.3" : "blocks.2");
}

static void one_killed(dist_comm *c) {
    barrier(c, "head");
    if (c->index == 1) kill(getpid(), SIGKILL);
    barrier(c, "blocks.0");
}

static void one_fails(dist_comm *c) {
    barrier(c, "head");
    if (c->index == 1) rt_fail(c->rank, "rank 1: no more paper");
    barrier(c, "blocks.0");
}

static void one_leaves(dist_comm *c) {
    barrier(c, "head");
    if (c->index != 1) barrier(c, "blocks.0");
}

static void one_sleeps(dist_comm *c) {
    barrier(c, "head");
    if (c->index == 1) sleep(7);
    barrier(c, "blocks.0");
}

/* One line in all, which says this; every rank that lives has failed. */
static void ends_with(void (*body)(dist_comm *), double timeout, const char *expected) {
    int status[8];
    char said[4096];
    play((scene){.size = 3, .timeout = timeout, .body = body}, status, said);
    if (!strstr(said, expected)) fail_msg("found '%s', expected '%s'", said, expected);
    for (int r = 0; r < 3; r++)
        if (status[r] != FAILED && !(body == one_leaves && r == 1) && !(body == one_killed && r == 1))
            fail_msg("rank %d ends with %d", r, status[r]);
}

static void failures_are_told(void **state) {
    (void)state;
    ends_with(another_unit, 30, "disagree: barrier 1 of 0 (blocks.");
    ends_with(one_killed, 30, "lost rank 1");
    ends_with(one_fails, 30, "rank 1: no more paper");
    ends_with(one_leaves, 30, "disagree: barrier 1 of 0 (blocks.0) against nothing more");
    ends_with(one_sleeps, 3, "no word from rank 1 for 3 s in barrier 1 (blocks.0)");
}

int main(int argc, char **argv) {
    const char *rank = getenv("OMPI_COMM_WORLD_RANK"), *size = getenv("OMPI_COMM_WORLD_SIZE");
    if (argc == 2 && !strcmp(argv[1], "mpi") && rank && size)
        return run_rank(&(scene){.size = atoi(size), .timeout = 60, .body = all_sizes}, atoi(rank), stdout);
    const struct CMUnitTest tests[] = {cmocka_unit_test(numbers_are_right),
                                       cmocka_unit_test(failures_are_told)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
