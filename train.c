/* train.c - the program: trains and evaluates Vision Transformers on any number of ranks.
 *
 *     make && ./train --nproc-per-node 2                       # the embedded digits, two local ranks
 *     ./train --data-path cifar-10-batches-bin --epochs 6
 *     ./train eval --checkpoint runs/... --data-path cifar-10-batches-bin
 *     ./train predict --checkpoint runs/... cat.jpg dog.png
 *     ./train compare --strategies ddp,zero3 --nproc-per-node 2
 *     ./train export --checkpoint runs/... --format hf --output-dir vit-hf
 *
 * In this order: preparation (options, data, model), batches, evaluation, prediction, the training loop,
 * commands, main.
 * The strategies are in dist.h, the model in vit.h, its folders on disk in checkpoint.h, the options in
 * train_options.h.
 */
#define VIT_IMPLEMENTATION
#define DIST_IMPLEMENTATION
#include "checkpoint.h"
#include "compare.h"
#include "data/dataset.h"
#include "data/loader.h"
#ifdef HAVE_MPI
#include "dist_mpi.h"
#endif
#ifdef HAVE_NCCL
#include "dist_nccl.h"
#endif
#include "dist_tcp.h"
#include "io/metrics.h"
#include "io/nvml.h"
#include "launch.h"
#include "report.h"
#include "spawn.h"
#include "train_options.h"

#include <signal.h>
#include <sys/utsname.h>
#include <time.h>

#define TRAIN_VERSION "0.1"

/* Everything that is fixed before the ranks start, shared by them and read-only from then on. */
typedef struct run {
    train_options o;
    size_t command; /* COMMAND_TRAIN, COMMAND_EVAL or COMMAND_PREDICT */
    const vit_device *device;
    dataset train, val;
    sample_format format; /* of images in evaluation; training differs in the augmentation */
    vit_config config;
    vit_model model;
    model_source source; /* of --pretrained or --checkpoint */
    int loaded;
    char (*label_names)[256]; /* [labels] what a loaded model calls its classes, or NULL */
    size_t labels;
    model_card card;
    size_t ranks, global_batch, steps_per_epoch, steps;
    launch launch;
    dist_process *process; /* one of several, or NULL */
    int silent;            /* rank 0 says why the run failed */
    dist_hub *hub;
    int out_of_memory;      /* why the ranks failed */
    schedule *schedules;    /* [ranks] of the first step, with --print-schedule; each rank writes its own */
    compare_result *result; /* of compare: what this training leaves behind; or NULL */

    char resumed[CHECKPOINT_PATH]; /* the step folder that training goes on from, "": none */
    checkpoint_state state;        /* of it */
    int continues;                 /* it is one of the output directory */
    int interrupted;               /* by a signal: written by rank 0 at the end */
} run;

/* How many signals have come that ask to stop: the one thing that a handler can tell the rest. */
static volatile sig_atomic_t stop_signals;

/* The first one lets all ranks finish their step and write a checkpoint; a second one ends at once. */
static void on_stop_signal(int signal) {
    (void)signal;
    if (++stop_signals > 1) _exit(130);
}

static void catch_signals(void) {
    const struct sigaction stop = {.sa_handler = on_stop_signal, .sa_flags = SA_RESTART};
    sigaction(SIGINT, &stop, NULL);
    sigaction(SIGTERM, &stop, NULL);
}

/* -------------------------------------------------------------------------------------------- preparation */

static int given(const run *r, const void *field) { return options_given(&train_table, &r->o, field); }

/* Recipes that learn something in minutes on a laptop, by data set. */
static const struct {
    size_t patch_size, epochs;
    double learning_rate;
} recipes[] = {[DATASET_DIGITS] = {2, 60, 3e-3},
               [DATASET_MNIST] = {7, 3, 1e-3},
               [DATASET_CIFAR10] = {4, 6, 1e-3},
               [DATASET_IMAGEFOLDER] = {16, 10, 1e-3},
               [DATASET_SYNTHETIC] = {4, 1, 1e-3}};

/* The model: a loaded one, a named one, or the data set's small one; single sizes override it. */
static int prepare_config(run *r, dataset_kind kind, error_text *e) {
    train_options *o = &r->o;
    const char *path = *o->checkpoint ? o->checkpoint : o->pretrained;
    vit_config *c = &r->config;
    if (*o->checkpoint && *o->pretrained)
        return error_set(e, "found both --checkpoint and --pretrained, expected one model");
    if (*o->model) {
        if (vit_config_named(c, o->model, e)) return -1;
    } else if (vit_config_named(c, "vit_tiny_patch16_224", e)) { /* the name that timm will know it by */
        return -1;
    } else if (*path) {
        c->num_heads = c->image_height = c->image_width = 0;
    } else {
        if (kind == DATASET_SYNTHETIC) c->image_height = c->image_width = 32; /* others have their own */
        c->patch_size = recipes[kind].patch_size;
        c->embed_dim = 64;
        c->num_heads = c->depth = 4;
    }
    if (*path) {
        if (model_source_open(&r->source, path, e)) return -1;
        r->loaded = 1;
        r->source.may_replace_head = *o->pretrained != 0;
        if (model_source_config(&r->source, c, e)) return -1;
        if (*o->model && strcmp(o->model, c->name))
            return error_set(e, "%s: found a %s, expected a %s (--model)", path, c->name, o->model);
    }
    if (given(r, &o->layer_norm_eps)) c->layer_norm_eps = o->layer_norm_eps;
    if (given(r, &o->gelu)) c->gelu = (vit_gelu)o->gelu;
    if (given(r, &o->image_size))
        c->image_height = o->image_size.height, c->image_width = o->image_size.width;
    if (given(r, &o->patch_size)) c->patch_size = o->patch_size;
    if (given(r, &o->embed_dim)) c->embed_dim = o->embed_dim;
    if (given(r, &o->depth)) c->depth = o->depth;
    if (given(r, &o->num_heads)) c->num_heads = o->num_heads;
    if (given(r, &o->mlp_ratio)) c->mlp_ratio = o->mlp_ratio;
    if (given(r, &o->num_classes)) c->num_classes = o->num_classes;
    c->drop_path = o->drop_path;
    c->label_smoothing = o->label_smoothing;
    c->freeze_backbone = o->freeze_backbone;
    if (!c->num_heads || !c->image_height)
        return error_set(e, "%s: its tensors do not tell the %s, expected --%s", r->source.path,
                         c->num_heads ? "image size" : "number of heads",
                         c->num_heads ? "image-size" : "num-heads");
    return 0;
}

static int prepare_dataset(run *r, dataset *d, dataset_kind kind, int train, error_text *e) {
    train_options *o = &r->o;
    const vit_config *c = &r->config;
    size_t limit = train ? o->limit_train : o->limit_val;
    if (limit == SIZE_MAX) limit = 0;
    if (kind != DATASET_SYNTHETIC)
        return dataset_load(d, kind, *o->data_path ? o->data_path : NULL, train, limit, e);
    size_t classes = (given(r, &o->num_classes) || r->loaded) && c->num_classes ? c->num_classes : 10;
    return dataset_synthetic(d,
                             limit   ? limit
                             : train ? 1024
                                     : 256,
                             c->channels, c->image_height, c->image_width, classes, o->seed, train, e);
}

/* What the user says of mean and deviation, else the loaded model, else the data set (d, or NULL). */
static void prepare_normalisation(run *r, const dataset *d) {
    const train_options *o = &r->o;
    for (int i = 0; i < 3; i++) {
        float mean = 0.5f, std = 0.5f;
        if (r->loaded && r->source.has_normalisation)
            mean = r->source.mean[i], std = r->source.std[i];
        else if (!r->loaded && d)
            mean = d->mean[i], std = d->std[i];
        if (o->mean.count) mean = (float)o->mean.values[o->mean.count == 1 ? 0 : i];
        if (o->std.count) std = (float)o->std.values[o->std.count == 1 ? 0 : i];
        r->format.mean[i] = mean;
        r->format.std[i] = std;
    }
}

/* Gives the images of a folder the model's numbers of their classes, where the model knows its classes by
 * name. */
static int prepare_labels(run *r, dataset *d, error_text *e) {
    size_t V = r->config.num_classes;
    int32_t *number = calloc(d->classes, sizeof *number); /* [classes of the folder] */
    if (!number) return error_set(e, "out of memory for %zu classes", d->classes);
    int failed = 0;
    for (size_t k = 0; k < d->classes && !failed; k++) {
        size_t i = 0;
        while (i < V && strcmp(d->label_names[k], r->label_names[i])) i++;
        if (i == V)
            failed = error_set(e, "%s: found class %s, which the model does not know (%s, %s, ...)",
                               r->o.data_path, d->label_names[k], r->label_names[0], r->label_names[V > 1]);
        number[k] = (int32_t)i;
    }
    for (size_t i = 0; i < d->count && !failed; i++) d->labels[i] = number[d->labels[i]];
    free(number);
    return failed;
}

/* The names of the classes that a loaded model's file has, if it has one for each. */
static int prepare_label_names(run *r, error_text *e) {
    if (!r->loaded) return 0;
    if (r->config.channels != 1 && r->config.channels != 3)
        return error_set(e, "%s: found a model of images with %zu channels, expected 1 or 3", r->source.path,
                         r->config.channels);
    if (model_source_labels(&r->source, &r->label_names, &r->labels, e)) return -1;
    if (r->labels == r->config.num_classes) return 0;
    free(r->label_names);
    r->label_names = NULL;
    return 0;
}

/* Loads the data and makes model and data fit each other. */
static int prepare_data(run *r, dataset_kind kind, error_text *e) {
    train_options *o = &r->o;
    vit_config *c = &r->config;
    int small = !*o->model && !r->loaded; /* the data set's own model */
    int training = r->command == COMMAND_TRAIN;
    if (prepare_dataset(r, &r->val, kind, 0, e)) return -1;
    if (training && (prepare_dataset(r, &r->train, kind, 1, e) || dataset_same_shape(&r->train, &r->val, e)))
        return -1;
    const dataset *d = &r->val;
    if (small && d->height && !given(r, &o->image_size))
        c->image_height = d->height, c->image_width = d->width;
    if (!r->loaded) c->channels = d->channels;
    if ((!r->loaded || r->source.may_replace_head) && !given(r, &o->num_classes)) c->num_classes = d->classes;
    if (d->classes > c->num_classes)
        return error_set(e, "%s has %zu classes, more than the model's %zu (--num-classes)",
                         dataset_kind_names[kind], d->classes, c->num_classes);
    if (c->channels == 1 && (o->mean.count == 3 || o->std.count == 3))
        return error_set(e, "--mean, --std: found three numbers, expected one for grey images");
    prepare_normalisation(r, d);
    if (!training && r->label_names && d->files) return prepare_labels(r, &r->val, e);
    return 0;
}

static void say_warning(void *unused, const char *why) {
    (void)unused;
    fprintf(stderr, "train: warning: %s\n", why);
}

/* The output directory that a step folder lies in, DIR/checkpoints/step-...; "": in none. */
static void directory_of_step(const char *step, char directory[CHECKPOINT_PATH]) {
    static const char inner[] = "/checkpoints";
    snprintf(directory, CHECKPOINT_PATH, "%s", step);
    char *slash = strrchr(directory, '/');
    if (slash) *slash = 0;
    size_t length = strlen(directory), tail = sizeof inner - 1;
    directory[length > tail && !strcmp(directory + length - tail, inner) ? length - tail : 0] = 0;
}

static dist_optimizer optimizer_of(const train_options *o) {
    return o->optimizer == CHOICE_OPTIMIZER_ADAMW ? DIST_ADAMW : DIST_SGD;
}

/* Finds the step folder that --resume means, and reads where it stood. */
static int prepare_resume(run *r, error_text *e) {
    train_options *o = &r->o;
    char directory[CHECKPOINT_PATH], output[CHECKPOINT_PATH];
    dist_optimizer optimizer = optimizer_of(o);
    if (!*o->resume) return 0;
    if (!strcmp(o->resume, "auto")) {
        if (checkpoint__join(directory, o->output_dir, "checkpoints", e) ||
            checkpoint_newest(directory, &r->model, optimizer, r->resumed, say_warning, NULL, e))
            return -1;
        if (!*r->resumed)
            fprintf(stderr, "%s: found no checkpoint to resume, training begins anew\n", o->output_dir);
        if (!*r->resumed) return 0;
        r->continues = 1;
    } else {
        if (checkpoint_check(o->resume, &r->model, optimizer, e)) return -1;
        if (!realpath(o->resume, r->resumed))
            return error_set(e, "%s: cannot be resolved: %s", o->resume, strerror(errno));
        directory_of_step(r->resumed, directory);
        if (!*o->output_dir) snprintf(o->output_dir, sizeof o->output_dir, "%s", directory);
        r->continues = *directory && realpath(o->output_dir, output) && !strcmp(output, directory);
    }
    return checkpoint_read_state(r->resumed, &r->state, e);
}

/* A resumed training keeps its global batch, on however many ranks, unless the command line says
 * otherwise: by its accumulation if its micro-batch can stay, else by the largest micro-batch that divides
 * a rank's share. */
static int resume_batch(run *r, error_text *e) {
    train_options *o = &r->o;
    const checkpoint_state *s = &r->state;
    size_t n = o->nproc_per_node, b = s->batch_size, share = s->global_batch / n;
    const size_t *told[] = {&o->batch_size, &o->gradient_accumulation_steps};
    for (int i = 0; i < 2; i++)
        if (o->state.source[options_of_field(&train_table, o, told[i]) - train_option_list] ==
            OPTION_FROM_COMMAND_LINE)
            return 0;
    if (s->global_batch % n)
        return error_set(
            e, "%s: a global batch of %zu (micro-batch %zu) cannot be kept on %zu ranks: give --batch-size",
            r->resumed, s->global_batch, s->batch_size, n);
    if (b > share) b = share;
    while (share % b) b--;
    o->batch_size = b;
    o->gradient_accumulation_steps = share / b;
    return 0;
}

/* Optimizer steps of all epochs: those that were made before, and those that are left. */
static size_t steps_of_epochs(const run *r) {
    const checkpoint_state *s = &r->state; /* all 0 in a new training */
    size_t left;
    if (r->o.epochs <= s->epoch) return s->step;
    if (size_multiply(r->o.epochs - s->epoch - 1, r->steps_per_epoch, &left)) return SIZE_MAX;
    size_t of_this_one = s->step + (r->train.count - s->position) / r->global_batch;
    return left > SIZE_MAX - of_this_one ? SIZE_MAX : of_this_one + left;
}

/* How many of the ranks run on this host. */
static size_t ranks_here(const run *r) { return r->process ? (size_t)r->launch.local_size : r->ranks; }

/* The cores of this host, shared by its ranks. */
static void prepare_threads(run *r) {
    size_t cores = (size_t)sysconf(_SC_NPROCESSORS_ONLN), here = ranks_here(r);
    if (r->o.threads_per_rank == SIZE_MAX) r->o.threads_per_rank = cores > here ? cores / here : 1;
}

/* Fills in every default that depends on something else; config.json shows what came of it. */
static int prepare_plan(run *r, dataset_kind kind, error_text *e) {
    train_options *o = &r->o;
    vit_config *c = &r->config;
    if (*r->resumed && resume_batch(r, e)) return -1;
    size_t n = r->ranks = o->nproc_per_node, M = o->gradient_accumulation_steps;
    prepare_threads(r);
    if (o->strategy < 0) o->strategy = n > 1 ? CHOICE_STRATEGY_DDP : CHOICE_STRATEGY_SINGLE;
    if (o->backend < 0) o->backend = CHOICE_BACKEND_LOCAL;
    if (o->reduce_dtype < 0) o->reduce_dtype = o->precision;
    const dist_strategy *strategy = dist_strategy_named(options_choice(&train_table, o, &o->strategy).text);
    if (o->gradient_reduction < 0)
        o->gradient_reduction =
            strategy->reduction == DIST_REDUCE_LAST ? CHOICE_REDUCTION_LAST : CHOICE_REDUCTION_EVERY;
    if (o->learning_rate != o->learning_rate) o->learning_rate = recipes[kind].learning_rate;
    if (o->batch_size == SIZE_MAX) o->batch_size = n < 64 ? 64 / n : 1;
    if (r->command == COMMAND_PREDICT && !given(r, &o->batch_size)) /* no more blanks than need be */
        o->batch_size = o->state.argument_count < 16 ? o->state.argument_count : 16;
    o->dataset = CHOICE_DATASET_DIGITS + (int)kind;
    snprintf(o->model, sizeof o->model, "%s", c->name);
    o->image_size = (option_extent){c->image_height, c->image_width};
    o->patch_size = c->patch_size;
    o->embed_dim = c->embed_dim;
    o->depth = c->depth;
    o->num_heads = c->num_heads;
    o->mlp_ratio = c->mlp_ratio;
    o->num_classes = c->num_classes;
    o->layer_norm_eps = c->layer_norm_eps;
    o->gelu = (int)c->gelu;
    o->mean.count = o->std.count = c->channels == 1 ? 1 : 3;
    for (int i = 0; i < 3; i++)
        o->mean.values[i] = json_float(r->format.mean[i]), o->std.values[i] = json_float(r->format.std[i]);
    int work =
        kind == DATASET_IMAGEFOLDER || r->val.height != c->image_height || r->val.width != c->image_width;
    if (o->num_workers == SIZE_MAX) /* decoding and resizing are work for others; the rest is soon done */
        o->num_workers = !work ? 0 : o->threads_per_rank < 4 ? o->threads_per_rank : 4;
    r->format.channels = c->channels;
    r->format.height = c->image_height;
    r->format.width = c->image_width;
    r->format.seed = o->seed;
    r->card =
        (model_card){r->format.mean, r->format.std, r->val.label_names, r->val.classes, r->source.transform};
    r->format.crop_pct = model_card_crop_pct(&r->card);
    r->format.filter = r->card.transform.bilinear ? RESIZE_BILINEAR : RESIZE_BICUBIC;
    r->format.squash = r->card.transform.squash;
    if (r->command != COMMAND_TRAIN) return 0;
    if (size_multiply(o->batch_size, M, &r->global_batch) ||
        size_multiply(r->global_batch, n, &r->global_batch) || r->global_batch > r->train.count)
        return error_set(e,
                         "a global batch of %zu x %zu x %zu (batch size x accumulation x ranks) is larger "
                         "than the data set, %zu images",
                         o->batch_size, M, n, r->train.count);
    r->steps_per_epoch = r->train.count / r->global_batch;
    r->steps = o->max_steps;
    if (o->epochs == SIZE_MAX && o->max_steps != SIZE_MAX) { /* as many epochs as the steps take */
        o->epochs = (o->max_steps + r->steps_per_epoch - 1) / r->steps_per_epoch;
    } else {
        if (o->epochs == SIZE_MAX) o->epochs = recipes[kind].epochs;
        size_t steps = steps_of_epochs(r);
        if (r->steps > steps) r->steps = steps;
    }
    if (o->warmup_steps == SIZE_MAX) o->warmup_steps = r->steps / 20;
    return 0;
}

/* The type that stands behind a choice of --precision or --reduce-dtype. */
static rt_type number_type(int choice) {
    static const rt_type types[] = {[CHOICE_PRECISION_FP32] = RT_FP32,
                                    [CHOICE_PRECISION_BF16] = RT_BF16,
                                    [CHOICE_PRECISION_FP16] = RT_FP16};
    return types[choice];
}

/* The options as dist.h wants them. */
static dist_options distribution(const run *r) {
    const train_options *o = &r->o;
    size_t counts = 5 + 3 * r->model.V, totals = r->ranks * (2 * RT_CATEGORIES + 1 + 3 * DIST_OPS);
    const dist_strategy *s = dist_strategy_named(options_choice(&train_table, o, &o->strategy).text);
    return (dist_options){.strategy = s->name,
                          .batch_size = o->batch_size,
                          .accumulation = o->gradient_accumulation_steps,
                          .bucket_size_mb = o->bucket_size_mb,
                          .reduce_type = number_type(o->reduce_dtype),
                          .reduction = o->gradient_reduction == CHOICE_REDUCTION_LAST ? DIST_REDUCE_LAST
                                                                                      : DIST_REDUCE_EVERY,
                          .prefetch = o->prefetch,
                          .keep_after_forward = !o->reshard_after_forward,
                          .checkpoint_every = o->activation_checkpointing,
                          .optimizer = optimizer_of(o),
                          .adamw = {o->beta1, o->beta2, o->eps, o->weight_decay},
                          .sgd = {o->momentum, o->weight_decay},
                          .gradient_clipping = o->gradient_clipping,
                          .layer_decay = o->layer_decay,
                          .graphs = o->cuda_graphs && r->command == COMMAND_TRAIN,
                          .offload = o->offload == CHOICE_OFFLOAD_OPTIMIZER ? &vit_cpu : NULL,
                          .inference = r->command != COMMAND_TRAIN,
                          .counts = counts > totals ? counts : totals};
}

/* Bytes that are free, and that there are, in the memory of the devices of this process's ranks, where they
 * have their own. -1: they cannot have them, and why. */
static int device_memory(const run *r, double *unused, double *total, error_text *e) {
    int first = r->process ? r->launch.local_rank : 0, ranks = r->process ? 1 : (int)r->o.nproc_per_node;
    return r->device->memory(first, ranks, unused, total, e);
}

/* The device that --device names. */
static int prepare_device(run *r, error_text *e) {
    const train_options *o = &r->o;
    int fp32 = o->precision == CHOICE_PRECISION_FP32;
    quoted precision = options_choice(&train_table, o, &o->precision);
    r->device = &vit_cpu;
    if (o->tf32 && (o->device == CHOICE_DEVICE_CPU || !fp32))
        return error_set(e, "--tf32: found --%s%s, expected --device cuda and --precision fp32",
                         fp32 ? "device cpu" : "precision ", fp32 ? "" : precision.text);
    if (o->matmul == CHOICE_MATMUL_OPENBLAS && !fp32)
        return error_set(
            e, "--matmul openblas: found --precision %s, expected fp32, as it has no product of 16 bits",
            precision.text);
    int offload = o->offload == CHOICE_OFFLOAD_OPTIMIZER;
    const char *unrecorded = o->device == CHOICE_DEVICE_CPU ? "--device cpu, expected cuda"
                             : offload ? "--offload optimizer, expected none, as the host takes no part"
                             : o->nproc_per_node > 1 && o->backend == CHOICE_BACKEND_LOCAL
                                 ? "--backend local with several ranks, expected one, or nccl"
                                 : NULL;
    if (o->cuda_graphs && unrecorded) return error_set(e, "--cuda-graphs: found %s", unrecorded);
    if (offload && o->device == CHOICE_DEVICE_CPU)
        return error_set(e, "--offload optimizer: found --device cpu, whose optimizer runs in host memory "
                            "already; expected cuda");
    if (o->device == CHOICE_DEVICE_CPU) return 0;
#ifdef HAVE_CUDA
    r->device = &vit_cuda;
    if (o->nproc_per_node > 1 && o->backend != CHOICE_BACKEND_LOCAL && o->backend != CHOICE_BACKEND_NCCL)
        return error_set(e,
                         "--device cuda: found --backend %s, expected nccl (a process a GPU), or local, with "
                         "which ranks of one process share the GPUs",
                         options_choice(&train_table, o, &o->backend).text);
    double unused, total;
    if (!r->process && o->backend == CHOICE_BACKEND_NCCL) /* of processes to come: one for the last? */
        return vit_cuda.memory((int)o->nproc_per_node - 1, 0, &unused, &total, e);
    return device_memory(r, &unused, &total, e);
#else
    return error_set(e, "--device cuda: this program was not built with CUDA (make found no nvcc)");
#endif
}

/* Opens the device for a rank. */
static int open_device(const run *r, rt_rank *rank, error_text *e) {
    rank->threads = (int)r->o.threads_per_rank;
    if (r->device->open(rank, e)) return -1;
#ifdef HAVE_CUDA
    if (r->device == &vit_cuda) vit_cuda_products(rank, r->o.tf32, r->o.deterministic);
#endif
    vit_matmul matmul = r->o.precision == CHOICE_PRECISION_FP32 ? (vit_matmul)r->o.matmul : VIT_MATMUL_OWN;
    return r->device == &vit_cpu ? vit_cpu_matmul(rank, matmul, e) : 0;
}

/* Bytes of memory that all ranks may have, if other hosts have what this one has. */
static double available_bytes(const run *r) {
    double unused = 0, total;
    error_text ignored;
    if (!r->device->memory) return report_available_bytes() * (double)r->ranks / (double)ranks_here(r);
    device_memory(r, &unused, &total, &ignored);
    return r->process ? unused * (double)r->ranks : unused;
}

/* What cannot fit is refused at once: a system that promises memory that it has not kills who uses it. */
static int prepare_memory(run *r, error_text *e) {
    dist_options d = distribution(r);
    double needed, has = available_bytes(r);
    if (report_needed_bytes(r->device, &r->model, &d, (int)r->ranks, &needed, e)) return -1;
    r->out_of_memory = needed > has;
    if (!r->out_of_memory) return 0;
    return error_set(e, "out of memory: %zu rank%s of strategy %s need %.3f GB, of %.3f GB that there is",
                     r->ranks, r->ranks > 1 ? "s" : "", d.strategy, 1e-9 * needed, 1e-9 * has);
}

/* What a training keeps must be what the step folder and the output directory say. */
static int prepare_same_training(run *r, error_text *e) {
    const train_options *o = &r->o;
    char path[CHECKPOINT_PATH];
    if (!*o->resume) return 0;
    if (*r->resumed && (checkpoint__join(path, r->resumed, "trainer_state.json", e) ||
                        options_same_training(&train_table, o, r->state.options, path, e)))
        return -1;
    if (checkpoint__join(path, o->output_dir, "config.json", e)) return -1;
    if ((*r->resumed && !r->continues) || !source__exists(path)) return 0;
    cJSON *root = source__read_json(path, e);
    const cJSON *options = cJSON_GetObjectItemCaseSensitive(root, "options");
    int failed = !root || options_same_training(&train_table, o, options, path, e);
    cJSON_Delete(root);
    return failed ? -1 : 0;
}

static int prepare(run *r, error_text *e) {
    train_options *o = &r->o;
    dataset_kind kind = DATASET_IMAGEFOLDER; /* what predict is given: images in files */
    quoted dataset = options_choice(&train_table, o, &o->dataset);
    int predicting = r->command == COMMAND_PREDICT;
    if (!predicting && dataset_choose(dataset.text, *o->data_path ? o->data_path : NULL, &kind, e)) return -1;
    if (prepare_device(r, e) || prepare_config(r, kind, e) || prepare_label_names(r, e)) return -1;
    if (predicting)
        prepare_normalisation(r, NULL);
    else if (prepare_data(r, kind, e))
        return -1;
    return vit_model_init(&r->model, &r->config, number_type(o->precision), e) || prepare_resume(r, e) ||
                   prepare_plan(r, kind, e) || prepare_same_training(r, e) ||
                   (r->loaded && model_source_check(&r->source, &r->model, e)) || prepare_memory(r, e)
               ? -1
               : 0;
}

/* What was done to a loaded model beside reading it, and what will be done to the images. */
static void show_notes(const run *r) {
    const train_options *o = &r->o;
    const dataset *d = &r->val;
    const sample_format *f = &r->format;
    size_t k =
        0; /* classes that a loaded model and the data set call alike; if not all, one is likely wrong */
    int keeps_head = r->command == COMMAND_TRAIN && r->label_names && r->labels == d->classes;
    while (keeps_head && k < d->classes && !strcmp(r->label_names[k], d->label_names[k])) k++;
    if (keeps_head && k < d->classes)
        fprintf(stderr, "train: warning: class %zu of %s is %s, of the data %s; its head is kept as it is\n",
                k, r->source.path, r->label_names[k], d->label_names[k]);
    if (o->quiet) return;
    if (*r->source.notes)
        fprintf(stderr, "%s %s: %s\n", *o->checkpoint ? "checkpoint" : "pretrained",
                *o->checkpoint ? o->checkpoint : o->pretrained, r->source.notes);
    if (d->pixels && (d->height != f->height || d->width != f->width))
        fprintf(stderr, "images of %zux%zu are resized to %zux%zu\n", d->height, d->width, f->height,
                f->width);
    if (d->channels == 3 && f->channels == 1) fprintf(stderr, "images in colour are made grey\n");
}

/* ------------------------------------------------------------------------------------------------ batches */

/* One rank, and the model's state that it trains. */
typedef struct trainer {
    run *r;
    rt_rank *rank;
    dist_comm comm;
    dist d;
    uint32_t *order; /* [train.count] of the epoch */
    size_t epoch;
    size_t position;   /* samples of the epoch's order that were used before the batches of the loader */
    double epoch_loss; /* sum over the steps of the epoch so far */
    size_t epoch_steps;
    float *logits; /* [B, V] */
    float *losses; /* [B] */
    double data_s; /* seconds spent on waiting for batches */
    /* rank 0 */
    metrics_file metrics;
    nvml gpu; /* its GPU, where NVML knows it */
    double started, last_accuracy, best_accuracy;
    double best_saved;         /* the accuracy of `best` */
    char best[32], latest[32]; /* folders */
    size_t evaluated;          /* the step of the last evaluation */
    int saved;                 /* (every rank) there is a checkpoint of this run */
    int warned;                /* that a line could not be written */
} trainer;

/* Begins to draw batches [first, last), what a batch is says `draw`. */
static int start_loader(const trainer *t, loader *l, loader_draw *draw, size_t first, size_t last) {
    const sample_format *f = &t->r->format;
    error_text e;
    loader_job job = {.draw = draw,
                      .context = t,
                      .first = first,
                      .last = last,
                      .batch_size = t->r->o.batch_size,
                      .pixels = f->channels * f->height * f->width,
                      .workers = t->r->o.num_workers};
    return loader_open(l, &job, &e) ? rt_fail(t->rank, "%s", e.text) : 0;
}

/* The next batch; NULL: a sample failed, and so has the world. */
static const loader_batch *next_batch(trainer *t, loader *l) {
    double start = rt_seconds();
    error_text e;
    const loader_batch *batch = loader_next(l, &e);
    if (!batch) rt_fail(t->rank, "%s", e.text);
    t->data_s += rt_seconds() - start;
    return batch;
}

/* Batch k of the epoch is micro-batch m of a step: its sample b is number (b M + m) N + r of the step's
 * global batch. */
static int draw_training(const void *context, size_t k, size_t b, float *image, int32_t *label, uint64_t *key,
                         error_text *e) {
    const trainer *t = context;
    const run *r = t->r;
    size_t M = r->o.gradient_accumulation_steps, step = k / M;
    size_t number = sampler_number(b, k % M, M, (size_t)t->rank->rank, r->ranks);
    size_t index = t->order[t->position + step * r->global_batch + number];
    sample_format f = r->format;
    f.how = r->o.augmentation == CHOICE_AUGMENTATION_BASIC ? AUGMENTATION_BASIC : AUGMENTATION_NONE;
    *label = r->train.labels[index];
    *key = random_key(r->o.seed, RANDOM_DROP_PATH, t->epoch, index);
    return dataset_sample(&r->train, &f, index, t->epoch, image, e);
}

/* --------------------------------------------------------------------------------------------- evaluation */

typedef struct evaluation {
    size_t images;
    double loss;
    scores scores;
} evaluation;

/* Which image of the validation set is sample b of batch k: rank r takes r, r + N, ... */
static size_t validation_index(const trainer *t, size_t k, size_t b) {
    return (k * t->r->o.batch_size + b) * t->r->ranks + (size_t)t->rank->rank;
}

/* What fills up the last batches and does not count. */
static int draw_blank(const sample_format *f, float *image, int32_t *label, uint64_t *key) {
    memset(image, 0, f->channels * f->height * f->width * sizeof *image);
    *label = 0;
    *key = 0;
    return 0;
}

static int draw_validation(const void *context, size_t k, size_t b, float *image, int32_t *label,
                           uint64_t *key, error_text *e) {
    const trainer *t = context;
    const run *r = t->r;
    const sample_format *f = &r->format;
    size_t index = validation_index(t, k, b);
    if (index >= r->val.count) return draw_blank(f, image, label, key);
    *key = 0;
    *label = r->val.labels[index];
    return dataset_sample(&r->val, f, index, 0, image, e);
}

/* Every image of the validation set exactly once. All that is summed over ranks is an integer. A loss that is
 * not finite fails: all ranks then go through it once more and look for the unit (explain). */
static int evaluate(trainer *t, size_t step, int explain, evaluation *result) {
    const run *r = t->r;
    size_t B = r->o.batch_size, V = r->model.V, N = r->ranks;
    size_t batches = (r->val.count + N * B - 1) / (N * B), length = 5 + 3 * V;
    int64_t *counts = calloc(length, sizeof *counts), loss = 0, bad = 0;
    loader l;
    if (!counts) return rt_fail(t->rank, "rank %d: out of memory for %zu counts", t->rank->rank, length);
    score_counts s = {.hit = counts + 5, .predicted = counts + 5 + V, .actual = counts + 5 + 2 * V};
    int failed = start_loader(t, &l, draw_validation, 0, batches);
    for (size_t k = 0; k < batches && !failed; k++) {
        size_t unit = 0; /* the first whose output is not finite */
        const loader_batch *batch = next_batch(t, &l);
        if (!batch) break;
        dist_forward(&t->d, batch->images, batch->labels, t->logits, t->losses, explain ? &unit : NULL);
        if (rt_failed(t->rank)) break;
        for (size_t b = 0; b < B && validation_index(t, k, b) < r->val.count; b++) {
            int fine = t->losses[b] < 1e6f; /* a larger one could not be summed */
            if (!fine && explain)
                rt_fail(t->rank,
                        "evaluation after step %zu: the loss of image %zu is %g: on rank %d the first unit "
                        "with a NaN or an infinity: %s",
                        step, validation_index(t, k, b), (double)t->losses[b], t->rank->rank,
                        unit < r->model.units ? r->model.unit[unit].name : "none");
            bad += !fine;
            loss += fine ? llround((double)t->losses[b] / VIT_LOSS_UNIT) : 0;
            score_count(&s, t->logits + b * V, V, (size_t)batch->labels[b]);
        }
    }
    if (!failed) loader_close(&l);
    int64_t *totals[] = {&s.images, &s.correct, &s.correct_top5, &loss, &bad};
    for (int i = 0; i < 5; i++) counts[i] = *totals[i];
    dist_sum(&t->d, counts, length);
    for (int i = 0; i < 5; i++) *totals[i] = counts[i];
    *result = (evaluation){(size_t)s.images, (double)loss * VIT_LOSS_UNIT / (double)(s.images ? s.images : 1),
                           score_result(&s, V)};
    free(counts);
    if (bad && !explain && !rt_failed(t->rank)) return evaluate(t, step, 1, result);
    return rt_failed(t->rank) ? -1 : 0;
}

/* Prints one object as one line on stdout and frees it. */
static int print_json(trainer *t, cJSON *object) {
    char *text = cJSON_PrintUnformatted(object);
    cJSON_Delete(object);
    if (!text) return rt_fail(t->rank, "out of memory");
    puts(text);
    free(text);
    return 0;
}

static cJSON *evaluation_line(const evaluation *v, size_t step, size_t epoch) {
    cJSON *line = metrics_line("eval");
    metrics_add_count(line, "step", step);
    metrics_add_count(line, "epoch", epoch);
    metrics_add_count(line, "images", v->images);
    metrics_add(line, "val_loss", v->loss);
    metrics_add(line, "val_accuracy", v->scores.accuracy);
    metrics_add(line, "val_top5_accuracy", v->scores.top5_accuracy);
    metrics_add(line, "val_precision", v->scores.precision);
    metrics_add(line, "val_recall", v->scores.recall);
    metrics_add(line, "val_f1", v->scores.f1);
    return line;
}

static int eval_once(trainer *t) {
    evaluation v = {0};
    if (evaluate(t, 0, 0, &v) || t->rank->rank != 0) return rt_failed(t->rank) ? -1 : 0;
    cJSON *line = evaluation_line(&v, 0, 0);
    cJSON_DeleteItemFromObject(line, "event");
    return print_json(t, line);
}

/* --------------------------------------------------------------------------------------------- prediction */

/* Image number k B + b of the command line; behind the last of them come blanks. */
static int draw_argument(const void *context, size_t k, size_t b, float *image_out, int32_t *label,
                         uint64_t *key, error_text *e) {
    const trainer *t = context;
    const option_state *state = &t->r->o.state;
    const sample_format *f = &t->r->format;
    size_t i = k * t->r->o.batch_size + b;
    image from;
    if (i >= state->argument_count) return draw_blank(f, image_out, label, key);
    *key = 0;
    *label = 0;
    if (image_read(&from, state->arguments[i], e)) return -1;
    int failed = sample_of_image(&from, f, image_out, e);
    image_free(&from);
    return failed;
}

/* {"file", "top": the likeliest classes, the lower number first among equals, "logits" if asked for} */
static cJSON *prediction_line(const run *r, const char *file, const float *logits) {
    enum { TOP = 5 };
    size_t V = r->model.V, top[TOP] = {0}, n = 0;
    for (size_t i = 0; i < V; i++) { /* insertion into the list of the first five */
        size_t at = n < TOP ? n++ : TOP;
        for (; at > 0 && logits[i] > logits[top[at - 1]]; at--)
            if (at < TOP) top[at] = top[at - 1];
        if (at < TOP) top[at] = i;
    }
    double sum = 0, most = (double)logits[top[0]];
    for (size_t i = 0; i < V; i++) sum += exp((double)logits[i] - most);
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "file", file);
    cJSON *list = cJSON_AddArrayToObject(line, "top");
    for (size_t i = 0; i < n; i++) {
        cJSON *entry = cJSON_CreateObject();
        char number[32];
        snprintf(number, sizeof number, "%zu", top[i]);
        metrics_add_count(entry, "index", top[i]);
        cJSON_AddStringToObject(entry, "label", r->label_names ? r->label_names[top[i]] : number);
        metrics_add(entry, "probability", exp((double)logits[top[i]] - most) / sum);
        cJSON_AddItemToArray(list, entry);
    }
    if (r->o.logits) {
        list = cJSON_AddArrayToObject(line, "logits");
        for (size_t i = 0; i < V; i++) cJSON_AddItemToArray(list, metrics_number((double)logits[i]));
    }
    return line;
}

static int predict(trainer *t) {
    const run *r = t->r;
    const option_state *state = &r->o.state;
    size_t B = r->o.batch_size, batches = (state->argument_count + B - 1) / B;
    loader l;
    if (start_loader(t, &l, draw_argument, 0, batches)) return -1;
    for (size_t k = 0; k < batches && !rt_failed(t->rank); k++) {
        const loader_batch *batch = next_batch(t, &l);
        if (!batch) break;
        dist_forward(&t->d, batch->images, batch->labels, t->logits, NULL, NULL);
        for (size_t b = 0; b < B && k * B + b < state->argument_count && !rt_failed(t->rank); b++)
            print_json(t, prediction_line(r, state->arguments[k * B + b], t->logits + b * r->model.V));
    }
    loader_close(&l);
    return rt_failed(t->rank) ? -1 : 0;
}

/* -------------------------------------------------------------------------------------- the training loop */

/* The rate of step t = 0, 1, ... of T with W steps of warm-up. */
static double scheduled_rate(const train_options *o, size_t t, size_t T) {
    double lr = o->learning_rate, least = o->min_learning_rate;
    size_t W = o->warmup_steps;
    if (t < W) return lr * (double)(t + 1) / (double)W;
    double done = (double)(t - W) / (double)(T > W ? T - W : 1);
    switch (o->scheduler) {
    case CHOICE_SCHEDULER_COSINE: return least + (lr - least) / 2 * (1 + cos(3.141592653589793 * done));
    case CHOICE_SCHEDULER_LINEAR: return lr + (least - lr) * done;
    default: return lr;
    }
}

static int is_first(const trainer *t) { return t->rank->rank == 0; }

/* Something could not be written. Training goes on, with a warning, if what there is suffices to resume
 * it. */
static int write_failed(trainer *t, const error_text *e) {
    if (!t->saved) return rt_fail(t->rank, "%s", e->text);
    say_warning(NULL, e->text);
    return 0;
}

static int log_line(trainer *t, cJSON *line) {
    error_text e;
    if (!metrics_write(&t->metrics, line, &e)) return 0;
    if (t->warned) return 0; /* once is enough */
    t->warned = t->saved;
    return write_failed(t, &e);
}

/* The line that a terminal shows while an epoch runs, and that is printed when it ends. */
static void show_progress(const trainer *t, size_t epoch, size_t step, double loss, double images_per_s,
                          double data_share, int ended) {
    const run *r = t->r;
    int terminal = isatty(STDERR_FILENO);
    if (r->o.quiet || (!ended && !terminal)) return;
    double left = (rt_seconds() - t->started) / (double)step * (double)(r->steps - step);
    fprintf(
        stderr,
        "%sepoch %*zu/%zu  step %*zu/%zu  loss %.4f  %7.0f images/s  data wait %2.0f %%  time left %d:%02d",
        terminal ? "\r\033[K" : "", r->o.epochs > 9 ? 2 : 1, epoch + 1, r->o.epochs,
        snprintf(NULL, 0, "%zu", r->steps), step, r->steps, loss, images_per_s, 100 * data_share,
        (int)(left / 60), (int)left % 60);
    if (ended && t->evaluated == step) fprintf(stderr, "  val accuracy %.4f", t->last_accuracy);
    if (ended) fprintf(stderr, "\n");
}

static int evaluate_and_log(trainer *t, size_t step, size_t epoch) {
    evaluation v = {0};
    if (evaluate(t, step, 0, &v)) return -1;
    t->evaluated = step;
    t->last_accuracy = v.scores.accuracy;
    if (t->last_accuracy > t->best_accuracy) t->best_accuracy = t->last_accuracy;
    return is_first(t) ? log_line(t, evaluation_line(&v, step, epoch)) : 0;
}

/* Where training stands after `step`, when `used` samples of the epoch's order are. */
static checkpoint_state training_state(const trainer *t, size_t step, size_t used) {
    const train_options *o = &t->r->o;
    const vit_scaler *scaler = &t->d.scaler;
    int ended = used + t->r->global_batch > t->r->train.count; /* the epoch */
    checkpoint_state s = {.step = step,
                          .epoch = t->epoch + (size_t)ended,
                          .position = ended ? 0 : used,
                          .global_batch = t->r->global_batch,
                          .batch_size = o->batch_size,
                          .accumulation = o->gradient_accumulation_steps,
                          .ranks = t->r->ranks,
                          .metrics_bytes = t->metrics.length,
                          .epoch_loss = ended ? 0 : t->epoch_loss,
                          .epoch_steps = ended ? 0 : t->epoch_steps,
                          .last_accuracy = t->last_accuracy,
                          .best_accuracy = t->best_accuracy,
                          .best_saved = t->best_saved,
                          .evaluated = t->evaluated,
                          .loss_scale = scaler->scale,
                          .scaler_step = (size_t)scaler->step,
                          .scaler_overflow = (size_t)(scaler->last_overflow + 1),
                          .scaler_left = (size_t)scaler->left,
                          .scaler_skipped = (size_t)scaler->skipped,
                          .options = options_to_json(&train_table, o)};
    snprintf(s.best, sizeof s.best, "%s", t->best);
    return s;
}

/* Makes checkpoints/latest or checkpoints/best name a folder; "": there is none. */
static int write_pointer(trainer *t, const char *file, const char *name) {
    error_text e;
    char path[CHECKPOINT_PATH];
    snprintf(path, sizeof path, "%.*s/checkpoints/%s", CHECKPOINT_PATH - 32, t->r->o.output_dir, file);
    if (!*name) return unlink(path), 0;
    return file_write_atomic(path, name, strlen(name), &e) ? write_failed(t, &e) : 0;
}

/* Every rank calls it; the rest is rank 0's. If it cannot be written and there is an older one, training goes
 * on; but the last one of a run must be. */
static int write_checkpoint(trainer *t, size_t step, size_t used, int last) {
    const train_options *o = &t->r->o;
    error_text e = {{0}};
    char folder[CHECKPOINT_PATH], name[32], best_before[32];
    double start = rt_seconds(), saved_before = t->best_saved;
    snprintf(name, sizeof name, "step-%08zu", step);
    if (snprintf(folder, sizeof folder, "%s/checkpoints/%s", o->output_dir, name) >= CHECKPOINT_PATH)
        return rt_fail(t->rank, "%.200s...: found too long a path", o->output_dir);
    memcpy(best_before, t->best, sizeof best_before);
    if (t->evaluated == step && t->last_accuracy > t->best_saved) {
        t->best_saved = t->last_accuracy;
        memcpy(t->best, name, sizeof name);
    }
    checkpoint_state state = training_state(t, step, used);
    int failed = checkpoint_save(&t->d, folder, &t->r->card, &state, &e);
    checkpoint_state_free(&state);
    if (failed) { /* without a message another rank has one */
        t->best_saved = saved_before;
        memcpy(t->best, best_before, sizeof best_before);
        if (rt_failed(t->rank)) return -1;
        if (last) return *e.text ? rt_fail(t->rank, "%s", e.text) : -1;
        return *e.text ? write_failed(t, &e) : t->saved ? 0 : -1;
    }
    t->saved = 1;
    if (!is_first(t)) return 0;
    memcpy(t->latest, name, sizeof name);
    int best_changed = strcmp(t->best, best_before) != 0;
    if (write_pointer(t, "latest", t->latest) || (best_changed && write_pointer(t, "best", t->best)))
        return -1;
    folder[strlen(folder) - strlen(name) - 1] = 0;
    checkpoint_prune(folder, o->keep_checkpoints, t->best, t->latest);
    cJSON *line = metrics_line("checkpoint");
    metrics_add_count(line, "step", step);
    snprintf(folder, sizeof folder, "checkpoints/%s", name);
    cJSON_AddStringToObject(line, "path", folder);
    metrics_add(line, "seconds", rt_seconds() - start);
    return log_line(t, line);
}

/* A loss or a gradient is not finite. Nothing was updated, so the micro-batches can be run again, unit by
 * unit. */
static int explain_not_finite(trainer *t, size_t step_of_epoch, size_t step, const dist_result *result) {
    size_t N = t->r->ranks, units = t->r->model.units;
    int64_t *found = calloc(N, sizeof *found); /* [N] 1 + index of the first unit of each rank, 0: none */
    if (!found) return rt_fail(t->rank, "rank %d: out of memory", t->rank->rank);
    loader l;
    size_t M = t->r->o.gradient_accumulation_steps, k = step_of_epoch * M;
    int failed = start_loader(t, &l, draw_training, k, k + M);
    for (size_t m = 0; m < M && !failed; m++) {
        size_t unit = units;
        const loader_batch *batch = next_batch(t, &l);
        if (!batch) break;
        dist_forward(&t->d, batch->images, batch->labels, NULL, NULL, &unit);
        if (!found[t->rank->rank] && unit < units) found[t->rank->rank] = 1 + (int64_t)unit;
    }
    if (!failed) loader_close(&l);
    dist_sum(&t->d, found, N);
    size_t first = 0;
    while (first < N && !found[first]) first++;
    if (rt_failed(t->rank)) first = N; /* somebody else has said it */
    const char *what = result->bad_losses ? "the loss" : "the gradient norm";
    if (first < N && (size_t)t->rank->rank == first)
        rt_fail(t->rank,
                "step %zu: %s is not finite: on rank %zu the first unit with a NaN or an infinity is %s",
                step, what, first, t->r->model.unit[found[first] - 1].name);
    else if (first == N && is_first(t))
        rt_fail(t->rank,
                "step %zu: %s is not finite or too large to be summed, though the output of every unit is "
                "finite (forward pass of all ranks)",
                step, what);
    free(found);
    return -1;
}

static int log_step(trainer *t, size_t step, size_t epoch, const dist_result *result, double rate,
                    double seconds) {
    cJSON *line = metrics_line("step");
    metrics_add_count(line, "step", step);
    metrics_add_count(line, "epoch", epoch);
    metrics_add(line, "train_loss", result->loss);
    metrics_add(line, "learning_rate", rate);
    metrics_add(line, "grad_norm", result->gradient_norm);
    if (t->r->model.type == RT_FP16) metrics_add(line, "loss_scale", result->loss_scale);
    metrics_add(line, "step_time_s", seconds);
    metrics_add(line, "images_per_s", (double)t->r->global_batch / seconds);
    if (t->gpu.device) {
        nvml_figures gpu = nvml_read(&t->gpu);
        metrics_add(line, "gpu_utilization", gpu.utilization);
        metrics_add_count(line, "gpu_memory_bytes", gpu.memory_bytes);
        metrics_add(line, "gpu_power_w", gpu.power_w);
        metrics_add(line, "gpu_temperature_c", gpu.temperature_c);
    }
    return log_line(t, line);
}

/* Once all ranks have made the first step. */
static int print_schedule(trainer *t) {
    int64_t none = 0;
    t->comm.observe = NULL;
    dist_sum(&t->d, &none, 1); /* what the others noted is there */
    if (is_first(t) && !rt_failed(t->rank))
        schedule_print(stdout, t->r->schedules,
                       t->r->process ? 1 : t->r->ranks); /* of other processes: not here */
    return rt_failed(t->rank) ? -1 : 0;
}

/* The line of an epoch, of which this run has made `steps` in so many seconds. */
static int log_epoch(trainer *t, size_t step, size_t steps, double seconds, double data,
                     double communication) {
    double loss = t->epoch_loss / (double)t->epoch_steps, images = (double)(steps * t->r->global_batch);
    if (!is_first(t)) return 0;
    show_progress(t, t->epoch, step, loss, images / seconds, data / seconds, 1);
    cJSON *line = metrics_line("epoch");
    metrics_add_count(line, "epoch", t->epoch);
    metrics_add(line, "epoch_time_s", seconds);
    metrics_add(line, "train_loss", loss);
    metrics_add(line, "data_time_s", data);
    metrics_add(line, "communication_time_s", communication);
    metrics_add(line, "compute_time_s", seconds - data - communication);
    return log_line(t, line);
}

/* How far this run has come with an epoch. */
typedef struct epoch_run {
    size_t first;                    /* steps before it */
    size_t made, known;              /* steps of it; whose results have been read */
    double start, data, checkpoints; /* when it began; seconds of data before; spent on checkpoints */
    double began[2], rate[2];        /* of the last two steps, in turn */
    double ended;                    /* the last step whose result is known */
    int stop;                        /* a rank has asked for it */
} epoch_run;

/* Reads the result of the earliest step whose result is not known yet, and logs it. */
static int learn_result(trainer *t, epoch_run *w) {
    const run *r = t->r;
    size_t k = w->known++, step = w->first + w->known;
    dist_result result = {0};
    dist_read_result(&t->d, &result);
    if (rt_failed(t->rank)) return -1;
    if (!result.overflow && (result.bad_losses || !isfinite(result.gradient_norm)))
        return explain_not_finite(t, k, step, &result);
    double seconds = result.ended - fmax(w->began[k % 2], w->ended);
    double total = result.ended - w->start - w->checkpoints;
    w->ended = result.ended;
    w->stop |= result.stop;
    t->epoch_loss += result.loss;
    t->epoch_steps++;
    if (!is_first(t)) return 0;
    if (r->result) compare_add_step(r->result, &result, seconds);
    if (step % r->o.log_interval != 0 && step != r->steps) return 0;
    if (log_step(t, step, t->epoch, &result, w->rate[k % 2], seconds)) return -1;
    show_progress(t, t->epoch, step, t->epoch_loss / (double)t->epoch_steps,
                  (double)(w->known * r->global_batch) / total, (t->data_s - w->data) / total, 0);
    return 0;
}

/* The steps of an epoch up to `last`; *step counts those that are done. The loader has their batches. 1: a
 * signal has come; the checkpoint is written. */
static int train_steps(trainer *t, loader *l, size_t *step, size_t last) {
    const run *r = t->r;
    const train_options *o = &r->o;
    size_t epoch = t->epoch, G = r->global_batch;
    epoch_run w = {.first = *step, .start = rt_seconds(), .data = t->data_s};
    double communication = t->rank->communication_s;
    int due = 0; /* a checkpoint, after this step */
    while (*step < last && !w.stop) {
        double rate = w.rate[w.made % 2] = scheduled_rate(o, *step, r->steps);
        w.began[w.made % 2] = rt_seconds();
        dist_begin_step(&t->d, *step + 1, rate);
        for (size_t m = 0; m < o->gradient_accumulation_steps; m++) {
            const loader_batch *batch = next_batch(t, l);
            if (!batch) return -1;
            dist_micro_batch(&t->d, m, batch->images, batch->labels, batch->keys);
        }
        if (stop_signals) dist_request_stop(&t->d);
        dist_end_step(&t->d, NULL);
        if (rt_failed(t->rank) || (t->comm.observe && print_schedule(t))) return -1;
        ++*step;
        w.made++;
        due = o->checkpoint_interval_steps != SIZE_MAX && *step % o->checkpoint_interval_steps == 0;
        /* the step before is read while this one runs; this one, too, before a checkpoint or an evaluation */
        size_t unread = due || *step == last ? 0 : 1;
        while (w.known + unread < w.made) {
            if (learn_result(t, &w)) return -1;
            if (w.stop) unread = 0;
        }
        if (w.stop || (due && *step < last)) { /* that of the epoch's end comes after the evaluation */
            double began = rt_seconds();
            if (write_checkpoint(t, *step, t->position + w.made * G, w.stop)) return -1;
            w.checkpoints += rt_seconds() - began;
        }
    }
    double seconds = rt_seconds() - w.start - w.checkpoints, data = t->data_s - w.data;
    communication = t->rank->communication_s - communication;
    if (w.stop) return 1;
    int end = *step == r->steps;
    if ((end || (epoch + 1) % o->eval_interval == 0) && evaluate_and_log(t, *step, epoch)) return -1;
    if (log_epoch(t, *step, w.made, seconds, data, communication)) return -1;
    if (!end && !due && (epoch + 1) % o->checkpoint_interval != 0) return 0;
    return write_checkpoint(t, *step, t->position + w.made * G, end);
}

/* One epoch, or what is left of it, or of the steps. 1: a signal has come. */
static int train_epoch(trainer *t, size_t *step) {
    const run *r = t->r;
    size_t left = (r->train.count - t->position) / r->global_batch;
    size_t last = r->steps - *step < left ? r->steps : *step + left;
    if (left == 0) return 0; /* resumed with a larger global batch */
    loader l;
    sampler_order(r->o.seed, t->epoch, r->train.count, r->o.shuffle, t->order);
    if (start_loader(t, &l, draw_training, 0, (last - *step) * r->o.gradient_accumulation_steps)) return -1;
    int status = train_steps(t, &l, step, last);
    loader_close(&l);
    return status;
}

/* Beside the ledger, what the device itself says of its memory. all [ranks, length]: totals of every rank. */
static void report_card(const trainer *t, const int64_t *all, size_t length) {
    double unused, total, ledger = 0;
    error_text e;
    const run *r = t->r;
    int here = r->process ? 1 : (int)r->ranks;
    if (!r->device->memory || device_memory(r, &unused, &total, &e)) return;
    for (int k = 0; k < here; k++) /* of one process a GPU: rank 0's */
        for (int c = 0; c < RT_HOST_MEMORY; c++) ledger += (double)all[length * (size_t)k + 2 * (size_t)c];
    fprintf(stderr, "%-16s %14.0f\n%-16s %14.0f\n%-16s %14.0f  %s\n", "GPU, in use", total - unused,
            r->process ? "ledger" : "ledger, all ranks", ledger, "difference", total - unused - ledger,
            "context, kernels, NCCL, cuBLASLt's workspace, scratch, other programs");
}

/* One `memory` line a rank and one `communication` line a rank and operation. */
static int log_totals(trainer *t, size_t steps) {
    enum { MEMORY = 2 * RT_CATEGORIES + 1, LENGTH = MEMORY + 3 * DIST_OPS };
    size_t N = t->r->ranks;
    int64_t *all = calloc(N, LENGTH * sizeof *all), *own = all + LENGTH * t->rank->rank;
    if (!all) return rt_fail(t->rank, "rank %d: out of memory", t->rank->rank);
    for (int c = 0; c < RT_CATEGORIES; c++) {
        own[2 * c] = (int64_t)t->rank->ledger.bytes[c];
        own[2 * c + 1] = (int64_t)t->rank->ledger.peak_bytes[c];
    }
    own[MEMORY - 1] = (int64_t)t->rank->ledger.total_peak_bytes;
    for (int op = 0; op < DIST_OPS; op++) {
        own[MEMORY + 3 * op] = (int64_t)t->comm.traffic[op].calls;
        own[MEMORY + 3 * op + 1] = (int64_t)t->comm.traffic[op].elements;
        own[MEMORY + 3 * op + 2] = llround(t->comm.traffic[op].wire_bytes);
    }
    dist_traffic traffic[DIST_OPS];
    memcpy(traffic, t->comm.traffic, sizeof traffic);
    if (t->r->result) compare_add_rank(t->r->result, &t->d, traffic);
    dist_sum(&t->d, all, N * LENGTH);
    int failed = rt_failed(t->rank);
    if (is_first(t) && !failed && !t->r->o.quiet && !t->r->result) {
        dist_formula formula = dist_formula_of(&t->d);
        fprintf(stderr, "rank 0 of %zu:\n", N);
        report_memory(stderr, &t->rank->ledger, &formula);
        report_card(t, all, LENGTH);
        report_traffic(stderr, traffic, steps, &formula);
    }
    for (size_t k = 0; k < N && is_first(t) && !failed; k++) {
        const int64_t *x = all + LENGTH * k;
        cJSON *line = metrics_line("memory");
        metrics_add_count(line, "rank", k);
        for (int c = 0; c < RT_CATEGORIES; c++) {
            char key[64];
            if (c == RT_HOST_MEMORY && !t->r->o.offload) continue;
            snprintf(key, sizeof key, "%s_bytes", rt_category_name(c));
            metrics_add_count(line, key, (uint64_t)x[2 * c]);
            snprintf(key, sizeof key, "%s_peak_bytes", rt_category_name(c));
            metrics_add_count(line, key, (uint64_t)x[2 * c + 1]);
        }
        metrics_add_count(line, "total_peak_bytes", (uint64_t)x[MEMORY - 1]);
        failed = log_line(t, line);
        for (int op = 0; op < DIST_OPS && !failed; op++) {
            const int64_t *y = x + MEMORY + 3 * op;
            if (!y[0]) continue;
            line = metrics_line("communication");
            metrics_add_count(line, "rank", k);
            cJSON_AddStringToObject(line, "op", dist_op_name(op));
            metrics_add(line, "calls_per_step", (double)y[0] / (double)steps);
            metrics_add(line, "elements_per_step", (double)y[1] / (double)steps);
            metrics_add(line, "wire_bytes_per_step", (double)y[2] / (double)steps);
            failed = log_line(t, line);
        }
    }
    free(all);
    return failed ? -1 : 0;
}

/* The model in one line. */
static void describe_model(const run *r, char *text, size_t size) {
    const vit_config *c = &r->config;
    snprintf(text, size,
             "ViT of %zux%zu images, patch %zu, dim %zu, depth %zu, heads %zu, %zu classes: %zu parameters",
             c->image_height, c->image_width, c->patch_size, c->embed_dim, c->depth, c->num_heads,
             c->num_classes, r->model.parameters);
}

/* From where training goes on, and what may give it other bits than those of a run that never stopped. */
static void say_resumed(const trainer *t) {
    const run *r = t->r;
    const train_options *o = &r->o;
    const checkpoint_state *s = &r->state;
    const char *const names[] = {"gradient-reduction", "matmul"};
    const char *const now[] = {options_choice(&train_table, o, &o->gradient_reduction).text,
                               options_choice(&train_table, o, &o->matmul).text};
    char other[256] = "";
    if (s->ranks != r->ranks) snprintf(other, sizeof other, ", %zu ranks before", s->ranks);
    if (s->batch_size != o->batch_size || s->accumulation != o->gradient_accumulation_steps)
        snprintf(other + strlen(other), sizeof other - strlen(other),
                 ", %zu batch size x %zu accumulation before", s->batch_size, s->accumulation);
    for (int i = 0; i < 2; i++) {
        const char *before = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(s->options, names[i]));
        int counts = i || o->gradient_accumulation_steps > 1; /* one micro-batch has one way to be reduced */
        if (counts && before && strcmp(before, now[i]))
            snprintf(other + strlen(other), sizeof other - strlen(other), ", %s %s before", names[i], before);
    }
    fprintf(stderr, "resumed from %s: step %zu, epoch %zu after %zu images%s%s\n", r->resumed, s->step,
            s->epoch + 1, s->position, other,
            *other ? ": the last bits may differ from those of a run that never stopped" : "");
}

static int log_start(trainer *t) {
    const run *r = t->r;
    cJSON *line = metrics_line("start");
    metrics_add_count(line, "world_size", r->ranks);
    metrics_add_count(line, "global_batch_size", r->global_batch);
    metrics_add_count(line, "parameters", r->model.parameters);
    cJSON_AddStringToObject(line, "strategy", t->d.strategy->name);
    cJSON_AddStringToObject(line, "device", t->d.device->name);
    cJSON_AddStringToObject(line, "precision", options_choice(&train_table, &r->o, &r->o.precision).text);
    metrics_add_count(line, "steps", r->steps);
    size_t rows = r->config.image_height % r->config.patch_size,
           columns = r->config.image_width % r->config.patch_size;
    if (rows || columns) /* as timm's convolution of that stride does */
        fprintf(stderr,
                "train: warning: the last %zu rows and %zu columns of an image are in no patch of %zu\n",
                rows, columns, r->config.patch_size);
    if (log_line(t, line) || r->o.quiet) return 0;
    const train_options *o = &r->o;
    char model[256];
    describe_model(r, model, sizeof model);
    fprintf(stderr, "%s\n", model);
    fprintf(stderr, "%s: %zu training images, %zu validation images\n", dataset_kind_names[r->val.kind],
            r->train.count, r->val.count);
    fprintf(stderr, "strategy %s on %zu rank%s of %zu thread%s, %s\n", t->d.strategy->name, r->ranks,
            r->ranks > 1 ? "s" : "", o->threads_per_rank, o->threads_per_rank > 1 ? "s" : "",
            r->device->description(t->rank));
    fprintf(stderr, "global batch %zu = %zu batch size x %zu accumulation x %zu ranks; %zu steps\n",
            r->global_batch, o->batch_size, o->gradient_accumulation_steps, r->ranks, r->steps);
    if (*r->resumed) say_resumed(t);
    fprintf(stderr, "results go to %s\n", o->output_dir);
    return 0;
}

static const char libraries[] = "cJSON, zlib, stb_image"
#ifdef HAVE_JPEG
                                ", libjpeg-turbo"
#endif
#ifdef HAVE_OPENBLAS
                                ", OpenBLAS"
#endif
#ifdef HAVE_MPI
                                ", MPI"
#endif
#ifdef HAVE_NCCL
                                ", NCCL"
#endif
    ;

/* Makes the output directory, and config.json in it: enough to run it again. */
static int write_config(trainer *t) {
    const run *r = t->r;
    struct utsname host;
    error_text e = {"out of memory for config.json"};
    char path[CHECKPOINT_PATH];
    cJSON *root = cJSON_CreateObject(), *about = cJSON_CreateObject();
    uname(&host);
    cJSON_AddItemToObject(root, "options", options_to_json(&train_table, &r->o));
    cJSON_AddStringToObject(about, "version", TRAIN_VERSION);
    cJSON_AddStringToObject(about, "host", host.nodename);
    cJSON_AddStringToObject(about, "devices", t->d.device->name);
    cJSON_AddStringToObject(about, "libraries", libraries);
    cJSON_AddStringToObject(about, "matrix_product", r->device->description(t->rank));
    cJSON_AddNumberToObject(about, "threads", (double)r->o.threads_per_rank);
    extern char **environ;
    for (char **v = environ; r->o.backend == CHOICE_BACKEND_NCCL && *v; v++) { /* NCCL's settings */
        char name[64];
        const char *value = strchr(*v, '=');
        if (strncmp(*v, "NCCL_", 5) || !value || value - *v >= (ptrdiff_t)sizeof name) continue;
        snprintf(name, sizeof name, "%.*s", (int)(value - *v), *v);
        cJSON_AddStringToObject(about, name, value + 1);
    }
    cJSON_AddItemToObject(root, "run", about);
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    snprintf(path, sizeof path, "%.*s/config.json", CHECKPOINT_PATH - 16, r->o.output_dir);
    int failed =
        !text || directory_make(r->o.output_dir, &e) || file_write_atomic(path, text, strlen(text), &e);
    free(text);
    return failed ? rt_fail(t->rank, "%s", e.text) : 0;
}

/* Where training begins: at its first step, or where the step folder stood. */
static size_t begin_at(trainer *t) {
    const run *r = t->r;
    const checkpoint_state *s = &r->state;
    t->best_accuracy = t->best_saved = -1;
    t->evaluated = SIZE_MAX;
    if (!*r->resumed) return 0;
    t->epoch = s->epoch;
    t->position = s->position;
    t->epoch_loss = s->epoch_loss;
    t->epoch_steps = s->epoch_steps;
    t->last_accuracy = s->last_accuracy;
    t->best_accuracy = s->best_accuracy;
    t->evaluated = s->evaluated;
    t->d.scaler.scale = s->loss_scale;
    t->d.scaler.step = (int64_t)s->scaler_step;
    t->d.scaler.last_overflow = (int64_t)s->scaler_overflow - 1;
    t->d.scaler.left = (int64_t)s->scaler_left;
    t->d.scaler.skipped = (int64_t)s->scaler_skipped;
    if (!r->continues) return s->step;
    t->saved = 1;
    t->best_saved = s->best_saved;
    memcpy(t->best, s->best, sizeof t->best);
    snprintf(t->latest, sizeof t->latest, "%.31s", strrchr(r->resumed, '/') + 1);
    return s->step;
}

/* Rank 0 opens what the run writes, cut back to where it goes on. */
static int open_output(trainer *t, size_t step) {
    const run *r = t->r;
    error_text e;
    char path[CHECKPOINT_PATH], kept[64];
    if (write_config(t)) return -1;
    if (r->continues) {
        snprintf(path, sizeof path, "%.*s/checkpoints", CHECKPOINT_PATH - 16, r->o.output_dir);
        size_t removed =
            strcmp(r->o.resume, "auto") ? checkpoint_cut(path, step) : 0; /* auto: damaged ones stay */
        if (removed)
            fprintf(stderr, "%zu checkpoint%s after step %zu removed, where training goes on\n", removed,
                    removed > 1 ? "s" : "", step);
        if (write_pointer(t, "latest", t->latest) || write_pointer(t, "best", t->best)) return -1;
    }
    snprintf(path, sizeof path, "%.*s/metrics.jsonl", CHECKPOINT_PATH - 16, r->o.output_dir);
    snprintf(kept, sizeof kept, "{\"event\":\"checkpoint\",\"step\":%zu,", step);
    if (metrics_open(&t->metrics, path, r->continues ? r->state.metrics_bytes : 0, r->continues ? kept : NULL,
                     &e))
        return rt_fail(t->rank, "%s", e.text);
    char address[32];
    if (r->device->address && (r->device->address(t->rank, address, &e) || nvml_open(&t->gpu, address, &e)))
        say_warning(NULL, e.text); /* the lines of steps go without its figures */
    return log_start(t);
}

static int train_loop(trainer *t) {
    run *r = t->r;
    size_t first = begin_at(t), step = first;
    int status = 0;
    if (step >= r->steps) {
        if (is_first(t)) fprintf(stderr, "%s: complete, step %zu of %zu\n", r->resumed, step, r->steps);
        return 0;
    }
    if (is_first(t) && open_output(t, step)) return -1;
    if (r->schedules) {
        t->comm.observer = &r->schedules[t->rank->rank];
        t->comm.observe = schedule_observe;
    }
    t->started = rt_seconds();
    while (step < r->steps) {
        if ((status = train_epoch(t, &step)) < 0) return -1;
        if (status) break;
        t->epoch++;
        t->position = t->epoch_steps = 0;
        t->epoch_loss = 0;
    }
    double seconds = rt_seconds() - t->started;
    size_t steps = step - first;
    if (status && r->process) r->interrupted = 1; /* the exit status of this process */
    if ((steps && log_totals(t, steps)) || !is_first(t)) return rt_failed(t->rank) ? -1 : 0;
    cJSON *line = metrics_line("end");
    metrics_add_count(line, "steps", step);
    metrics_add(line, "seconds", seconds);
    metrics_add(line, "images_per_s", (double)(steps * r->global_batch) / seconds);
    metrics_add(line, "best_val_accuracy", t->best_accuracy);
    metrics_add_count(line, "resident_peak_bytes", report_resident_peak_bytes());
    if (log_line(t, line)) return -1;
    if (status) {
        r->interrupted = 1;
        fprintf(stderr, "interrupted after step %zu of %zu; to go on: --resume auto --output-dir %s\n", step,
                r->steps, r->o.output_dir);
        return 0;
    }
    if (r->result) r->result->accuracy = t->last_accuracy;
    if (r->result) return 0; /* compare prints its own */
    printf("validation accuracy %.4f (best %.4f) after %zu steps, %.1f s\nresults: %s\n", t->last_accuracy,
           t->best_accuracy, step, seconds, r->o.output_dir);
    return 0;
}

/* Sets aside the memory that this rank will need, where the device does that. */
static int reserve_memory(run *r, rt_rank *rank, const dist_options *options) {
    rt_ledger needs;
    error_text e;
    if (!r->device->reserve) return 0;
    if (dist_estimate(r->device, &r->model, options, (int)r->ranks, rank->rank, &needs, &e))
        return rt_fail(rank, "%s", e.text);
    if (!r->device->reserve(rank, &needs, &e)) return 0;
    rt_fail(rank, "%s", e.text);
    pthread_mutex_lock(&rank->world->lock);
    rank->world->out_of_memory = 1;
    pthread_mutex_unlock(&rank->world->lock);
    return -1;
}

/* What every rank does from its first moment to its last. */
static int rank_body(rt_rank *rank, void *argument) {
    run *r = argument;
    const train_options *o = &r->o;
    size_t B = o->batch_size, V = r->model.V;
    trainer t = {.r = r, .rank = rank, .metrics.fd = -1};
    error_text e = {{0}};
    if (open_device(r, rank, &e)) return rt_fail(rank, "%s", e.text);
    dist_options d = distribution(r);
    if (reserve_memory(r, rank, &d)) {
        r->device->close(rank);
        return -1;
    }
    t.order = calloc(r->train.count + 1, sizeof *t.order);
    t.logits = calloc(B, V * sizeof *t.logits);
    t.losses = calloc(B, sizeof *t.losses);
    if (!t.order || !t.logits || !t.losses) {
        rt_fail(rank, "rank %d: out of memory for batches of %zu images", rank->rank, B);
    } else if (!dist_comm_open(&t.comm, r->hub, rank, r->device)) {
        int failed = dist_open(&t.d, &t.comm, &r->model, &d, &e);
        if (!failed && *r->resumed)
            failed = checkpoint_load(&t.d, r->resumed, &e);
        else if (!failed && r->loaded)
            failed = model_source_load(&r->source, &t.d, o->seed, &e);
        for (size_t u = 0; u < r->model.units && !failed && !r->loaded && !*r->resumed; u++) {
            float *values = malloc(r->model.unit[u].count * sizeof *values);
            if (!values)
                failed = error_set(&e, "rank %d: out of memory", rank->rank);
            else
                vit_unit_initialise(&r->model.unit[u], o->seed, values), dist_import(&t.d, u, values);
            free(values);
        }
        if (failed && *e.text) /* without a message another rank has one */
            rt_fail(rank, "%s", e.text);
        else if (!failed && !rt_failed(rank))
            (r->command == COMMAND_TRAIN ? train_loop : r->command == COMMAND_EVAL ? eval_once : predict)(&t);
        dist_close(&t.d);
    }
    metrics_close(&t.metrics);
    nvml_close(&t.gpu);
    dist_comm_close(&t.comm);
    r->device->close(rank);
    free(t.order);
    free(t.logits);
    free(t.losses);
    return 0;
}

/* ----------------------------------------------------------------------------------------------- commands */

/* Names the output directory. One that already holds a run is refused; it is made when all else is ready. */
static int prepare_output(run *r, error_text *e) {
    train_options *o = &r->o;
    char path[CHECKPOINT_PATH], stamp[32];
    const char *const traces[] = {"config.json", "metrics.jsonl", "checkpoints"};
    time_t now = time(NULL);
    struct tm local;
    localtime_r(&now, &local);
    strftime(stamp, sizeof stamp, "%Y%m%d-%H%M%S", &local);
    const char *what =
        o->state.command == COMMAND_COMPARE ? "compare" : options_choice(&train_table, o, &o->strategy).text;
    if (!*o->output_dir)
        snprintf(o->output_dir, sizeof o->output_dir, "runs/%s-%.64s-%s", stamp, r->config.name, what);
    for (size_t i = 0; i < 3 && !r->continues && strcmp(o->resume, "auto"); i++) {
        struct stat st;
        if (checkpoint__join(path, o->output_dir, traces[i], e)) return -1;
        if (!stat(path, &st))
            return error_set(e,
                             "%s: found %s, so it already holds a run; choose another --output-dir, or go on "
                             "with --resume auto",
                             o->output_dir, traces[i]);
    }
    return 0;
}

#ifdef HAVE_MPI
#define BACKEND_MPIRUN CHOICE_BACKEND_MPI
#define BACKENDS_MPI   ", mpi"
#else
#define BACKEND_MPIRUN CHOICE_BACKEND_TCP
#define BACKENDS_MPI   ""
#endif
#ifdef HAVE_NCCL
#define BACKENDS_NCCL ", nccl"
#else
#define BACKENDS_NCCL ""
#endif

/* Who has started this process, and what communicates. */
static int find_launch(run *r, error_text *e) {
    train_options *o = &r->o;
    const launch *l = &r->launch;
    if (launch_find(&r->launch, e)) return -1;
    int several = l->launcher ? l->size > 1 : o->nproc_per_node > 1;
    if (o->backend == CHOICE_BACKEND_NCCL && o->device == CHOICE_DEVICE_CPU)
        return error_set(e, "--backend nccl: found --device cpu, expected cuda");
    if (o->backend >= 0) return 0;
    if (o->device == CHOICE_DEVICE_CUDA)
        o->backend = several ? CHOICE_BACKEND_NCCL : CHOICE_BACKEND_LOCAL;
    else
        o->backend = !l->launcher                    ? CHOICE_BACKEND_LOCAL
                     : strcmp(l->launcher, "mpirun") ? CHOICE_BACKEND_TCP
                                                     : BACKEND_MPIRUN;
    return 0;
}

/* Is this process to start the ranks, each a process of its own, and to wait for them? */
static int starts_ranks(const run *r) {
    const train_options *o = &r->o;
    size_t command = o->state.command;
    return !r->launch.launcher && o->nproc_per_node > 1 &&
           (o->backend == CHOICE_BACKEND_TCP || o->backend == CHOICE_BACKEND_NCCL) &&
           (command == COMMAND_TRAIN || command == COMMAND_EVAL || command == COMMAND_ENV);
}

/* Meets the other processes over the backend. NULL: e says why. */
static dist_process *open_process(const run *r, error_text *e) {
    const train_options *o = &r->o;
    const launch *l = &r->launch;
    int port = given(r, &o->rendezvous_port) ? (int)o->rendezvous_port : l->port ? l->port + 1 : 29501;
    switch (o->backend) {
    case CHOICE_BACKEND_TCP: return dist_tcp_open(l->host, port, l->rank, l->size, o->timeout, e);
#ifdef HAVE_MPI
    case CHOICE_BACKEND_MPI: return dist_mpi_open(l->rank, l->size, o->timeout, e);
#endif
#ifdef HAVE_NCCL
    case CHOICE_BACKEND_NCCL: return dist_nccl_open(l->host, port, l->rank, l->size, o->timeout, e);
#endif
    default:
        error_set(e, "--backend %s: found a program built without it (make prints what it found)",
                  options_choice(&train_table, o, &o->backend).text);
        return NULL;
    }
}

/* Joins the ranks that a launcher has started, if one has. */
static int join_ranks(run *r, error_text *e) {
    train_options *o = &r->o;
    launch *l = &r->launch;
    if (!l->launcher && o->backend > CHOICE_BACKEND_LOCAL)
        return error_set(e,
                         "--backend %s: found one rank, or a command that runs in one process, expected "
                         "train, eval or env with %storchrun, srun or mpirun",
                         options_choice(&train_table, o, &o->backend).text,
                         o->backend == CHOICE_BACKEND_MPI ? "" : "--nproc-per-node, ");
    if (!l->launcher) return 0;
    if (o->backend == CHOICE_BACKEND_LOCAL && l->size > 1)
        return error_set(
            e, "--backend local: found a process that %s started as rank %d of %d, expected tcp, mpi or nccl",
            l->launcher, l->rank, l->size);
    if (given(r, &o->nproc_per_node) && strcmp(l->launcher, "train"))
        return error_set(e, "found --nproc-per-node, expected none, as %s has started the ranks",
                         l->launcher);
    if (r->o.state.command == COMMAND_COMPARE || r->o.state.command == COMMAND_EXPORT ||
        r->o.state.command == COMMAND_HELP)
        return l->size == 1 ? 0 : error_set(e, "found %d processes, expected one for this command", l->size);
    o->nproc_per_node = (size_t)l->size;
    if (l->rank) o->quiet = true;
    if (l->size == 1 && o->backend != CHOICE_BACKEND_NCCL) return 0; /* a rank alone can try NCCL */
    r->process = open_process(r, e);
    return r->process ? 0 : -1;
}

/* Has this rank, or another, failed before the ranks start? What rank 0 chose is everyone's from here on. */
static int agree(run *r, int failed, error_text *e) {
    if (!r->process) return failed;
    failed = r->process->agree(r->process, failed, e, r->o.output_dir, sizeof r->o.output_dir);
    if (failed && !*e->text) r->silent = 1;
    return failed;
}

/* Runs body(rank, r) as every rank of this process. -1: e and perhaps *table, for the caller to free, say
 * why. */
static int run_ranks(run *r, int (*body)(rt_rank *, void *), error_text *e, char **table) {
    rt_world world;
    int failed = -1, here = r->process ? 1 : (int)r->ranks;
    int flags = (r->device->memory ? 0 : RT_CHECK) | (r->process ? RT_ELSEWHERE : 0);
    if (rt_world_init(&world, here, flags)) return error_set(e, "out of memory for %zu ranks", r->ranks);
    if (r->process) world.ranks[0].rank = r->launch.rank, world.ranks[0].local_rank = r->launch.local_rank;
    error_set(e, "out of memory for %zu ranks", r->ranks);
    r->hub = r->process ? r->process->start(r->process, &world, r->device, e) : dist_hub_create(&world);
    if (r->hub) failed = rt_run(&world, body, r);
    if (r->hub && r->process && !r->process->stop(r->process)) r->silent = world.failed;
    if (world.failed) failed = -1; /* by the others, while this rank said goodbye */
    if (failed && r->hub) *e = world.error;
    if (!failed) *e->text = 0;
    if (world.table) *table = strdup(world.table);
    r->out_of_memory = world.out_of_memory;
    if (!r->process) dist_hub_free(r->hub);
    rt_world_free(&world);
    return failed;
}

/* An all-reduce of growing sizes over all ranks, checked and timed as nccl-tests does: algorithm bandwidth =
 * bytes / time, bus bandwidth = that times 2 (N - 1) / N. */
static int env_body(rt_rank *rank, void *argument) {
    run *r = argument;
    error_text e;
    dist_comm comm;
    if (open_device(r, rank, &e)) return rt_fail(rank, "%s", e.text);
    if (rank->rank == 0)
        printf("threads per rank   %d\nmatrix product     %s\n", rank->threads, r->device->description(rank));
    if (r->ranks > 1 && !dist_comm_open(&comm, r->hub, rank, r->device)) {
        if (rank->rank == 0)
            printf("\nall-reduce over %zu ranks (fp32, %s transport)\n%12s %12s %14s %14s\n", r->ranks,
                   comm.transport->name, "bytes", "time us", "algorithm GB/s", "bus GB/s");
        for (size_t count = 256; count <= (size_t)1 << 24 && !rt_failed(rank); count *= 16) {
            enum { ROUNDS = 9 };
            double best = 1e30, n = (double)r->ranks, bytes = 4. * (double)count;
            rt_event done = {0};
            rt_block x = rt_alloc(rank, RT_COMMUNICATION_BUFFERS, RT_FP32, count, 1);
            rt_stream *s = &rank->stream[RT_COMMUNICATION];
            float *values = malloc(count * sizeof *values);
            if (!values) rt_fail(rank, "rank %d: out of memory", rank->rank);
            for (int round = 0; round < ROUNDS && !rt_failed(rank); round++) {
                for (size_t i = 0; i < count; i++) values[i] = (float)(i % 1024) + (float)rank->rank;
                r->device->copy_in(s, x, values);
                dist_post(&comm,
                          &(dist_call){
                              .op = DIST_BARRIER, .unit = "env", .stream = RT_COMMUNICATION, .done = &done});
                rt_wait(rank, RT_HOST, &done);
                double start = rt_seconds();
                dist_post(&comm, &(dist_call){.op = DIST_ALL_REDUCE,
                                              .in = x,
                                              .out = x,
                                              .unit = "env",
                                              .stream = RT_COMMUNICATION,
                                              .done = &done});
                rt_wait(rank, RT_HOST, &done);
                if (rt_seconds() - start < best) best = rt_seconds() - start;
                if (!rt_failed(rank)) r->device->copy_out(s, values, x);
                for (size_t i = 0; i < count && !rt_failed(rank); i++) {
                    float expected =
                        (float)r->ranks * (float)(i % 1024) + (float)(r->ranks * (r->ranks - 1) / 2);
                    if (values[i] != expected)
                        rt_fail(rank, "all-reduce of %zu elements: found %g at %zu on rank %d, expected %g",
                                count, (double)values[i], i, rank->rank, (double)expected);
                }
            }
            if (rank->rank == 0)
                printf("%12.0f %12.1f %14.2f %14.2f\n", bytes, 1e6 * best, 1e-9 * bytes / best,
                       1e-9 * bytes / best * 2 * (n - 1) / n);
            rt_free(rank, RT_COMMUNICATION_BUFFERS, &x);
            free(values);
        }
        dist_comm_close(&comm);
    }
    r->device->close(rank);
    return 0;
}

#ifdef HAVE_CUDA
#define ENV_CUDA ", cuda"
#else
#define ENV_CUDA " (not built with cuda)"
#endif

static int command_env(run *r, error_text *e, char **table) {
    struct utsname host;
    size_t cores = (size_t)sysconf(_SC_NPROCESSORS_ONLN);
    uname(&host);
    r->ranks = r->o.nproc_per_node;
    if (prepare_device(r, e)) return -1;
    prepare_threads(r);
    if (r->launch.rank) return run_ranks(r, env_body, e, table); /* rank 0 says it */
    printf("version            %s\nhost               %s, %s %s\ncores              %zu\nmemory             "
           "%.1f GB\n",
           TRAIN_VERSION, host.nodename, host.sysname, host.machine, cores,
           1e-9 * (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE));
    printf("devices            cpu" ENV_CUDA "\nbackends           local, tcp" BACKENDS_MPI BACKENDS_NCCL
           "\nlibraries          %s\n",
           libraries);
#ifdef HAVE_CUDA
    error_text why;
    if (vit_cuda.list(stdout, &why)) printf("GPUs               none: %s\n", why.text);
#endif
    return run_ranks(r, env_body, e, table);
}

/* Makes the run that of strategy i, in a folder of its own in the output directory. */
static int compare_run(run *r, const compare *c, size_t i, const char *directory, error_text *e) {
    train_options *o = &r->o;
    const char *choices = options_of_field(&train_table, o, &o->strategy)->choices;
    o->strategy = option_choice_index(choices, c->result[i].strategy);
    int length = snprintf(o->output_dir, sizeof o->output_dir, "%s/%s", directory, c->result[i].strategy);
    return length < CHECKPOINT_PATH ? 0 : error_set(e, "%.200s...: found too long a path", directory);
}

/* All that can be refused is, before anything is run. */
static int compare_prepare(run *r, compare *c, option_text directory, error_text *e) {
    train_options *o = &r->o;
    char path[CHECKPOINT_PATH];
    struct stat st;
    *o->strategies = 0; /* each run is one like any other */
    if (o->gradient_reduction < 0) o->gradient_reduction = CHOICE_REDUCTION_EVERY;
    if (prepare(r, e) || prepare_output(r, e)) return -1;
    memcpy(directory, o->output_dir, sizeof o->output_dir);
    if (checkpoint__join(path, directory, "compare.md", e)) return -1;
    if (!stat(path, &st))
        return error_set(
            e, "%s: found compare.md, so it already holds a comparison; choose another --output-dir",
            directory);
    for (size_t i = 0; i < c->count; i++)
        if (compare_run(r, c, i, directory, e) || prepare_memory(r, e) || prepare_output(r, e)) return -1;
    const char *data = dataset_kind_names[r->val.kind];
    describe_model(r, c->about[0], sizeof c->about[0]);
    snprintf(c->about[1], sizeof c->about[1],
             "%s, %s: %zu steps of %zu images = %zu batch size x %zu accumulation x %zu ranks; "
             "gradient reduction %s",
             data, options_choice(&train_table, o, &o->precision).text, r->steps, r->global_batch,
             o->batch_size, o->gradient_accumulation_steps, r->ranks,
             options_choice(&train_table, o, &o->gradient_reduction).text);
    return compare_open(c, r->ranks, r->steps, e);
}

/* The same training under each strategy. The first failure ends it. */
static int compare_train(run *r, compare *c, const char *directory, error_text *e, char **table) {
    for (size_t i = 0; i < c->count; i++) {
        error_text why;
        if (compare_run(r, c, i, directory, e)) return -1;
        if (!r->o.quiet)
            fprintf(stderr, "\nstrategy %zu of %zu: %s\n", i + 1, c->count, c->result[i].strategy);
        r->result = &c->result[i];
        if (run_ranks(r, rank_body, &why, table))
            return error_set(e, "compare: strategy %s: %s", c->result[i].strategy, why.text);
        if (r->interrupted)
            return error_set(e, "compare: interrupted under strategy %s", c->result[i].strategy);
    }
    return 0;
}

/* The exit status. That strategies give different numbers is a failure: they promise the same bits. */
static int command_compare(run *r, error_text *e, char **table) {
    train_options *o = &r->o;
    option_text directory;
    compare c = {0};
    const option *strategy = options_of_field(&train_table, o, &o->strategy);
    if (compare_choose(&c, o->strategies, strategy->choices, e)) return 2;
    int given_one = o->state.source[strategy - train_option_list] == OPTION_FROM_COMMAND_LINE;
    if (given_one || o->print_schedule || *o->resume) {
        error_set(e, "compare: found --%s, expected it with one strategy (train) alone",
                  given_one           ? "strategy"
                  : o->print_schedule ? "print-schedule"
                                      : "resume");
        return 2;
    }
    o->strategy = option_choice_index(strategy->choices, c.result[0].strategy); /* until compare_run */
    r->command = COMMAND_TRAIN;
    int failed = compare_prepare(r, &c, directory, e);
    if (!failed) show_notes(r);
    catch_signals();
    if (!failed) failed = compare_train(r, &c, directory, e, table) || compare_judge(&c, directory, e);
    if (!failed) {
        compare_print_text(&c, stdout);
        failed = compare_write(&c, directory, e);
    }
    if (!failed) {
        printf("results: %s\n", directory);
        failed = compare_verdict(&c, e);
    }
    compare_free(&c);
    return r->interrupted ? 130 : failed ? 1 : 0;
}

/* Writes the model of --checkpoint as a folder that timm or Hugging Face's transformers open. */
static int command_export(run *r, error_text *e) {
    train_options *o = &r->o;
    model_source *s = &r->source;
    size_t length = strlen(o->output_dir);
    while (length > 1 && o->output_dir[length - 1] == '/') o->output_dir[--length] = 0;
    if (prepare_config(r, DATASET_DIGITS, e) || vit_model_init(&r->model, &r->config, RT_FP32, e) ||
        model_source_check(s, &r->model, e))
        return -1;
    show_notes(r);
    for (int i = 0; i < 3 && !s->has_normalisation; i++) s->mean[i] = s->std[i] = 0.5f;
    if (!s->has_normalisation && !o->quiet)
        fprintf(stderr, "%s does not say how images are normalised: mean and deviation 0.5\n", s->path);
    if (o->format == CHOICE_FORMAT_HF && !s->transform.squash && !o->quiet &&
        r->config.image_height != r->config.image_width)
        fprintf(stderr,
                "transformers will stretch images of another aspect: its processors do not crop to "
                "%zux%zu\n",
                r->config.image_height, r->config.image_width);
    model_card card = {s->mean, s->std, NULL, 0, s->transform};
    if (model_source_labels(s, &card.label_names, &card.labels, e)) return -1;
    int failed = model_source_export(s, &r->model, o->output_dir,
                                     o->format == CHOICE_FORMAT_HF ? MODEL_HF : MODEL_TIMM, &card, e);
    free(card.label_names);
    if (!failed) printf("results: %s\n", o->output_dir);
    return failed;
}

static int command_help(const train_options *o, error_text *e) {
    const char *topic = o->state.argument_count ? o->state.arguments[0] : NULL;
    if (topic && !strcmp(topic, "cluster")) return error_set(e, "help cluster is not built yet");
    if (!topic || strcmp(topic, "model")) return options_help(&train_table, topic, stdout, e);
    printf("%-24s %6s %6s %6s %6s %6s %14s\n", "name", "image", "patch", "dim", "depth", "heads",
           "parameters");
    for (size_t i = 0; vit_config_name(i); i++) {
        vit_config c;
        vit_model m;
        if (vit_config_named(&c, vit_config_name(i), e) || vit_model_init(&m, &c, RT_FP32, e)) return -1;
        printf("%-24s %6zu %6zu %6zu %6zu %6zu %14zu\n", c.name, c.image_height, c.patch_size, c.embed_dim,
               c.depth, c.num_heads, m.parameters);
        vit_model_free(&m);
    }
    return 0;
}

/* --------------------------------------------------------------------------------------------------- main */

/* Threads that wait for each other must sleep, not spin: ranks are threads too, and there may be more than
 * cores. OpenMP reads this when it is loaded, so the program sets it and starts itself again. */
static void sleep_while_waiting(char **argv) {
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv("/proc/self/exe", argv); /* if that fails, the program is slower at worst */
}

int main(int argc, char **argv) {
    sleep_while_waiting(argv);
    run *r = calloc(1, sizeof *r);
    error_text e = {{0}};
    char *table = NULL;
    int status = 1;
    if (!r) return fprintf(stderr, "train: error: out of memory\n"), 1;
    if (options_parse(&train_table, argc, argv, &r->o, &e)) {
        status = 2;
    } else if (r->o.state.command == COMMAND_HELP) {
        status = command_help(&r->o, &e) ? 2 : 0;
    } else if (find_launch(r, &e)) {
        status = 1;
    } else if (starts_ranks(r)) {
        status = prepare_device(r, &e) ? 1 : spawn_ranks(argv, (int)r->o.nproc_per_node, &e);
    } else if (join_ranks(r, &e)) {
        status = 1;
    } else if (r->o.state.command == COMMAND_ENV) {
        status = command_env(r, &e, &table) ? 1 : 0;
    } else if (r->o.state.command == COMMAND_COMPARE) {
        status = command_compare(r, &e, &table);
    } else if (r->o.state.command == COMMAND_EXPORT) {
        const char *missing = !*r->o.checkpoint   ? "checkpoint, expected the model to export"
                              : r->o.format < 0   ? "format, expected timm or hf"
                              : !*r->o.output_dir ? "output-dir, expected a new folder"
                                                  : NULL;
        if (missing)
            status = 2, error_set(&e, "export: found no --%s", missing);
        else
            status = command_export(r, &e) ? 1 : 0;
    } else {
        r->command = r->o.state.command;
        int predicting = r->command == COMMAND_PREDICT, training = r->command == COMMAND_TRAIN;
        const char *resume = r->o.resume;
        if (!training && !*r->o.checkpoint) {
            error_set(&e, "%s: found no --checkpoint, expected a model", predicting ? "predict" : "eval");
            status = 2;
        } else if (predicting && (!r->o.state.argument_count || r->o.nproc_per_node > 1)) {
            error_set(&e, "predict: found %zu images and %zu ranks, expected images, and one rank",
                      r->o.state.argument_count, r->o.nproc_per_node);
            status = 2;
        } else if (*resume && (!training || (!strcmp(resume, "auto") && !*r->o.output_dir))) {
            error_set(&e, training ? "--resume auto: found no --output-dir, expected that of the run to go on"
                                   : "found --resume, expected it with training alone");
            status = 2;
        } else if (!agree(r, prepare(r, &e) || (training && prepare_output(r, &e)), &e)) {
            if (r->launch.rank == 0) show_notes(r);
            if (training) catch_signals();
            e.text[0] = 0;
            if (training && r->o.print_schedule && !(r->schedules = calloc(r->ranks, sizeof *r->schedules)))
                error_set(&e, "out of memory");
            else
                status = run_ranks(r, rank_body, &e, &table) ? 1 : r->interrupted ? 130 : 0;
        }
    }
    if (!status && (fflush(stdout) || ferror(stdout)))
        status = 1, error_set(&e, "stdout: cannot be written: %s", strerror(errno));
    for (char *c = e.text; *c; c++) /* names from outside may hold line ends: one line */
        if ((unsigned char)*c < ' ' || *c == 0x7F) *c = '?';
    int speaks = status && *e.text && !r->silent && launch_takes_turn(&r->launch);
    if (speaks) /* on a terminal: in place of a progress line */
        fprintf(stderr, "%strain: error: %s\n%s", isatty(STDERR_FILENO) ? "\r\033[K" : "", e.text,
                table ? table : "");
    if (speaks && r->out_of_memory) {
        dist_options d = distribution(r);
        report_advice(stderr, r->device, &r->model, &d, (int)r->ranks, available_bytes(r));
    }
    for (size_t i = 0; r->schedules && i < r->ranks; i++) free(r->schedules[i].entry);
    free(r->schedules);
    checkpoint_state_free(&r->state);
    if (r->process) r->process->close(r->process);
    dataset_free(&r->train);
    dataset_free(&r->val);
    model_source_close(&r->source);
    vit_model_free(&r->model);
    free(r->label_names);
    free(table);
    free(r);
    return status;
}
