"""A run from its flags to its report: checks, training, checkpoints, results.json, and the final test."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import qbr
from qbr import kernels
from qbr.freezing import mean_distance
from qbr.quantizers import quantizers

from . import checkpoints, data, distillation, exits, folders, histograms, logs, oscillation, processes, report, warmup
from .device import keep_freed_memory, pick_device
from .engine import Trainer, TrainingDiverged, check_batches
from .files import UserError, check_writable, write_json
from .lines import epoch_line, leaps
from .models import MODELS
from .options import (
    FLOAT_BITS,
    QUICK_BASELINE,
    baseline_parser,
    freeze,
    parse,
    plain,
    qat_config,
    resumed,
    without_br,
)
from .sources import commit
from .strength import expected_pull

BASELINE, QAT = "cifar10_baseline", "cifar10_qat_br"
NOT_PRETRAINED = "warning: no --pretrained-baseline: quantization-aware training starts from random weights"


def cli(parser: argparse.ArgumentParser, script: str, argv: Sequence[str] | None = None) -> int:
    """Run one script; its exit code, as exits.exit_code gives it."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def work() -> None:
        options, given = parse(parser, argv)
        with processes.joined(options.gpu):
            Run(script, options, given, shlex.join(["python", f"experiments/{script}.py", *argv])).go()

    return exits.exit_code(work, "the same command with --resume")


class Run:
    """One training run in one output folder. Making it checks everything and writes nothing; go() trains.

    Args:
        script: BASELINE or QAT.
        options: as parse() gives them.
        given: names of the flags that were given, for --resume.
        command: what was typed, for results.json.
        parent: the run that this one is the first part of; it has chosen the device and loaded the data.

    Raises:
        UserError: for anything that stands in the way of training.
    """

    def __init__(
        self,
        script: str,
        options: argparse.Namespace,
        given: set[str],
        command: str,
        parent: Run | None = None,
    ) -> None:
        self.script, self.command = script, command
        self.folder = options.output_dir
        checkpoint_folder = self.folder / folders.CHECKPOINTS
        self.best_path, self.last_path = (checkpoint_folder / f"{name}.pth" for name in ("best", "last"))
        processes.on_main(check_writable, self.folder, folders.CHECKPOINTS, folders.PLOTS)
        self.state = processes.on_main(folders.state_to_resume, self.folder, script, options)
        self.options = options = resumed(options, given, self.state["args"]) if self.state else options
        self.warm = None  # the end of another run's warm-up, where this one starts
        if self.state is None and getattr(options, "warmup_from", None) is not None:
            self.warm = processes.on_main(warmup.state, options)
        if options.tensorboard:
            logs.check_installed()
        if options.pretrained_baseline is not None and self.state is None:
            # Before data may be downloaded.
            processes.on_main(_check_checkpoint, options.pretrained_baseline, "--pretrained-baseline")
        self.device = parent.device if parent else pick_device(options.gpu)
        if self.device.type == "cpu":
            keep_freed_memory()
        if parent:
            self.splits = parent.splits
        else:
            with processes.first_on_each_machine(options.download):
                self.splits = data.load(
                    options.data,
                    download=options.download and processes.local_rank() == 0,
                    val_fraction=options.val_fraction,
                    limit=options.limit,
                    quiet=processes.rank() > 0,
                )
        if self.state:
            self._check_data()
        check_batches(len(self.splits.train), options)
        torch.manual_seed(options.seed)
        self.model = MODELS[options.model](len(self.splits.classes))
        self.epochs = options.epochs if script == BASELINE else options.qat_epochs
        self.first_run = None  # the float baseline that --quick trains before
        if self.state is None and self.warm is None:
            if options.pretrained_baseline is not None:
                self._load_float(options.pretrained_baseline)
            elif script == QAT and options.quick:
                self.first_run = self._quick_baseline()
        self.teacher, self.teacher_digest = self._teacher() if self.first_run is None else (None, None)

    def _check_data(self) -> None:
        """A run goes on with the images that it began with, wherever they are by now."""
        for key, now in (("classes", list(self.splits.classes)), ("images", self.splits.sizes)):
            before = self.state.get(key, now)  # an older checkpoint has no "images"
            if before != now:
                raise UserError(f"--data {self.options.data}: its {key} are {now}, and the run in {self.folder} began "
                                f"with {before}; name the same data")  # fmt: skip

    def _load_float(self, path) -> None:
        """Into rank 0's model, from which DistributedDataParallel gives it to the others."""
        was = processes.on_main(checkpoints.load_float, self.model, self.options.model, path)
        left, mine = (was or {}).get("val_fraction"), self.options.val_fraction
        if left is not None and left < mine:
            print(f"warning: {path} was trained with --val-fraction {left:g}, and so on some of the validation images "
                  f"of --val-fraction {mine:g}: what is chosen by them is chosen by images that were seen")  # fmt: skip

    def _quick_baseline(self) -> Run:
        """The float run that --quick starts from, in baseline/ under this one's folder."""
        values = vars(parse(baseline_parser(), ["--quick"])[0])
        values.update({name: value for name, value in vars(self.options).items() if name in values})
        values.update({name: QUICK_BASELINE[name] for name in ("epochs", "batch_size")})
        values.update({"lr": baseline_parser().get_default("lr"), "output_dir": self.folder / "baseline"})
        return Run(BASELINE, argparse.Namespace(**values), set(), self.command, self)

    def _teacher(self) -> tuple[nn.Module | None, str | None]:
        if not getattr(self.options, "distill", 0):
            return None, None
        path = self.options.pretrained_baseline or self.folder / "baseline" / folders.CHECKPOINTS / self.best_path.name
        teacher = distillation.teacher(self.model, self.options.model, path, self.state or self.warm)
        return teacher, distillation.digest(teacher)

    def go(self) -> dict[str, Any]:
        """Train, test, report; return what results.json holds."""
        with contextlib.ExitStack() as lock:
            return self._go(lock)

    def _go(self, lock: contextlib.ExitStack) -> dict[str, Any]:
        if self.first_run is not None:
            print("--quick without --pretrained-baseline: a short float baseline comes first")
            self.first_run.go()
            self._load_float(self.first_run.best_path)
            self.teacher, self.teacher_digest = self._teacher()
            print()
        trainer = self._trainer()
        processes.on_main(folders.take, self.folder, self.state is None, lock)
        history: list[dict[str, Any]] = []
        best: dict[str, Any] = {}
        if self.state:
            trainer.load_state_dict(self.state)
            history, best = self.state["history"], self.state["best"]
            if best["epoch"] == len(history):
                processes.on_main(folders.mend_best, self.best_path, self.state)
            self._keep_warmup(len(history))
            print(f"resuming after epoch {len(history)} of {self.epochs}")
            done = processes.on_main(self._finished_results)
            if done:
                self._finish(trainer, done)
                return done
        elif self.warm:
            trainer.load_state_dict(warmup.with_control(self.warm, trainer.control))
            history = self.warm["history"]
            print(f"warm-up (epochs 1 to {len(history)}) from {self.options.warmup_from}")
        elif self.script == QAT and self.options.alpha_init != "lsq":  # LSQ's are set in the first step
            trainer.calibrate(self.options.alpha_init)
        results = self._header(trainer)
        board = None
        if self.options.tensorboard and processes.rank() == 0:
            board = logs.TensorBoard(self.folder / "tensorboard", len(history) + 1)
        try:
            for epoch in range(len(history) + 1, self.epochs + 1):
                figures = self._epoch(trainer, epoch)
                history.append(figures)
                if self._begins_anew(epoch) or figures["val_acc"] is None or figures["val_acc"] > best["val_acc"]:
                    best = {"epoch": epoch, "val_acc": figures["val_acc"]}
                self._save(trainer, history, best)
                self._keep_warmup(epoch)
                self._write_results({**results, "epochs": history, "best": best})
                if board:
                    board.epoch(figures, trainer.model, trainer.batches.batch(0)[0])
        except TrainingDiverged as error:
            self._write_results({**results, "status": "diverged", "error": str(error), "epochs": history, "best": best})
            kept = "no epoch ended"
            if history:
                kept = f"the last good checkpoint is {self.last_path} (epoch {len(history)})"
            raise TrainingDiverged(f"{error}; {kept}; a lower --lr or --lambda-br may help") from error
        results.update(status="finished", epochs=history, best=best, final=self._test(trainer, history, best, board))
        if board:
            board.close()
        self._finish(trainer, results)
        return results

    def _begins_anew(self, epoch: int) -> bool:
        """Whether no earlier epoch can be the best one: an epoch of the warm-up lacks what the run is about."""
        return epoch in (1, getattr(self.options, "warmup_epochs", 0) + 1)

    def _write_results(self, results: dict[str, Any]) -> None:
        if processes.rank() == 0:
            write_json(self.folder / "results.json", results)

    def _finished_results(self) -> dict[str, Any] | None:
        path = self.folder / "results.json"
        try:
            results = json.loads(path.read_text()) if path.exists() else {}
        except ValueError:  # damaged: written again, from last.pth
            results = {}
        return results if results.get("status") == "finished" and len(results["epochs"]) == self.epochs else None

    def _trainer(self) -> Trainer:
        options, control = self.options, None
        losses = {}
        if self.script == QAT:
            self._warn_unless_pretrained()
            qbr.prepare(self.model, qat_config(options, self.model))
            control = qbr.AlphaControl(
                freeze_weights=freeze(options, "weight"),
                freeze_acts=freeze(options, "act"),
                br_to_alpha_weights=options.br_backprop_to_alpha,
                br_to_alpha_acts=options.br_backprop_to_alpha_act,
                warmup_epochs=options.warmup_epochs,
            )
            losses = {"lambda_weights": options.lambda_br, "lambda_acts": options.lambda_br_act}
            losses |= {"global_bins": options.br_bins == "global", "skip": without_br(options, self.model)}
            losses["teacher"] = self.teacher
        if options.sync_bn:
            self._synchronise_batch_norm()
        memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=memory_format)
        if self.teacher is not None:
            processes.as_on_main(self.teacher.to(self.device, memory_format=memory_format), weights=True)
        if control:
            control.attach(self.model)
        quiet = processes.rank() > 0
        return Trainer(
            self.model, self.splits, options, self.device, self.epochs, control=control, quiet=quiet, **losses
        )

    def _synchronise_batch_norm(self) -> None:
        if self.device.type != "cuda" or processes.world() == 1:
            raise UserError("--sync-bn: works under torchrun on CUDA devices alone; leave it out")
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)

    def _warn_unless_pretrained(self) -> None:
        if self.options.pretrained_baseline is None and not self.options.quick:
            print(NOT_PRETRAINED)

    def _header(self, trainer: Trainer) -> dict[str, Any]:
        """Print what is about to run, and give the part of results.json that does not change."""
        options = self.options
        if self.device.type == "cuda":
            where = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        else:
            where = f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
        print(self.splits.describe())
        header = {
            "script": self.script,
            "command": self.command,
            "status": "running",
            "options": plain(options),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "qbr": qbr.__version__,
                "commit": commit(),
                "numpy": np.__version__,
            },
            "device": where,
            "cpus": os.cpu_count(),
            "processes": processes.world(),
            "data": {
                "source": self.splits.source,
                "classes": list(self.splits.classes),
                **self.splits.sizes,
                "val_seed": data.VAL_SEED,
            },
        }
        what = "float"
        if trainer.control:
            sides = "weight", "act", "first", "last"
            bits = {side: _bits(getattr(options, f"num_bits_{side}")) for side in sides}
            header["backend"] = kernels.resolve("auto", self.device.type, torch.float32)
            ends = [f"{side} {bits[side]}" for side in ("first", "last") if bits[side]]
            weights = bits["weight"] + (f" ({', '.join(ends)})" if ends else "")
            what = f"weights {weights}, activations {bits['act']}, {header['backend']} kernels"
            header["alpha_control"] = trainer.control.describe()
            header["warmup_epochs"] = options.warmup_epochs
        if processes.world() > 1:
            where = f"{processes.world()} processes, each on {where}"
        print(f"model: {options.model}, {what}, on {where}")
        if trainer.control:
            print(f"lambda: {options.lambda_br:g} (weights), {options.lambda_br_act:g} (activations)")
            print(trainer.control.describe())
            if self.teacher is not None:
                print(f"distillation: {options.distill:g} of the loss on labels is the distance from the float network")
        if len(self.splits.val) == 0:
            print(f"no validation images (--val-fraction {options.val_fraction:g}): the last epoch counts as the best")
        return header

    def _epoch(self, trainer: Trainer, epoch: int) -> dict[str, Any]:
        start = time.perf_counter()
        before = self._alphas() if all(module.initialised for module in quantizers(self.model).values()) else {}
        if trainer.control and epoch == self.options.warmup_epochs + 1:
            self._keep_histograms("before", epoch - 1)
            if self.options.lambda_br and self.options.num_bits_weight != FLOAT_BITS:
                steps = len(trainer.batches)
                print(expected_pull(self.model, self.options, steps * (epoch - 1), steps * self.epochs, trainer.skip))
        with oscillation.watched(self.model, getattr(self.options, "monitor", False)) as seen:
            figures = {"epoch": epoch, **trainer.train_epoch(epoch), **seen()}
        if trainer.control:
            figures["phase"] = "BR" if trainer.control.br_active else "warm-up"
            figures["alphas"] = self._alphas()
            if self.options.num_bits_weight != FLOAT_BITS:
                figures["distance_w"] = float(mean_distance(self.model))
        figures["val_loss"] = figures["val_acc"] = None
        if len(trainer.validation):
            figures["val_loss"], figures["val_acc"] = trainer.evaluate(trainer.validation)
        figures["seconds"] = time.perf_counter() - start
        print(epoch_line(figures, self.epochs), flush=True)
        for warning in leaps(before, figures.get("alphas", {})):
            print(warning)
        return figures

    def _alphas(self) -> dict[str, float]:
        """Every quantizer's step size, the mean where it has several."""
        found = quantizers(self.model)
        means = [module.alpha.detach().mean() for module in found.values()]
        return dict(zip(found, torch.stack(means).tolist())) if found else {}

    def _keep_histograms(self, when: str, epoch: int) -> None:
        layers = histograms.weight_histograms(self.model)  # on every rank: it may set steps, from all of them
        if layers and processes.rank() == 0:
            path = self.folder / "histograms.json"
            kept = json.loads(path.read_text()) if path.exists() else {}
            write_json(path, {**kept, when: {"epoch": epoch, "layers": layers}})

    def _save(self, trainer: Trainer, history: list, best: dict) -> None:
        """last.pth, then best.pth if this epoch is the best; folders.mend_best mends what a kill between them left."""
        state = {
            "epoch": len(history),
            "script": self.script,
            **trainer.state_dict(),
            "val_acc": history[-1]["val_acc"],
            "best": best,
            "history": history,
            "args": plain(self.options),
            "classes": list(self.splits.classes),
            "images": self.splits.sizes,
            "teacher": self.teacher_digest,
        }
        if processes.rank():
            return
        best_too = [self.best_path] if best["epoch"] == len(history) else []
        checkpoints.save(state, self.last_path, *best_too)

    def _keep_warmup(self, epoch: int) -> None:
        if getattr(self.options, "keep_warmup", False) and epoch == self.options.warmup_epochs:
            processes.on_main(warmup.keep, self.folder)

    def _test(self, trainer: Trainer, history: list, best: dict, board: logs.TensorBoard | None) -> dict[str, Any]:
        """Test accuracy of the last and of the best epoch: the only time that test images are looked at."""
        final: dict[str, Any] = {}
        self._keep_histograms("after", len(history))
        for which, path, epoch in (("last", self.last_path, len(history)), ("best", self.best_path, best["epoch"])):
            state = processes.on_main(checkpoints.load, path, "--output-dir")
            if which == "best" and epoch == len(history):
                loss, accuracy = final["last"]["test_loss"], final["last"]["test_acc"]
            else:
                self.model.load_state_dict(state["model_state_dict"])
                loss, accuracy = trainer.evaluate(self.splits.test)
            val = history[epoch - 1]["val_acc"]
            final[which] = {"epoch": epoch, "val_acc": val, "test_loss": loss, "test_acc": accuracy}
            if processes.rank() == 0:
                checkpoints.save({**state, "test_acc": accuracy}, path)
            if board:
                board.test(epoch, loss, accuracy)
        with_br = [figures for figures in history if "br_w" in figures]
        for side in ("br_w", "br_a"):
            if with_br:
                final[side] = {"start": with_br[0][f"{side}_start"], "end": with_br[-1][f"{side}_end"]}
        final["seconds"] = sum(figures["seconds"] for figures in history)
        return final

    def _finish(self, trainer: Trainer, results: dict[str, Any]) -> None:
        self._write_results(results)
        page = processes.on_main(report.write, self.folder)
        final = results["final"]
        kind = "quantized" if trainer.control else "float"
        for which in ("best", "last"):
            epoch, val, test = (final[which][key] for key in ("epoch", "val_acc", "test_acc"))
            by = "" if val is None else f", validation {val:.2f} %"
            print(f"{kind} test accuracy, {which} epoch ({epoch}): {test:.2f} %{by}")
        if "br_w" in final:
            figures = [f"BR_{s[-1].upper()} {final[s]['start']:.6g} -> {final[s]['end']:.6g}" for s in ("br_w", "br_a")]
            print(f"BR phase, first step -> last step: {', '.join(figures)}")
        print(f"report: {page}")


def _bits(bits: int | None) -> str:
    return "" if bits is None else "float" if bits == FLOAT_BITS else f"{bits} bits"


def _check_checkpoint(path, flag: str) -> None:
    checkpoints.load(path, flag)
