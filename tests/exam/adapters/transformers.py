"""transformers' Trainer, by its documentation:

https://huggingface.co/docs/transformers/trainer (resume_from_checkpoint: the newest checkpoint in output_dir)
https://huggingface.co/docs/transformers/main_classes/trainer (save_steps, enable_jit_checkpoint for SIGTERM)
"""

import torch
import transformers.trainer
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tests.exam import work

transformers.trainer.is_datasets_available = lambda: False  # `datasets` is this project's package, not Hugging Face's
job = work.Job.from_command_line()


class Model(torch.nn.Module):
    main_input_name = "pixel_values"  # which include_for_metrics collects

    def __init__(self) -> None:
        super().__init__()
        self.model = job.model()

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class RecordedTrainer(Trainer):
    def training_step(self, model, inputs, *args, **options):
        step = self.state.global_step
        job.probe.trained(inputs["pixel_values"], step // job.kind.epoch_steps, step)
        return super().training_step(model, inputs, *args, **options)


def collate(samples):
    images, labels = torch.utils.data.default_collate(samples)
    return {"pixel_values": images, "labels": labels}


def accuracy(evaluation):
    if trainer.is_world_process_zero():
        job.probe.evaluated(torch.as_tensor(evaluation.inputs))
    return {"accuracy": (evaluation.predictions.argmax(1) == evaluation.label_ids).mean().item()}


optimizer = job.optimizer(model := Model())
arguments = TrainingArguments(
    output_dir=str(job.run),
    num_train_epochs=work.N_EPOCHS,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), job.kind.batch_size),
    save_strategy="steps",
    save_steps=job.kind.save_every,
    enable_jit_checkpoint=True,
    eval_strategy="epoch",
    include_for_metrics=["inputs"],
    label_names=["labels"],
    remove_unused_columns=False,
    dataloader_num_workers=0 if job.data == "digits" else 1,
    max_grad_norm=0.0,
    use_cpu=True,
    seed=work.SEED,
    report_to=[],
    disable_tqdm=True,
)
trainer = RecordedTrainer(
    model=model,
    args=arguments,
    data_collator=collate,
    train_dataset=job.dataset(train=True),
    eval_dataset=job.dataset(train=False),
    compute_metrics=accuracy,
    optimizers=(optimizer, job.schedule(optimizer)),
)
if job.evaluate:
    trainer.evaluate()
else:
    trainer.train(resume_from_checkpoint=get_last_checkpoint(job.run) if job.resume else None)
    job.finish(model.model)
