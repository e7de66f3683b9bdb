#!/usr/bin/env python3
"""The sequence of loss scales that DeepSpeed's rules give: writes tests/golden/loss_scale.txt.

Rules as in deepspeed/runtime/fp16/loss_scaler.py (DynamicLossScaler.update_scale, after Megatron), written down here
from their description, in its variables. A line `new INITIAL LEAST WINDOW HYSTERESIS` begins a scaler; each further
line is a step: over or fine, the scale after it, 1 if it raises, and how many steps have been skipped.
"""
import random


class Scaler:
    def __init__(self, initial, least, window, hysteresis):
        self.cur_scale, self.min_scale, self.scale_window = initial, least, window
        self.delayed_shift = self.cur_hysteresis = hysteresis
        self.cur_iter, self.last_overflow_iter = 0, -1

    def update_scale(self, overflow):
        if overflow:
            if self.delayed_shift == 1 or self.cur_hysteresis == 1:
                if self.cur_scale == self.min_scale:
                    raise OverflowError
                self.cur_scale = max(self.cur_scale / 2, self.min_scale)
            else:
                self.cur_hysteresis -= 1
            self.last_overflow_iter = self.cur_iter
        else:
            stable_interval = (self.cur_iter - self.last_overflow_iter) - 1
            if stable_interval > 0 and stable_interval % self.scale_window == 0:
                self.cur_hysteresis = self.delayed_shift
                self.cur_scale *= 2
        self.cur_iter += 1


random.seed(0)
with open("tests/golden/loss_scale.txt", "w") as file:
    for settings, steps, chance in [((65536, 1, 1000, 2), 2100, 0), ((65536, 1, 10, 2), 500, 0.05),
                                    ((65536, 1, 10, 1), 500, 0.1), ((1024, 1, 4, 3), 500, 0.2),
                                    ((8, 1, 4, 2), 50, 0.9), ((65536, 1, 1000, 2), 30, 1)]:
        scaler, skipped = Scaler(*settings), 0
        print("new", *settings, file=file)
        for _ in range(steps):
            overflow, raises = random.random() < chance, 0
            skipped += overflow
            try:
                scaler.update_scale(overflow)
            except OverflowError:
                raises = 1
            print("over" if overflow else "fine", f"{scaler.cur_scale:.17g}", raises, skipped, file=file)
            if raises:
                break
