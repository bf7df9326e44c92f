"""Lightning, by its documentation:

https://lightning.ai/docs/pytorch/stable/common/checkpointing_basic.html (ckpt_path resumes "the full state")
https://lightning.ai/docs/pytorch/stable/common/checkpointing_intermediate.html (every_n_train_steps, save_last)
With `--save stateful` the data loader is torchdata's, whose state Lightning saves:
https://github.com/Lightning-AI/pytorch-lightning/pull/19361
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.exam import work

job = work.Job.from_command_line()


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = job.model()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        job.probe.trained(images, self.current_epoch, self.global_step)
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        job.probe.evaluated(images)
        self.log("valid/acc", (self.model(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = job.optimizer(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": job.schedule(optimizer), "interval": "step"}}


L.seed_everything(work.SEED, workers=True)
when = {"every_n_epochs": 1} if job.save == "epoch" else {"every_n_train_steps": job.kind.save_every}
trainer = L.Trainer(
    max_epochs=work.N_EPOCHS,
    accelerator="cpu",
    devices=2 if job.evaluate else 1,
    callbacks=[ModelCheckpoint(dirpath=job.run / "checkpoints", save_last=True, **when)],
    default_root_dir=job.run,
    enable_progress_bar=False,
    logger=False,
    num_sanity_val_steps=0,
)
module = Module()
if job.evaluate:
    trainer.validate(module, job.loader(train=False))
else:
    trainer.fit(module, job.loader(train=True), job.loader(train=False), ckpt_path="last" if job.resume else None)
    job.finish(module.model)
