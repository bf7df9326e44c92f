"""This project: main.py, the same command each time. Docs: docs/reliability.md, docs/command-line.md (`-r auto`)."""

import sys

import torch

from engine.config.command_line import run_tool
from engine.tasks.classification import Accuracy
from engine.update import Update
from main import main
from tests.exam import work

job = work.Job.from_command_line()
kind = job.kind
update, count = Update.__call__, Accuracy.update


def recorded_update(self, state, batch, **options):
    job.probe.trained(batch[0], state.step // kind.epoch_steps, state.step)
    update(self, state, batch, **options)


def recorded_count(self, model, batch):
    job.probe.evaluated(batch[0])
    count(self, model, batch)


Update.__call__, Accuracy.update = recorded_update, recorded_count

argv = ["-e", job.run / "run", "-r", "auto", "--seed", work.SEED, "--model.name", "lenet", "--train.num_threads", 1]
argv += ["--data.name", "digits", "--data.test_ratio", work.test_ratio()] if job.data == "digits" else []
argv += ["--data.name", "imagefolder", "--data.dataroot", job.folder] if job.data == "pictures" else []
argv += ["--data.img_size", kind.img_size, "--train.batch_size", kind.batch_size, "--train.save_freq", kind.save_every]
argv += ["--train.n_steps", 1 if job.evaluate else job.n_steps, "--train.optim.lr", work.LR, "--dataloader.num_workers", 1]
argv += ["--data.mean", list(work.MEAN[: kind.channels]), "--data.std", list(work.STD[: kind.channels])]
argv += ["--train.optim.weight_decay", 0]
argv += ["--augment.enabled", "false"] if job.data == "digits" else []
if code := run_tool(lambda: main([str(word) for word in argv])):
    sys.exit(code)
from safetensors.torch import load_file  # noqa: E402 - main.py sets up the process before torch is used

torch.save(load_file(job.run / "run" / "ckpt" / "latest" / "model.safetensors"), job.run / work.WEIGHTS)
