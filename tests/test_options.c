/* test_options.c - command lines, configuration files and help by the table of train_options.h.
 *
 * What is documented for users stands here a second time, typed in by hand: names, defaults, choices, and
 * which of them are built.
 */
#include <setjmp.h>
#include <stdarg.h>

#include "train_options.h"

#include <cmocka.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* Parses the words after "./train"; the values hold on to argv, so they come together. */
typedef struct {
    train_options o;
    char *argv[16];
    error_text e;
    int failed;
} parsed;

static parsed *parse_words(parsed *p, size_t count, const char *const *words) {
    p->argv[0] = "./train";
    for (size_t i = 0; i < count; i++) p->argv[i + 1] = (char *)words[i];
    p->argv[count + 1] = NULL;
    p->e.text[0] = 0;
    p->failed = options_parse(&train_table, (int)count + 1, p->argv, &p->o, &p->e);
    return p;
}

#define PARSE(p, ...) parse_words(p, COUNT(((const char *[]){__VA_ARGS__})), (const char *[]){__VA_ARGS__})
#define PARSE_OK(p, ...)                                                                                     \
    do {                                                                                                     \
        if (PARSE(p, __VA_ARGS__)->failed) fail_msg("%s", (p)->e.text);                                      \
    } while (0)

static int new_parsed(void **state) { return (*state = calloc(1, sizeof(parsed))) ? 0 : -1; }

static int free_parsed(void **state) {
    free(*state);
    return 0;
}

/* ---------------------------------------------------------------------------------------------- the table */

static void test_table_is_consistent(void **state) {
    (void)state;
    assert_true(train_table.count <= OPTIONS_MAX);
    for (size_t i = 0; i < train_table.count; i++) {
        const option *o = &train_table.options[i];
        assert_int_equal(strspn(o->name, "abcdefghijklmnopqrstuvwxyz0123456789-"), strlen(o->name));
        assert_true(strlen(o->name) < 60 && strncmp(o->name, "no-", 3) != 0);
        assert_ptr_equal(options_find(&train_table, o->name, strlen(o->name)), o); /* no name twice */
        assert_true(o->help && *o->help);
        bool number = o->type == OPTION_SIZE || o->type == OPTION_NUMBER || o->type == OPTION_NUMBERS ||
                      o->type == OPTION_EXTENT || o->type == OPTION_INTERVAL;
        assert_int_equal(o->range != NULL, number);
        assert_int_equal(o->choices != NULL, o->type == OPTION_CHOICE);
        if (o->type == OPTION_SWITCH || o->type == OPTION_INTERVAL) assert_non_null(o->preset);
        const char *later = o->later, *piece;
        for (size_t length; (piece = option_next_choice(&later, &length));)
            assert_true(option_choice_index(o->choices, quote(piece, length).text) >= 0);
        bool used = false;
        for (size_t c = 0; c < train_table.command_count; c++)
            used |= option_choice_index(train_table.commands[c].groups, o->group) >= 0;
        assert_true(used);
        for (size_t k = 0; k < i; k++) assert_true(train_table.options[k].offset != o->offset);
        for (size_t k = 0; k + 1 < i; k++) /* groups are not torn apart */
            if (strcmp(train_table.options[k].group, o->group) == 0)
                assert_string_equal(train_table.options[i - 1].group, o->group);
    }
    assert_string_equal(train_table.commands[COMMAND_TRAIN].name, "train");
    assert_string_equal(train_table.commands[COMMAND_EVAL].name, "eval");
    assert_string_equal(train_table.commands[COMMAND_PREDICT].name, "predict");
    assert_string_equal(train_table.commands[COMMAND_COMPARE].name, "compare");
    assert_string_equal(train_table.commands[COMMAND_EXPORT].name, "export");
    assert_string_equal(train_table.commands[COMMAND_SIMULATE].name, "simulate");
    assert_string_equal(train_table.commands[COMMAND_PLAN].name, "plan");
    assert_string_equal(train_table.commands[COMMAND_ENV].name, "env");
    assert_string_equal(train_table.commands[COMMAND_HELP].name, "help");
}

/* Every documented option, by what it answers to a value: built, or not built yet. */
static void test_every_documented_option_is_there(void **state) {
    const char *built[] = {"data-path",
                           "dataset",
                           "augmentation",
                           "mean",
                           "std",
                           "shuffle",
                           "limit-train",
                           "limit-val",
                           "model",
                           "image-size",
                           "patch-size",
                           "embed-dim",
                           "depth",
                           "num-heads",
                           "mlp-ratio",
                           "num-classes",
                           "layer-norm-eps",
                           "gelu",
                           "pretrained",
                           "checkpoint",
                           "format",
                           "optimizer",
                           "learning-rate",
                           "weight-decay",
                           "beta1",
                           "beta2",
                           "eps",
                           "momentum",
                           "scheduler",
                           "warmup-steps",
                           "min-learning-rate",
                           "gradient-clipping",
                           "label-smoothing",
                           "drop-path",
                           "layer-decay",
                           "freeze-backbone",
                           "num-workers",
                           "logits",
                           "seed",
                           "batch-size",
                           "gradient-accumulation-steps",
                           "epochs",
                           "max-steps",
                           "strategy",
                           "strategies",
                           "nproc-per-node",
                           "device",
                           "backend",
                           "rendezvous-port",
                           "timeout",
                           "bucket-size-mb",
                           "gradient-reduction",
                           "prefetch",
                           "reshard-after-forward",
                           "activation-checkpointing",
                           "print-schedule",
                           "matmul",
                           "precision",
                           "reduce-dtype",
                           "tf32",
                           "cuda-graphs",
                           "deterministic",
                           "offload",
                           "threads-per-rank",
                           "output-dir",
                           "resume",
                           "log-interval",
                           "eval-interval",
                           "checkpoint-interval",
                           "checkpoint-interval-steps",
                           "keep-checkpoints",
                           "quiet",
                           "config"};
    const char *later[] = {"mixup",     "cutmix", "deepspeed-config", "cluster", "nodes", "sweep",
                           "straggler", "delay",  "jitter",           "json",    "trace", "trace-ranks"};
    assert_int_equal(train_table.count, COUNT(built) + COUNT(later));
    char word[64], message[128];
    for (size_t i = 0; i < COUNT(built); i++) {
        const option *o = options_find(&train_table, built[i], strlen(built[i]));
        assert_non_null(o);
        assert_false(o->not_built_yet);
    }
    for (size_t i = 0; i < COUNT(later); i++) {
        snprintf(word, sizeof word, "--%s=1", later[i]);
        snprintf(message, sizeof message, "--%s is not built yet", later[i]);
        parsed *p = PARSE(*state, word);
        assert_int_equal(p->failed, -1);
        assert_string_equal(p->e.text, message);
    }
}

static void test_defaults(void **state) {
    parsed *p = parse_words(*state, 0, NULL);
    if (p->failed) fail_msg("%s", p->e.text);
    const train_options *o = &p->o;
    assert_int_equal(o->state.command, COMMAND_TRAIN);
    assert_int_equal(o->dataset, CHOICE_DATASET_AUTO);
    assert_int_equal(o->augmentation, CHOICE_AUGMENTATION_BASIC);
    assert_int_equal(o->gelu, CHOICE_GELU_ERF);
    assert_int_equal(o->optimizer, CHOICE_OPTIMIZER_ADAMW);
    assert_int_equal(o->scheduler, CHOICE_SCHEDULER_COSINE);
    assert_int_equal(o->device, CHOICE_DEVICE_CPU);
    assert_int_equal(o->matmul, CHOICE_MATMUL_AUTO);
    assert_int_equal(o->precision, CHOICE_PRECISION_FP32);
    assert_true(o->shuffle && o->reshard_after_forward && !o->quiet && !o->trace &&
                !o->activation_checkpointing);
    assert_true(o->weight_decay == 0.05 && o->beta1 == 0.9 && o->beta2 == 0.999 && o->eps == 1e-8);
    assert_true(o->label_smoothing == 0 && o->drop_path == 0 && o->mixup == 0 && o->cutmix == 0);
    assert_true(o->gradient_clipping == 0 && o->min_learning_rate == 0 && o->layer_norm_eps == 1e-6);
    assert_int_equal(o->seed, 0);
    assert_int_equal(o->gradient_accumulation_steps, 1);
    assert_int_equal(o->nproc_per_node, 1);
    assert_int_equal(o->prefetch, 1);
    assert_int_equal(o->log_interval, 1);
    assert_int_equal(o->eval_interval, 1);
    assert_int_equal(o->checkpoint_interval, 1);
    assert_int_equal(o->keep_checkpoints, 3);
    /* unset: derived later */
    assert_int_equal(o->strategy, -1);
    assert_int_equal(o->backend, -1);
    assert_int_equal(o->gradient_reduction, -1);
    assert_int_equal(o->reduce_dtype, -1);
    assert_true(isnan(o->learning_rate) && isnan(o->mlp_ratio));
    assert_true(o->epochs == SIZE_MAX && o->max_steps == SIZE_MAX && o->batch_size == SIZE_MAX);
    assert_true(o->warmup_steps == SIZE_MAX && o->depth == SIZE_MAX && o->limit_train == SIZE_MAX);
    assert_true(o->mean.count == 0 && o->image_size.height == 0);
    assert_string_equal(o->data_path, "");
    assert_string_equal(o->output_dir, "");
    for (size_t i = 0; i < train_table.count; i++) assert_int_equal(o->state.source[i], OPTION_PRESET);
}

/* The constants of train_options.h are in the order of the table's texts. */
static void test_choices_and_constants_agree(void **state) {
    const struct {
        const char *words[2];
        size_t offset;
        int expected;
    } cases[] = {
#define CASE(option, field, name, constant) {{option, name}, offsetof(train_options, field), constant}
        CASE("--dataset", dataset, "auto", CHOICE_DATASET_AUTO),
        CASE("--dataset", dataset, "digits", CHOICE_DATASET_DIGITS),
        CASE("--dataset", dataset, "mnist", CHOICE_DATASET_MNIST),
        CASE("--dataset", dataset, "cifar10", CHOICE_DATASET_CIFAR10),
        CASE("--dataset", dataset, "imagefolder", CHOICE_DATASET_IMAGEFOLDER),
        CASE("--dataset", dataset, "synthetic", CHOICE_DATASET_SYNTHETIC),
        CASE("--augmentation", augmentation, "none", CHOICE_AUGMENTATION_NONE),
        CASE("--augmentation", augmentation, "basic", CHOICE_AUGMENTATION_BASIC),
        CASE("--gelu", gelu, "erf", CHOICE_GELU_ERF),
        CASE("--gelu", gelu, "tanh", CHOICE_GELU_TANH),
        CASE("--optimizer", optimizer, "adamw", CHOICE_OPTIMIZER_ADAMW),
        CASE("--optimizer", optimizer, "sgd", CHOICE_OPTIMIZER_SGD),
        CASE("--scheduler", scheduler, "cosine", CHOICE_SCHEDULER_COSINE),
        CASE("--scheduler", scheduler, "linear", CHOICE_SCHEDULER_LINEAR),
        CASE("--scheduler", scheduler, "constant", CHOICE_SCHEDULER_CONSTANT),
        CASE("--strategy", strategy, "single", CHOICE_STRATEGY_SINGLE),
        CASE("--strategy", strategy, "dp", CHOICE_STRATEGY_DP),
        CASE("--strategy", strategy, "ddp", CHOICE_STRATEGY_DDP),
        CASE("--device", device, "cpu", CHOICE_DEVICE_CPU),
        CASE("--backend", backend, "local", CHOICE_BACKEND_LOCAL),
        CASE("--gradient-reduction", gradient_reduction, "last", CHOICE_REDUCTION_LAST),
        CASE("--gradient-reduction", gradient_reduction, "every", CHOICE_REDUCTION_EVERY),
        CASE("--matmul", matmul, "auto", CHOICE_MATMUL_AUTO),
        CASE("--backend", backend, "mpi", CHOICE_BACKEND_MPI),
        CASE("--backend", backend, "nccl", CHOICE_BACKEND_NCCL),
        CASE("--matmul", matmul, "own", CHOICE_MATMUL_OWN),
        CASE("--matmul", matmul, "openblas", CHOICE_MATMUL_OPENBLAS),
        CASE("--precision", precision, "fp32", CHOICE_PRECISION_FP32),
        CASE("--precision", precision, "bf16", CHOICE_PRECISION_BF16),
        CASE("--precision", precision, "fp16", CHOICE_PRECISION_FP16),
        CASE("--reduce-dtype", reduce_dtype, "fp32", CHOICE_PRECISION_FP32),
        CASE("--reduce-dtype", reduce_dtype, "bf16", CHOICE_PRECISION_BF16),
        CASE("--reduce-dtype", reduce_dtype, "fp16", CHOICE_PRECISION_FP16),
#undef CASE
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        parsed *p = parse_words(*state, 2, cases[i].words);
        if (p->failed) fail_msg("%s", p->e.text);
        const int *field = (const int *)((const char *)&p->o + cases[i].offset);
        assert_int_equal(*field, cases[i].expected);
        assert_string_equal(options_choice(&train_table, &p->o, field).text, cases[i].words[1]);
        assert_true(options_given(&train_table, &p->o, field));
    }
    const struct {
        const char *option, *name;
        int expected;
    } later[] = {
        {"augmentation", "imagenet", CHOICE_AUGMENTATION_IMAGENET},
    };
    for (size_t i = 0; i < COUNT(later); i++) {
        char word[64], message[128];
        const option *o = options_find(&train_table, later[i].option, strlen(later[i].option));
        assert_int_equal(option_choice_index(o->choices, later[i].name), later[i].expected);
        snprintf(word, sizeof word, "--%s=%s", later[i].option, later[i].name);
        snprintf(message, sizeof message, "--%s %s is not built yet", later[i].option, later[i].name);
        parsed *p = PARSE(*state, word);
        assert_int_equal(p->failed, -1);
        assert_string_equal(p->e.text, message);
    }
    parsed *p = parse_words(*state, 0, NULL);
    assert_string_equal(options_choice(&train_table, &p->o, &p->o.strategy).text, ""); /* unset */
}

/* --------------------------------------------------------------------------------------- the command line */

static void test_every_type_in_both_spellings(void **state) {
    parsed *p = *state;
    PARSE_OK(p, "--epochs", "3", "--batch-size=64", "--learning-rate", "1e-3", "--mean=.5,-0.25,1", "--std",
             "2", "--image-size", "32x48", "--model=vit_tiny_patch16_224", "--no-shuffle", "--quiet");
    assert_int_equal(p->o.epochs, 3);
    assert_int_equal(p->o.batch_size, 64);
    assert_true(p->o.learning_rate == 1e-3);
    assert_int_equal(p->o.mean.count, 3);
    assert_true(p->o.mean.values[0] == 0.5 && p->o.mean.values[1] == -0.25 && p->o.mean.values[2] == 1);
    assert_int_equal(p->o.std.count, 1);
    assert_true(p->o.std.values[0] == 2);
    assert_int_equal(p->o.image_size.height, 32);
    assert_int_equal(p->o.image_size.width, 48);
    assert_string_equal(p->o.model, "vit_tiny_patch16_224");
    assert_true(!p->o.shuffle && p->o.quiet);
    assert_true(options_given(&train_table, &p->o, &p->o.shuffle));
    assert_false(options_given(&train_table, &p->o, &p->o.depth));
    PARSE_OK(p, "--image-size=64", "--data-path", "-", "--mean", "-0.5", "--output-dir=--odd", "--model=a=b");
    assert_true(p->o.image_size.height == 64 && p->o.image_size.width == 64);
    assert_string_equal(p->o.data_path, "-");
    assert_true(p->o.mean.values[0] == -0.5);
    assert_string_equal(p->o.output_dir, "--odd");
    assert_string_equal(p->o.model, "a=b");
}

static void test_last_of_several_wins(void **state) {
    parsed *p = *state;
    PARSE_OK(p, "--seed=1", "--seed=2", "--no-shuffle", "--shuffle", "--mean=1,2,3", "--mean=4");
    assert_int_equal(p->o.seed, 2);
    assert_true(p->o.shuffle);
    assert_int_equal(p->o.mean.count, 1);
}

static void test_limits_of_ranges_are_accepted(void **state) {
    parsed *p = *state;
    PARSE_OK(p, "--seed=9007199254740991", "--label-smoothing=1", "--drop-path=0",
             "--beta1=0.9999999999999999", "--nproc-per-node=4096", "--epochs=1", "--eps=0",
             "--learning-rate=1e308");
    assert_int_equal(p->o.seed, 9007199254740991u);
    PARSE_OK(p, "--seed=0", "--seed=007", "--warmup-steps=0", "--learning-rate=1e-400", "--learning-rate=.5");
    assert_int_equal(p->o.seed, 7);
}

static void test_bad_command_lines(void **state) {
    const struct {
        const char *words[4], *message;
    } cases[] = {
        {{"--epohcs", "3"}, "unknown option --epohcs, did you mean --epochs?"},
        {{"--batchsize=3"}, "unknown option --batchsize, did you mean --batch-size?"},
        {{"--lerning-rate"}, "unknown option --lerning-rate, did you mean --learning-rate?"},
        {{"--learning_rate", "1"}, "unknown option --learning_rate, did you mean --learning-rate?"},
        {{"--Epochs", "3"}, "unknown option --Epochs, did you mean --epochs?"},
        {{"--no-shufle"}, "unknown option --no-shufle, did you mean --no-shuffle?"},
        {{"-epochs", "3"}, "unknown option -epochs, did you mean --epochs?"},
        {{"---epochs", "3"}, "unknown option ---epochs, did you mean --epochs?"},
        {{"-"}, "unknown option -, did you mean"},
        {{"--"}, "unknown option --, did you mean"},
        {{"--=3"}, "unknown option --, did you mean"},
        {{"--no-"}, "unknown option --no-, did you mean"},
        {{"--epochs"}, "--epochs: found no value, expected a whole number in [1, inf)"},
        {{"--epochs", "--quiet"}, "--epochs: found no value, expected a whole number in [1, inf)"},
        {{"--epochs="}, "--epochs: found '', expected a whole number in [1, inf)"},
        {{"--epochs=0"}, "--epochs: found '0', expected a whole number in [1, inf)"},
        {{"--epochs", "-1"}, "--epochs: found '-1', expected a whole number in [1, inf)"},
        {{"--epochs=+1"}, "--epochs: found '+1', expected a whole number"},
        {{"--epochs= 1"}, "--epochs: found ' 1', expected a whole number"},
        {{"--epochs=1 "}, "--epochs: found '1 ', expected a whole number"},
        {{"--epochs=1e3"}, "--epochs: found '1e3', expected a whole number"},
        {{"--epochs=0x10"}, "--epochs: found '0x10', expected a whole number"},
        {{"--epochs=1.0"}, "--epochs: found '1.0', expected a whole number"},
        {{"--epochs=ma\ny"}, "--epochs: found 'ma?y', expected a whole number"},
        {{"--seed=9007199254740992"}, "--seed: found '9007199254740992', expected a whole number"},
        {{"--seed=18446744073709551616"}, "--seed: found '18446744073709551616', expected a whole number"},
        {{"--seed=99999999999999999999999999"}, "--seed: found '99999999999999999999999999', expected"},
        {{"--nproc-per-node=4097"}, "--nproc-per-node: found '4097', expected a whole number in [1, 4096]"},
        {{"--learning-rate=nan"}, "--learning-rate: found 'nan', expected a number in [0, inf)"},
        {{"--learning-rate=inf"}, "--learning-rate: found 'inf', expected a number in [0, inf)"},
        {{"--learning-rate=-1e-3"}, "--learning-rate: found '-1e-3', expected a number in [0, inf)"},
        {{"--learning-rate=1e999"}, "--learning-rate: found '1e999', expected a number in [0, inf)"},
        {{"--learning-rate=1e-3x"}, "--learning-rate: found '1e-3x', expected a number"},
        {{"--learning-rate=0x1p-3"}, "--learning-rate: found '0x1p-3', expected a number"},
        {{"--learning-rate=1,5"}, "--learning-rate: found '1,5', expected a number"},
        {{"--learning-rate=e"}, "--learning-rate: found 'e', expected a number"},
        {{"--beta1=1"}, "--beta1: found '1', expected a number in [0, 1)"},
        {{"--label-smoothing=1.1"}, "--label-smoothing: found '1.1', expected a number in [0, 1]"},
        {{"--mlp-ratio=0"}, "--mlp-ratio: found '0', expected a number in (0, inf)"},
        {{"--mean=1,2"}, "--mean: found '1,2', expected one number or three (a,b,c) in (-inf, inf)"},
        {{"--mean=1,2,3,4"}, "--mean: found '1,2,3,4', expected one number or three"},
        {{"--mean=1,,3"}, "--mean: found '1,,3', expected one number or three"},
        {{"--mean=1,2,"}, "--mean: found '1,2,', expected one number or three"},
        {{"--std=1,0,1"}, "--std: found '1,0,1', expected one number or three (a,b,c) in (0, inf)"},
        {{"--image-size=0"}, "--image-size: found '0', expected N or HxW, whole numbers in [1, inf)"},
        {{"--image-size=32x"}, "--image-size: found '32x', expected N or HxW"},
        {{"--image-size=x32"}, "--image-size: found 'x32', expected N or HxW"},
        {{"--image-size=32x32x3"}, "--image-size: found '32x32x3', expected N or HxW"},
        {{"--image-size=32X32"}, "--image-size: found '32X32', expected N or HxW"},
        {{"--data-path="}, "--data-path: found '', expected 1 to 4095 bytes of UTF-8"},
        {{"--data-path=\xFF"}, "expected 1 to 4095 bytes of UTF-8"},
        {{"--no-epochs"}, "--no-epochs: found --no- before an option with a value, expected --epochs"},
        {{"--no-epochs=3"}, "--no-epochs: found --no- before an option with a value, expected --epochs"},
        {{"--shuffle=true"}, "--shuffle: found the value 'true', expected none: --shuffle or --no-shuffle"},
        {{"--no-shuffle=1"}, "--no-shuffle: found the value '1', expected none: --shuffle or --no-shuffle"},
        {{"--optimizer=adam"}, "--optimizer: found 'adam', expected one of adamw|sgd; did you mean adamw"},
        {{"--strategy", "ddpp"},
         "--strategy: found 'ddpp', expected one of single|dp|ddp|zero1|zero2|zero3|fsdp; did you mean ddp"},
        {{"--dataset=mnist|cifar10"}, "--dataset: found 'mnist|cifar10', expected one of auto|digits|"},
        {{"--dataset="}, "--dataset: found '', expected one of auto|digits|"},
        {{"--augmentation", "imagenet"}, "--augmentation imagenet is not built yet"},
        {{"--activation-checkpointing=0"},
         "--activation-checkpointing: found '0', expected none, or a whole number in [1, inf)"},
        {{"--activation-checkpointing=x"}, "--activation-checkpointing: found 'x', expected none, or"},
        {{"--no-activation-checkpointing=2"}, "--no-activation-checkpointing: found the value '2'"},
        {{"--mixup", "0.8"}, "--mixup is not built yet"},
        {{"--mixup"}, "--mixup is not built yet"},
        {{"--mixup=0"}, "--mixup is not built yet"},
        {{"simulate", "--nodes=2"}, "simulate is not built yet"},
        {{"plan"}, "plan is not built yet"},
        {{"trian"}, "unknown command 'trian', did you mean train?"},
        {{"evaluate"}, "unknown command 'evaluate', did you mean eval?"},
        {{""}, "unknown command '', did you mean"},
        {{"--epochs=3", "eval"}, "found the argument 'eval', expected an option (a command comes first)"},
        {{"eval", "model"}, "found the argument 'model', expected an option (a command comes first)"},
        {{"--quiet", "3"}, "found the argument '3', expected an option"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        size_t count = 0;
        while (count < 4 && cases[i].words[count]) count++;
        parsed *p = parse_words(*state, count, cases[i].words);
        bool whole = strncmp(p->e.text, cases[i].message, strlen(cases[i].message)) == 0;
        if (p->failed != -1 ||
            !(whole || (cases[i].message[0] == 'e' && strstr(p->e.text, cases[i].message))))
            fail_msg("%s %s\nfound    %s\nexpected %s", cases[i].words[0], count > 1 ? cases[i].words[1] : "",
                     p->e.text, cases[i].message);
        assert_null(strchr(p->e.text, '\n'));
    }
}

/* Messages stay one readable line whatever was typed. */
static void test_long_words(void **state) {
    parsed *p = *state;
    char word[10000] = "--";
    memset(word + 2, 'x', sizeof word - 3);
    word[sizeof word - 1] = 0;
    assert_int_equal(PARSE(p, word)->failed, -1);
    assert_true(strlen(p->e.text) < 200 && strstr(p->e.text, "did you mean --"));
    assert_int_equal(PARSE(p, word + 2)->failed, -1);
    assert_true(strlen(p->e.text) < 200);
    memcpy(word, "--data-path=", 12);
    assert_int_equal(PARSE(p, word)->failed, -1);
    assert_true(strlen(p->e.text) < 200);
    word[12 + 4095] = 0;
    PARSE_OK(p, word);
    assert_int_equal(strlen(p->o.data_path), 4095);
    word[12 + 4095] = 'x';
    word[12 + 4096] = 0;
    assert_int_equal(PARSE(p, word)->failed, -1);
}

static void test_commands_and_arguments(void **state) {
    parsed *p = *state;
    PARSE_OK(p, "train");
    assert_int_equal(p->o.state.command, COMMAND_TRAIN);
    PARSE_OK(p, "eval", "--checkpoint", "runs/x");
    assert_int_equal(p->o.state.command, COMMAND_EVAL);
    assert_string_equal(p->o.checkpoint, "runs/x");
    PARSE_OK(p, "env");
    assert_int_equal(p->o.state.command, COMMAND_ENV);
    PARSE_OK(p, "help");
    assert_int_equal(p->o.state.command, COMMAND_HELP);
    assert_int_equal(p->o.state.argument_count, 0);
    PARSE_OK(p, "help", "--quiet", "model", "--seed", "3", "more");
    assert_int_equal(p->o.state.argument_count, 2);
    assert_string_equal(p->o.state.arguments[0], "model");
    assert_string_equal(p->o.state.arguments[1], "more");
    PARSE_OK(p, "--help", "eval");
    assert_int_equal(p->o.state.command, COMMAND_HELP);
    assert_string_equal(p->o.state.arguments[0], "eval");
    PARSE_OK(p, "-h");
    assert_int_equal(p->o.state.command, COMMAND_HELP);
    PARSE_OK(p, "eval", "--seed", "3", "--help"); /* as "help eval" */
    assert_int_equal(p->o.state.command, COMMAND_HELP);
    assert_int_equal(p->o.state.argument_count, 1);
    assert_string_equal(p->o.state.arguments[0], "eval");
    PARSE_OK(p, "--seed", "3", "--help");
    assert_int_equal(p->o.state.command, COMMAND_HELP);
    assert_int_equal(p->o.state.argument_count, 0);
}

/* ------------------------------------------------------------------------------------ configuration files */

static int parse_text(parsed *p, const char *text) {
    return p->failed = options_parse_json(&train_table, text, strlen(text), "f.json", &p->o, &p->e);
}

static void test_flat_configuration(void **state) {
    parsed *p = parse_words(*state, 0, NULL);
    if (parse_text(
            p, "{\"epochs\": 7, \"learning-rate\": 1e-3, \"shuffle\": false, \"dataset\": \"mnist\","
               " \"mean\": [0.1, 0.2, 0.3], \"std\": 0.5, \"image-size\": \"28x32\", \"model\": \"m\","
               " \"output-dir\": \"o\", \"depth\": null, \"seed\": 9007199254740991, \"batch-size\": 1e2}"))
        fail_msg("%s", p->e.text);
    assert_int_equal(p->o.epochs, 7);
    assert_true(p->o.learning_rate == 1e-3 && !p->o.shuffle);
    assert_int_equal(p->o.dataset, CHOICE_DATASET_MNIST);
    assert_true(p->o.mean.count == 3 && p->o.mean.values[1] == 0.2 && p->o.std.count == 1);
    assert_true(p->o.image_size.height == 28 && p->o.image_size.width == 32);
    assert_string_equal(p->o.output_dir, "o");
    assert_int_equal(p->o.depth, SIZE_MAX);
    assert_int_equal(p->o.seed, 9007199254740991u);
    assert_int_equal(p->o.batch_size, 100);
    assert_true(options_given(&train_table, &p->o, &p->o.epochs));
    assert_false(options_given(&train_table, &p->o, &p->o.depth));
    if (parse_text(p, "{\"image-size\": 64}")) fail_msg("%s", p->e.text);
    assert_int_equal(p->o.image_size.width, 64);
}

static void test_configuration_of_a_run(void **state) {
    parsed *p = parse_words(*state, 0, NULL);
    if (parse_text(p, "{\"options\": {\"epochs\": 7, \"output-dir\": \"runs/a\", \"resume\": \"auto\","
                      " \"config\": \"other.json\"}, \"run\": {\"version\": 3}}"))
        fail_msg("%s", p->e.text);
    assert_int_equal(p->o.epochs, 7);
    assert_string_equal(p->o.output_dir, "");
    assert_string_equal(p->o.resume, "");
    assert_string_equal(p->o.config, "");
}

/* A switch that may have a number, from the command line and to and from JSON. */
static void test_intervals(void **state) {
    const struct {
        const char *words[3];
        size_t expected;
        const char *json;
    } cases[] = {
        {{"--quiet"}, 0, "false"},
        {{"--activation-checkpointing"}, 1, "true"},
        {{"--activation-checkpointing", "--quiet"}, 1, "true"},
        {{"--activation-checkpointing", "3"}, 3, "3"},
        {{"--activation-checkpointing=4"}, 4, "4"},
        {{"--activation-checkpointing=4", "--no-activation-checkpointing"}, 0, "false"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        size_t count = 0;
        while (count < 3 && cases[i].words[count]) count++;
        parsed *p = parse_words(*state, count, cases[i].words);
        assert_int_equal(p->failed, 0);
        assert_int_equal(p->o.activation_checkpointing, cases[i].expected);
        const option *o = options_of_field(&train_table, &p->o, &p->o.activation_checkpointing);
        cJSON *json = option_to_json(&train_table, o, &p->o);
        char *text = cJSON_PrintUnformatted(json), configuration[64];
        assert_string_equal(text, cases[i].json);
        snprintf(configuration, sizeof configuration, "{\"activation-checkpointing\": %s}", text);
        free(text);
        cJSON_Delete(json);
        p = parse_words(*state, 0, NULL);
        assert_int_equal(parse_text(p, configuration), 0);
        assert_int_equal(p->o.activation_checkpointing, cases[i].expected);
    }
    assert_int_equal(parse_text(parse_words(*state, 0, NULL), "{\"activation-checkpointing\": 0}"), -1);
}

/* A resumed training keeps some options; others may change, and so may how a file spells a number. */
static void test_options_of_a_training(void **state) {
    const struct {
        const char *written, *message;
    } cases[] = {
        {"{\"seed\": 3, \"embed-dim\": 64.0, \"epochs\": 9, \"mean\": [0.5]}", NULL},
        {"{}", NULL},
        {"{\"seed\": 4}",
         "s.json: found seed 4, asked for is 3: a training that is resumed keeps its --seed"},
        {"{\"mean\": [0.25]}", "s.json: found mean [0.25], asked for is [0.5]"},
        {"{\"optimizer\": \"sgd\"}", "s.json: found optimizer \"sgd\", asked for is \"adamw\""},
        {"{\"shuffle\": null}", "s.json: found shuffle null, asked for is true"},
    };
    const char *words[] = {"--seed=3", "--embed-dim=64", "--mean=0.5"};
    for (size_t i = 0; i < COUNT(cases); i++) {
        parsed *p = parse_words(*state, 3, words);
        cJSON *written = cJSON_Parse(cases[i].written);
        int failed = options_same_training(&train_table, &p->o, written, "s.json", &p->e);
        cJSON_Delete(written);
        assert_int_equal(failed, cases[i].message ? -1 : 0);
        if (cases[i].message && strncmp(p->e.text, cases[i].message, strlen(cases[i].message)))
            fail_msg("%s", p->e.text);
    }
}

static void test_configuration_knows_what_is_not_built(void **state) {
    parsed *p = parse_words(*state, 0, NULL);
    if (parse_text(p, "{\"mixup\": 0, \"trace\": false, \"cluster\": null, \"format\": null, \"nodes\": 1}"))
        fail_msg("%s", p->e.text);
    const char *const texts[][2] = {
        {"{\"mixup\": 0.8}", "f.json: mixup is not built yet"},
        {"{\"cluster\": \"p5\"}", "f.json: cluster is not built yet"},
        {"{\"trace\": true}", "f.json: trace is not built yet"},
        {"{\"augmentation\": \"imagenet\"}", "f.json: augmentation imagenet is not built yet"},
    };
    for (size_t i = 0; i < COUNT(texts); i++) {
        assert_int_equal(parse_text(p, texts[i][0]), -1);
        assert_string_equal(p->e.text, texts[i][1]);
    }
}

static void test_bad_configurations(void **state) {
    parsed *p = parse_words(*state, 0, NULL);
    const char *const texts[][2] = {
        {"", "f.json: found invalid or truncated JSON near byte 0 of 0"},
        {"{\"epochs\": 3", "f.json: found invalid or truncated JSON near byte 12 of 12"},
        {"{\"epochs\": 3,}", "f.json: found invalid or truncated JSON near byte 14 of 14"},
        {"{\"epochs\": 03}", "f.json: found a malformed number at byte 11 of 14, expected valid JSON"},
        {"[]", "f.json: found an array, expected an object of options"},
        {"3", "f.json: found a number, expected an object of options"},
        {"{\"options\": []}", "f.json: unknown option options, did you mean"},
        {"{\"epohcs\": 3}", "f.json: unknown option epohcs, did you mean epochs?"},
        {"{\"--epochs\": 3}", "f.json: unknown option --epochs, did you mean epochs?"},
        {"{\"no-shuffle\": true}", "f.json: unknown option no-shuffle, did you mean shuffle?"},
        {"{\"\": 3}", "f.json: unknown option , did you mean"},
        {"{\"a\\nb\": 3}", "f.json: unknown option a?b, did you mean"},
        {"{\"options\": {\"epohcs\": 3}}", "f.json: unknown option epohcs, did you mean epochs?"},
        {"{\"epochs\": 3, \"epochs\": 4}", "f.json: found the key 'epochs' twice, expected it once"},
        {"{\"epochs\": \"3\"}", "f.json: epochs: found a string, expected a whole number in [1, inf)"},
        {"{\"epochs\": true}", "f.json: epochs: found true or false, expected a whole number in [1, inf)"},
        {"{\"epochs\": {}}", "f.json: epochs: found an object, expected a whole number in [1, inf)"},
        {"{\"epochs\": 3.5}", "f.json: epochs: found '3.5', expected a whole number in [1, inf)"},
        {"{\"epochs\": -3}", "f.json: epochs: found '-3', expected a whole number in [1, inf)"},
        {"{\"epochs\": 0}", "f.json: epochs: found '0', expected a whole number in [1, inf)"},
        {"{\"epochs\": 1e999}", "f.json: epochs: found 'inf', expected a whole number in [1, inf)"},
        {"{\"seed\": 9007199254740993}", "f.json: seed: found '9007199254740992', expected a whole number"},
        {"{\"beta1\": 1}", "f.json: beta1: found '1', expected a number in [0, 1)"},
        {"{\"shuffle\": 1}", "f.json: shuffle: found a number, expected true or false"},
        {"{\"shuffle\": \"true\"}", "f.json: shuffle: found a string, expected true or false"},
        {"{\"dataset\": 1}", "f.json: dataset: found a number, expected one of auto|digits|"},
        {"{\"dataset\": \"minst\"}", "f.json: dataset: found 'minst', expected one of "
                                     "auto|digits|mnist|cifar10|imagefolder|synthetic; did you mean mnist"},
        {"{\"model\": 3}", "f.json: model: found a number, expected 1 to 4095 bytes of UTF-8"},
        {"{\"model\": \"\"}", "f.json: model: found '', expected 1 to 4095 bytes of UTF-8"},
        {"{\"mean\": \"0.5\"}", "f.json: mean: found a string, expected one number or three"},
        {"{\"mean\": []}", "f.json: mean: found '', expected one number or three"},
        {"{\"mean\": [1, 2]}", "f.json: mean: found '1,2', expected one number or three"},
        {"{\"mean\": [1, 2, 3, 4]}", "f.json: mean: found '1,2,3,4', expected one number or three"},
        {"{\"mean\": [1, null, 3]}", "f.json: mean: found an array, expected one number or three"},
        {"{\"mean\": [[1]]}", "f.json: mean: found an array, expected one number or three"},
        {"{\"image-size\": [32, 32]}", "f.json: image-size: found an array, expected N or HxW"},
        {"{\"config\": \"g.json\"}", "f.json: found config, expected no further file to read"},
    };
    for (size_t i = 0; i < COUNT(texts); i++)
        if (parse_text(p, texts[i][0]) != -1 || strncmp(p->e.text, texts[i][1], strlen(texts[i][1])) != 0)
            fail_msg("%s\nfound    %s\nexpected %s", texts[i][0], p->e.text, texts[i][1]);
    char array[1000] = "{\"mean\": [0.1";
    for (size_t i = 0; i < 100; i++) strcat(array, ",1e-300");
    strcat(array, "]}");
    assert_int_equal(parse_text(p, array), -1);
}

static void test_command_line_wins_over_the_file(void **state) {
    parsed *p = *state;
    char path[] = "/tmp/test_options_XXXXXX";
    int fd = mkstemp(path);
    const char *text = "{\"epochs\": 7, \"seed\": 8, \"shuffle\": false}";
    assert_true(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text) && close(fd) == 0);
    for (int order = 0; order < 2; order++) {
        if (order == 0)
            PARSE(p, "--config", path, "--epochs", "3", "--shuffle");
        else
            PARSE(p, "--epochs", "3", "--shuffle", "--config", path);
        if (p->failed) fail_msg("%s", p->e.text);
        assert_int_equal(p->o.epochs, 3);
        assert_int_equal(p->o.seed, 8);
        assert_true(p->o.shuffle);
        assert_string_equal(p->o.config, path);
    }
    assert_int_equal(truncate(path, 12), 0);
    assert_int_equal(PARSE(p, "--config", path)->failed, -1);
    assert_true(strncmp(p->e.text, path, strlen(path)) == 0 && strstr(p->e.text, "near byte 12 of 12"));
    unlink(path);
    assert_int_equal(PARSE(p, "--config", "/nowhere/c.json")->failed, -1);
    assert_string_equal(p->e.text, "/nowhere/c.json: cannot be opened: No such file or directory");
    assert_int_equal(PARSE(p, "--config", "/tmp")->failed, -1);
    assert_string_equal(p->e.text, "/tmp: cannot be read: Is a directory");
    assert_int_equal(PARSE(p, "--config=/dev/zero")->failed, -1);
    assert_string_equal(p->e.text, "/dev/zero: found more than 1048576 bytes, expected no more");
}

/* What a run writes down runs again with the same values, derived ones included; what is unset is null. */
static void test_json_survives_a_round_trip(void **state) {
    parsed *p = *state;
    PARSE_OK(p, "--epochs=3", "--learning-rate=0.1", "--mean=.1,.2,.3", "--image-size=32x48",
             "--strategy=ddp", "--output-dir=runs/a \"b\"", "--seed=9007199254740991", "--no-shuffle",
             "--model=\xC3\xBC");
    p->o.learning_rate = 0.1 + 0.2; /* as the program derives defaults: written into the fields */
    p->o.weight_decay = 1.0 / 3;
    p->o.batch_size = 21;
    p->o.gradient_reduction = CHOICE_REDUCTION_LAST;
    cJSON *json = options_to_json(&train_table, &p->o), *root = cJSON_CreateObject();
    assert_int_equal(cJSON_GetArraySize(json), train_table.count);
    assert_true(cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(json, "depth")));
    assert_true(cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(json, "max-steps")));
    assert_string_equal(cJSON_GetObjectItemCaseSensitive(json, "gradient-reduction")->valuestring, "last");
    assert_string_equal(cJSON_GetObjectItemCaseSensitive(json, "image-size")->valuestring, "32x48");
    cJSON_AddItemToObject(root, "options", json);
    char *text = cJSON_Print(root), *again = NULL;
    cJSON_Delete(root);

    train_options first = p->o;
    parse_words(p, 0, NULL);
    if (parse_text(p, text)) fail_msg("%s", p->e.text);
    assert_true(p->o.learning_rate == 0.1 + 0.2 && p->o.weight_decay == 1.0 / 3);
    assert_int_equal(p->o.batch_size, 21);
    assert_int_equal(p->o.seed, 9007199254740991u);
    assert_int_equal(p->o.strategy, CHOICE_STRATEGY_DDP);
    assert_string_equal(p->o.output_dir, "");
    memcpy(p->o.output_dir, first.output_dir, sizeof first.output_dir);
    root = cJSON_CreateObject();
    cJSON_AddItemToObject(root, "options", options_to_json(&train_table, &p->o));
    again = cJSON_Print(root);
    assert_string_equal(again, text);
    cJSON_Delete(root);
    free(again);
    free(text);
}

/* --------------------------------------------------------------------------------------------------- help */

static char *help_text(const char *topic) {
    char *text = NULL;
    size_t size;
    error_text e;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    if (options_help(&train_table, topic, out, &e)) fail_msg("%s", e.text);
    fclose(out);
    return text;
}

static void test_help_shows_every_option_within_110_columns(void **state) {
    (void)state;
    char *text = help_text(NULL), part[128];
    for (size_t i = 0; i < train_table.count; i++) {
        const option *o = &train_table.options[i];
        snprintf(part, sizeof part, "\n  --%s%s%s",
                 o->type == OPTION_SWITCH || o->type == OPTION_INTERVAL ? "[no-]" : "", o->name,
                 o->type == OPTION_INTERVAL ? "[=N]\n" : " "); /* the one interval is too long for one line */
        char *found = strstr(text, part);
        if (!found) {
            fail_msg("no %s", o->name);
            return;
        }
        char *end = strstr(found + 1, "\n  --"); /* its own lines */
        size_t length = end ? (size_t)(end - found) : strlen(found);
        bool marked = false;
        for (size_t k = 0; k < length; k++) /* perhaps on two lines */
            marked |= strncmp(found + k, "(not", 4) == 0 &&
                      strncmp(found + k + 4 + strspn(found + k + 4, " \n"), "built", 5) == 0;
        assert_int_equal(marked, o->not_built_yet || o->later);
    }
    for (char *line = text; *line; line += strcspn(line, "\n") + 1) {
        assert_true(strcspn(line, "\n") <= 110);
        if (*line == ' ' && line[2] == ' ') assert_int_equal(strspn(line, " "), OPTIONS_INDENT); /* aligned */
        size_t length = strcspn(line, "\n");
        if (length) assert_true(line[length - 1] != ' ');
    }
    assert_non_null(strstr(text, "\ndata:\n"));
    assert_non_null(strstr(text, "update rule: adamw|sgd (default: adamw)\n"));
    assert_non_null(strstr(text, "(default: 1e-6; a loaded model's own)\n"));
    assert_non_null(strstr(text, "  plan [options]                    which strategies"));
    free(text);
}

static void test_help_of_one_command(void **state) {
    (void)state;
    char *text = help_text("eval");
    assert_true(strncmp(text, "usage: ./train eval --checkpoint PATH [options]\n\n", 49) == 0);
    assert_non_null(strstr(text, "\n  --checkpoint PATH "));
    assert_null(strstr(text, "--learning-rate"));
    assert_null(strstr(text, "simulate"));
    free(text);
    error_text e;
    const char *const cases[][2] = {
        {"modle", "unknown topic 'modle', did you mean help model?"},
        {"cluter", "unknown topic 'cluter', did you mean help cluster?"},
        {"simulation", "unknown topic 'simulation', did you mean help simulate?"},
        {"model", "unknown topic 'model', did you mean help model?"}}; /* the caller's */
    for (size_t i = 0; i < COUNT(cases); i++) {
        assert_int_equal(options_help(&train_table, cases[i][0], stdout, &e), -1);
        assert_string_equal(e.text, cases[i][1]);
    }
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, new_parsed, free_parsed)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_table_is_consistent),
        TEST(test_every_documented_option_is_there),
        TEST(test_defaults),
        TEST(test_choices_and_constants_agree),
        TEST(test_every_type_in_both_spellings),
        TEST(test_last_of_several_wins),
        TEST(test_limits_of_ranges_are_accepted),
        TEST(test_bad_command_lines),
        TEST(test_long_words),
        TEST(test_commands_and_arguments),
        TEST(test_flat_configuration),
        TEST(test_configuration_of_a_run),
        TEST(test_intervals),
        TEST(test_options_of_a_training),
        TEST(test_configuration_knows_what_is_not_built),
        TEST(test_bad_configurations),
        TEST(test_command_line_wins_over_the_file),
        TEST(test_json_survives_a_round_trip),
        TEST(test_help_shows_every_option_within_110_columns),
        TEST(test_help_of_one_command),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
