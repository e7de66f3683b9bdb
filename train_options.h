/* train_options.h - every option of the program: its field, name, type, default, limits and help, once.
 *
 *     train_options o;
 *     if (options_parse(&train_table, argc, argv, &o, &e)) ...     // e.text: one line
 *     if (!options_given(&train_table, &o, &o.learning_rate)) o.learning_rate = 1e-3;   // a derived default
 *     cJSON *json = options_to_json(&train_table, &o);             // the "options" of config.json
 *
 * Fields whose default depends on something else begin unset (see io/options.h) and are filled in by the
 * program before it writes config.json. What is not built yet stands here too, and says so when it is used.
 */
#ifndef TRAIN_OPTIONS_H
#define TRAIN_OPTIONS_H

#include "io/options.h"

/* The values of choices, in the order of the table's texts. */
// clang-format off
enum { CHOICE_DATASET_AUTO, CHOICE_DATASET_DIGITS, CHOICE_DATASET_MNIST, CHOICE_DATASET_CIFAR10,
       CHOICE_DATASET_IMAGEFOLDER, CHOICE_DATASET_SYNTHETIC };
enum { CHOICE_AUGMENTATION_NONE, CHOICE_AUGMENTATION_BASIC, CHOICE_AUGMENTATION_IMAGENET };
enum { CHOICE_GELU_ERF, CHOICE_GELU_TANH };
enum { CHOICE_OPTIMIZER_ADAMW, CHOICE_OPTIMIZER_SGD };
enum { CHOICE_SCHEDULER_COSINE, CHOICE_SCHEDULER_LINEAR, CHOICE_SCHEDULER_CONSTANT };
enum { CHOICE_STRATEGY_SINGLE, CHOICE_STRATEGY_DP, CHOICE_STRATEGY_DDP, CHOICE_STRATEGY_ZERO1,
       CHOICE_STRATEGY_ZERO2, CHOICE_STRATEGY_ZERO3, CHOICE_STRATEGY_FSDP };
enum { CHOICE_DEVICE_CPU, CHOICE_DEVICE_CUDA };
enum { CHOICE_BACKEND_LOCAL, CHOICE_BACKEND_TCP, CHOICE_BACKEND_MPI, CHOICE_BACKEND_NCCL };
enum { CHOICE_REDUCTION_LAST, CHOICE_REDUCTION_EVERY };
enum { CHOICE_MATMUL_AUTO, CHOICE_MATMUL_OWN, CHOICE_MATMUL_OPENBLAS };
enum { CHOICE_PRECISION_FP32, CHOICE_PRECISION_BF16, CHOICE_PRECISION_FP16 };
enum { CHOICE_OFFLOAD_NONE, CHOICE_OFFLOAD_OPTIMIZER };
enum { CHOICE_FORMAT_TIMM, CHOICE_FORMAT_HF };

enum { COMMAND_TRAIN, COMMAND_EVAL, COMMAND_PREDICT, COMMAND_COMPARE, COMMAND_EXPORT, COMMAND_SIMULATE,
       COMMAND_PLAN, COMMAND_ENV, COMMAND_HELP };
// clang-format on

typedef struct {
    option_state state; /* command, arguments, who gave what */

    /* data */
    option_text data_path, config;
    int dataset, augmentation;
    option_numbers mean, std;
    bool shuffle;
    size_t limit_train, limit_val, num_workers;

    /* model */
    option_text model, pretrained, checkpoint;
    option_extent image_size;
    size_t patch_size, embed_dim, depth, num_heads, num_classes;
    double mlp_ratio, layer_norm_eps;
    int gelu;

    /* optimisation */
    int optimizer, scheduler;
    double learning_rate, min_learning_rate, weight_decay, beta1, beta2, eps, momentum;
    double gradient_clipping, label_smoothing, drop_path, mixup, cutmix, layer_decay;
    bool freeze_backbone;
    size_t warmup_steps, seed;

    /* length */
    size_t batch_size, gradient_accumulation_steps, epochs, max_steps;

    /* distribution */
    int strategy, device, backend, gradient_reduction, matmul, precision, reduce_dtype, offload;
    size_t nproc_per_node, rendezvous_port, prefetch, activation_checkpointing, threads_per_rank;
    double timeout, bucket_size_mb;
    bool reshard_after_forward, print_schedule, tf32, deterministic, cuda_graphs;
    option_text deepspeed_config;

    /* simulation */
    option_text cluster, sweep, straggler, json;
    size_t nodes;
    double delay, jitter;

    /* output */
    option_text output_dir, resume;
    size_t log_interval, eval_interval, checkpoint_interval, checkpoint_interval_steps, keep_checkpoints;
    size_t trace_ranks;
    bool trace, quiet;

    /* other commands */
    option_text strategies;
    int format;
    bool logits;
} train_options;

#define FIELD(name) offsetof(train_options, name)
#define COUNT       "[1, inf)" /* something of which there is at least one */

// clang-format off
static const option train_option_list[] = {
    {"data", "data-path", OPTION_TEXT, FIELD(data_path), .value_name = "DIR",
     .note = "the digits inside the program", .help = "directory of the data set"},
    {"data", "dataset", OPTION_CHOICE, FIELD(dataset), .of_training = true, .preset = "auto",
     .choices = "auto|digits|mnist|cifar10|imagefolder|synthetic",
     .help = "its format, auto: told by what lies in the directory"},
    {"data", "augmentation", OPTION_CHOICE, FIELD(augmentation), .of_training = true, .preset = "basic",
     .choices = "none|basic|imagenet", .later = "imagenet", .help = "random changes to training images"},
    {"data", "mean", OPTION_NUMBERS, FIELD(mean), .of_training = true,
     .range = "(-inf, inf)", .note = "the data set's",
     .help = "subtracted from the pixels of each channel (pixels in 0..1)"},
    {"data", "std", OPTION_NUMBERS, FIELD(std), .of_training = true,
     .range = "(0, inf)", .note = "the data set's",
     .help = "standard deviation that the pixels of each channel are divided by"},
    {"data", "shuffle", OPTION_SWITCH, FIELD(shuffle), .of_training = true, .preset = "true",
     .help = "a new order of the training images in every epoch"},
    {"data", "limit-train", OPTION_SIZE, FIELD(limit_train), .of_training = true,
     .range = COUNT, .note = "all",
     .help = "use only the first N training images"},
    {"data", "limit-val", OPTION_SIZE, FIELD(limit_val), .range = COUNT, .note = "all",
     .help = "use only the first N validation images"},
    {"data", "num-workers", OPTION_SIZE, FIELD(num_workers), .range = "[0, 256]",
     .note = "for images to decode or resize as many as compute, at most 4",
     .help = "threads a rank that load images ahead; 0: those that compute do it"},

    {"model", "model", OPTION_TEXT, FIELD(model), .of_training = true, .value_name = "NAME",
     .note = "a small one for the data set",
     .help = "a Vision Transformer by its timm name (help model lists them)"},
    {"model", "image-size", OPTION_EXTENT, FIELD(image_size), .of_training = true,
     .range = COUNT, .note = "the model's",
     .help = "height and width of the model's images, in pixels"},
    {"model", "patch-size", OPTION_SIZE, FIELD(patch_size), .of_training = true,
     .range = COUNT, .note = "the model's",
     .help = "side of a patch, in pixels"},
    {"model", "embed-dim", OPTION_SIZE, FIELD(embed_dim), .of_training = true,
     .range = COUNT, .note = "the model's",
     .help = "width of a token"},
    {"model", "depth", OPTION_SIZE, FIELD(depth), .of_training = true, .range = COUNT, .note = "the model's",
     .help = "blocks"},
    {"model", "num-heads", OPTION_SIZE, FIELD(num_heads), .of_training = true,
     .range = COUNT, .note = "the model's",
     .help = "attention heads of a block"},
    {"model", "mlp-ratio", OPTION_NUMBER, FIELD(mlp_ratio), .of_training = true,
     .range = "(0, inf)", .note = "the model's",
     .help = "width of a block's hidden layer, in widths of a token"},
    {"model", "num-classes", OPTION_SIZE, FIELD(num_classes), .of_training = true,
     .range = COUNT, .note = "the data set's",
     .help = "outputs of the head"},
    {"model", "layer-norm-eps", OPTION_NUMBER, FIELD(layer_norm_eps), .of_training = true,
     .range = "[0, inf)",
     .preset = "1e-6", .note = "a loaded model's own", .help = "added to the variance in LayerNorm"},
    {"model", "gelu", OPTION_CHOICE, FIELD(gelu), .of_training = true, .preset = "erf",
     .note = "a loaded model's own", .choices = "erf|tanh",
     .help = "GELU: exact, or its approximation by tanh, which cuBLASLt fuses with 16-bit products"},
    {"model", "pretrained", OPTION_TEXT, FIELD(pretrained), .value_name = "PATH",
     .help = "weights to begin with: a safetensors file, or a folder with config.json and model.safetensors"},
    {"model", "checkpoint", OPTION_TEXT, FIELD(checkpoint), .value_name = "PATH",
     .help = "the model to evaluate, use or export: as --pretrained, a step folder or an output directory"},

    {"optimisation", "optimizer", OPTION_CHOICE, FIELD(optimizer), .of_training = true, .preset = "adamw",
     .choices = "adamw|sgd", .help = "update rule"},
    {"optimisation", "learning-rate", OPTION_NUMBER, FIELD(learning_rate), .range = "[0, inf)",
     .note = "3e-3 for digits, else 1e-3", .help = "largest learning rate of the schedule"},
    {"optimisation", "weight-decay", OPTION_NUMBER, FIELD(weight_decay), .range = "[0, inf)",
     .preset = "0.05",
     .help = "decoupled decay of weights (not of biases, norms, class token and positions)"},
    {"optimisation", "beta1", OPTION_NUMBER, FIELD(beta1), .range = "[0, 1)", .preset = "0.9",
     .help = "AdamW: decay of the mean of gradients"},
    {"optimisation", "beta2", OPTION_NUMBER, FIELD(beta2), .range = "[0, 1)", .preset = "0.999",
     .help = "AdamW: decay of the mean of squared gradients"},
    {"optimisation", "eps", OPTION_NUMBER, FIELD(eps), .range = "[0, inf)", .preset = "1e-8",
     .help = "AdamW: added to the denominator"},
    {"optimisation", "momentum", OPTION_NUMBER, FIELD(momentum), .range = "[0, 1)", .preset = "0.9",
     .help = "SGD: decay of the sum of gradients"},
    {"optimisation", "scheduler", OPTION_CHOICE, FIELD(scheduler), .preset = "cosine",
     .choices = "cosine|linear|constant", .help = "learning rate after the warm-up"},
    {"optimisation", "warmup-steps", OPTION_SIZE, FIELD(warmup_steps), .range = "[0, inf)",
     .note = "5 % of all steps", .help = "steps in which the learning rate rises linearly"},
    {"optimisation", "min-learning-rate", OPTION_NUMBER, FIELD(min_learning_rate), .range = "[0, inf)",
     .preset = "0", .help = "where cosine and linear end"},
    {"optimisation", "gradient-clipping", OPTION_NUMBER, FIELD(gradient_clipping), .range = "[0, inf)",
     .preset = "0", .help = "largest norm of the whole gradient, 0: any"},
    {"optimisation", "label-smoothing", OPTION_NUMBER, FIELD(label_smoothing), .range = "[0, 1]",
     .preset = "0", .help = "share of the target that is spread over all classes"},
    {"optimisation", "drop-path", OPTION_NUMBER, FIELD(drop_path), .range = "[0, 1)", .preset = "0",
     .help = "probability to skip the last block, growing linearly from 0 at the first"},
    {"optimisation", "layer-decay", OPTION_NUMBER, FIELD(layer_decay), .range = "(0, 1]", .preset = "1",
     .help = "fine-tuning: learning rate of a layer, in that of the layer above it; the head's is whole"},
    {"optimisation", "freeze-backbone", OPTION_SWITCH, FIELD(freeze_backbone), .of_training = true,
     .preset = "false",
     .help = "fine-tuning: train head.weight and head.bias alone"},
    {"optimisation", "mixup", OPTION_NUMBER, FIELD(mixup), .range = "[0, inf)", .preset = "0",
     .not_built_yet = true, .help = "alpha of mixup, 0: off"},
    {"optimisation", "cutmix", OPTION_NUMBER, FIELD(cutmix), .range = "[0, inf)", .preset = "0",
     .not_built_yet = true, .help = "alpha of cutmix, 0: off"},
    {"optimisation", "seed", OPTION_SIZE, FIELD(seed), .of_training = true,
     .range = "[0, inf)", .preset = "0",
     .help = "what all random numbers depend on"},

    {"length", "batch-size", OPTION_SIZE, FIELD(batch_size), .range = COUNT,
     .note = "64 over all ranks", .help = "images in a micro-batch of one rank"},
    {"length", "gradient-accumulation-steps", OPTION_SIZE, FIELD(gradient_accumulation_steps),
     .range = COUNT, .preset = "1", .help = "micro-batches in an optimizer step"},
    {"length", "epochs", OPTION_SIZE, FIELD(epochs), .range = COUNT,
     .note = "60 for digits, 3 for MNIST, 6 for CIFAR-10, 10 for folders",
     .help = "passes over the training images"},
    {"length", "max-steps", OPTION_SIZE, FIELD(max_steps), .range = COUNT, .note = "no limit",
     .help = "optimizer steps; the first of both ends the run"},

    {"distribution", "strategy", OPTION_CHOICE, FIELD(strategy),
     .note = "single for one rank, else ddp", .choices = "single|dp|ddp|zero1|zero2|zero3|fsdp",
     .help = "what each rank holds and when ranks communicate"},
    {"distribution", "nproc-per-node", OPTION_SIZE, FIELD(nproc_per_node), .range = "[1, 4096]",
     .preset = "1", .help = "ranks that the program starts itself"},
    {"distribution", "device", OPTION_CHOICE, FIELD(device), .preset = "cpu", .choices = "cpu|cuda",
     .help = "what computes"},
    {"distribution", "backend", OPTION_CHOICE, FIELD(backend),
     .note = "local for ranks of one program, nccl on GPUs, mpi under mpirun, else tcp",
     .choices = "local|tcp|mpi|nccl", .help = "what communicates"},
    {"distribution", "rendezvous-port", OPTION_SIZE, FIELD(rendezvous_port), .range = "[1, 65535]",
     .value_name = "P", .note = "MASTER_PORT + 1",
     .help = "port at which ranks meet, on the host of rank 0"},
    {"distribution", "timeout", OPTION_NUMBER, FIELD(timeout), .range = "(0, 1e6]", .value_name = "S",
     .preset = "600", .help = "seconds to wait for another process"},
    {"distribution", "bucket-size-mb", OPTION_NUMBER, FIELD(bucket_size_mb),
     .range = "(0, inf)", .preset = "25", .help = "ddp: gradients that are reduced together, in MB"},
    {"distribution", "gradient-reduction", OPTION_CHOICE, FIELD(gradient_reduction),
     .note = "every for zero2, zero3 and compare, else last", .choices = "last|every",
     .help = "after which micro-batch of a step ranks add their gradients"},
    {"distribution", "prefetch", OPTION_SIZE, FIELD(prefetch), .range = "[0, inf)", .preset = "1",
     .help = "zero3: units gathered ahead"},
    {"distribution", "reshard-after-forward", OPTION_SWITCH, FIELD(reshard_after_forward),
     .preset = "true",
     .help = "zero3: free gathered units between forward and backward"},
    {"distribution", "activation-checkpointing", OPTION_INTERVAL, FIELD(activation_checkpointing),
     .preset = "false", .range = COUNT,
     .help = "compute the activations of blocks again in backward; N: of every Nth block"},
    {"distribution", "print-schedule", OPTION_SWITCH, FIELD(print_schedule), .preset = "false",
     .help = "print what each rank gathers, sends and frees in the first step"},
    {"distribution", "matmul", OPTION_CHOICE, FIELD(matmul), .preset = "auto",
     .choices = "auto|own|openblas", .help = "matrix product on the CPU"},
    {"distribution", "precision", OPTION_CHOICE, FIELD(precision), .of_training = true, .preset = "fp32",
     .choices = "fp32|bf16|fp16",
     .help = "numbers of the model; the optimizer's are fp32, and fp16 scales its loss"},
    {"distribution", "tf32", OPTION_SWITCH, FIELD(tf32), .preset = "false",
     .help = "fp32 on a GPU: matrix products round their factors to TF32, which has 10 bits"},
    {"distribution", "deterministic", OPTION_SWITCH, FIELD(deterministic), .preset = "false",
     .help = "GPU: products by cuBLASLt's first algorithm, not the fastest, so that runs agree in every bit"},
    {"distribution", "reduce-dtype", OPTION_CHOICE, FIELD(reduce_dtype), .of_training = true,
     .note = "the precision",
     .choices = "fp32|bf16|fp16", .help = "numbers in which ranks add their gradients"},
    {"distribution", "cuda-graphs", OPTION_SWITCH, FIELD(cuda_graphs), .preset = "false",
     .help = "GPU: record a step once, and launch it as a whole from then on (several ranks: NCCL)"},
    {"distribution", "offload", OPTION_CHOICE, FIELD(offload), .preset = "none", .choices = "none|optimizer",
     .help = "GPU: keep optimizer state and master weights in host memory, and update there"},
    {"distribution", "deepspeed-config", OPTION_TEXT, FIELD(deepspeed_config), .value_name = "FILE",
     .not_built_yet = true, .help = "take options from a DeepSpeed configuration"},
    {"distribution", "threads-per-rank", OPTION_SIZE, FIELD(threads_per_rank), .range = "[1, 4096]",
     .note = "cores / ranks", .help = "threads that compute for one rank"},

    {"simulation", "cluster", OPTION_TEXT, FIELD(cluster), .value_name = "NAME|FILE",
     .not_built_yet = true, .help = "the machine to simulate (help cluster lists them)"},
    {"simulation", "nodes", OPTION_SIZE, FIELD(nodes), .range = COUNT, .preset = "1",
     .not_built_yet = true, .help = "how many of its nodes"},
    {"simulation", "sweep", OPTION_TEXT, FIELD(sweep), .value_name = "NAME=A,B,C",
     .not_built_yet = true, .help = "one simulation for each value of an option"},
    {"simulation", "straggler", OPTION_TEXT, FIELD(straggler), .value_name = "RANK:FACTOR",
     .not_built_yet = true, .help = "one rank that computes slower"},
    {"simulation", "delay", OPTION_NUMBER, FIELD(delay), .range = "[0, inf)", .preset = "0",
     .value_name = "MS", .not_built_yet = true, .help = "milliseconds added to every message"},
    {"simulation", "jitter", OPTION_NUMBER, FIELD(jitter), .range = "[0, 1)", .preset = "0",
     .not_built_yet = true, .help = "random part of every duration, as a fraction"},
    {"simulation", "json", OPTION_TEXT, FIELD(json), .value_name = "FILE", .not_built_yet = true,
     .help = "write the result as JSON, -: to stdout"},

    {"output", "output-dir", OPTION_TEXT, FIELD(output_dir), .value_name = "DIR", .of_one_run = true,
     .note = "runs/YYYYMMDD-HHMMSS-model-strategy", .help = "where everything is written"},
    {"output", "log-interval", OPTION_SIZE, FIELD(log_interval), .range = COUNT, .preset = "1",
     .help = "steps between lines of metrics.jsonl"},
    {"output", "eval-interval", OPTION_SIZE, FIELD(eval_interval), .range = COUNT, .preset = "1",
     .help = "epochs between evaluations"},
    {"output", "checkpoint-interval", OPTION_SIZE, FIELD(checkpoint_interval), .range = COUNT,
     .preset = "1", .help = "epochs between checkpoints"},
    {"output", "checkpoint-interval-steps", OPTION_SIZE, FIELD(checkpoint_interval_steps),
     .range = COUNT, .note = "none", .help = "further checkpoints after every N steps"},
    {"output", "keep-checkpoints", OPTION_SIZE, FIELD(keep_checkpoints), .range = COUNT, .preset = "3",
     .help = "checkpoints that are kept; the best and the latest always are"},
    {"output", "resume", OPTION_TEXT, FIELD(resume), .value_name = "auto|PATH", .of_one_run = true,
     .help = "go on from a step folder, auto: the newest whole one of the output directory"},
    {"output", "trace", OPTION_SWITCH, FIELD(trace), .preset = "false", .not_built_yet = true,
     .help = "write a timeline, trace.json"},
    {"output", "trace-ranks", OPTION_SIZE, FIELD(trace_ranks), .range = COUNT, .preset = "8",
     .not_built_yet = true, .help = "how many ranks the timeline shows"},
    {"output", "quiet", OPTION_SWITCH, FIELD(quiet), .preset = "false",
     .help = "no progress on stderr"},
    {"output", "config", OPTION_TEXT, FIELD(config), .value_name = "FILE", .of_one_run = true,
     .is_config = true, .help = "read options from JSON, such as a config.json; the command line wins"},

    {"other commands", "strategies", OPTION_TEXT, FIELD(strategies), .value_name = "A,B,...",
     .help = "compare: the strategies to train with"},
    {"other commands", "format", OPTION_CHOICE, FIELD(format), .choices = "timm|hf",
     .help = "export: who opens it, timm or Hugging Face's transformers"},
    {"other commands", "logits", OPTION_SWITCH, FIELD(logits), .preset = "false",
     .help = "predict: print the outputs of the head too"},
};

/* In the order of COMMAND_... */
static const option_command train_command_list[] = {
    {"train", "[train] [options]", "train a model (the default command)",
     .groups = "data|model|optimisation|length|distribution|output"},
    {"eval", "eval --checkpoint PATH [options]", "loss and accuracy of a model on a validation set",
     .groups = "data|model|length|distribution|output"},
    {"predict", "predict --checkpoint PATH IMAGE...", "the five likeliest classes of images",
     .groups = "model|distribution|other commands", .takes_arguments = true},
    {"compare", "compare --strategies A,B,... [options]", "the same training under several strategies",
     .groups = "data|model|optimisation|length|distribution|output|other commands"},
    {"export", "export --checkpoint PATH --format timm|hf --output-dir DIR",
     "a model as a folder that timm or Hugging Face's transformers open",
     .groups = "model|output|other commands"},
    {"simulate", "simulate [options]", "time and memory of a run on a described cluster; computes nothing",
     .groups = "data|model|optimisation|length|distribution|simulation|output", .not_built_yet = true},
    {"plan", "plan [options]", "which strategies and batch sizes fit on a described cluster",
     .groups = "model|length|distribution|simulation", .not_built_yet = true},
    {"env", "env [options]", "what this machine has and what the program uses of it",
     .groups = "distribution"},
    {"help", "help [COMMAND|model|cluster]", "this text, or what stands behind one word of it", .groups = "",
     .also = "-h|--help", .takes_arguments = true},
};
// clang-format on

#undef FIELD
#undef COUNT

static const option_table train_table = {
    .program = "./train",
    .options = train_option_list,
    .count = sizeof train_option_list / sizeof *train_option_list,
    .commands = train_command_list,
    .command_count = sizeof train_command_list / sizeof *train_command_list,
    .topics = "model|cluster",
    .size = sizeof(train_options),
};

#endif
