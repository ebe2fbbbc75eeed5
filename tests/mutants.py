"""Small faults in the sources, each as the exact text that stands there once and what stands there instead.

tests/mutate.py puts them in one at a time and runs a suite's tests, of which one at least has to fail.
tests/test_mutants.py sees to it that every text is still there.
"""

from __future__ import annotations

from typing import NamedTuple

_INTERPRETED = "triton-cpu and not opcheck and not bf16 and not f16 and not 100003 and not conv"
# The tests that a fault in such a place has to be found by: pytest's arguments, the environment before them.
SUITES = {
    "native": "test_native.py test_parity.py test_foreach.py test_instruction_sets.py -k 'not cuda and not triton and not 100003'",
    "triton": f"TRITON_INTERPRET=1 test_parity.py -k '{_INTERPRETED}'",
    "ptx": "test_triton_ptx.py test_triton_lists.py",
    "cuda": "test_cuda_ptx.py",
    "formulas": "test_oracle.py test_parity.py test_foreach.py test_dampening.py -k 'not cuda and not triton and not 100003'",
    "metrics": "test_regularizer.py test_compat.py test_oracle.py",
    "distributed": "test_distributed.py",
    "quantizers": "test_quantizers.py test_regularizer.py test_grouping.py",
    "layers": "test_layers.py test_attention.py test_prepare.py",
    "control": "test_alpha_control.py test_freezing.py",
    "schedules": "test_schedules.py",
    "prepare": "test_prepare.py test_discovery.py test_config.py test_layers.py",
    "convert": "test_convert.py test_attention.py",
    "calibrate": "test_calibrate.py",
    "monitor": "test_monitor.py test_layer_summary.py",
    "export": "test_export_bits.py test_export_packed.py test_export_onnx.py",
}


class Mutant(NamedTuple):
    """One fault. Of one that no test can find, ``equivalent`` tells why; it is not run."""

    name: str
    file: str
    old: str
    new: str
    suite: str
    equivalent: str = ""


LOOPS, BINS, CHUNK, SIMD = "csrc/cpu_loops.cpp", "csrc/cpu_bins.h", "csrc/cpu_chunk.h", "csrc/cpu_simd.h"
TASKS, BINDINGS, CALL = "csrc/cpu.cpp", "csrc/bindings.cpp", "csrc/bindings_call.h"
TRITON, TRITON_BINS, TRITON_SUMS = (f"qbr/kernels/triton_{name}.py" for name in ("kernels", "bins", "finalize"))
REFERENCE, OPS = "qbr/kernels/reference.py", "qbr/ops.py"
QUANTIZERS, LAYERS, REGULARIZER = "qbr/quantizers.py", "qbr/layers.py", "qbr/regularizer.py"
CONTROL, FREEZING, CALIBRATE, SKETCH = "qbr/alpha_control.py", "qbr/freezing.py", "qbr/calibrate.py", "qbr/sketch.py"

MUTANTS = [
    # ---- the CPU's loops ----
    Mutant("cpu: floor for round", LOOPS, "(code.c + 12582912.f) - 12582912.f", "(code.c - 0.5f + 12582912.f) - 12582912.f",
           "native"),
    Mutant("cpu: the tail counts in the bins", LOOPS, "code = keep_first(code, left, all(collect", "(void)(all(collect",
           "native"),
    Mutant("cpu: the tail counts as near", LOOPS, "size = keep_first(size, left, all(INFINITY))", "size = keep_first(size, left, VecF{})",
           "native"),
    Mutant("cpu: the bound of near", LOOPS, "less(size, step * 0.01f)", "less(size, step * 0.011f)", "native"),
    Mutant("cpu: v outside of the range in alpha's gradient", LOOPS, "gs * subtract_where(inside, code.b, v)",
           "gs * (code.b - v)", "native"),
    Mutant("cpu: the sign of the pull", LOOPS, "dy = with_g ? dy + pull : pull", "dy = with_g ? dy - pull : pull", "native"),
    Mutant("cpu: no mask of the clip", LOOPS, "select(not_above(xs, all(q.clip)), dy, VecF{})", "dy", "native"),
    Mutant("cpu: terms of the last channel are lost", LOOPS, "if (step_sums) step_sums[channel] += sum_lanes(terms.sum);",
           "if (step_sums && channel == 0) step_sums[channel] += sum_lanes(terms.sum);", "native"),
    Mutant("cpu: float sums never become double ones", BINS, "(ways_ == 8 ? 2048 : 4096)", "(1 << 30)", "native"),
    Mutant("cpu: eight tables where two fit", BINS, "levels * (j % ways_)", "levels * (j % 8)", "native"),
    Mutant("cpu: one element of the next channel", CHUNK, "first + n <= (run + 1) * layout.inner",
           "first + n <= (run + 1) * layout.inner + 1", "native"),
    Mutant("cpu: the channel after the last", CHUNK, "if (++channel == layout.channels) channel = 0;",
           "if (++channel > layout.channels) channel = 0;", "native"),
    Mutant("cpu: ties of float16 go up", CHUNK, "0xfff + ((a >> 13) & 1)", "0x1000", "native"),
    Mutant("cpu: ties of bfloat16 go down", CHUNK, "_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd)",
           "_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff + 0 * (int)sizeof(odd)))", "native"),
    Mutant("cpu: the sign of a step of -0", SIMD, "return f - zero;", "return f + zero;", "native"),
    Mutant("cpu: a NaN in no bin", SIMD, "_CMP_EQ_UQ", "_CMP_EQ_OQ", "native"),
    Mutant("cpu: 16 entries for 32 levels", SIMD, "if (levels <= 16) return vec(", "if (levels <= 32) return vec(", "native"),
    Mutant("cpu: the last task is left out", TASKS, "begin < numel; begin += length", "begin + kChunk <= numel; begin += length",
           "native"),
    Mutant("cpu: a row too few", TASKS, "i < rows.count; ++i", "i < std::min<int64_t>(rows.count, 5); ++i", "native"),
    Mutant("cpu: the sign of alpha's bin gradient", TASKS, "return -2.0 * (double(item.quant.qn) + k)",
           "return 2.0 * (double(item.quant.qn) + k)", "native"),
    Mutant("cpu: the first tensor's gradient scale", BINDINGS, "items[i].grad_scale = float(scales[i]);",
           "items[i].grad_scale = float(scales[0]);", "native"),
    Mutant("cpu: a table of bins that is too short", CALL, "bins.numel() == bins_length()", "bins.numel() <= bins_length()",
           "native"),
    # ---- Triton's kernels, in its interpreter ----
    Mutant("triton: one element of the next row", TRITON, "m_x = (o_c < C) & (o_i < inner)", "m_x = (o_c < C) & (o_i <= inner)",
           "triton"),
    Mutant("triton: a gradient where the ReLU is 0", TRITON, "(b_x <= 0) | (b_x > clip)", "(b_x < 0) | (b_x > clip)", "triton"),
    Mutant("triton: v outside of the range in alpha's gradient", TRITON, "b_g * (b_b - tl.where(m_in, b_v, 0.0))",
           "b_g * (b_b - b_v)", "triton"),
    Mutant("triton: binary's code of 0", TRITON, "tl.where(b_v >= 0, 1.0, -1.0)", "tl.where(b_v > 0, 1.0, -1.0)", "triton"),
    Mutant("triton: what lies beyond is near", TRITON_BINS, "b_limit = tl.where(m_x, b_limit, 0.0)",
           "b_limit = tl.where(m_x, b_limit, 1.0)", "triton"),
    Mutant("triton: coarse squares for fine ones", TRITON_BINS, "_to_fixed(b_q, tl.where(m_fine, Q_FINE_ONE, Q_ONE))",
           "_to_fixed(b_q, Q_ONE)", "triton"),
    Mutant("triton: bins of one element", TRITON_SUMS, "b_n = tl.maximum(b_n, 1.0)", "b_n = tl.maximum(b_n, 2.0)", "triton"),
    Mutant("triton: a level too few", TRITON_SUMS, "for k in range(1, LEVELS - 1):", "for k in range(1, LEVELS - 2):",
           "triton"),
    Mutant("triton: an infinite step is the unit", TRITON_BINS, '(b_a < float("inf")) & (b_a > b_max)', "(b_a > b_max)",
           "triton"),
    Mutant("triton: a cell's square without its distance", "qbr/kernels/triton_shared.py", "fma.rn.f32 q, $3, $3, q;",
           "add.f32 q, q, $3;", "ptx"),
    # ---- CUDA's kernels, executed from PTX ----
    Mutant("cuda: v outside of the range in alpha's gradient", "csrc/cuda_lsq.cuh", "__fsub_rn(e.b, inside ? e.v : 0.f)",
           "__fsub_rn(e.b, e.v)", "cuda"),
    Mutant("cuda: a gradient where the ReLU is 0", "csrc/cuda_walk.cuh", "return (x <= r.masked) | (x > r.high);",
           "return (x < r.masked) | (x > r.high);", "cuda"),
    Mutant("cuda: a part too few", "csrc/cuda_lsq.cuh", "i < w.outer * w.segments; i += 32", "i + 1 < w.outer * w.segments; i += 32",
           "cuda"),
    Mutant("cuda: the upper end's distances", "csrc/cuda_bins.cuh", "else if (slot == levels - 1) end_s[1]",
           "else if (slot == levels - 2) end_s[1]", "cuda"),
    # ---- the formulas ----
    Mutant("reference: floor for round", REFERENCE, "b = v.clamp(qn, qp).round()", "b = v.clamp(qn, qp).floor()", "formulas"),
    Mutant("reference: a gradient where the ReLU is 0", REFERENCE, "_mask((y > 0) & (y <= clip), y)",
           "_mask((y >= 0) & (y <= clip), y)", "formulas"),
    Mutant("reference: v outside of the range in alpha's gradient", REFERENCE, "v_inside = torch.where(q.inside == 0, 0.0, q.v)",
           "v_inside = q.v", "formulas"),
    Mutant("reference: half of BR's gradient of alpha", REFERENCE, "return (-2.0 * (k / n) @ s_step)", "return (-1.0 * (k / n) @ s_step)",
           "formulas"),
    Mutant("reference: dampening's gradient without its codes", REFERENCE, "_sum_per_step(q.b * q.d, channel_axis)",
           "_sum_per_step(q.d, channel_axis)", "formulas"),
    Mutant("spec: the gradient scale without qp", "qbr/spec.py", "max(numel_per_step, 1) * max(self.qp, 1)",
           "max(numel_per_step, 1)", "formulas"),
    Mutant("ops: the loss's gradient does not reach alpha's", OPS, "dalpha = dalpha + dloss_dalpha * (grad_loss * br_to_alpha)",
           "dalpha = dalpha + dloss_dalpha * br_to_alpha", "formulas"),
    Mutant("ops: a fraction that is scaled", OPS, "return fraction * grad_scale if scaled else fraction",
           "return grad_scale if scaled else fraction", "formulas"),
    Mutant("ops: alpha_grad is lost in a list", OPS, "grad_scale = alpha_grads[i] * _grad_scale(x, alpha, spec)",
           "grad_scale = _grad_scale(x, alpha, spec)", "formulas"),
    Mutant("ops: channels from the end", OPS, "        axis %= x.dim()\n", "        axis = max(axis, 0)\n", "formulas"),
    Mutant("metrics: biased deviations", "qbr/metrics.py", "(q - s * s / n) / (n - 1)", "(q - s * s / n) / n", "metrics"),
    Mutant("metrics: effectiveness of a whole step", "qbr/metrics.py", "distance / (alpha / 2)", "distance / alpha", "metrics"),
    # ---- quantizers, layers, the regularizer ----
    Mutant("quantizers: the first step without its root", QUANTIZERS, "mean * (2.0 / math.sqrt(max(self.spec.qp, 1)))",
           "mean * (2.0 / max(self.spec.qp, 1))", "quantizers"),
    Mutant("quantizers: a step may shrink more", QUANTIZERS, "LARGEST_SHRINK = 10.0", "LARGEST_SHRINK = 100.0", "quantizers"),
    Mutant("quantizers: no least step", QUANTIZERS, "torch._foreach_clamp_min_(floors, SMALLEST_ALPHA)", "pass", "quantizers"),
    Mutant("quantizers: momentum moves a frozen step", QUANTIZERS,
           "            q.alpha.grad = None  # an optimizer", "            pass  # an optimizer", "control"),
    Mutant("quantizers: bins are kept without gradients", QUANTIZERS,
           "return self.collecting and self.training and torch.is_grad_enabled()",
           "return self.collecting and self.training", "quantizers"),
    Mutant("quantizers: a weight counts once a call", QUANTIZERS, '        if self.kind == "weight":\n            self._retained.clear()\n',
           "", "quantizers"),
    Mutant("quantizers: a cast rounds the step", QUANTIZERS, "return moved if moved.dtype == t.dtype else t.to(moved.device)",
           "return moved", "quantizers"),
    Mutant("quantizers: data before force", QUANTIZERS, "usable = usable & (self.init_state == 0)", "pass", "quantizers"),
    Mutant("layers: the value is another tensor", LAYERS, "same_key, same_value = key is query, value is key",
           "same_key, same_value = key is query, value is query", "layers"),
    Mutant("layers: no gradient at the clip", LAYERS, "torch.where(x > clip, clip, y)", "torch.where(x >= clip, clip, y)", "layers"),
    Mutant("layers: renormalising changes the weight", LAYERS, "torch.embedding_renorm_(weight.clone(), rows,",
           "torch.embedding_renorm_(weight, rows,", "convert"),
    Mutant("layers: an embedding without its padding", LAYERS, "F.embedding(x, weight, self.padding_idx, scale",
           "F.embedding(x, weight, None, scale", "layers"),
    Mutant("regularizer: metrics see the next step's alpha", REGULARIZER,
           "torch._foreach_mul([entry.bins.alpha for entry in entries], 1.0) if entries else []",
           "[entry.bins.alpha for entry in entries]", "quantizers"),
    Mutant("regularizer: an earlier forward is kept", REGULARIZER, "                module._retained = []\n            fresh",
           "                pass\n            fresh", "quantizers"),
    Mutant("grouping: a weight that has changed since", "qbr/grouping.py", "or ready.versions != (weight._version, alpha._version)",
           "or ready.versions[1] != alpha._version", "quantizers"),
    Mutant("distributed: activations' gradients do not shrink", QUANTIZERS,
           'return 1.0 if self.kind == "weight" else distributed.ranks() ** -0.5', "return 1.0", "distributed"),
    # ---- alphas' control, schedules ----
    Mutant("control: warm-up is an epoch shorter", CONTROL, "return self._epoch > self.warmup_epochs",
           "return self._epoch >= self.warmup_epochs", "control"),
    Mutant("control: weight decay of alphas", CONTROL, 'alpha_lr, "weight_decay": 0.0}', 'alpha_lr, "weight_decay": weight_decay}',
           "control"),
    Mutant("control: warm-up's losses are kept", CONTROL, "                quantizer.take_retained()\n",
           "                pass\n", "control"),
    Mutant("freezing: an epoch late", FREEZING, "return epoch >= at_epoch", "return epoch > at_epoch", "control"),
    Mutant("freezing: an absolute tolerance", FREEZING, "<= tolerance * then.to(now.device)", "<= tolerance", "control"),
    Mutant("freezing: a window that is too short", FREEZING, "history.get(epoch - self.plan.window)",
           "history.get(epoch - 1)", "control"),
    Mutant("schedules: beyond the end", "qbr/schedules.py", "(self.until - self.begin), 0.0), 1.0)",
           "(self.until - self.begin), 0.0), 2.0)", "schedules"),
    # ---- prepare, convert, calibrate ----
    Mutant("prepare: ties are broken", "qbr/prepare.py", "        if key not in made:\n", "        if True:\n", "prepare"),
    Mutant("prepare: quantizers in training mode", "qbr/prepare.py",
           "device=weight.device\n            ).train(each.module.training)", "device=weight.device\n            )", "prepare"),
    Mutant("convert: binary's code of 0", "qbr/convert.py", "torch.where(v >= 0, 1.0, -1.0) if", "torch.where(v > 0, 1.0, -1.0) if",
           "convert"),
    Mutant("convert: tied weights come apart", "qbr/convert.py", "            if key not in folded:\n",
           "            if True:\n", "convert"),
    Mutant("calibrate: small batches count as large ones", SKETCH, ".double() * count", ".double()", "calibrate"),
    Mutant("calibrate: the quantile's next bin", SKETCH, "share >= quantile * share[:, -1:]", "share > quantile * share[:, -1:]",
           "calibrate"),
    Mutant("calibrate: unusable steps are set", CALIBRATE, "quantizer.set_alpha(torch.where(usable, step, quantizer.alpha))",
           "quantizer.set_alpha(step)", "calibrate"),
    Mutant("calibrate: negative values are left out", SKETCH, "+ _BINS * (x < 0)", "+ 0 * (x < 0)", "calibrate"),
    # ---- monitor, export ----
    Mutant("monitor: the tail of a sum", "qbr/monitor.py", " + flat[whole:].sum()", "", "monitor"),
    Mutant("monitor: any turn is an oscillation", "qbr/monitor.py", "turned_back = turn & self.back", "turned_back = turn & 3",
           "monitor"),
    Mutant("monitor: a weight counts once a call", "qbr/monitor.py", "                if value == self._seen:\n",
           "                if False:\n", "monitor"),
    Mutant("export: the bits of the last byte", "qbr/export/bits.py", "if bits[whole:].any():", "if False:", "export"),
    Mutant("export: codes of a negative weight", "qbr/export/codes.py", "else v.clamp(spec.qn, spec.qp).round()",
           "else (v + 0.5).floor().clamp(spec.qn, spec.qp)", "export"),
    Mutant("export: a bit too wide", "qbr/export/codes.py", "return max(1, (len(spec.codes) - 1).bit_length())",
           "return max(1, len(spec.codes).bit_length())", "export"),
]  # fmt: skip
