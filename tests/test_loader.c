/* test_loader.c - the queue of batches: what comes out, how far ahead it is drawn, and what happens to
 * errors. Samples are formulas of their place, some of them slow, so that workers overtake each other. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "data/loader.h"

enum { BATCHES = 12, BATCH = 7, PIXELS = 5, FIRST = 3 };
static const size_t worker_counts[] = {0, 1, 2, 3, 8};
#define FOR_EACH_WORKERS(w) for (size_t w = 0; w < sizeof worker_counts / sizeof *worker_counts; w++)

/* What the samples of a test do, and what was seen of them. */
typedef struct {
    size_t fails_from; /* samples of batch FIRST + fails_from fail ... */
    size_t fails[2];   /* ... in these places */
    size_t asked;      /* batches that the test has asked for */
    size_t ahead;      /* the most that a batch was drawn before it was asked for */
    size_t drawn;
    pthread_mutex_t lock;
} samples;

static samples samples_new(void) {
    samples s = {.fails_from = SIZE_MAX};
    pthread_mutex_init(&s.lock, NULL);
    return s;
}

static float pixel_of(size_t batch, size_t b, size_t i) {
    return (float)random_below(random_key(1, batch, b, 0), i, 1000);
}

static int draw(const void *context, size_t batch, size_t b, float *image, int32_t *label, uint64_t *key,
                error_text *e) {
    samples *s = (samples *)context;
    usleep((useconds_t)random_below(random_key(2, batch, b, 0), 0, 600));
    pthread_mutex_lock(&s->lock);
    size_t ahead = batch - FIRST + 1 > s->asked ? batch - FIRST + 1 - s->asked : 0;
    if (ahead > s->ahead) s->ahead = ahead;
    s->drawn++;
    pthread_mutex_unlock(&s->lock);
    if (batch - FIRST == s->fails_from && (b == s->fails[0] || b == s->fails[1]))
        return error_set(e, "sample %zu of batch %zu", b, batch);
    for (size_t i = 0; i < PIXELS; i++) image[i] = pixel_of(batch, b, i);
    *label = (int32_t)(batch * 100 + b);
    *key = random_key(3, batch, b, 0);
    return 0;
}

static void open_loader(loader *l, samples *s, size_t workers) {
    loader_job job = {draw, s, FIRST, FIRST + BATCHES, BATCH, PIXELS, workers};
    error_text e;
    assert_int_equal(loader_open(l, &job, &e), 0);
}

static const loader_batch *ask(loader *l, samples *s, error_text *e) {
    pthread_mutex_lock(&s->lock);
    s->asked++;
    pthread_mutex_unlock(&s->lock);
    return loader_next(l, e);
}

static void batches_do_not_depend_on_workers(void **state) {
    (void)state;
    FOR_EACH_WORKERS(w) {
        samples s = samples_new();
        loader l;
        error_text e;
        open_loader(&l, &s, worker_counts[w]);
        for (size_t k = FIRST; k < FIRST + BATCHES; k++) {
            const loader_batch *batch = ask(&l, &s, &e);
            assert_non_null(batch);
            for (size_t b = 0; b < BATCH; b++) {
                assert_int_equal(batch->labels[b], k * 100 + b);
                assert_true(batch->keys[b] == random_key(3, k, b, 0));
                for (size_t i = 0; i < PIXELS; i++)
                    assert_true(batch->images[b * PIXELS + i] == pixel_of(k, b, i));
            }
        }
        loader_close(&l);
        assert_int_equal(s.drawn, BATCHES * BATCH);
        /* nobody draws more than the slots hold: the caller's batch and those ahead */
        assert_in_range(s.ahead, 0, worker_counts[w] ? LOADER_DEPTH : 0);
    }
}

static void workers_fill_the_queue_and_then_rest(void **state) {
    (void)state;
    samples s = samples_new();
    loader l;
    open_loader(&l, &s, 2);
    for (int i = 0; i < 1000; i++) { /* until they have filled it, and a while longer */
        usleep(1000);
        pthread_mutex_lock(&s.lock);
        size_t drawn = s.drawn;
        pthread_mutex_unlock(&s.lock);
        if (drawn == LOADER_DEPTH * BATCH) break;
    }
    usleep(20000);
    loader_close(&l);
    assert_int_equal(s.drawn, LOADER_DEPTH * BATCH);
}

/* Of two samples that fail in one batch the first is reported, whoever was quicker; the batches before are
 * whole. */
static void the_first_failure_is_reported(void **state) {
    (void)state;
    FOR_EACH_WORKERS(w) for (size_t at = 0; at < BATCHES; at += 4) {
        samples s = samples_new();
        loader l;
        error_text e;
        s.fails_from = at;
        s.fails[0] = 5, s.fails[1] = 2;
        open_loader(&l, &s, worker_counts[w]);
        for (size_t k = 0; k < at; k++) assert_non_null(ask(&l, &s, &e));
        assert_null(ask(&l, &s, &e));
        char expected[64];
        snprintf(expected, sizeof expected, "sample 2 of batch %zu", FIRST + at);
        assert_string_equal(e.text, expected);
        loader_close(&l);
    }
}

static void a_loader_may_be_closed_at_any_time(void **state) {
    (void)state;
    FOR_EACH_WORKERS(w) for (size_t taken = 0; taken <= BATCHES; taken++) {
        samples s = samples_new();
        loader l;
        error_text e;
        open_loader(&l, &s, worker_counts[w]);
        for (size_t k = 0; k < taken; k++) assert_non_null(ask(&l, &s, &e));
        loader_close(&l);
    }
}

static void no_batches_and_no_memory(void **state) {
    (void)state;
    samples s = samples_new();
    loader l;
    error_text e;
    loader_job none = {draw, &s, 4, 4, BATCH, PIXELS, 2}, huge = {draw, &s, 0, 1, SIZE_MAX / 8, 3, 2};
    assert_int_equal(loader_open(&l, &none, &e), 0);
    loader_close(&l);
    assert_int_equal(s.drawn, 0);
    assert_int_equal(loader_open(&l, &huge, &e), -1);
    assert_non_null(strstr(e.text, "out of memory"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(batches_do_not_depend_on_workers),
        cmocka_unit_test(workers_fill_the_queue_and_then_rest),
        cmocka_unit_test(the_first_failure_is_reported),
        cmocka_unit_test(a_loader_may_be_closed_at_any_time),
        cmocka_unit_test(no_batches_and_no_memory),
    };
    return cmocka_run_group_tests_name("loader", tests, NULL, NULL);
}
