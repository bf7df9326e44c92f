"""Ultralytics, by its guide: YOLO("last.pt").train(resume=True).

https://docs.ultralytics.com/modes/train/#resuming-interrupted-trainings
It trains its own smallest classifier. Checkpoints are saved after each epoch.
"""

import torch
from ultralytics import YOLO
from ultralytics.models.yolo.classify import ClassificationTrainer

from tests.exam import work

job = work.Job.from_command_line()
last = job.run / "train" / "weights" / "last.pt"
preprocess = ClassificationTrainer.preprocess_batch


def recorded(trainer, batch):
    batch = preprocess(trainer, batch)
    step = trainer.epoch * job.kind.epoch_steps + trainer.exam_step
    job.probe.trained(batch["img"], trainer.epoch, step, mean=0.0, std=1.0)
    trainer.exam_step += 1
    return batch


def new_epoch(trainer):
    trainer.exam_step = 0


ClassificationTrainer.preprocess_batch = recorded
model = YOLO(str(last) if job.resume and last.exists() else "yolo11n-cls.yaml")
model.add_callback("on_train_epoch_start", new_epoch)
model.add_callback("on_train_end", lambda trainer: job.finish(torch.nn.Sequential(trainer.model)))
options = {} if job.resume and last.exists() else {
    "data": str(job.folder), "epochs": work.N_EPOCHS, "imgsz": job.kind.img_size, "batch": job.kind.batch_size,
    "project": str(job.run), "name": "train", "exist_ok": True, "pretrained": False, "seed": work.SEED, "device": "cpu",
    "optimizer": "SGD", "lr0": work.LR, "momentum": work.MOMENTUM, "weight_decay": 0.0, "workers": 1, "plots": False,
    "amp": False, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "auto_augment": None, "erasing": 0.0,  # colors are numbers
}  # fmt: skip
model.train(**(options or {"resume": True}))
