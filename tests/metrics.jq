# metrics.jq - everything that must hold between the lines of a metrics.jsonl and the config.json beside it; prints what
# does not. tests/test_train.sh runs it, with --slurpfile config config.json and the numbers of training images (images),
# validation images (val) and channels of an image (channels).
def near($a; $b): ($a - $b | fabs) <= 2e-8 * ($a | fabs) + 1e-12;
def mean: add / length;
def expected: {
    start: "world_size global_batch_size parameters strategy device precision steps",
    step: "step epoch train_loss learning_rate grad_norm step_time_s images_per_s",
    eval: "step epoch images val_loss val_accuracy val_top5_accuracy val_precision val_recall val_f1",
    epoch: "epoch epoch_time_s train_loss data_time_s communication_time_s compute_time_s",
    memory: ("rank total_peak_bytes " + ("parameters gradients optimizer activations communication workspace" / " "
        | map("\(.)_bytes \(.)_peak_bytes") | join(" "))),
    communication: "rank op calls_per_step elements_per_step wire_bytes_per_step",
    checkpoint: "step path seconds",
    end: "steps seconds images_per_s best_val_accuracy"} | map_values(. / " ");
$config[0].options as $o | $config[0].run as $run | . as $lines
| map(select(.event == "start"))[0] as $start | map(select(.event == "step")) as $steps
| map(select(.event == "eval")) as $evals | map(select(.event == "epoch")) as $epochs
| map(select(.event == "memory")) as $memory | map(select(.event == "communication")) as $traffic
| map(select(.event == "checkpoint")) as $checkpoints | map(select(.event == "end"))[0] as $total
| $o["nproc-per-node"] as $N | ($o["batch-size"] * $o["gradient-accumulation-steps"] * $N) as $global
| ($images / $global | floor) as $per_epoch | $o["warmup-steps"] as $W
| ([$per_epoch * $o.epochs, $o["max-steps"] // infinite] | min) as $T
| ($o["embed-dim"]) as $D | ($o["patch-size"]) as $P | ($o["num-classes"]) as $V
| (($o["image-size"] / $P | floor) | . * .) as $patches
| [ ($lines[] | select((keys_unsorted - ["event"] | sort) != (expected[.event] // [] | sort))
        | "keys of \(.)"),
    ($lines[] | select(any(.[]; . == null)) | "null in \(.)"),
    (expected | keys[] | . as $e | select(all($lines[]; .event != $e)) | "no line of \($e)"),
    (if $lines[0].event == "start" and $lines[-1].event == "end" then empty else "first and last line" end),
    (if ($run | keys) == ["devices", "host", "libraries", "matrix_product", "threads", "version"] then empty
        else "run of config.json" end),
    (if $start.world_size == $N and $start.global_batch_size == $global and $start.steps == $T
        and $start.strategy == $o.strategy and $start.device == "cpu" and $start.precision == "fp32" then empty
        else "start: \($start)" end),
    (($P * $P * $channels * $D + $D + $D + ($patches + 1) * $D + $o.depth * (12 * $D * $D + 13 * $D) + 2 * $D
        + $V * $D + $V) as $parameters
        | if $start.parameters == $parameters then empty else "parameters: expected \($parameters)" end),
    (if [$steps[].step] == [range(1; $T + 1) | select(. % $o["log-interval"] == 0 or . == $T)] then empty
        else "numbers of the steps" end),
    ($steps[] | select(.epoch != ((.step - 1) / $per_epoch | floor)) | "epoch of step \(.step)"),
    ($steps[] | (.step - 1) as $t | ($o["min-learning-rate"]) as $min | ($o["learning-rate"]) as $lr
        | (if $t < $W then $lr * ($t + 1) / $W elif $o.scheduler == "constant" then $lr
           elif $o.scheduler == "linear" then $lr + ($min - $lr) * ($t - $W) / ($T - $W)
           else $min + ($lr - $min) / 2 * (1 + ((1 | atan) * 4 * ($t - $W) / ($T - $W) | cos)) end) as $rate
        | select(near(.learning_rate; $rate) | not) | "learning rate \(.learning_rate) of step \(.step): \($rate)"),
    ($steps[] | select(near(.images_per_s; $global / .step_time_s) | not) | "images/s of step \(.step)"),
    ($steps[] | select(.train_loss <= 0 or .grad_norm <= 0) | "loss or norm of step \(.step)"),
    ([range(1; $T + 1) | select((. % $per_epoch == 0 and . / $per_epoch % $o["eval-interval"] == 0) or . == $T)]
        as $due | if [$evals[].step] == $due then empty else "evaluations \([$evals[].step]), expected \($due)" end),
    ($evals[] | select(.images != $val) | "images of evaluation \(.step)"),
    ($evals[] | (.val_accuracy * $val) as $hits | select(($hits - ($hits | round) | fabs) > 1e-5
        or .val_top5_accuracy < .val_accuracy or .val_top5_accuracy > 1 or .val_f1 < 0 or .val_f1 > 1
        or .val_precision > 1 or .val_recall > 1) | "scores of evaluation \(.step)"),
    ([range(1; $T + 1) | select((. % $per_epoch == 0 and . / $per_epoch % $o["checkpoint-interval"] == 0) or . == $T
        or . % ($o["checkpoint-interval-steps"] // infinite) == 0)] as $due
        | if [$checkpoints[].step] == $due then empty
          else "checkpoints \([$checkpoints[].step]), expected \($due)" end),
    ($checkpoints[] | (.step + 100000000 | tostring | .[1:]) as $n
        | select(.path != "checkpoints/step-\($n)") | "path of checkpoint \(.step)"),
    (if [$epochs[].epoch] == [range($T / $per_epoch | ceil)] then empty else "numbers of the epochs" end),
    ($epochs[] | select((.epoch_time_s - .data_time_s - .communication_time_s - .compute_time_s | fabs) > 1e-6)
        | "times of epoch \(.epoch)"),
    ($epochs[] | select($o["log-interval"] == 1) | .epoch as $e
        | select(near(.train_loss; [$steps[] | select(.epoch == $e).train_loss] | mean) | not)
        | "loss of epoch \(.epoch)"),
    (if [$memory[].rank] == [range($N)] then empty else "ranks of memory" end),
    ($memory[] | . as $m | expected.memory[] | select(endswith("_peak_bytes")) | sub("_peak_bytes"; "_bytes")
        | select($m[.] > $m[sub("_bytes"; "_peak_bytes")]) | "\(.) above its peak on rank \($m.rank)"),
    ($memory[] | select(.total_peak_bytes < .parameters_bytes + .gradients_bytes + .optimizer_bytes
        or .parameters_bytes < 4 * $start.parameters or .gradients_bytes < 4 * $start.parameters)
        | "memory of rank \(.rank)"),
    ($memory[] | (if $o.strategy == "dp" and .rank > 0 then 0 elif $o.optimizer == "sgd" then 1 else 2 end) as $states
        | select(.optimizer_bytes != $states * .parameters_bytes) | "optimizer's memory of rank \(.rank)"),
    ({single: ["control"], dp: ["broadcast", "control", "reduce"], ddp: ["all_reduce", "control"]}[$o.strategy] as $ops
        | range($N) as $r | select([$traffic[] | select(.rank == $r).op] | sort != $ops)
        | "operations of rank \($r)"),
    ($traffic[] | {all_reduce: (2 * ($N - 1) / $N), reduce: (if .rank == 0 then 0 else 1 end),
                   broadcast: (if .rank == 0 then $N - 1 else 0 end)}[.op] as $share
        | select($share and (near(.wire_bytes_per_step; $share * 4 * .elements_per_step) | not))
        | "bytes of \(.op) of rank \(.rank)"),
    ($traffic[] | select(.op == "all_reduce" or .op == "reduce")
        | (if $o["gradient-reduction"] == "every" then $o["gradient-accumulation-steps"] else 1 end) as $times
        | ($memory[0].gradients_bytes / 4) as $all # of which the slot for later micro-batches is a part
        | select(.elements_per_step < $times * $start.parameters or .elements_per_step > $times * $all)
        | "elements of \(.op) of rank \(.rank)"),
    (if $total.steps == $T and near($total.images_per_s; $T * $global / $total.seconds)
        and $total.best_val_accuracy == ([$evals[].val_accuracy] | max) then empty else "end: \($total)" end)
  ] | .[]
