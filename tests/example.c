/* example.c - vit.h in another program, without train.c and dist.h: a Vision Transformer learns one batch.
 *
 *     cc -O2 -I. tests/example.c vit_cpu.c -lm -o example && ./example
 *
 * For speed add -march=native -fopenmp, and -DHAVE_OPENBLAS -lopenblas. Exit status 0: the loss fell.
 */
#define VIT_IMPLEMENTATION
#include "vit.h"

enum { BATCH = 8, CHANNELS = 3, SIDE = 32, CLASSES = 10, STEPS = 20 };

int main(void) {
    static float images[BATCH * CHANNELS * SIDE * SIDE];
    int32_t labels[BATCH];
    for (size_t i = 0; i < sizeof images / sizeof *images; i++) images[i] = (float)random_normal(1, i);
    for (int b = 0; b < BATCH; b++) labels[b] = b % CLASSES;

    vit_config config;
    vit_replica vit;
    error_text e;
    if (vit_config_named(&config, "vit_tiny_patch16_224", &e)) return puts(e.text), 1;
    config.image_height = config.image_width = SIDE;
    config.patch_size = 8;
    config.num_classes = CLASSES;
    if (vit_open(&vit, &config, &vit_cpu, RT_FP32, BATCH, &e)) return puts(e.text), 1;

    float *weights = vit.parameters.data, *gradients = vit.gradients.data; /* on a CPU: plain memory */
    double before = vit_forward(&vit, images, labels), after = before;
    for (int step = 0; step < STEPS; step++) {
        vit_backward(&vit);
        for (size_t i = 0; i < vit.parameters.count; i++) weights[i] -= 0.05f * gradients[i];
        after = vit_forward(&vit, images, labels);
    }
    printf("loss %.3f before, %.3f after %d steps of gradient descent\n", before, after, STEPS);
    vit_close(&vit);
    return after < before ? 0 : 1;
}
