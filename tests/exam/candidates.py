"""The frameworks of the exam."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Candidate:
    """A framework and one of its documented ways to save."""

    title: str
    adapter: str  # a module of tests.exam.adapters
    package: str | None  # None: this project
    module: str  # imported once, before the trainings are forked
    checkpoint: str  # the file or folder that a resume reads, as a pattern
    save: str = "steps"
    data: tuple[str, ...] = ("digits", "pictures")
    two_ranks: bool = True  # False: it evaluates on several ranks only with GPUs
    issues: tuple[str, ...] = ()  # where its failures are known

    def version(self) -> str | None:
        """Return the installed version, or None."""
        try:
            return version(self.package) if self.package else ""
        except PackageNotFoundError:
            return None


LIGHTNING_ISSUES = ("Lightning-AI/pytorch-lightning#19764", "Lightning-AI/pytorch-lightning#18780")
CANDIDATES = {
    "ours": Candidate("this project", "ours", None, "main", "run/ckpt/step-*"),
    "lightning-epoch": Candidate(
        "Lightning, each epoch", "lightning", "lightning", "lightning", "checkpoints/last.ckpt", save="epoch"
    ),
    "lightning-steps": Candidate(
        "Lightning, within an epoch", "lightning", "lightning", "lightning", "checkpoints/last.ckpt", issues=LIGHTNING_ISSUES
    ),
    "lightning-stateful": Candidate(
        *("Lightning, within an epoch, StatefulDataLoader", "lightning", "lightning", "lightning", "checkpoints/last.ckpt"),
        save="stateful",
    ),
    "transformers": Candidate("transformers Trainer", "transformers", "transformers", "transformers.trainer", "checkpoint-*"),
    "accelerate": Candidate(
        *("accelerate, skip_first_batches", "accelerate", "accelerate", "accelerate", "step_*"),
        issues=("huggingface/accelerate#2016", "huggingface/accelerate#2823"),
    ),
    "accelerate-stateful": Candidate(
        *("accelerate, StatefulDataLoader", "accelerate", "accelerate", "accelerate", "step_*"), save="stateful"
    ),
    "timm": Candidate("timm, the calls of train.py, each epoch", "timm", "timm", "timm.data", "last.pth.tar", save="epoch"),
    "composer": Candidate("Composer", "composer", "mosaicml", "composer", "checkpoints/latest-rank0.pt"),
    "ultralytics": Candidate(
        *("Ultralytics, each epoch", "ultralytics", "ultralytics", "ultralytics", "train/weights/last.pt"),
        save="epoch",
        data=("pictures",),
        two_ranks=False,
        issues=("ultralytics/ultralytics#23973",),
    ),
}
