# metrics.jq - everything that must hold between the lines of a metrics.jsonl and the config.json beside it;
# prints what does not. tests/test_train.sh runs it, with --slurpfile config config.json and the numbers of
# training images ($images), validation images ($val) and channels of an image ($channels).

def near($a; $b): ($a - $b | fabs) <= 2e-8 * ($a | fabs) + 1e-12; # nine digits
def mean: add / length;
def check(condition; message): if condition then empty else message end;

def memory_keys: "parameters gradients optimizer activations communication workspace" / " "
    | map("\(.)_bytes", "\(.)_peak_bytes");
def expected: {
    start: "world_size global_batch_size parameters strategy device precision steps",
    step: "step epoch train_loss learning_rate grad_norm step_time_s images_per_s",
    eval: "step epoch images val_loss val_accuracy val_top5_accuracy val_precision val_recall val_f1",
    epoch: "epoch epoch_time_s train_loss data_time_s communication_time_s compute_time_s",
    memory: (["rank", "total_peak_bytes"] + memory_keys | join(" ")),
    communication: "rank op calls_per_step elements_per_step wire_bytes_per_step",
    checkpoint: "step path seconds",
    end: "steps seconds images_per_s best_val_accuracy resident_peak_bytes"} | map_values(. / " ");

. as $lines
| def lines($event): $lines | map(select(.event == $event));
$config[0].options as $o
| lines("start")[0] as $start | lines("end")[0] as $total
| lines("step") as $steps | lines("eval") as $evals | lines("epoch") as $epochs
| lines("memory") as $memory | lines("communication") as $traffic | lines("checkpoint") as $checkpoints

# The plan, from the options.
| $o["nproc-per-node"] as $N | $o["gradient-accumulation-steps"] as $M
| ($o["batch-size"] * $M * $N) as $global
| ($images / $global | floor) as $per_epoch
| ([$per_epoch * $o.epochs, $o["max-steps"] // infinite] | min) as $T
| def rate($t): # of step t = 0, 1, ...
    $o["warmup-steps"] as $W | $o["min-learning-rate"] as $min | $o["learning-rate"] as $lr
    | (($t - $W) / ([$T - $W, 1] | max)) as $done
    | if $t < $W then $lr * ($t + 1) / $W
      elif $o.scheduler == "constant" then $lr
      elif $o.scheduler == "linear" then $lr + ($min - $lr) * $done
      else $min + ($lr - $min) / 2 * (1 + ((1 | atan) * 4 * $done | cos)) end;
def due($interval): # steps after which something is done that is due after so many epochs
    [range(1; $T + 1) | select((. % $per_epoch == 0 and . / $per_epoch % $interval == 0) or . == $T)];
def parameters: # of a model with mlp ratio 4 and square images
    $o["embed-dim"] as $D | $o["patch-size"] as $P | $o["num-classes"] as $V
    | ($o["image-size"] / $P | floor | . * .) as $patches
    | $P * $P * $channels * $D + $D + $D + ($patches + 1) * $D + $o.depth * (12 * $D * $D + 13 * $D)
      + 2 * $D + $V * $D + $V;

# Keys and order.
# A step of fp16 has its loss scale, and no norm where that overflowed; NVML tells of a GPU what it can.
((["loss_scale"] | select($o.precision == "fp16")) // []) as $scale
| ((["gpu_utilization", "gpu_memory_bytes", "gpu_power_w", "gpu_temperature_c"] | select($o.device == "cuda")) // [])
    as $gpu
| ($lines[] | check((keys_unsorted - ["event"] | sort)
    == ((expected[.event] // []) + (if .event == "step" then $scale + $gpu else [] end) | sort); "keys of \(.)")),
($lines[] | check(del(.[$gpu[]], if $o.precision == "fp16" then .grad_norm else empty end) | all(.[]; . != null);
    "null in \(.)")),
(expected | keys[] | . as $e | check(any($lines[]; .event == $e); "no line of \($e)")),
check($lines[0].event == "start" and $lines[-1].event == "end"; "first and last line"),
($config[0].run | check((keys | map(select(startswith("NCCL_") | not))) == ["devices", "host", "libraries", "matrix_product", "threads", "version"];
    "run of config.json: \(.)")),

# start, steps
check($start.world_size == $N and $start.global_batch_size == $global and $start.steps == $T
    and $start.strategy == $o.strategy and $start.device == $o.device and $start.precision == $o.precision;
    "start: \($start)"),
check($start.parameters == parameters; "parameters: \($start.parameters), expected \(parameters)"),
check([$steps[].step] == [range(1; $T + 1) | select(. % $o["log-interval"] == 0 or . == $T)];
    "numbers of the steps"),
($steps[] | check(.epoch == ((.step - 1) / $per_epoch | floor); "epoch of step \(.step)")),
($steps[] | check(near(.learning_rate; rate(.step - 1));
    "learning rate \(.learning_rate) of step \(.step), expected \(rate(.step - 1))")),
($steps[] | check(near(.images_per_s; $global / .step_time_s); "images/s of step \(.step)")),
($steps[] | check(.train_loss > 0 and (.grad_norm == null or .grad_norm > 0); "loss or norm of step \(.step)")),

# evaluations, checkpoints, epochs
check([$evals[].step] == due($o["eval-interval"]); "steps of evaluations: \([$evals[].step])"),
($evals[] | check(.images == $val; "images of evaluation \(.step)")),
($evals[] | (.val_accuracy * $val) as $hits | check(($hits - ($hits | round) | fabs) < 1e-5
    and .val_accuracy <= .val_top5_accuracy and all(.val_top5_accuracy, .val_precision, .val_recall, .val_f1;
    . >= 0 and . <= 1); "scores of evaluation \(.step)")),
check([$checkpoints[].step] == (due($o["checkpoint-interval"])
    + [range(1; $T + 1) | select(. % ($o["checkpoint-interval-steps"] // infinite) == 0)] | unique);
    "steps of checkpoints: \([$checkpoints[].step])"),
($checkpoints[] | check(.path == "checkpoints/step-" + (.step + 100000000 | tostring | .[1:]);
    "path of checkpoint \(.step)")),
check([$epochs[].epoch] == [range($T / $per_epoch | ceil)]; "numbers of the epochs"),
($epochs[] | check((.epoch_time_s - .data_time_s - .communication_time_s - .compute_time_s | fabs) < 1e-6;
    "times of epoch \(.epoch)")),
($epochs[] | select($o["log-interval"] == 1) | .epoch as $e
    | check(near(.train_loss; [$steps[] | select(.epoch == $e).train_loss] | mean); "loss of epoch \($e)")),

# memory, traffic: what a stage of ZeRO keeps in N shards; P: bytes of all parameters, padding included
({zero1: 1, zero2: 2, zero3: 3}[$o.strategy] // 0) as $stage
| ($o["gradient-reduction"] == "every") as $every
| ($stage >= 2 and ($every or $M == 1)) as $cut_gradients
| (if $o.precision == "fp32" then 4 else 2 end) as $b # bytes of a number; --reduce-dtype is the precision
| ($memory[0].parameters_bytes * (if $stage == 3 then $N else 1 end)) as $P
| (check([$memory[].rank] == [range($N)]; "ranks of memory"),
($memory[] | . as $m | memory_keys[] | select(endswith("_peak_bytes"))
    | check($m[.] >= $m[sub("_peak"; "")]; "\(.) of rank \($m.rank) below what is in use")),
($memory[] | check(.total_peak_bytes >= .parameters_bytes + .gradients_bytes + .optimizer_bytes
    and $P >= $b * $start.parameters and .gradients_bytes >= $P / (if $cut_gradients then $N else 1 end);
    "memory of rank \(.rank)")),
($memory[]
    | (if $o.strategy == "dp" and .rank > 0 then 0 elif $o.optimizer == "sgd" then 1 else 2 end) as $states
    | check(.optimizer_bytes == ($states + if $b == 2 then 1 else 0 end) * 4 * $P / $b / (if $stage > 0 then $N else 1 end);
        "optimizer's memory of rank \(.rank)")),
(({single: ["control"], dp: ["broadcast", "control", "reduce"], ddp: ["all_reduce", "control"]}[$o.strategy]
    // ["all_gather", "control", "reduce_scatter"]) as $ops
    | range($N) as $r | [$traffic[] | select(.rank == $r).op] | sort
    | check(. == $ops; "operations of rank \($r): \(.)")),
($traffic[] | {all_reduce: (2 * ($N - 1) / $N), all_gather: (($N - 1) / $N),
               reduce_scatter: (($N - 1) / $N), control: (2 * ($N - 1) / $N * 2), # integers of 8 bytes
               reduce: (if .rank == 0 then 0 else 1 end),
               broadcast: (if .rank == 0 then $N - 1 else 0 end)}[.op] as $share
    | check((.wire_bytes_per_step - $share * (if .op == "control" then 4 else $b end) * .elements_per_step | fabs) < 1; "bytes of \(.op) of rank \(.rank)")),
($traffic[] | select(.op == "all_reduce" or .op == "reduce" or .op == "reduce_scatter")
    | check(.elements_per_step == (if $every then $M else 1 end) * $P / $b;
        "elements of \(.op) of rank \(.rank)")),
($traffic[] | select(.op == "all_gather" and $stage < 3)
    | check(.elements_per_step == $P / $b; "elements of \(.op) of rank \(.rank)")),
($traffic[] | select(.op == "all_gather" and $stage == 3) | .elements_per_step as $elements # the last unit stays
    | check($elements < $M * 2 * $P / $b and $elements >= $M * (2 * $P / $b - 16 * $N - ($o["embed-dim"] + 16)
        * ($o["num-classes"] + 2)); "elements of \(.op) of rank \(.rank)"))),

# end
check($total.steps == $T and near($total.images_per_s; $T * $global / $total.seconds)
    and $total.best_val_accuracy == ([$evals[].val_accuracy] | max); "end: \($total)")
