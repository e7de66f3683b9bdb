/* loader.h - batches of samples, drawn ahead by worker threads into a bounded queue.
 *
 *     loader l;
 *     loader_job job = {.draw = draw, .context = &data, .last = 100, .batch_size = 8, .workers = 2,
 *                       .pixels = 3 * 224 * 224};
 *     if (loader_open(&l, &job, &e)) ...
 *     for (size_t k = 0; k < 100; k++) {
 *         const loader_batch *b = loader_next(&l, &e);        // NULL: a sample failed; e names it
 *         ... b->images, b->labels, b->keys, until the next call ...
 *     }
 *     loader_close(&l);
 *
 * A worker takes the next sample, not the next batch, so that a batch is ready as early as can be. A
 * sample is a pure function of its batch and place: what comes out does not depend on the number of
 * workers or their order, nor does the error that is reported, that of the first sample which fails.
 * Without workers the caller draws, when it asks. At most LOADER_DEPTH batches exist at a time: the
 * caller's and those ahead. */
#ifndef DATA_LOADER_H
#define DATA_LOADER_H

#include <pthread.h>
#include <stdlib.h>

#include "base.h"

enum { LOADER_DEPTH = 3, LOADER_WORKERS = 256 };

/* Draws sample b of a batch: its image [pixels], label, and the key of its own randomness. Called from
 * several threads at once. */
typedef int loader_draw(const void *context, size_t batch, size_t b, float *image, int32_t *label,
                        uint64_t *key, error_text *e);

typedef struct loader_job {
    loader_draw *draw;
    const void *context;
    size_t first, last;        /* batches [first, last) are drawn, in this order */
    size_t batch_size, pixels; /* samples of a batch, floats of an image */
    size_t workers;            /* threads, at most LOADER_WORKERS; 0: none */
} loader_job;

typedef struct loader_batch {
    float *images;   /* [batch_size][pixels] */
    int32_t *labels; /* [batch_size] */
    uint64_t *keys;  /* [batch_size] */
    size_t drawn;    /* samples that are done with, well or not */
    size_t failed;   /* the first that failed, or SIZE_MAX */
    error_text error;
} loader_batch;

typedef struct loader {
    loader_job job;
    loader_batch slot[LOADER_DEPTH]; /* batch k lies in slot k % slots */
    size_t slots;
    size_t asked; /* batches that the caller has asked for: all but the last of them may be overwritten */
    size_t next;  /* the next sample that nobody has taken, counted from the first of batch `first` */
    int stop;
    pthread_mutex_t lock; /* guards all of it but what the slots point to */
    pthread_cond_t room, ready;
    pthread_t worker[LOADER_WORKERS];
    size_t workers; /* that run */
} loader;

static inline loader_batch *loader__slot(loader *l, size_t batch) { return &l->slot[batch % l->slots]; }

/* Draws one sample into its slot and writes down what came of it. The lock is held, but not while drawing. */
static inline void loader__draw(loader *l, size_t sample) {
    const loader_job *job = &l->job;
    size_t batch = sample / job->batch_size, b = sample % job->batch_size;
    loader_batch *to = loader__slot(l, batch);
    error_text e;
    pthread_mutex_unlock(&l->lock);
    int failed = job->draw(job->context, job->first + batch, b, to->images + b * job->pixels, &to->labels[b],
                           &to->keys[b], &e);
    pthread_mutex_lock(&l->lock);
    if (failed && b < to->failed) to->failed = b, to->error = e;
    to->drawn++;
}

/* Takes the next sample, first of a batch that begins: the slot is new. */
static inline size_t loader__take(loader *l) {
    size_t sample = l->next++;
    if (sample % l->job.batch_size == 0) {
        loader_batch *slot = loader__slot(l, sample / l->job.batch_size);
        slot->drawn = 0;
        slot->failed = SIZE_MAX;
    }
    return sample;
}

static inline void *loader__work(void *argument) {
    loader *l = argument;
    size_t B = l->job.batch_size, samples = (l->job.last - l->job.first) * B;
    pthread_mutex_lock(&l->lock);
    while (!l->stop && l->next < samples) {
        size_t begun = l->asked ? l->asked - 1 : 0; /* the batch that the caller still reads */
        if (l->next / B >= begun + l->slots) {
            pthread_cond_wait(&l->room, &l->lock);
            continue;
        }
        size_t sample = loader__take(l);
        loader__draw(l, sample);
        if (loader__slot(l, sample / B)->drawn == B) pthread_cond_signal(&l->ready);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

/* Ends the workers and frees the batches; what is being drawn is waited for. */
static inline void loader_close(loader *l) {
    pthread_mutex_lock(&l->lock);
    l->stop = 1;
    pthread_cond_broadcast(&l->room);
    pthread_mutex_unlock(&l->lock);
    for (size_t i = 0; i < l->workers; i++) pthread_join(l->worker[i], NULL);
    for (size_t i = 0; i < l->slots; i++) {
        free(l->slot[i].images);
        free(l->slot[i].labels);
        free(l->slot[i].keys);
    }
    pthread_cond_destroy(&l->ready);
    pthread_cond_destroy(&l->room);
    pthread_mutex_destroy(&l->lock);
    l->workers = l->slots = 0;
}

/* Starts to draw. -1: nothing to close. */
static inline int loader_open(loader *l, const loader_job *job, error_text *e) {
    size_t floats, batches = job->last - job->first;
    *l = (loader){.job = *job, .slots = job->workers ? LOADER_DEPTH : 1};
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->room, NULL);
    pthread_cond_init(&l->ready, NULL);
    int failed = size_multiply(job->batch_size, job->pixels, &floats) || size_multiply(floats, 4, &floats);
    for (size_t i = 0; i < l->slots && !failed; i++) {
        loader_batch *slot = &l->slot[i];
        slot->images = malloc(floats + 1);
        slot->labels = calloc(job->batch_size + 1, sizeof *slot->labels);
        slot->keys = calloc(job->batch_size + 1, sizeof *slot->keys);
        failed = !slot->images || !slot->labels || !slot->keys;
    }
    if (failed) error_set(e, "out of memory for batches of %zu images", job->batch_size);
    for (size_t i = 0; i < job->workers && i < LOADER_WORKERS && batches && !failed; i++) {
        failed = pthread_create(&l->worker[i], NULL, loader__work, l);
        if (failed) error_set(e, "found no room for thread %zu of %zu that load images", i, job->workers);
        l->workers += !failed;
    }
    if (failed) loader_close(l);
    return failed ? -1 : 0;
}

/* The next batch, which is the caller's until the next call; NULL: one of its samples failed, and e is the
 * message of the first that did. To be called no more than last - first times. */
static inline const loader_batch *loader_next(loader *l, error_text *e) {
    pthread_mutex_lock(&l->lock);
    size_t B = l->job.batch_size, batch = l->asked++;
    loader_batch *b = loader__slot(l, batch);
    pthread_cond_broadcast(&l->room);
    while (!l->workers && l->next < (batch + 1) * B) loader__draw(l, loader__take(l));
    while (l->next < (batch + 1) * B || b->drawn < B) pthread_cond_wait(&l->ready, &l->lock);
    int failed = b->failed != SIZE_MAX;
    if (failed) *e = b->error;
    pthread_mutex_unlock(&l->lock);
    return failed ? NULL : b;
}

#endif
